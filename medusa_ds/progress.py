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
        self._is_bar, self._told = sys.stderr.isatty(), 0
        form = f"{{n:,}} of {{total:,}} {unit}{{postfix}} in {{elapsed}}, {{remaining}} left"
        every, delay = (0.5, 0.0) if self._is_bar else (LINE_EVERY_S, LINE_EVERY_S)
        shown = {"mininterval": every, "delay": delay, "leave": self._is_bar}
        super().__init__(total=total, bar_format=form, disable=silent, **shown)
        self.tokens, self.began = 0, time.monotonic()

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Draw the bar, as tqdm asks for; elsewhere write a line, unless the last one says as much."""
        if self._is_bar:
            return super().display(msg, pos)
        if self.n > self._told:
            print(self, file=sys.stderr, flush=True)
            self._told = self.n
        return False

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
