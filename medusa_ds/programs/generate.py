"""Answer a prompt with a run's heads, or chat on the terminal; shows tokens per step and per second.

Example:
    medusa-ds generate smollm2_135m --prompt "What is a transformer?"
"""

import sys
import time
from collections.abc import Sequence

from medusa_ds.config.types import Count
from medusa_ds.decoding.acceptance import AcceptanceSettings
from medusa_ds.decoding.decoder import Decoder, Generation, StopStrings
from medusa_ds.errors import UserError
from medusa_ds.runs import Run, RunSettings


class Settings(AcceptanceSettings, RunSettings):
    """What the command line says."""

    prompt: str | None = None
    """The user's turn; without it, chat until an empty turn."""
    max_new_tokens: Count = 512
    """Of an answer."""
    stop: list[str] = []
    """End at this text; may be repeated."""
    seed: int = 0
    """Of exact acceptance."""


def run(settings: Settings) -> None:
    """Decode with a run's heads."""
    run, prompt = settings.load_run(), settings.prompt
    decoder = Decoder(run.backbone, run.heads, run.tree, settings.acceptance, adapt=True)
    messages: list[dict[str, str]] = []
    while (turn := prompt if prompt is not None else _ask()) is not None:
        messages.append({"role": "user", "content": turn})
        text = _answer(run, decoder, messages, settings.max_new_tokens, settings.stop, settings.seed)
        messages.append({"role": "assistant", "content": text})
        if prompt is not None:
            return


def _ask() -> str | None:
    try:
        return input("\n> ").strip() or None
    except (EOFError, KeyboardInterrupt):
        return None


def _answer(
    run: Run, decoder: Decoder, messages: list[dict[str, str]], max_new_tokens: int, stop: Sequence[str], seed: int
) -> str:
    """Print the answer as it comes, then tokens per step and tokens per second on standard error."""
    prompt = run.encode(messages)
    if len(prompt) > decoder.limit:
        raise UserError(f"prompt: found {len(prompt)} tokens; the model's limit is {decoder.limit}: shorten it")
    ends = StopStrings(run.tokenizer, stop) if stop else None
    decoder.prepare(1, min(len(prompt) + max_new_tokens, decoder.limit + 1))  # not part of the speed
    text, row, started = "", Generation(), time.perf_counter()
    for (row,) in decoder.stream([prompt], max_new_tokens, ends, seed):
        longer = run.decode(row.tokens)
        if row.finish or not longer.endswith("\ufffd"):  # else a character is still in pieces
            print(longer[len(text) :], end="", flush=True)
            text = longer
    seconds = time.perf_counter() - started
    print()
    steps = max(len(row.accepted), 1)
    print(
        f"[{len(row.tokens)} tokens, {sum(row.accepted) / steps:.2f} tokens per step, "
        f"{len(row.tokens) / seconds:.1f} tokens/s; ended by {row.finish}]",
        file=sys.stderr,
    )
    return text
