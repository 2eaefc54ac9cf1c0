"""Marks in rendered text: where each message lies, and what in it is text though it looks like a control token.

Marks are private-use characters of plane 16, which no message may contain. They are taken out before the text is
tokenised in one call. A control token spelled out in a message (`<|im_end|>` typed by a user) is broken by a mark, so
that the template does not see it, and is tokenised by a copy of the tokenizer that knows no added tokens.
"""

import json
import re
from collections.abc import Collection
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerBase

from medusa_ds.data.layouts import UnusableRow
from medusa_ds.errors import UserError

IGNORED = -100
OPEN, CLOSE, BEGIN, _BREAK, _FILL, _CONTROL = (chr(0x10FFF0 + n) for n in range(6))
_INDEX = 0x100000
BORDER = re.compile(f"[{OPEN}{CLOSE}][{chr(_INDEX)}-{chr(0x10FFEF)}]")
_MARK = re.compile(f"[{OPEN}{CLOSE}]([{chr(_INDEX)}-{chr(0x10FFEF)}])|[{BEGIN}{_BREAK}]")
PLANE_16 = re.compile(f"[{chr(_INDEX)}-{chr(0x10FFFF)}]")


class Encoded(NamedTuple):
    """One conversation: ids, and labels that are the id where a token is the assistant's, else -100 (not shifted)."""

    input_ids: list[int]
    labels: list[int]


def opening(message: int) -> str:
    """The mark before what a message says."""
    return OPEN + chr(_INDEX + message)


def wrap(text: str, message: int) -> str:
    """A text between the marks of its message, inside its outer whitespace, which templates trim."""
    core = text.strip()
    return text.replace(core, f"{opening(message)}{core}{CLOSE}{chr(_INDEX + message)}", 1) if core else text


class _Text(NamedTuple):
    """A rendered text without its marks, and where they were.

    `regions` are [start, end] of what messages say, `closes` the last end by message.
    """

    text: str
    begins: list[int]
    breaks: list[int]
    regions: list[list[int]]
    closes: dict[str, int]


