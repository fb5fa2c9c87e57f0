"""Refusal receipts: the outcome of a study as a file that others can check.

A results folder comes in; receipt.json, an in-toto Statement, and receipt.html go out. `statement`
says what a receipt holds, `build` makes one from a results folder, and `canonical` gives its bytes
and digest. `verify` checks a receipt against itself, its results and its model; `compare` puts two
next to each other and evaluates gates for CI. `page` and its template draw the HTML, `text` the
terminal's tables, `charts` the notebook's. Begin reading with `statement`, then `build`.
"""
