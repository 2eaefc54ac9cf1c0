"""Which positions a head may learn from, and their targets: the only place that shifts labels.

Heads are counted as in the paper (arXiv 2401.10774, section 2.1): the LM head is offset 0 and predicts token t+1 from
position t, head k predicts token t+k+1. Documents that share a sequence are told apart by their position ids alone.

Shapes: B sequences of a micro-batch, S tokens of a sequence, N rows (supervised positions).
"""

import torch
from torch import Tensor

IGNORED = -100


def _learnable(labels_BS: Tensor, position_ids_BS: Tensor, offset: int) -> Tensor:
    shift = offset + 1
    same_document = position_ids_BS[:, shift:] == position_ids_BS[:, :-shift] + shift
    return same_document & (labels_BS[:, shift:] != IGNORED)


def head_rows(labels_BS: Tensor, position_ids_BS: Tensor, offset: int) -> tuple[Tensor, Tensor]:
    """Rows and targets of one head; with offset 0 those of the LM head, with k those of head k.

    Labels are -100 where a token is not supervised, and not shifted; positions restart at 0 with every document.
    Position t is a row when `labels[t+offset+1]` is a label and `position_ids[t+offset+1]` equals
    `position_ids[t]+offset+1`, which holds inside a document and never across a border: two documents of a sequence
    start at different places.

    Returns:
        `rows_N`, indices into the flattened B*S positions, ascending; `targets_N`, their token ids.
    """
    learnable = _learnable(labels_BS, position_ids_BS, offset)
    sequence_N, position_N = learnable.nonzero(as_tuple=True)
    rows_N = sequence_N * labels_BS.shape[1] + position_N
    return rows_N, labels_BS[sequence_N, position_N + offset + 1]


def any_head_rows(labels_BS: Tensor, position_ids_BS: Tensor, num: int) -> Tensor:
    """Which positions at least one of the heads 1..num learns from, BoolTensor [B, S]; see `head_rows`."""
    some_BS = torch.zeros_like(labels_BS, dtype=torch.bool)
    for offset in range(1, num + 1):
        some_BS[:, : -(offset + 1)] |= _learnable(labels_BS, position_ids_BS, offset)
    return some_BS


def count_targets(labels_BS: Tensor, position_ids_BS: Tensor, num: int, known_V: Tensor | None = None) -> Tensor:
    """How many rows the losses of the LM head (index 0) and of each head k = 1..num have: LongTensor of num+1 counts.

    `known_V` says which tokens the heads have rows for; None: all. For the rest see `head_rows`.
    """
    masks = [_learnable(labels_BS, position_ids_BS, offset) for offset in range(num + 1)]
    if known_V is not None:
        known_BS = known_V[labels_BS.clamp(min=0)]
        masks[1:] = [mask & known_BS[:, offset + 1 :] for offset, mask in enumerate(masks[1:], 1)]
    return torch.stack([mask.sum() for mask in masks])
