"""The command line: each command calls library functions that a notebook can call too.

`__main__` is where it begins; `common` holds what all commands share. This file imports nothing, so
that `__main__` hears stop signals before the slow imports.
"""
