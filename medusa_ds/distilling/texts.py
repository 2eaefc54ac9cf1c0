"""How made prompts begin, and which texts are not worth training on: repetitions, near-duplicates, a benchmark's."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from medusa_ds.errors import UserError

LOOP_TOKENS, LOOP_PERIOD = 64, 32
GRAM = 8  # words in a row that two independent texts do not share
_SHINGLE, _SIMILAR, _MOST = 3, 0.6, 64
_WORD = re.compile(r"\w+")


def loops(items: Sequence[Any]) -> bool:
    """Whether the last 64 items repeat with a period of at most 32."""
    tail = items[-LOOP_TOKENS:]
    if len(tail) < LOOP_TOKENS:
        return False
    return any(
        tail[-1] == tail[-1 - period] and tail[period:] == tail[:-period] for period in range(1, LOOP_PERIOD + 1)
    )


def repetitive(text: str) -> bool:
    """Whether most of a text's runs of four words stand in it before."""
    words = text.split()
    runs = list(zip(words, words[1:], words[2:], words[3:], strict=False))
    return len(runs) >= 20 and len(set(runs)) < 0.5 * len(runs)


def grams(text: str, size: int = GRAM) -> set[tuple[str, ...]]:
    """Runs of `size` words, without case and punctuation; a shorter text is one run."""
    words = _WORD.findall(text.lower())
    return {tuple(words[at : at + size]) for at in range(max(len(words) - size, 0) + 1)}


class Excluded:
    """Texts that must not be trained on, such as the user's turns of a benchmark."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.grams = {gram for text in texts for gram in grams(text)} - {()}
        self.short = {gram for gram in self.grams if len(gram) < GRAM}

    def overlap(self, text: str) -> bool:
        """Whether a text has eight words in a row with one of them, or all words of a shorter one."""
        if not self.grams.isdisjoint(grams(text)):
            return True
        return any(gram in grams(text, len(gram)) for gram in self.short)


class Seen:
    """Texts so far, to tell near-duplicates."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, ...], list[int]] = defaultdict(list)
        self.count = 0

    def add(self, text: str) -> bool:
        """Add a text unless 60% of its runs of three words stand in one earlier text; whether it was added."""
        shingles = grams(text, _SHINGLE)
        shared = Counter(row for shingle in shingles for row in self.rows[shingle])
        if shared and max(shared.values()) >= _SIMILAR * len(shingles):
            return False
        for shingle in shingles:
            if len(self.rows[shingle]) < _MOST:  # what more texts share tells none of them apart
                self.rows[shingle].append(self.count)
        self.count += 1
        return True


def read_openings(file: str) -> list[str]:
    """The lines of a text file, blank ones left out.

    Raises:
        UserError: it cannot be read, or has no line with text.
    """
    try:
        lines = [line.rstrip() for line in Path(file).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--openings: {file}: cannot be read as text ({error}); name another file") from None
    if not any(lines):
        raise UserError(f"--openings: {file}: found no line with text; write the beginning of a prompt into each line")
    return [line for line in lines if line]
