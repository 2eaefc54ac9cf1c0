"""The one exception that stands for a user's mistake, caught in one place (`ranks.exit_on_user_error`)."""

from typing import Any


class UserError(Exception):
    """What is wrong, where, and what mends it: one line a mistake.

    Args:
        problems: one string or several, each `FILE:LINE or KEY: what was found; what is allowed`.
        one_rank: only this rank knows of the problem, so that it is this rank that prints it.
    """

    def __init__(self, *problems: str, one_rank: bool = False) -> None:
        super().__init__("\n".join(problems))
        self.problems, self.one_rank = problems, one_rank


def one_line(text: Any, most: int = 200) -> str:
    """What an error or a text says, in one line of at most so many characters."""
    return " ".join(str(text).split())[:most]


def counted(number: int, noun: str) -> str:
    """A number of things in words, as in `1 step` and `1,200 steps`."""
    return f"{number:,} {noun}{'s' * (number != 1)}"
