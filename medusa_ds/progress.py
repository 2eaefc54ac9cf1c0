"""How far a program is: a bar on a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
LINE_EVERY_S = 15.0


def progress(items: Sequence[T], unit: str) -> Iterator[T]:
    """The items one after the other, with how many have been worked off on standard error."""
    if sys.stderr.isatty():
        yield from tqdm(items, unit=f" {unit}", leave=False)
        return
    started = printed = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if now - printed >= LINE_EVERY_S:
            printed = now
            left = (now - started) / done * (len(items) - done)
            print(
                f"{done} of {len(items)} {unit} in {now - started:.0f} s, {left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )
        yield item
