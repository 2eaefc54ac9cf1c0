"""MedusaModel: backbone and heads; one micro-batch becomes a loss sum per head.

Losses are sums and counts stay beside them: the one division by a count is the engine's. Accuracies come from the
argmax that the loss returns anyway, so that no logits are kept for them.

Under ZeRO-3 a weight is whole only while the module that owns it is called. So every loss is computed inside the
forward of the module whose weight it needs: heads own their projections, and the backbone's LM head, whose weight may
be tied to the embeddings, is replaced by a `VocabularyProjection` that owns the same parameter. All ranks make the same
calls in the same order, also with no rows.

Shapes: B sequences of a micro-batch, S tokens of a sequence, H hidden size, N rows of a head, K = num heads.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from medusa_ds.heads.medusa import MedusaHeads
from medusa_ds.model.backbone import hidden_states, moved, use_vocabulary_projection
from medusa_ds.model.lm_head import LmHeadAlone
from medusa_ds.model.loss import Impl
from medusa_ds.model.rows import head_rows


class HeadLoss(NamedTuple):
    """What one head made of a micro-batch.

    `loss_sum`: scalar with graph. `count`: N. `predicted`: argmax token ids [N].
    `rows`: indices into the B*S positions [N]. `missed`: those of rows left out, whose target has no row.
    """

    loss_sum: Tensor
    count: int  # type: ignore[assignment]
    predicted: Tensor
    rows: Tensor
    missed: Tensor


class MedusaOutput(NamedTuple):
    """`losses[0]` is the LM head's (stage 2, otherwise None), `losses[k]` head k's; `counters` as `COUNTERS` says."""

    losses: list[HeadLoss | None]
    counters: Tensor


COUNTERS = (
    "loss_sum",
    "count",
    "correct",
    "full_correct",
    "full_count",
    "cond_correct",
    "cond_count",
    "missed",
    "label_loss_sum",
)
"""Columns of the counters, a float64 tensor [K+1, 9] of sums: add them over micro-batches and ranks, then `metrics`.