class Coder:
    """Tokenises marked texts with a fast tokenizer.

    Raises:
        UserError: it is not one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.is_fast:
            raise UserError(f"{tokenizer.name_or_path}: has no fast tokenizer (tokenizer.json), which labels need")
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        unknown = getattr(tokenizer.backend_tokenizer.model, "unk_token", None)
        self.added = {i for i, token in added.items() if token.content != unknown}  # that one any odd letter can become
        self.special = {i for i, token in added.items() if token.special} | {tokenizer.eos_token_id}
        texts = sorted((t.content for t in added.values() if not t.content.isspace()), key=len, reverse=True)
        self.spelled = re.compile("|".join(map(re.escape, texts)) or "(?!)")
        self.plain: Tokenizer | None = None

    def hide(self, value: Any) -> Any:
        """Break every control token spelled out in strings and keys by a mark after its first character."""
        if isinstance(value, str):
            return self.spelled.sub(lambda match: match[0][0] + _BREAK + match[0][1:], value)
        if isinstance(value, dict):
            return {self.hide(key): self.hide(item) for key, item in value.items()}
        return [self.hide(item) for item in value] if isinstance(value, list) else value

    def ids(self, marked: str) -> list[int]:
        """Ids of a marked text."""
        found = _read(marked)
        return self._tokenise(found.text, found.breaks, found.regions)[0].tolist()

    def encode(
        self, marked: str, turns: list[int], unfinished: Collection[int], ends: Collection[int], ends_in_call: bool
    ) -> Encoded:
        """Ids of a text with a BEGIN for each of `turns`, labelled from there to the token that ends the turn.

        The end of an unfinished turn has no label. `ends` are tokens with which the template ends a plain turn; where
        none follows a turn, any special token does. `ends_in_call`: the last message has a call, whose arguments follow
        its last mark.

        Raises:
            UnusableRow: no special token follows a turn before the next message, unless the text ends with it.
        """
        text, begins, breaks, regions, closes = _read(marked)
        ids, stops, controls = self._tokenise(text, breaks, regions)
        labels = np.full(len(ids), IGNORED)
        starts = np.concatenate([[0], stops])  # a token covers what follows the one before it, trimmed or not
        special = [(k, stops[k]) for k in controls if ids[k] in self.special]
        for turn, begin, limit in zip(turns, begins, [*begins[1:], len(text) + 1], strict=True):
            close = closes.get(chr(_INDEX + turn), -1)
            following = min(limit, min((start for start, _ in regions if start >= max(close, begin)), default=limit))
            possible = [k for k, stop in special if close < stop <= following]
            end = next((k for k in possible if ids[k] in ends), possible[0] if possible else None)
            ends_text = not text[close:].strip() or (ends_in_call and following > len(text))
            if close < begin or (end is None and not ends_text):
                raise UnusableRow("the chat template writes no special token after an assistant turn")
            first = np.searchsorted(stops, begin, "right")
            before = text[starts[first] : begin]  # of the prompt in that token, unless the tokenizer drops it
            if before and self.tokenizer.encode(before, add_special_tokens=False):
                first = np.searchsorted(starts, begin, "left")
            if end is None:
                last = int(np.searchsorted(starts, len(text.rstrip()), "left"))
            else:
                last = end if turn in unfinished else end + 1
            labels[first:last] = ids[first:last]
        return Encoded(ids.tolist(), labels.tolist())

    def _tokenise(
        self, text: str, breaks: list[int], regions: list[list[int]]
    ) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """Ids, their ends in the text, and the places of the control tokens that the template wrote."""
        spelled = [match.span() for at in breaks if (match := self.spelled.match(text, at - 1))]
        borders = [0, *(at for span in spelled for at in span), len(text)]
        parts = [text[a:b] if n % 2 == 0 else _FILL * (b - a) for n, (a, b) in enumerate(pairwise(borders))]
        found = self.tokenizer("".join(parts), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, spans = found["input_ids"], found["offset_mapping"]
        controls = [(k, *spans[k]) for k, token in enumerate(ids) if token in self.added]
        real = [
            (k, a, b)
            for k, a, b in controls
            if text[a:b].isspace() or not any(a < end and start < b for start, end in regions)
        ]
        if not spelled and len(real) == len(controls):
            return np.array(ids), np.maximum.accumulate([end for _, end in spans]), [k for k, _, _ in controls]
        return self._tokenise_apart(text, [(ids[k], a, b) for k, a, b in real])

    def _tokenise_apart(
        self, text: str, controls: list[tuple[int, int, int]]
    ) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """The same for a text whose control tokens are known: (id, start, end); all others in it are plain text."""
        if self.plain is None:
            state = json.loads(self.tokenizer.backend_tokenizer.to_str())
            state |= {"added_tokens": [], "truncation": None, "padding": None}
            self.plain = Tokenizer.from_str(json.dumps(state))
            self.plain.add_special_tokens([AddedToken(_CONTROL, normalized=False, special=True)])
        pieces, last = [], 0
        for _, start, end in controls:
            pieces += [text[last:start], _CONTROL]
            last = end
        found = self.plain.encode("".join([*pieces, text[last:]]), add_special_tokens=False)
        ids: list[int] = []
        ends: list[int] = []
        places: list[int] = []
        shift, rest = 0, iter(controls)
        for token, (_, end) in zip(found.ids, found.offsets, strict=True):
            if token == self.plain.token_to_id(_CONTROL):
                token, _, here = next(rest)
                shift = here - end
                places.append(len(ids))
            elif token in self.added:
                raise UnusableRow("the tokenizer reads a control token even out of plain text")
            ids.append(token)
            ends.append(end + shift)
        return np.array(ids), np.maximum.accumulate(ends), places


def _read(marked: str) -> _Text:
    """Take the marks out of a text."""
    parts: list[str] = []
    found = _Text("", [], [], [], {})
    last = length = 0
    for match in _MARK.finditer(marked):
        parts.append(marked[last : match.start()])
        length += match.start() - last
        last = match.end()
        kind = match[0][0]
        if kind == OPEN:
            found.regions.append([length, length])
        elif kind == CLOSE:
            found.closes[match[1]] = length
            if found.regions:
                found.regions[-1][1] = length
        else:
            (found.begins if kind == BEGIN else found.breaks).append(length)
    return found._replace(text="".join([*parts, marked[last:]]))
