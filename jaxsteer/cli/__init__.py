"""The command line: every command is a call into the library that a notebook could make too.

Heavy imports happen inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import sys

from jaxsteer.cli import models, studies  # noqa: F401 (each registers its commands)
from jaxsteer.cli.common import app
from jaxsteer.errors import UserError


def main() -> None:
    """Entry point: user errors become one line on stderr and exit code 2."""
    try:
        app()
    except UserError as error:
        print(f"jaxsteer: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("jaxsteer: stopped; finished rows are kept, run again to go on", file=sys.stderr)
        sys.exit(130)