Row 0 is the LM head (zeros in stage 1, and in the `full`, `cond` and `missed` columns always), row k head k. `count`:
rows of the loss; `missed`: rows that are not, since their target is outside `heads.vocab`: wrong ones. `full_count`:
positions where heads 1..k all have targets; `full_correct`: where all of them are right. `cond_count`: positions of
`full_count` where heads 1..k-1 are right; `cond_correct`: where head k is right too, which is `full_correct`.
`label_loss_sum`: of the LM head alone, in evaluation, where its loss is not the labels' cross-entropy: this one.
"""


def metrics(counters: Tensor) -> dict[str, float]:
    """Losses and accuracies of summed counters.

    Args:
        counters: sums over any number of micro-batches and ranks, laid out as `COUNTERS` says.

    Returns:
        `head{k}_loss` (nats per row), `head{k}_acc`, `full_acc_{k}` (heads 1..k right), `cond_acc_{k}` (head k right
        where heads 1..k-1 are) for every k, `acceptance_length = 1 + sum_k full_acc_k` (tokens per step; the 1 is the
        LM head's own token), and where the LM head was counted `lm_loss` (the divergence from the frozen start with
        the target `distribution`), `lm_acc` and, where it was measured beside another loss, `lm_label_loss`, the
        cross-entropy of the labels. A share of nothing is NaN, but 0 inside `acceptance_length`.
    """
    result: dict[str, float] = {"acceptance_length": 1.0}
    for k, row in enumerate(counters.tolist()):
        sums = dict(zip(COUNTERS, row, strict=True))
        if k == 0:
            if sums["count"]:
                result |= {"lm_loss": sums["loss_sum"] / sums["count"], "lm_acc": sums["correct"] / sums["count"]}
            if sums["label_loss_sum"]:
                result["lm_label_loss"] = sums["label_loss_sum"] / sums["count"]
            continue
        result[f"head{k}_loss"] = _share(sums["loss_sum"], sums["count"])
        result[f"head{k}_acc"] = _share(sums["correct"], sums["count"] + sums["missed"])
        result[f"full_acc_{k}"] = _share(sums["full_correct"], sums["full_count"])
        result[f"cond_acc_{k}"] = _share(sums["cond_correct"], sums["cond_count"])
        if sums["full_count"]:
            result["acceptance_length"] += sums["full_correct"] / sums["full_count"]
    return result


def _share(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")


def in_backward(call: Callable[[], tuple[Tensor, Tensor]], owner: nn.Module) -> tuple[Tensor, Tensor]:
    """A loss whose gradients are made in the backward pass, when it is its turn, and its logits for a second time.

    A loss in chunks makes its gradients in the forward pass, so that those of all heads are there at once.
    """
    start = next(owner.parameters()).new_zeros((), requires_grad=True)  # what the backward pass follows to the loss
    return checkpoint(lambda _: call(), start, use_reentrant=True, preserve_rng_state=False)


class MedusaModel(nn.Module):
    """Backbone under `backbone.`, heads under `heads.`, the frozen start of a stage 2 that needs it under `start.`.

    Args:
        backbone: causal language model of transformers; its LM head is replaced, its weights are shared; it may be
            None where nobody reads it. Where all hidden states come from a cache, what stands in for the backbone.
        heads: heads of the same hidden size, vocabulary and dtype.
        stage: 1 freezes the backbone, runs it without a graph and skips the LM head; 2 trains everything.
        loss_impl: `liger`, `torch` or `eager`.
        chunk_mib: memory that one chunk of logits may take, MiB.
        target: what is learned, see `recipe_sections.LossSpec.target`.
        temperature: of the target `distribution`.
        start: stage 2, targets other than `label`: a second copy of the backbone, which predicts the targets.

    Attributes:
        one_gradient: stage 1, see `in_backward`; where gradients leave the GPU one by one, to an offloaded optimizer.
    """

    one_gradient = False

    def __init__(
        self,
        backbone: PreTrainedModel | LmHeadAlone,
        heads: MedusaHeads,
        stage: int,
        loss_impl: Impl,
        chunk_mib: int,
        target: Literal["label", "argmax", "distribution"] = "label",
        temperature: float = 1.0,
        start: PreTrainedModel | None = None,
    ):
        super().__init__()
        assert target == "label" or (heads.token_map is None and isinstance(backbone, PreTrainedModel))
        assert (start is not None) == (stage == 2 and target != "label")
        for model in (backbone, start):
            if isinstance(model, PreTrainedModel) and model.get_output_embeddings() is not None:
                use_vocabulary_projection(model)
        self.backbone = backbone.requires_grad_(stage == 2)
        self.start = None if start is None else start.requires_grad_(False)
        self.heads, self.known_V = heads, heads.known_V
        self.stage, self.loss_impl, self.chunk_mib = stage, loss_impl, chunk_mib
        self.target, self.temperature = target, temperature

    def train(self, mode: bool = True) -> "MedusaModel":
        """Switch to training; what is frozen stays in evaluation mode (no dropout)."""
        super().train(mode)
        for frozen in (self.backbone if self.stage == 1 else None, self.start):
            if frozen is not None:
                frozen.eval()
        return self

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        position_ids: Tensor,
        states_MH: Tensor | None = None,
        row_R: Tensor | None = None,
        scales_M: Tensor | None = None,
        scales: Tensor | None = None,
    ) -> MedusaOutput:
        """Loss sums and counters of one micro-batch.

        Rows are found where the labels are: on the CPU, the host need not wait for the GPU to know how many.

        Args:
            input_ids: LongTensor [B, S].
            labels: LongTensor [B, S], token ids or -100, not shifted; on the CPU or with `input_ids`.
            position_ids: LongTensor [B, S], where the labels are; restart at 0 with every document of a sequence.
            states_MH: hidden states of M positions that were computed before; the backbone is not asked then.
            row_R: LongTensor [B*S], which of them a position has.
            scales_M: what to multiply them by.
            scales: [K+1], what the gradients of the losses are multiplied by, see `loss.linear_cross_entropy`.
        """
        device, first = input_ids.device, 0 if self.stage == 2 else 1
        if states_MH is None:
            hidden_RH = _hidden_states(self.backbone, input_ids, position_ids, grad=self.stage == 2)
        else:
            scaled_MH = states_MH if scales_M is None else states_MH.float() * scales_M[:, None]
            hidden_RH = scaled_MH.to(next(self.heads.parameters()).dtype)
        # found while the GPU runs the backbone
        rows = _moved([self._rows(labels, position_ids, k) for k in range(first, len(self.heads) + 1)], device)
        lm_head: Any = self.backbone.get_output_embeddings()
        teacher, teacher_RH = lm_head, hidden_RH
        if self.start is not None:
            teacher = self.start.get_output_embeddings()
            teacher_RH = _hidden_states(self.start, input_ids, position_ids, grad=False)
        if self.target == "argmax":  # the LM head at t+k predicts the token of head k's label
            lm_rows_N = head_rows(labels, position_ids, 0)[0].to(device)
            predicted_N = teacher(teacher_RH[lm_rows_N], argmax=True, chunk_mib=self.chunk_mib)
            chosen_R = lm_rows_N.new_zeros(len(hidden_RH)).index_put((lm_rows_N,), predicted_N)
        losses: list[HeadLoss | None] = [None] * first
        right: list[Tensor | None] = [None] * first
        for k, (rows_N, targets_N, missed_M) in enumerate(rows, first):
            learned_N = chosen_R[rows_N + k] if self.target == "argmax" else targets_N
            args = (hidden_RH[rows_N if row_R is None else row_R[rows_N]], learned_N, self.loss_impl, self.chunk_mib)
            scale = None if scales is None else scales[k]
            teaching: dict[str, Any] = {}
            if self.target == "distribution":
                teaching = {"teacher_NH": teacher_RH[rows_N + k], "temperature": self.temperature}
            if k > 0:
                options = {"shared_projection": teacher if teaching else lm_head, "scale": scale, **teaching}
                call = partial(self.heads[k - 1], *args, **options)
                alone = self.one_gradient and torch.is_grad_enabled()
                loss_sum, predicted_N = in_backward(call, self.heads) if alone else call()
            elif teaching:
                options = {"chunk_mib": self.chunk_mib, "student": lm_head, "scale": scale}
                loss_sum, predicted_N = teacher(args[0], **options, **teaching)
            else:
                loss_sum, predicted_N = lm_head(*args, scale=scale)
            losses.append(HeadLoss(loss_sum, len(rows_N), predicted_N, rows_N, missed_M))
            right.append(predicted_N == targets_N)
        counters = _count(losses, right, labels.numel())
        if self.start is not None and not self.training:
            rows_N, targets_N, _ = rows[0]
            label_loss_sum, _ = lm_head(hidden_RH[rows_N], targets_N, self.loss_impl, self.chunk_mib)
            counters[0, COUNTERS.index("label_loss_sum")] = label_loss_sum.detach()
        return MedusaOutput(losses, counters)

    def _rows(self, labels: Tensor, position_ids: Tensor, k: int) -> list[Tensor]:
        """Rows and targets of head k, and the rows left out, whose target has no row in the heads' vocabulary."""
        rows_N, targets_N = head_rows(labels, position_ids, k)
        if k == 0 or self.known_V is None:
            return [rows_N, targets_N, rows_N[:0]]
        known_N = self.known_V.to(labels.device)[targets_N]
        return [rows_N[known_N], targets_N[known_N], rows_N[~known_N]]


