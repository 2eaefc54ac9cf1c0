"""MedusaModel: backbone and heads; one micro-batch becomes a loss sum per head.

Losses are sums and counts stay beside them: the one division by a count is the engine's. Accuracies come from the
argmax that the loss returns anyway, so that no logits are kept for them.

Under ZeRO-3 a weight is whole only while the module that owns it is called. So every loss is computed inside the
forward of the module whose weight it needs: heads own their projections, and the backbone's LM head, whose weight may
be tied to the embeddings, is replaced by a `VocabularyProjection` that owns the same parameter. All ranks make the same
calls in the same order, also with no rows.

Shapes: B sequences of a micro-batch, S tokens of a sequence, H hidden size, N rows of a head, K = num heads.
"""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from medusa_ds.model.backbone import use_vocabulary_projection
from medusa_ds.model.heads import MedusaHeads
from medusa_ds.model.lm_head import LmHeadAlone
from medusa_ds.model.loss import Impl
from medusa_ds.model.rows import head_rows


class HeadLoss(NamedTuple):
    """What one head made of a micro-batch.

    `loss_sum`: scalar with graph. `count`: N, a LongTensor scalar. `predicted`: argmax token ids [N].
    `rows`: indices into the B*S positions [N]. `missed`: those of rows left out, whose target has no row.
    """

    loss_sum: Tensor
    count: Tensor  # type: ignore[assignment]
    predicted: Tensor
    rows: Tensor
    missed: Tensor


class MedusaOutput(NamedTuple):
    """`losses[0]` is the LM head's (stage 2, otherwise None), `losses[k]` head k's; `counters` as `COUNTERS` says."""

    losses: list[HeadLoss | None]
    counters: Tensor


COUNTERS = ("loss_sum", "count", "correct", "full_correct", "full_count", "cond_correct", "cond_count", "missed")
"""Columns of the counters, a float64 tensor [K+1, 8] of sums: add them over micro-batches and ranks, then `metrics`.

Row 0 is the LM head (zeros in stage 1, and in the last five columns always), row k head k. `count`: rows of the loss;
`missed`: rows that are not, since their target is outside `heads.vocab`: wrong ones. `full_count`: positions
where heads 1..k all have targets; `full_correct`: where all of them are right. `cond_count`: positions of `full_count`
where heads 1..k-1 are right; `cond_correct`: where head k is right too, which is `full_correct`.
"""


def metrics(counters: Tensor) -> dict[str, float]:
    """Losses and accuracies of summed counters.

    Args:
        counters: sums over any number of micro-batches and ranks, laid out as `COUNTERS` says.

    Returns:
        `head{k}_loss` (nats per row), `head{k}_acc`, `full_acc_{k}` (heads 1..k right), `cond_acc_{k}` (head k right
        where heads 1..k-1 are) for every k, `acceptance_length = 1 + sum_k full_acc_k` (tokens per step; the 1 is the
        LM head's own token), and `lm_loss`, `lm_acc` where the LM head was counted. A share of nothing is NaN, but 0
        inside `acceptance_length`.
    """
    result: dict[str, float] = {"acceptance_length": 1.0}
    for k, row in enumerate(counters.tolist()):
        sums = dict(zip(COUNTERS, row, strict=True))
        if k == 0:
            if sums["count"]:
                result |= {"lm_loss": sums["loss_sum"] / sums["count"], "lm_acc": sums["correct"] / sums["count"]}
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


