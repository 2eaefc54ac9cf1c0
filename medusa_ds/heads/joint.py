"""JointModel: backbone and heads of any kind; one micro-batch becomes a loss sum per head.

Losses are sums and counts stay beside them: the one division by a count is the engine's. Accuracies come from the
argmax that the loss returns anyway, so that no logits are kept for them.

Under ZeRO-3 a weight is whole only while the module that owns it is called. So every loss is computed inside the
forward of the module whose weight it needs: heads own their projections, and the backbone's LM head, whose weight may
be tied to the embeddings, is replaced by a `VocabularyProjection` that owns the same parameter. All ranks make the same
calls in the same order, also with no rows.

Shapes: B sequences of a micro-batch, S tokens of a sequence, R = B*S positions, H hidden size, N rows of a head, M
positions that some head learns from, K heads.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from medusa_ds.config.sections import LossSpec
from medusa_ds.heads.base import Heads
from medusa_ds.model.attention import hidden_states, moved
from medusa_ds.model.backbone import vocabulary_projection
from medusa_ds.model.lm_head import LmHeadAlone
from medusa_ds.model.projection import VocabularyProjection
from medusa_ds.model.rows import any_head_rows, head_rows


class Target(NamedTuple):
    """What one head learns from a micro-batch.

    `rows`: indices into the R positions [N]. `labels`: the text's token ids there [N]. `missed`: positions left out,
    since the heads have no row for the token there. `learned`: what the loss takes, token ids [N], or with the target
    `distribution` hidden states [N, H] of the teacher that predicts them.
    """

    rows: Tensor
    labels: Tensor
    missed: Tensor
    learned: Tensor


class HeadLoss(NamedTuple):
    """What one head made of a micro-batch: a scalar with graph, and argmax token ids [N]."""

    loss_sum: Tensor
    predicted: Tensor


class Counters(NamedTuple):
    """Sums by head, each [K+1]: 0 is the LM head (zeros in stage 1, and in `full`, `cond` and `missed` always).

    `count`: rows of the loss; `missed`: rows that are not, since their target is outside `heads.vocab`: wrong ones.
    `full_count`: positions where heads 1..k all have targets; `full_correct`: where all of them are right.
    `cond_count`: positions of `full_count` where heads 1..k-1 are right. `label_loss_sum`: of the LM head alone, in
    evaluation, where its loss is not the labels' cross-entropy: this one.

    They travel as one float64 tensor [K+1, 8], a column each: add it over micro-batches and ranks, and read it with
    `Counters(*tensor.T)` or `metrics`.
    """

    loss_sum: Tensor
    count: Tensor  # type: ignore[assignment]
    correct: Tensor
    full_correct: Tensor
    full_count: Tensor
    cond_count: Tensor
    missed: Tensor
    label_loss_sum: Tensor


class JointOutput(NamedTuple):
    """`losses[0]` is the LM head's (stage 2, otherwise None), `losses[k]` head k's; `counters` see `Counters`."""

    losses: list[HeadLoss | None]
    counters: Tensor


def metrics(counters: Tensor) -> dict[str, float]:
    """Losses and accuracies of `Counters`, summed over any number of micro-batches and ranks.

    Returns:
        `head{k}_loss` (nats per row), `head{k}_acc`, `full_acc_{k}` (heads 1..k right), `cond_acc_{k}` (head k right
        where heads 1..k-1 are) for every k, `acceptance_length = 1 + sum_k full_acc_k` (tokens per step; the 1 is the
        LM head's own token), and where the LM head was counted `lm_loss` (the divergence from the frozen start with
        the target `distribution`), `lm_acc` and, where it was measured beside another loss, `lm_label_loss`, the
        cross-entropy of the labels. A share of nothing is NaN, but 0 inside `acceptance_length`.
    """
    result: dict[str, float] = {"acceptance_length": 1.0}
    for k, row in enumerate(counters.tolist()):
        sums = dict(zip(Counters._fields, row, strict=True))
        if k == 0:
            if sums["count"]:
                result |= {"lm_loss": sums["loss_sum"] / sums["count"], "lm_acc": sums["correct"] / sums["count"]}
            if sums["label_loss_sum"]:
                result["lm_label_loss"] = sums["label_loss_sum"] / sums["count"]
            continue
        result[f"head{k}_loss"] = _share(sums["loss_sum"], sums["count"])
        result[f"head{k}_acc"] = _share(sums["correct"], sums["count"] + sums["missed"])
        result[f"full_acc_{k}"] = _share(sums["full_correct"], sums["full_count"])
        result[f"cond_acc_{k}"] = _share(sums["full_correct"], sums["cond_count"])
        if sums["full_count"]:
            result["acceptance_length"] += sums["full_correct"] / sums["full_count"]
    return result


def _share(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")


def in_backward(
    call: Callable[[Tensor], tuple[Tensor, Tensor]], states_NH: Tensor, owner: nn.Module
) -> tuple[Tensor, Tensor]:
    """A loss whose gradients are made in the backward pass, when it is its turn, and its logits for a second time.

    A loss in chunks makes its gradients in the forward pass, so that those of all heads are there at once.
    """
    start = next(owner.parameters()).new_zeros((), requires_grad=True)  # what the backward pass follows to the loss
    return checkpoint(
        lambda states_NH, _: call(states_NH), states_NH, start, use_reentrant=True, preserve_rng_state=False
    )


class JointModel(nn.Module):
    """Backbone under `backbone.`, heads under `heads.`, the frozen start of a stage 2 that needs it under `start.`.

    Args:
        backbone: causal language model of transformers; its LM head is replaced, its weights are shared; it may be
            None where nobody reads it. Where all hidden states come from a cache, what stands in for the backbone.
        heads: heads of the same hidden size, vocabulary and dtype.
        stage: 1 freezes the backbone, runs it without a graph and skips the LM head; 2 trains everything.
        loss: the recipe's, with an `impl` for the device in place of `auto`.
        start: stage 2, targets other than `label`: a second copy of the backbone, which predicts the targets.

    Attributes:
        one_gradient: stage 1, see `in_backward`; where gradients leave the GPU one by one, to an offloaded optimizer.
    """

    one_gradient = False

    def __init__(
        self,
        backbone: PreTrainedModel | LmHeadAlone,
        heads: Heads,
        stage: int,
        loss: LossSpec,
        start: PreTrainedModel | None = None,
    ):
        super().__init__()
        target = loss.target
        assert loss.impl != "auto"
        assert target == "label" or (heads.token_map is None and isinstance(backbone, PreTrainedModel))
        assert (start is not None) == (stage == 2 and target != "label")
        for model in (backbone, start):
            if isinstance(model, PreTrainedModel) and model.get_output_embeddings() is not None:
                model.set_output_embeddings(vocabulary_projection(model))
        self.backbone = backbone.requires_grad_(stage == 2)
        self.start = None if start is None else start.requires_grad_(False)
        self.heads, self.known_V = heads, heads.known_V
        self.stage, self.target, self.temperature = stage, target, loss.temperature
        self.loss_impl, self.chunk_mib = loss.impl, loss.chunk_mib

    def train(self, mode: bool = True) -> "JointModel":
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
    ) -> JointOutput:
        """Loss sums and counters of one micro-batch.

        Rows are found where the labels are: on the CPU, the host need not wait for the GPU to know how many.

        Args:
            input_ids: LongTensor [B, S].
            labels: LongTensor [B, S], token ids or -100, not shifted; on the CPU or with `input_ids`.
            position_ids: LongTensor [B, S], where the labels are; restart at 0 with every document of a sequence.
            states_MH: hidden states of the M positions that some head learns from, in order, computed before; the
                backbone is not asked then.
            row_R: LongTensor [R], which of them a position has.
            scales_M: what to multiply them by.
            scales: [K+1], what the gradients of the losses are multiplied by, see `loss.linear_cross_entropy`.
        """
        if states_MH is None:
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.stage == 2):
                hidden = hidden_states(self.backbone, input_ids, position_ids)
        else:
            scaled_MH = states_MH if scales_M is None else states_MH.float() * scales_M[:, None]
            hidden = scaled_MH.to(next(self.heads.parameters()).dtype)
        targets = self._choose_targets(hidden, input_ids, labels, position_ids)
        losses: list[HeadLoss | None] = [None]
        if targets[0] is not None:
            losses = [self._loss(0, targets[0], hidden[targets[0].rows], scales)]
        states, row_R = self._states(hidden, row_R, input_ids, labels, position_ids)
        for k, (target, states_MH) in enumerate(zip(targets[1:], states, strict=True), 1):
            assert target is not None
            rows_N = target.rows if row_R is None else row_R[target.rows]
            losses.append(self._loss(k, target, states_MH[rows_N], scales))
        counters = _count(losses, targets, labels.numel())
        if self.start is not None and not self.training:
            assert targets[0] is not None
            lm_head: Any = self.backbone.get_output_embeddings()
            rows_NH, labels_N = hidden[targets[0].rows], targets[0].labels
            label_loss = lm_head.cross_entropy(rows_NH, labels_N, self.loss_impl, self.chunk_mib)[0]
            Counters(*counters.T).label_loss_sum[0] = label_loss.detach()
        return JointOutput(losses, counters)

    def _choose_targets(
        self, hidden_RH: Tensor, input_ids: Tensor, labels: Tensor, position_ids: Tensor
    ) -> list[Target | None]:
        """What the LM head (in stage 2, else None) and every head learn, and where; found while the GPU computes."""
        first = 0 if self.stage == 2 else 1
        rows = [self._rows(labels, position_ids, k) for k in range(first, len(self.heads) + 1)]
        found = [
            Target(rows_N, labels_N, missed_M, labels_N)
            for rows_N, labels_N, missed_M in _moved(rows, input_ids.device)
        ]
        if self.known_V is not None:
            found = [t._replace(learned=self.heads.rows(t.labels)) if k else t for k, t in enumerate(found, first)]
        if self.target != "label":  # the LM head at t+k predicts the token of head k's label
            teacher: Any = self.backbone if self.start is None else self.start
            teacher_RH = hidden_RH
            if self.start is not None:
                with torch.no_grad():
                    teacher_RH = hidden_states(self.start, input_ids, position_ids)
            if self.target == "argmax":
                lm_rows_N = head_rows(labels, position_ids, 0)[0].to(input_ids.device)
                chosen_N = teacher.get_output_embeddings().first_choice(teacher_RH[lm_rows_N], self.chunk_mib)
                teacher_RH = lm_rows_N.new_zeros(len(teacher_RH)).index_put((lm_rows_N,), chosen_N)
            found = [target._replace(learned=teacher_RH[target.rows + k]) for k, target in enumerate(found, first)]
        return [None] * first + found

    def _states(
        self, hidden: Tensor, row_R: Tensor | None, input_ids: Tensor, labels: Tensor, position_ids: Tensor
    ) -> tuple[list[Tensor], Tensor | None]:
        """The states [M, H] that every head reads, and which of them a position has (None: its own)."""
        if not self.heads.sees_tokens:
            return [hidden] * len(self.heads), row_R
        some_R = any_head_rows(labels, position_ids, len(self.heads)).flatten()
        at_M = moved(some_R.nonzero()[:, 0], input_ids.device)
        if row_R is None:
            hidden, row_R = hidden[at_M], moved(some_R.cumsum(0) - 1, input_ids.device)
        ahead_K1 = torch.arange(1, len(self.heads) + 1, device=input_ids.device)[:, None]
        following_KM = input_ids.flatten()[(at_M + ahead_K1).clamp(max=input_ids.numel() - 1)]
        embed: Any = self.backbone.get_input_embeddings()
        return self.heads.states(hidden, following_KM, embed), row_R

    def _loss(self, k: int, target: Target, states_NH: Tensor, scales: Tensor | None) -> HeadLoss:
        """The loss of head k, or with 0 that of the LM head."""
        lm_head: Any = self.backbone.get_output_embeddings()
        loss = partial(self._rows_loss, learned=target.learned, scale=None if scales is None else scales[k])
        if k == 0:
            loss_sum, predicted_N = loss(lm_head, states_NH)
        else:
            call = partial(self.heads[k - 1], lm_head=lm_head, loss=loss)
            alone = self.one_gradient and torch.is_grad_enabled()
            loss_sum, predicted_N = in_backward(call, states_NH, self.heads) if alone else call(states_NH)
            predicted_N = self.heads.tokens(predicted_N)
        return HeadLoss(loss_sum, predicted_N)

    def _rows_loss(
        self, projection: VocabularyProjection, rows_NH: Tensor, learned: Tensor, scale: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if self.target == "distribution":
            teacher: Any = (self.backbone if self.start is None else self.start).get_output_embeddings()
            return projection.divergence(rows_NH, teacher, learned, self.temperature, self.chunk_mib, scale)
        return projection.cross_entropy(rows_NH, learned, self.loss_impl, self.chunk_mib, scale)

    def _rows(self, labels: Tensor, position_ids: Tensor, k: int) -> list[Tensor]:
        """Rows and labels of head k, and the rows left out, whose label has no row in the heads' vocabulary."""
        rows_N, labels_N = head_rows(labels, position_ids, k)
        if k == 0 or self.known_V is None:
            return [rows_N, labels_N, rows_N[:0]]
        known_N = self.known_V.to(labels.device)[labels_N]
        return [rows_N[known_N], labels_N[known_N], rows_N[~known_N]]


