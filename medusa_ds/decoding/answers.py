"""Held-out prompts and their answers: what `evaluate` and `tree` both measure on.

Every turn is answered plainly and, if asked, with the heads' tree. The next turn of a conversation builds on the plain
answer, so that both always continue the same text.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from medusa_ds.decoding.acceptance import Acceptance
from medusa_ds.decoding.generator import Decoder, Generation
from medusa_ds.decoding.measure import head_ranks
from medusa_ds.decoding.runs import Run, encode_chat, load_run, place
from medusa_ds.errors import UserError


@dataclass
class Settings:
    """What the command lines of `evaluate` and `tree` say.

    Attributes:
        run: output directory, heads folder or checkpoint.
        prompts: JSON lines with `turns`.
        max_new_tokens: of an answer.
        limit: conversations; None takes all.
        acceptance: the rule.
        device, dtype: None: a GPU in bf16 if there is one, else the CPU in fp32.
        compile_step: fuse the step with torch.compile.
        json_file, picture: where to write the report and the picture.
    """

    run: str
    prompts: str
    max_new_tokens: int = 256
    limit: int | None = None
    acceptance: Acceptance = field(default_factory=Acceptance)
    device: str | None = None
    dtype: str | None = None
    compile_step: bool = False
    json_file: str | None = None
    picture: str | None = None

    def load(self) -> Run:
        """The run on its device."""
        liger = False if self.compile_step else None  # what Liger's kernels fuse, Inductor fuses with more
        return load_run(self.run, *place(self.device, self.dtype), liger)


class Prompt(NamedTuple):
    """A conversation's user turns."""

    turns: list[str]
    category: str


@dataclass
class Answer:
    """One turn, answered."""

    category: str
    prompt: list[int]
    plain: Generation
    medusa: Generation | None = None


def read_prompts(file: str | Path, limit: int | None = None) -> list[Prompt]:
    """Read prompts, one JSON object a line: `turns` (non-empty texts) and, if you like, `category`.

    Raises:
        UserError: every bad line, or no prompt at all.
    """
    prompts, problems = [], []
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read ({error}); name a JSON-lines file with prompts") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            problems.append(f"{file}:{number}: not valid JSON ({str(error)[:100]}); write one object a line")
            continue
        turns, category = (row.get("turns"), row.get("category", "")) if isinstance(row, dict) else (None, "")
        if (
            not isinstance(turns, list)
            or not turns
            or not all(isinstance(turn, str) and turn.strip() for turn in turns)
        ):
            problems.append(
                f"{file}:{number}: turns: found {json.dumps(turns)[:60]}; a list of texts, the user's turns"
            )
        elif not isinstance(category, str):
            problems.append(f"{file}:{number}: category: found {json.dumps(category)[:60]}; a text")
        else:
            prompts.append(Prompt(turns, category))
    if not prompts and not problems:
        problems.append(f'{file}: found no prompt; one object a line, as {{"turns": ["Hello"]}}')
    if problems:
        raise UserError(*problems)
    return prompts[:limit]


def answer_prompts(
    run: Run, prompts: list[Prompt], plain: Decoder, medusa: Decoder | None, max_new_tokens: int
) -> tuple[list[Answer], int]:
    """Every turn of every prompt, and how many turns the model's limit left out."""
    answers: list[Answer] = []
    left_out = 0
    for prompt in prompts:
        messages = []
        for turn in prompt.turns:
            messages.append({"role": "user", "content": turn})
            ids = encode_chat(run, messages)
            if len(ids) + max_new_tokens > plain.limit:
                left_out += 1
                break
            if not answers:  # the first call of everything is slow
                for decoder in (plain, medusa):
                    if decoder is not None:
                        decoder.generate([ids], 4)
            answer = Answer(prompt.category, ids, plain.generate([ids], max_new_tokens)[0])
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


def write_report(settings: Settings, report: dict[str, Any]) -> None:
    """Write a report as JSON, if asked."""
    if settings.json_file:
        try:
            Path(settings.json_file).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{settings.json_file}: cannot be written ({error.strerror}); name another file") from None
