"""Refusal receipts: the outcome of a study as a file that others can check.

statement   what a receipt says, as structs
form        its bytes: one canonical text, with a digest over itself
build       results folder -> statement -> receipt.json and receipt.html
recount     everything that follows from the counts, checked without the results
relabel     labels that need no model, given anew from the replies
verify      a receipt against itself, its results and its model
diff, gates two receipts side by side, and exit codes for CI
page        the statement as a self-contained HTML page
"""
