"""Refusal receipts: the outcome of a study as a file that others can check.

A results folder comes in; receipt.json, an in-toto Statement, and receipt.html go out. `statement`
says what a receipt holds, and gives its bytes and digest; `build` makes one from a results folder.
`verify` checks a receipt against itself, its results and its model; `compare` puts two next to each
other and evaluates gates for CI. `page` and its template draw the HTML, `charts` the notebook's
tables. Begin reading with `statement`, then `build`.
"""
