"""Figures about heads and steps: ranks on given texts, step times, and what lies behind a text that differs.

Shape suffixes: T tokens of a text, M measured positions, K heads, V vocabulary.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from medusa_ds.decoding.decoder import Decoder, head_logits
from medusa_ds.heads.base import Heads
from medusa_ds.model.attention import base_model
from medusa_ds.model.backbone import lm_head_weight, vocabulary_projection

_ROWS = 64  # positions whose logits of all heads are held at once


@torch.no_grad()
def head_ranks(backbone: PreTrainedModel, heads: Heads, prompt: list[int], answer: list[int]) -> Tensor:
    """The rank [M, K] that each head gives to the token that really came, at every position from the prompt's last.

    0 is a right first guess; of equal logits the lowest token comes first, as when decoding. Heads that see tokens see
    the answer's own. Only positions where the answer has a token for every head: all columns are about the same ones.
    """
    text_T = torch.tensor([prompt + answer], device=backbone.device)
    positions = len(answer) - len(heads)
    if positions < 1:
        return torch.zeros(0, len(heads), dtype=torch.long)
    hidden_TH = base_model(backbone)(input_ids=text_T, use_cache=False).last_hidden_state[0]
    ranks, lm_head = [], vocabulary_projection(backbone)
    for begin in range(len(prompt) - 1, len(prompt) - 1 + positions, _ROWS):
        end = min(begin + _ROWS, len(prompt) - 1 + positions)
        tokens_KM = torch.stack([text_T[0, begin + k : end + k] for k in range(1, len(heads) + 2)])
        states = heads.states(hidden_TH[begin:end], tokens_KM[:-1], backbone.get_input_embeddings())
        logits_KMV = head_logits([*heads], states, lm_head)
        rows_KM = heads.rows(tokens_KM[1:])
        own_KM = logits_KMV.gather(-1, rows_KM.clamp(min=0)[..., None])
        number_V = torch.arange(logits_KMV.shape[-1], device=rows_KM.device)
        before_KMV = (logits_KMV > own_KM) | ((logits_KMV == own_KM) & (number_V < rows_KM[..., None]))
        ranks_KM = before_KMV.sum(-1).masked_fill(rows_KM < 0, len(lm_head.weight))
        ranks.append(ranks_KM.T.cpu())
    return torch.cat(ranks)


class Difference(NamedTuple):
    """The first token at which two texts part.

    Attributes:
        position: index of the token in the answer.
        gap: distance of the two tokens' logits, computed afresh over the common text.
        resolution: distance of neighbouring numbers of the logits' dtype at their size.
    """

    position: int
    gap: float
    resolution: float

    @property
    def is_tie(self) -> bool:
        """Whether rounding explains it: the step's kernels sum in another order than the plain step's."""
        return self.gap <= 8 * self.resolution


@torch.no_grad()
def first_difference(
    backbone: PreTrainedModel, prompt: list[int], one: list[int], other: list[int]
) -> Difference | None:
    """Where two answers to a prompt part, and by how much the base model prefers one token to the other."""
    position = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
    if position is None:
        return None
    text = torch.tensor([prompt + one[:position]], device=backbone.device)
    hidden = base_model(backbone)(input_ids=text, use_cache=False).last_hidden_state[:, -1]
    pair = vocabulary_projection(backbone)(hidden)[0, [one[position], other[position]]].float()
    return Difference(
        position, float((pair[0] - pair[1]).abs()), torch.finfo(backbone.dtype).eps * float(pair.abs().max())
    )


def step_ms(decoder: Decoder, context: int, repeats: int = 20, nodes: int | None = None) -> float:
    """Milliseconds of a step with `context` tokens of text in the cache, batch 1; the median of the repeats.

    `nodes`: of the part of the tree that is verified, where the decoder adapts; None: all.
    """
    session = decoder.prepare(1, context)
    if nodes is not None:
        session.tree = decoder.next_tree = decoder.part(nodes)
    session.length_B.fill_(context)
    session.active_B.zero_()  # the text does not grow
    return 1000 * seconds_of(lambda: decoder.step(session), repeats, decoder.backbone.device)[repeats // 2]


def plain_step_bytes(backbone: PreTrainedModel) -> int:
    """Bytes of weights that one plain step reads: all but the input embeddings, which it reads one row of."""
    sizes = {id(parameter): parameter.nbytes for parameter in backbone.parameters()}  # tied weights come once
    embeddings = id(backbone.get_input_embeddings().weight)
    if embeddings != id(lm_head_weight(backbone)):
        sizes.pop(embeddings)
    return sum(sizes.values())


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second that a copy on the device moves, read and write counted."""
    source = torch.ones(1 << 28, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds_of(lambda: target.copy_(source), 8, device)[0]


def seconds_of(call: Callable[[], Any], repeats: int, device: torch.device) -> list[float]:
    """Seconds of each call, until the device has done it, ascending; three before them do not count."""
    seconds = []
    for _ in range(3 + repeats):
        _wait(device)
        started = time.perf_counter()
        call()
        _wait(device)
        seconds.append(time.perf_counter() - started)
    return sorted(seconds[3:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
