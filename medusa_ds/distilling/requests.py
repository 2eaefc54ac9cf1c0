"""What the engines are asked and what they answer; the same for the built-in one and for a server."""

import hashlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

MAKE_PROMPT = -1  # as the turn of a request: it asks for a user's turn


@dataclass(frozen=True)
class Sampling:
    """How to draw; a temperature of 0 takes the most probable token.

    `top_p`: draw from the most probable tokens that together have this share. `max_new_tokens`: of one answer.
    `max_prompt_tokens`: of the conversation before it. `seed`: of all draws.
    """

    temperature: float
    top_p: float
    max_new_tokens: int
    max_prompt_tokens: int
    seed: int


class Request(NamedTuple):
    """One answer that is wanted: of conversation `row`, its answer `turn` from 0, or `MAKE_PROMPT`.

    `text`: how a prompt begins that is to be made, else empty. `messages`: the conversation to answer, else empty.
    """

    row: int
    turn: int
    text: str
    messages: list[dict[str, Any]]

    def key(self, seed: int) -> int:
        """63 random bits that depend on seed, row and turn alone."""
        digest = hashlib.blake2b(f"{seed} {self.row} {self.turn}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") >> 1


class Reply(NamedTuple):
    """An answer, and what ended it.

    `finish`: `end`, or why it cannot be used: `cut off`, `repetition`, `prompt too long`, `failed: ...`. `thoughts`: of
    a server that tells them apart.
    """

    text: str
    tokens: int
    finish: str
    thoughts: str = ""


Handle = Callable[[Request, Reply], Request | None]
"""Takes a reply and gives the request that follows from it, if any."""


class Engine(Protocol):
    """What answers requests."""

    def run(self, requests: deque[Request], handle: Handle) -> None:
        """Answer all requests and those that follow from the answers, in any order."""
