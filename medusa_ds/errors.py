"""The one exception that stands for a user's mistake.

It carries every mistake found, a line each, and is caught in one place per program (`exit_on_user_error`), which
prints the lines and leaves with status 2: no traceback for something that the user can mend.
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """What is wrong, where, and what mends it: one line a mistake.

    Args:
        problems: one string or several, each `FILE:LINE or KEY: what was found; what is allowed`.
        one_rank: only this rank knows of the problem, so that it is this rank that prints it.
    """

    def __init__(self, *problems: str, one_rank: bool = False) -> None:
        super().__init__("\n".join(problems))
        self.problems, self.one_rank = problems, one_rank


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Print a `UserError` once per node and exit with status 2."""
    try:
        yield
    except UserError as error:
        if error.one_rank or os.environ.get("LOCAL_RANK", "0") == "0":
            sys.stdout.flush()
            for problem in error.problems:
                print(f"error: {problem}", file=sys.stderr, flush=True)
        else:
            time.sleep(3)  # the launcher ends every rank once one has ended: let the first one speak
        sys.exit(2)