class MedusaModel(nn.Module):
    """Backbone under `backbone.`, heads under `heads.`.

    Args:
        backbone: causal language model of transformers; its LM head is replaced, its weights are shared. Where all
            hidden states come from a cache, what stands in for it.
        heads: heads of the same hidden size, vocabulary and dtype.
        stage: 1 freezes the backbone, runs it without a graph and skips the LM head; 2 trains everything.
        loss_impl: `liger`, `torch` or `eager`.
        chunk_mib: memory that one chunk of logits may take, MiB.
        target: what heads learn, see `recipe_sections.LossSpec.target`; all but `label` need stage 1.
        temperature: of the target `distribution`.
    """

    def __init__(
        self,
        backbone: PreTrainedModel | LmHeadAlone,
        heads: MedusaHeads,
        stage: int,
        loss_impl: Impl,
        chunk_mib: int,
        target: Literal["label", "argmax", "distribution"] = "label",
        temperature: float = 1.0,
    ):
        super().__init__()
        assert target == "label" or (stage == 1 and heads.token_map is None and isinstance(backbone, PreTrainedModel))
        if isinstance(backbone, PreTrainedModel):
            use_vocabulary_projection(backbone)
        self.backbone = backbone.requires_grad_(stage == 2)
        self.heads = heads
        self.stage, self.loss_impl, self.chunk_mib = stage, loss_impl, chunk_mib
        self.target, self.temperature = target, temperature

    def train(self, mode: bool = True) -> "MedusaModel":
        """Switch to training; a frozen backbone stays in evaluation mode (no dropout)."""
        super().train(mode)
        if self.stage == 1:
            self.backbone.eval()
        return self

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        position_ids: Tensor,
        states_MH: Tensor | None = None,
        row_R: Tensor | None = None,
        scales_M: Tensor | None = None,
    ) -> MedusaOutput:
        """Loss sums and counters of one micro-batch.

        Args:
            input_ids: LongTensor [B, S].
            labels: LongTensor [B, S], token ids or -100, not shifted.
            position_ids: LongTensor [B, S]; restart at 0 with every document of a sequence.
            states_MH: hidden states of M positions that were computed before; the backbone is not asked then.
            row_R: LongTensor [B*S], which of them a position has.
            scales_M: what to multiply them by.
        """
        if states_MH is None:
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.stage == 2):
                # without mask and cache, transformers keeps documents apart by their position ids
                hidden_BSH = self.backbone.base_model(
                    input_ids=input_ids, position_ids=position_ids, use_cache=False
                ).last_hidden_state
            hidden_RH = hidden_BSH.flatten(0, 1)
        else:
            scaled_MH = states_MH if scales_M is None else states_MH.float() * scales_M[:, None]
            hidden_RH = scaled_MH.to(next(self.heads.parameters()).dtype)
        lm_head: Any = self.backbone.get_output_embeddings()
        first = 0 if self.stage == 2 else 1
        if self.target == "argmax":  # the LM head at t+k predicts the token of head k's label
            lm_rows_N, _ = head_rows(labels, position_ids, 0)
            predicted_N = lm_head(hidden_RH[lm_rows_N], argmax=True, chunk_mib=self.chunk_mib)
            chosen_R = lm_rows_N.new_zeros(len(hidden_RH)).index_put((lm_rows_N,), predicted_N)
        losses: list[HeadLoss | None] = [None] * first
        right: list[Tensor | None] = [None] * first
        for k in range(first, len(self.heads) + 1):
            rows_N, targets_N = head_rows(labels, position_ids, k)
            missed_M = rows_N[:0]
            if k > 0 and self.heads.token_map is not None:
                known_N = self.heads.knows(targets_N)
                missed_M, rows_N, targets_N = rows_N[~known_N], rows_N[known_N], targets_N[known_N]
            learned_N = chosen_R[rows_N + k] if self.target == "argmax" else targets_N
            args = (hidden_RH[rows_N if row_R is None else row_R[rows_N]], learned_N, self.loss_impl, self.chunk_mib)
            teacher: dict[str, Any] = {}
            if self.target == "distribution":
                teacher = {"teacher_NH": hidden_RH[rows_N + k], "temperature": self.temperature}
            loss_sum, predicted_N = (
                lm_head(*args) if k == 0 else self.heads[k - 1](*args, shared_projection=lm_head, **teacher)
            )
            losses.append(HeadLoss(loss_sum, targets_N.new_tensor(len(rows_N)), predicted_N, rows_N, missed_M))
            right.append(predicted_N == targets_N)
        return MedusaOutput(losses, _count(losses, right, labels.numel()))


def _count(losses: list[HeadLoss | None], right: list[Tensor | None], num_positions: int) -> Tensor:
    """Counters as `COUNTERS` says of heads that were right at `right[k]` of their rows."""
    device = losses[-1].rows.device  # type: ignore[union-attr]
    counters = torch.zeros(len(losses), len(COUNTERS), dtype=torch.float64, device=device)
    all_present_R = torch.ones(num_positions, dtype=torch.bool, device=device)
    all_right_R = all_present_R
    for k, (loss, right_N) in enumerate(zip(losses, right, strict=True)):
        if loss is None or right_N is None:
            continue
        counters[k, 0], counters[k, 1], counters[k, 2] = loss.loss_sum.detach(), loss.count, right_N.sum()
        if k == 0:
            continue
        nowhere_R = torch.zeros_like(all_present_R)
        all_present_R = all_present_R & nowhere_R.index_fill(0, torch.cat([loss.rows, loss.missed]), True)
        counters[k, 4], counters[k, 6] = all_present_R.sum(), (all_present_R & all_right_R).sum()
        all_right_R = all_right_R & nowhere_R.index_put((loss.rows,), right_N)
        counters[k, 7] = len(loss.missed)
        counters[k, 3] = counters[k, 5] = (all_present_R & all_right_R).sum()
    return counters
