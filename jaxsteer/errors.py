"""The error that users see: what is wrong, where, and how to correct it.

The command line prints it as a single line and exits with code 2; notebooks can catch it.
"""


class UserError(Exception):
    """Bad input, said in one line.

    Raise it at the boundary (files, arguments, specs) with a message that names the thing,
    the place and the fix. Anything else that escapes is a bug and shows its traceback.
    """


def one_line(error: Exception) -> str:
    """What another library's error says, on one line and not at length."""
    return " ".join(str(error).split())[:160] or type(error).__name__
