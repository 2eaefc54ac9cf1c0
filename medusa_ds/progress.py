"""How far a program is: a bar on a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
LINE_EVERY_S = 15.0
"""Seconds between lines where the output is no terminal."""


class Progress(tqdm):
    """How many of `total` items are done, their tokens and the time left, on standard error; nothing where `silent`."""

    def __init__(self, total: int, unit: str, silent: bool = False) -> None:
        plain = not sys.stderr.isatty()
        form = f"{{n:,}} of {{total:,}} {unit}{{postfix}} in {{elapsed}}, {{remaining}} left" + "\n" * plain
        every = LINE_EVERY_S if plain else 0.5
        super().__init__(total=total, bar_format=form, mininterval=every, delay=every * plain, disable=silent)
        self.tokens, self.began = 0, time.monotonic()

    def add(self, items: int, tokens: int) -> None:
        """Count items that have ended, and tokens."""
        self.tokens += tokens
        rate = self.tokens / max(time.monotonic() - self.began, 1e-9)
        self.set_postfix_str(f"{self.tokens:,} tokens, {rate:,.0f} tokens/s", refresh=False)
        self.update(items)


def progress(items: Sequence[T], unit: str) -> Iterator[T]:
    """The items one after the other, counted."""
    with Progress(len(items), unit) as bar:
        for item in items:
            yield item
            bar.update()
