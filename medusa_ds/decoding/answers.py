"""Prompts and their answers: what `evaluate` and `tree` both measure on.

Every turn is answered plainly and, if asked, with the heads' tree; the next turn of a conversation builds on the plain
answer, so that both always continue the same text. What is to be compared is measured alike: a decoder meets every
length of a prompt and every size of a session once outside the clock, since the first time loads and captures kernels,
and the two take turns in going first.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from medusa_ds.decoding.decoder import Decoder, Generation
from medusa_ds.errors import UserError

Message = dict[str, Any]


@dataclass
class Answer:
    """One turn, answered."""

    category: str
    prompt: list[int]
    plain: Generation
    medusa: Generation | None = None


def answer_prompts(
    prompts: Iterable[tuple[list[Message], str]],
    encode: Callable[[list[Message]], list[int]],
    read: Callable[[list[int]], str],
    plain: Decoder,
    medusa: Decoder | None,
    max_new_tokens: int,
) -> tuple[list[Answer], int]:
    """Answers of every user turn, and how many conversations the model's limit cut short.

    Prompts are system and user turns of a conversation, and its category; `encode` gives its tokens up to where the
    assistant begins, `read` the text of an answer's. `medusa`, if given, decodes them a second time.

    Raises:
        UserError: no prompt leaves room for an answer.
    """
    answers: list[Answer] = []
    left_out, met = 0, set[tuple[Decoder, int, int]]()
    decoders = [plain] if medusa is None else [plain, medusa]

    def answer(decoder: Decoder, prompt: list[int]) -> Generation:
        session = decoder.prepare(1, len(prompt) + max_new_tokens)
        if (size := (decoder, len(prompt), session.slots)) not in met:
            decoder.generate([prompt], 3)
            met.add(size)
        return decoder.generate([prompt], max_new_tokens)[0]

    for turns, category in prompts:
        messages: list[Message] = []
        for turn in turns:
            messages.append(turn)
            if turn["role"] == "system":
                continue
            ids = encode(messages)
            if len(ids) + max_new_tokens > plain.limit:
                left_out += 1
                break
            order = decoders if len(answers) % 2 == 0 else decoders[::-1]
            rows = {decoder: answer(decoder, ids) for decoder in order}
            answers.append(Answer(category, ids, rows[plain], None if medusa is None else rows[medusa]))
            messages.append({"role": "assistant", "content": read(answers[-1].plain.tokens)})
    if not answers:
        room = f"{max_new_tokens} more within the model's limit of {plain.limit} tokens"
        raise UserError(f"prompts: none leaves room for {room}; shorten them, or give a smaller --max-new-tokens")
    return answers, left_out


def device_name(backbone: PreTrainedModel) -> str:
    """Device and dtype, for reports."""
    device = backbone.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return f"{name}, {str(backbone.dtype).removeprefix('torch.')}"