def _moved(parts: list[list[Tensor]], device: torch.device) -> list[list[Tensor]]:
    """The same on a device, in one copy that the host does not wait for."""
    flat = [part for head in parts for part in head]
    if flat[0].device == device:
        return parts
    there = moved(torch.cat(flat), device).split([len(part) for part in flat])
    return [list(there[at : at + 3]) for at in range(0, len(flat), 3)]


def _hidden_states(model: Any, input_ids: Tensor, position_ids: Tensor, grad: bool) -> Tensor:
    with torch.set_grad_enabled(torch.is_grad_enabled() and grad):
        return hidden_states(model, input_ids, position_ids)


def _count(losses: list[HeadLoss | None], right: list[Tensor | None], num_positions: int) -> Tensor:
    """Counters as `COUNTERS` says of heads that were right at `right[k]` of their rows."""
    device = losses[-1].rows.device  # type: ignore[union-attr]
    counters = torch.zeros(len(losses), len(COUNTERS), dtype=torch.float64, device=device)
    all_present_R = torch.ones(num_positions, dtype=torch.bool, device=device)
    all_right_R = all_present_R
    for k, (loss, right_N) in enumerate(zip(losses, right, strict=True)):
        if loss is None or right_N is None:
            continue
        counters[k, 0], counters[k, 2] = loss.loss_sum.detach(), right_N.sum()
        counters[k, 1].fill_(loss.count)  # assigning a number would wait for the GPU
        if k == 0:
            continue
        nowhere_R = torch.zeros_like(all_present_R)
        all_present_R = all_present_R & nowhere_R.index_fill(0, torch.cat([loss.rows, loss.missed]), True)
        counters[k, 4], counters[k, 6] = all_present_R.sum(), (all_present_R & all_right_R).sum()
        all_right_R = all_right_R & nowhere_R.index_put((loss.rows,), right_N)
        counters[k, 7].fill_(len(loss.missed))
        counters[k, 3] = counters[k, 5] = (all_present_R & all_right_R).sum()
    return counters
