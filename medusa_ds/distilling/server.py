"""An OpenAI-compatible server (vLLM, SGLang, TGI, ...) as the engine: many requests in flight.

The `openai` client itself tries again, with growing pauses, after lost connections, timeouts and statuses 408, 409, 429
and 5xx. A request that fails for good costs its own conversation alone, which the next start asks again. When the first
ones all fail alike, or nothing but failures comes back any more, the run ends.
"""

import os
import re
from collections import deque
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any
from urllib.parse import urlsplit

from medusa_ds.config.parsing import redact
from medusa_ds.distilling.requests import Handle, Reply, Request, Sampling
from medusa_ds.errors import UserError, one_line

MAX_ANSWER_BYTES = 16 << 20
_FINISH = {"stop": "end", "length": "cut off"}
_FIRST, _GONE = 3, 20  # failures in a row: alike at the start; over those in flight later
_OF_A_ROW = re.compile("status (400|413|422)")  # such as a conversation that is too long
_EXAMPLE = "such as http://localhost:8000/v1"


def check_url(url: str) -> None:
    """Refuse what is not the address of a server.

    Raises:
        UserError: no http or https, no host, or something in it that can be a key, which is not repeated.
    """
    if "@" in url or "?" in url or redact(url) != url:
        raise UserError(f"--server: found a key in the URL (not shown); set OPENAI_API_KEY and give a URL {_EXAMPLE}")
    try:
        parts = urlsplit(url)
        good = len(url.split()) == 1 and parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good:
        raise UserError(f"--server: found {url!r}; allowed is a URL {_EXAMPLE}")


def server_key() -> str:
    """The key that OPENAI_API_KEY holds; empty where it holds none.

    Raises:
        UserError: a header has no place for it, which clients say with the key in their words.
    """
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not re.fullmatch("[!-~]*", key):
        raise UserError("OPENAI_API_KEY: found what is not printable ASCII without spaces (not shown); set it anew")
    return key


class Server:
    """Answers requests by way of a server at a URL (see `check_url`), `in_flight` at once.

    It knows the model by name; a request may take `timeout_s` seconds, and the client tries it again `retries` times.
    """

    def __init__(
        self, url: str, model: str, sampling: Sampling, in_flight: int, timeout_s: float, retries: int
    ) -> None:
        try:
            import openai
        except ImportError:
            raise UserError("--server: needs the openai package; pip install 'medusa-ds[distill]'") from None
        self.url, self.model, self.sampling, self.in_flight = url, model, sampling, in_flight
        bounded = openai.DefaultHttpxClient(event_hooks={"response": [_bound]}, headers={"Accept-Encoding": "identity"})
        key = server_key() or "none"
        options: dict[str, Any] = {"timeout": timeout_s, "max_retries": retries, "http_client": bounded}
        self.client = openai.OpenAI(base_url=url, api_key=key, **options)

    def run(self, requests: deque[Request], handle: Handle) -> None:
        """See `Engine`.

        Raises:
            UserError: the server answers nothing, or nothing any more.
        """
        pool = ThreadPoolExecutor(self.in_flight)
        waiting: dict[Future[Reply], Request] = {}
        failures: list[str] = []
        answered = False
        try:
            while requests or waiting:
                while requests and len(waiting) < (self.in_flight if answered else min(_FIRST, self.in_flight)):
                    request = requests.popleft()
                    waiting[pool.submit(self._ask, request)] = request
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    request, reply = waiting.pop(future), future.result()
                    if reply.finish.startswith("failed"):
                        failures.append(reply.finish)
                    else:
                        failures, answered = [], True
                    following = handle(request, reply)
                    if following is not None:
                        requests.appendleft(following)
                kinds = {failure.split(": ")[1] for failure in failures}
                alike = not answered and len(kinds) == 1 and not _OF_A_ROW.match(min(kinds))
                if len(failures) >= (_FIRST if alike else self.in_flight + _GONE):
                    raise UserError(
                        f"--server: {self.url}: {len(failures)} requests failed one after the other, the last one: "
                        f"{failures[-1]}; expected is JSON with `choices`, as OpenAI-compatible servers give it; "
                        "finished rows are kept: mend the server or the URL, and the same command goes on"
                    )
        finally:
            self.client.close()  # what is still asked need not be waited for
            pool.shutdown(wait=False, cancel_futures=True)

    def _ask(self, request: Request) -> Reply:
        sampling, response = self.sampling, None
        options: dict[str, Any] = {
            "model": self.model,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_new_tokens,
            "seed": request.key(sampling.seed) % 2**31,
        }
        try:
            if request.messages:
                options["messages"] = [{key: turn[key] for key in ("role", "content")} for turn in request.messages]
                raw = self.client.chat.completions.with_raw_response.create(**options)
            else:
                raw = self.client.completions.with_raw_response.create(prompt=request.text, **options)
            response = raw.http_response
            return _read(response.json())
        except Exception as error:  # whatever the client and the layers below it make of a server's answer
            response = response or getattr(error, "response", None)
            if response is None:
                cause = error.__cause__ or error
                return Reply("", 0, f"failed: no answer, {type(cause).__name__}: {one_line(cause, 80)}")
            kind = response.headers.get("Content-Type", "no content type").partition(";")[0]
            return Reply("", 0, f"failed: status {response.status_code}, {kind}: {one_line(redact(response.text), 80)}")


def _read(answer: Any) -> Reply:
    """What a server has answered; raises whatever follows from an answer of another form."""
    choice = answer["choices"][0]
    message = choice.get("message") or {"content": choice["text"]}
    text, finish = message["content"], choice["finish_reason"]
    thoughts = message.get("reasoning_content") or message.get("reasoning") or ""
    if not isinstance(text or "", str) or not isinstance(thoughts, str) or (text is None and not thoughts):
        raise ValueError("an answer without text")
    tokens = (answer.get("usage") or {}).get("completion_tokens") or 0
    return Reply(text or "", int(tokens), _FINISH.get(finish, f"finish reason {finish}"), thoughts)


def _bound(response: Any) -> None:
    """Have the client read no more than `MAX_ANSWER_BYTES` of a response, nor what could unpack to more."""
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise ValueError("a compressed answer, which was not asked for")
    read = response.iter_raw

    def iter_raw(*args: Any) -> Iterator[bytes]:
        size = 0
        for part in read(*args):
            size += len(part)
            if size > MAX_ANSWER_BYTES:
                raise ValueError(f"an answer of more than {MAX_ANSWER_BYTES >> 20} MiB")
            yield part

    response.iter_raw = iter_raw