def _moved(parts: list[list[Tensor]], device: torch.device) -> list[list[Tensor]]:
    """The same on a device, in one copy that the host does not wait for."""
    flat = [part for head in parts for part in head]
    if flat[0].device == device:
        return parts
    there = moved(torch.cat(flat), device).split([len(part) for part in flat])
    return [list(there[at : at + 3]) for at in range(0, len(flat), 3)]


def _count(losses: list[HeadLoss | None], targets: list[Target | None], num_positions: int) -> Tensor:
    """`Counters` of heads as one tensor."""
    device = losses[-1].predicted.device  # type: ignore[union-attr]
    columns = torch.zeros(len(losses), len(Counters._fields), dtype=torch.float64, device=device)
    sums = Counters(*columns.T)
    all_present_R = torch.ones(num_positions, dtype=torch.bool, device=device)
    all_right_R = all_present_R
    for k, (loss, target) in enumerate(zip(losses, targets, strict=True)):
        if loss is None or target is None:
            continue
        right_N = loss.predicted == target.labels
        sums.loss_sum[k], sums.correct[k] = loss.loss_sum.detach(), right_N.sum()
        sums.count[k].fill_(len(target.rows))  # assigning a number would wait for the GPU
        if k == 0:
            continue
        nowhere_R = torch.zeros_like(all_present_R)
        all_present_R = all_present_R & nowhere_R.index_fill(0, torch.cat([target.rows, target.missed]), True)
        sums.full_count[k], sums.cond_count[k] = all_present_R.sum(), (all_present_R & all_right_R).sum()
        all_right_R = all_right_R & nowhere_R.index_put((target.rows,), right_N)
        sums.missed[k].fill_(len(target.missed))
        sums.full_correct[k] = (all_present_R & all_right_R).sum()
    return columns
