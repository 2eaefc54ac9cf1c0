"""An OpenAI-compatible server (vLLM, SGLang, TGI, ...) as the engine: many requests in flight.

The `openai` client itself tries again, with growing pauses, after lost connections, timeouts and statuses 408, 409, 429
and 5xx. A request that fails for good costs its own conversation alone, which the next start asks again. When nothing
but failures comes back, the server is gone, and the run ends.
"""

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from medusa_ds.distilling.requests import Handle, Reply, Request, Sampling
from medusa_ds.errors import UserError

_FINISH = {"stop": "end", "length": "cut off"}
_GONE = 20  # failures in a row, over those in flight
MAX_ANSWER_BYTES = 16 << 20


class Server:
    """Answers requests by way of a server.

    Args:
        url: such as `http://localhost:8000/v1`.
        model: the name under which the server knows the model.
        sampling: how to draw.
        in_flight: requests at once.
        timeout_s: seconds that one request may take.
        retries: how often the client tries again.
    """

    def __init__(
        self, url: str, model: str, sampling: Sampling, in_flight: int, timeout_s: float = 300, retries: int = 5
    ) -> None:
        try:
            import openai
        except ImportError:
            raise UserError("--server: needs the openai package; pip install 'medusa-ds[distill]'") from None
        self.url, self.model, self.sampling, self.in_flight = url, model, sampling, in_flight
        key = os.environ.get("OPENAI_API_KEY", "none")
        bounded = openai.DefaultHttpxClient(event_hooks={"response": [_bound]}, headers={"Accept-Encoding": "identity"})
        self.client = openai.OpenAI(
            base_url=url, api_key=key, timeout=timeout_s, max_retries=retries, http_client=bounded
        )

    def run(self, requests: deque[Request], handle: Handle) -> None:
        """See `Engine`.

        Raises:
            UserError: the server answers nothing any more.
        """
        pool = ThreadPoolExecutor(self.in_flight)
        waiting: dict[Future[Reply], Request] = {}
        failures = 0
        try:
            while requests or waiting:
                while requests and len(waiting) < self.in_flight:
                    request = requests.popleft()
                    waiting[pool.submit(self._ask, request)] = request
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    request, reply = waiting.pop(future), future.result()
                    failures = failures + 1 if reply.finish.startswith("failed") else 0
                    following = handle(request, reply)
                    if following is not None:
                        requests.appendleft(following)
                if failures >= self.in_flight + _GONE:
                    raise UserError(
                        f"--server: {self.url}: {failures} requests failed one after the other, the last one: "
                        f"{reply.finish}; finished rows are kept: mend the server, and the same command goes on"
                    )
        finally:
            self.client.close()  # what is still asked need not be waited for
            pool.shutdown(wait=False, cancel_futures=True)

    def _ask(self, request: Request) -> Reply:
        sampling = self.sampling
        options: dict[str, Any] = {
            "model": self.model,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_new_tokens,
            "seed": request.key(sampling.seed) % 2**31,
        }
        try:
            if request.messages:
                options["messages"] = request.messages
                choice = (answer := self.client.chat.completions.create(**options)).choices[0]
                text = choice.message.content
            else:
                choice = (answer := self.client.completions.create(prompt=request.text, **options)).choices[0]
                text = choice.text
            if not isinstance(text, str):
                raise ValueError("an answer without text")
            tokens = answer.usage.completion_tokens if answer.usage else 0
            return Reply(text, tokens, _FINISH.get(choice.finish_reason, f"finish reason {choice.finish_reason}"))
        except Exception as error:  # whatever the client and the layers below it make of a server's answer
            return Reply("", 0, f"failed: {type(error).__name__}: {' '.join(str(error).split())[:120]}")


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
