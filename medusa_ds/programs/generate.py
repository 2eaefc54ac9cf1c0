"""Answer a prompt with a run's heads, or chat on the terminal; shows tokens per step and per second.

Example:
    medusa-ds generate smollm2_135m --prompt "What is a transformer?"
"""

import contextlib
import sys

from medusa_ds.config.types import Count, Seed
from medusa_ds.decoding.acceptance import AcceptanceSettings
from medusa_ds.decoding.decoder import Decoder, Generation, stop_at
from medusa_ds.errors import UserError, counted
from medusa_ds.runs import Run, RunSettings, Saved, encode

HELP = """/clear begins anew, /exit leaves, /help prints this; all else is said to the model
Ctrl-C stops an answer; at the prompt it leaves, as Ctrl-D does"""


class Settings(AcceptanceSettings, RunSettings):
    """What the command line says."""

    prompt: str | None = None
    """The user's turn; without it, chat on the terminal."""
    max_new_tokens: Count = 512
    """Of an answer."""
    stop: list[str] = []
    """End at this text; may be repeated."""
    seed: Seed = 0
    """Of the draws of exact acceptance."""


def run(settings: Settings) -> None:
    """Decode with a run's heads."""
    acceptance = settings.acceptance
    saved, first = settings.open_run(), [{"role": "user", "content": settings.prompt or ""}]
    if settings.prompt is not None:  # refused before the model is loaded
        _fitting(saved, first, saved.position_limit())
    run = settings.load_run(saved)
    options = {"compile_step": settings.compile_step, "adapt": True}
    decoder = Decoder(run.backbone, run.heads, run.tree, acceptance, **options)
    if settings.prompt is not None:
        _answer(settings, run, decoder, first)
        return
    print(f"chat with {settings.name}; /help lists commands, Ctrl-D leaves", file=sys.stderr)
    messages: list[dict[str, str]] = []
    while (turn := _ask()) is not None:
        if turn == "/help":
            print(HELP, file=sys.stderr)
        elif turn == "/clear":
            messages.clear()
        elif turn.startswith("/"):
            print(f"{turn.split()[0]}: no such command; /help lists them", file=sys.stderr)
        elif turn:
            asked = [*messages, {"role": "user", "content": turn}]
            try:
                messages = [*asked, {"role": "assistant", "content": _answer(settings, run, decoder, asked)}]
            except UserError as error:  # as of a conversation that has grown over the limit
                if not messages:
                    raise
                print(f"error: {error}, or begin anew with /clear", file=sys.stderr)


def _ask() -> str | None:
    """The next line; None when the user leaves."""
    with contextlib.suppress(ImportError):  # not on every system
        import readline  # noqa: F401 - `input` edits lines and keeps a history with it
    try:
        turn = input("\n> ").strip()
        return None if turn == "/exit" else turn
    except (EOFError, KeyboardInterrupt):
        return None


def _fitting(run: Saved | Run, messages: list[dict[str, str]], limit: int) -> list[int]:
    """The tokens of a conversation, at most as many as the model has positions for."""
    prompt = encode(run, messages)
    if len(prompt) > limit:
        raise UserError(f"prompt: found {len(prompt)} tokens; the model's limit is {limit}: shorten it")
    return prompt


def _answer(settings: Settings, run: Run, decoder: Decoder, messages: list[dict[str, str]]) -> str:
    """Print the answer as it comes, then figures on standard error; Ctrl-C in a chat stops it where it is."""
    prompt = _fitting(run, messages, decoder.limit)
    ends = stop_at(run.tokenizer, settings.stop) if settings.stop else None
    decoder.prepare(1, min(len(prompt) + settings.max_new_tokens, decoder.limit + 1))  # not part of the speed
    text, row = "", Generation()
    try:
        for (row,) in decoder.stream([prompt], settings.max_new_tokens, ends, settings.seed):
            longer = run.decode(row.tokens)
            if row.finish or not longer.endswith("\ufffd"):  # else a character is still in pieces
                print(longer[len(text) :], end="", flush=True)
                text = longer
    except KeyboardInterrupt:
        if settings.prompt is not None:
            raise
    print()
    steps = max(len(row.accepted), 1)
    ended_by = {"end": "the model", "length": "the limit of tokens", "stop": "--stop", "": "Ctrl-C"}[row.finish]
    rate = f", then {sum(row.accepted) / row.decode_s:.1f} tokens/s" if row.decode_s else ""
    print(
        f"[{counted(len(row.tokens), 'token')}, {sum(row.accepted) / steps:.2f} tokens per step; the first after "
        f"{row.prefill_s:.2f} s{rate}; ended by {ended_by}]",
        file=sys.stderr,
    )
    return text
