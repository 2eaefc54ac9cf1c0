"""This process among those that the launcher started: who it is, and how it meets the others.

What one rank finds wrong, all of them raise: a rank that went on alone would wait for the others for good. torch, which
takes seconds to import, is imported when ranks meet: commands that need none start at once.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

from medusa_ds.errors import UserError

T = TypeVar("T")
_MEND = "start the ranks with the deepspeed launcher or torchrun, which set it, or unset it"


def number_of(variable: str, default: int = 0) -> int:
    """What a launcher's variable says; the default where it is missing or empty.

    Raises:
        UserError: it is no whole number of at least 0.
    """
    found = os.environ.get(variable) or str(default)
    if not (found.isascii() and found.isdigit()):
        raise UserError(f"{variable}: found {found!r}; allowed is a whole number: {_MEND}", one_rank=True)
    return int(found)


class Ranks:
    """What the launcher says in the environment; alone without a launcher, or where it says nothing.

    Attributes:
        rank, size: of this process, and how many there are.
        local_rank: among those of this host.
        local_size: how many of them the stock launcher started on this host; 0 without it.

    Raises:
        UserError: a variable that no launcher would set so.
    """

    def __init__(self) -> None:
        self.size = number_of("WORLD_SIZE", 1)
        self.rank, self.local_rank, self.local_size = map(number_of, ("RANK", "LOCAL_RANK", "LOCAL_SIZE"))
        port = number_of("MASTER_PORT")  # torch reads it where ranks meet
        unset = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
        problems = {
            f"RANK: found {self.rank}, but WORLD_SIZE is {self.size}": self.rank >= self.size,
            f"WORLD_SIZE: found {self.size} without {', '.join(unset)}": self.size > 1 and bool(unset),
            f"MASTER_PORT: found {port}; allowed are ports up to 65535": port > 65535,
        }
        for problem in (text for text, holds in problems.items() if holds):
            raise UserError(f"{problem}: {_MEND}", one_rank=True)

    def join(self) -> None:
        """Wait until all processes are there, in a group for work in which a rank may be hours behind another."""
        import torch.distributed as dist

        if self.size > 1 and not dist.is_initialized():
            dist.init_process_group("gloo", timeout=timedelta(days=7))

    def gather(self, value: T) -> list[T]:
        """What every rank gives, by rank; each of them calls it.

        Raises:
            RuntimeError: another rank has died.
        """
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        answers: list[Any] = [None] * self.size
        dist.all_gather_object(answers, value)
        return answers

    def together(self, action: Callable[[], T]) -> list[T]:
        """Run an action on every rank; all of them get what each returns, by rank.

        Raises:
            UserError: what the action has raised on the first rank where it failed, on all ranks.
        """
        value: Any = None
        problems: tuple[str, ...] = ()
        try:
            value = action()
        except UserError as error:
            problems = error.problems
        answers = self.gather((problems, value))
        if found := next((problems for problems, _ in answers if problems), None):
            raise UserError(*found)
        return [value for _, value in answers]

    def first(self, action: Callable[[], T]) -> T:
        """Run an action on rank 0 alone; all ranks get what it returns.

        Raises:
            UserError: what the action has raised, on all ranks.
        """
        answers: list[Any] = self.together(lambda: action() if self.rank == 0 else None)
        return answers[0]

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This rank's part of items that all ranks have in the same order."""
        return items[self.rank :: self.size]


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Print the lines of a `UserError` once per node and exit with status 2: no traceback for what a user can mend."""
    try:
        yield
    except UserError as error:
        local_rank = os.environ.get("LOCAL_RANK", "")
        alone = os.environ.get("WORLD_SIZE") in (None, "", "1")  # a LOCAL_RANK is then one that was left there
        if error.one_rank or alone or not local_rank.isdigit() or int(local_rank) == 0:
            sys.stdout.flush()
            for problem in error.problems:
                print(f"error: {problem}", file=sys.stderr, flush=True)
        else:
            time.sleep(3)  # the launcher ends every rank once one has ended: let the first one speak
        sys.exit(2)
