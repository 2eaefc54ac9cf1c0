"""A server with heads, measured: what it answers, how fast, and what it counted of its drafts.

Prompts go as tokens to an OpenAI-compatible `/completions` (vLLM, SGLang), so that no other chat template comes between
them and the model. Counts come from vLLM's `/metrics`; they are the server's own, of all that it does meanwhile.
"""

import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from typing import Any, NamedTuple

from medusa_ds.distilling.server import MAX_ANSWER_BYTES, check_url, server_key
from medusa_ds.errors import UserError, one_line

_COUNTER = re.compile(r"vllm:spec_decode_(num_drafts|num_accepted_tokens_per_pos)_total\{([^}]*)\} (\S+)")
_WRONG = (ArithmeticError, OSError, HTTPException, LookupError, RecursionError, TypeError, ValueError)
_GONE = 3


class Reply(NamedTuple):
    """An answer; `ids` are its tokens where the server tells them, `problem` is why there is none, or empty."""

    text: str
    tokens: int
    problem: str = ""
    ids: list[int] | None = None


class Measured(NamedTuple):
    """What a server made of prompts, an entry a prompt.

    `seconds`: from the first request to the last answer. `drafts`: that were verified; 0 without a page of metrics or
    without heads. `accepted`: how many of them up to each position.
    """

    replies: list[Reply]
    seconds: float
    drafts: int
    accepted: list[int]

    @property
    def problems(self) -> list[str]:
        """Why answers are missing."""
        return [reply.problem for reply in self.replies if reply.problem]

    @property
    def tokens(self) -> int:
        """New tokens of all answers."""
        return sum(reply.tokens for reply in self.replies)


class HeadServer:
    """An OpenAI-compatible server, such as `http://localhost:8000/v1`.

    `model` is the name under which it knows the model (None: the first that it lists), and one answer may take
    `timeout_s` seconds.

    Raises:
        UserError: nothing answers there, or not with a list of models.
    """

    def __init__(self, url: str, model: str | None, timeout_s: float) -> None:
        check_url(url)
        self._key = server_key()
        self.url, self.timeout_s, self._failures = url.rstrip("/"), timeout_s, 0
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            listed = json.loads(self._read(f"{self.url}/models"))["data"]
            self.model = model or listed[0]["id"]
            if not isinstance(self.model, str):
                raise ValueError("a list of models without names")
        except _WRONG as error:
            raise UserError(f"--server: {url}: {_reason(error)}; start it, or name another") from None

    def measure(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, in_flight: int) -> Measured:
        """Greedy answers to prompts of token ids, `in_flight` at once, after one answer that is not counted.

        Raises:
            UserError: it answers nothing.
        """
        first = self._ask(prompts[0], 4)
        if first.problem:
            raise UserError(f"--server: {self.url}: {first.problem}; nothing was measured")
        before, started = self._counts(), time.perf_counter()
        with ThreadPoolExecutor(in_flight) as pool:
            replies = list(pool.map(lambda prompt: self._ask(prompt, max_new_tokens), prompts))
        seconds, after = time.perf_counter() - started, self._counts()
        drafts, *accepted = (after[key] - before.get(key, 0) for key in sorted(after)) if -1 in after else (0,)
        measured = Measured(replies, seconds, drafts, accepted)
        if len(measured.problems) == len(prompts):
            raise UserError(f"--server: {self.url}: no request was answered, the first: {measured.problems[0]}")
        return measured

    def _ask(self, prompt: Sequence[int], max_new_tokens: int) -> Reply:
        if self._failures >= _GONE:
            return Reply("", 0, f"not asked any more after {_GONE} failures in a row")
        asked = {"model": self.model, "prompt": list(prompt), "max_tokens": max_new_tokens, "temperature": 0}
        asked["return_token_ids"] = True  # vLLM's own: tokens that are no UTF-8 have no text to compare
        try:
            answer = json.loads(self._read(f"{self.url}/completions", asked))
            choice, tokens = answer["choices"][0], answer["usage"]["completion_tokens"]
            text, ids = choice["text"], choice.get("token_ids")
            text.encode()
            if type(tokens) is not int or not 0 <= tokens <= MAX_ANSWER_BYTES or not _are_tokens(ids):
                raise ValueError("an answer whose tokens are no numbers")
            self._failures = 0
            return Reply(text, tokens, ids=ids)
        except (*_WRONG, AttributeError) as error:
            self._failures += 1
            return Reply("", 0, _reason(error))

    def _read(self, url: str, content: Any = None) -> str:
        """A response's text; the socket's own timeout is of each piece of it."""
        ends, parts, size = time.monotonic() + self.timeout_s, [], 0
        body = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        if self._key:
            request.add_unredirected_header("Authorization", f"Bearer {self._key}")
        try:
            with self._opener.open(request, timeout=self.timeout_s) as response:
                while part := response.read1(1 << 16):
                    parts.append(part)
                    size += len(part)
                    if size > MAX_ANSWER_BYTES:
                        raise ValueError(f"an answer of more than {MAX_ANSWER_BYTES >> 20} MiB")
                    if time.monotonic() > ends:
                        raise TimeoutError
        except urllib.error.HTTPError as error:
            raise ValueError(f"status {error.code}: {error.read(1000).decode(errors='replace')}") from None
        return b"".join(parts).decode(errors="replace")

    def _counts(self) -> dict[int, int]:
        """Drafts so far at -1, and accepted tokens at each position."""
        counts: dict[int, int] = {}
        try:
            for name, labels, value in _COUNTER.findall(self._read(f"{self.url.removesuffix('/v1')}/metrics")):
                position = re.search(r'position="(\d+)"', labels)
                key = -1 if name == "num_drafts" else int(position[1]) if position else None
                if key is not None:
                    counts[key] = counts.get(key, 0) + int(float(value))
        except _WRONG:
            return {}
        return counts


def _are_tokens(ids: Any) -> bool:
    return ids is None or (isinstance(ids, list) and all(type(token) is int and token >= 0 for token in ids))


def _reason(error: Exception) -> str:
    """Why there is no answer, in a line."""
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, Exception):
        error = error.reason
    if isinstance(error, TimeoutError):
        return "no answer in time; give more --timeout"
    return f"{type(error).__name__}: {one_line(error)}"
