"""The generation program: answer one prompt, or chat on the terminal, streaming the text as it is decoded."""

import sys
import time
from collections.abc import Sequence

from medusa_ds.decoding.acceptance import Acceptance
from medusa_ds.decoding.decoder import Decoder, Generation, StopStrings
from medusa_ds.errors import UserError
from medusa_ds.runs import Run, encode_chat, load_run, place


def main(
    run_name: str,
    prompt: str | None,
    *,
    acceptance: Acceptance,
    max_new_tokens: int = 512,
    stop: Sequence[str] = (),
    seed: int = 0,
    device: str | None = None,
    dtype: str | None = None,
) -> None:
    """Decode with a run's heads.

    Args:
        run_name: output directory, heads folder or checkpoint.
        prompt: the user's turn; None asks for turns on the terminal until an empty one.
        acceptance: the rule.
        max_new_tokens: of an answer.
        stop: strings that end an answer.
        seed: of exact sampling.
        device: see `place`.
        dtype: see `place`.
    """
    run = load_run(run_name, *place(device, dtype))
    decoder = Decoder(run.backbone, run.heads, run.tree, acceptance)
    messages: list[dict[str, str]] = []
    while (turn := prompt if prompt is not None else _ask()) is not None:
        messages.append({"role": "user", "content": turn})
        text = _answer(run, decoder, messages, max_new_tokens, stop, seed)
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
    prompt = encode_chat(run, messages)
    if len(prompt) > decoder.limit:
        raise UserError(f"prompt: found {len(prompt)} tokens; the model's limit is {decoder.limit}: shorten it")
    ends = StopStrings(run.tokenizer, stop) if stop else None
    decoder.prepare(1, min(len(prompt) + max_new_tokens, decoder.limit + 1))  # not part of the speed
    text, row, started = "", Generation(), time.perf_counter()
    for (row,) in decoder.stream([prompt], max_new_tokens, ends, seed):
        longer = run.tokenizer.decode(row.tokens, skip_special_tokens=True)
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
