"""Held-out prompts and their answers: what `evaluate` and `tree` both measure on.

Every turn is answered plainly and, if asked, with the heads' tree. The next turn of a conversation builds on the plain
answer, so that both always continue the same text.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from medusa_ds.config.types import Count
from medusa_ds.decoding.decoder import Decoder, Generation
from medusa_ds.decoding.measure import head_ranks
from medusa_ds.errors import UserError
from medusa_ds.runs import Run, RunSettings, encode_chat

Message = dict[str, Any]


class PromptSettings(RunSettings):
    """Of programs that let a run answer prompts."""

    prompts: str = Field(title="SOURCE")
    """JSON lines such as {"turns": ["Hello"]}, or what data.path takes; its user turns are answered."""
    limit: Count | None = None
    """Take the first N conversations."""
    max_new_tokens: Count = 256
    """Of an answer."""
    compile_step: bool = Field(False, alias="compile")
    """Fuse the decoding step with torch.compile; a minute once."""
    json_file: str | None = Field(None, alias="json", title="FILE")
    """Write the report."""
    picture: str | None = Field(None, title="FILE")
    """Draw it."""

    def load(self) -> Run:
        """The run on its device."""
        return self.load_run(False if self.compile_step else None)  # what Liger fuses, Inductor fuses with more


@dataclass
class Answer:
    """One turn, answered."""

    category: str
    prompt: list[int]
    plain: Generation
    medusa: Generation | None = None


def answer_prompts(
    run: Run, prompts: Iterable[tuple[list[Message], str]], plain: Decoder, medusa: Decoder | None, max_new_tokens: int
) -> tuple[list[Answer], int]:
    """Answers of every user turn.

    Args:
        run: whose tokenizer and chat template are used.
        prompts: system and user turns of each conversation, and its category.
        plain: decodes the answers.
        medusa: decodes them a second time, if given.
        max_new_tokens: of an answer.

    Returns:
        The answers, and how many conversations the model's limit cut short.
    """
    answers: list[Answer] = []
    left_out = 0
    for turns, category in prompts:
        messages: list[Message] = []
        for turn in turns:
            messages.append(turn)
            if turn["role"] == "system":
                continue
            ids = encode_chat(run, messages)
            if len(ids) + max_new_tokens > plain.limit:
                left_out += 1
                break
            if not answers:  # the first call of everything is slow
                for decoder in (plain, medusa):
                    if decoder is not None:
                        decoder.generate([ids], 4)
            answer = Answer(category, ids, plain.generate([ids], max_new_tokens)[0])
            if medusa is not None:
                answer.medusa = medusa.generate([ids], max_new_tokens)[0]
            answers.append(answer)
            text = run.tokenizer.decode(answer.plain.tokens, skip_special_tokens=True)
            messages.append({"role": "assistant", "content": text})
    if not answers:
        raise UserError(f"prompts: all are too long for the model's limit of {plain.limit} tokens; shorten them")
    return answers, left_out


def all_ranks(run: Run, answers: list[Answer]) -> list[torch.Tensor]:
    """`head_ranks` on the plain answers, an entry an answer."""
    return [head_ranks(run.backbone, run.heads, answer.prompt, answer.plain.tokens) for answer in answers]


def device_name(run: Run) -> str:
    """Device and dtype, for reports."""
    device = run.backbone.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return f"{name}, {str(run.backbone.dtype).removeprefix('torch.')}"


def write_report(settings: PromptSettings, report: dict[str, Any]) -> None:
    """Write a report as JSON, if asked."""
    if settings.json_file:
        try:
            Path(settings.json_file).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{settings.json_file}: cannot be written ({error.strerror}); name another file") from None
