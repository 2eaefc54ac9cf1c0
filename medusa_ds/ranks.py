"""The processes of a launch that share the rows of a run.

They meet a few times in a run: when its files have been read, when all prompts are there, and at the end. Between these
a rank may be hours behind another, so that their process group is one of its own, with more patience than training's.
"""

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from medusa_ds.errors import UserError

T = TypeVar("T")
_PATIENCE = timedelta(days=7)


class Ranks:
    """This process among those that the launcher started; alone without one.

    Attributes:
        rank, size: as the launcher says.
        local_rank: among those of this host.
    """

    def __init__(self) -> None:
        self.rank, self.size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))

    def join(self) -> None:
        """Wait until all processes are there."""
        if self.size > 1 and not dist.is_initialized():
            dist.init_process_group("gloo", timeout=_PATIENCE)

    def gather(self, value: T) -> list[T]:
        """What every rank gives, by rank; each of them calls it.

        Raises:
            RuntimeError: another rank has died.
        """
        if self.size == 1:
            return [value]
        answers: list[Any] = [None] * self.size
        dist.all_gather_object(answers, value)
        return answers

    def first(self, action: Callable[[], T]) -> T:
        """Run an action on rank 0 alone; all ranks get what it returns.

        Raises:
            UserError: what the action has raised, on all ranks.
        """
        value: Any = None
        problems: tuple[str, ...] = ()
        if self.rank == 0:
            try:
                value = action()
            except UserError as error:
                problems = error.problems
        problems, value = self.gather((problems, value))[0]
        if problems:
            raise UserError(*problems)
        return value

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This rank's part of items that all ranks have in the same order."""
        return items[self.rank :: self.size]
