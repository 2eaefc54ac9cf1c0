"""The step of Liger-Kernel's `examples/medusa` with its mistakes corrected: the baseline, as a Trainer would run it.

Pure bf16 weights and AdamW states (torch's fused kernel), no DeepSpeed, Liger's layers in the backbone. Residual blocks
are applied, every position goes through every head, one call of Liger's fused linear cross-entropy a head with its
defaults, losses are means weighted by the decay. Rows require a gradient, without which Liger leaves the weights out.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from medusa_ds.config.recipe import Recipe
from medusa_ds.data.packing import MicroBatch
from medusa_ds.errors import UserError
from medusa_ds.heads.joint import JointModel
from medusa_ds.training.optimizer import loss_weights, lr_factor

TOTAL_STEPS = 10**6
"""Of the schedules, which no benchmark reaches the end of."""

LossFunction = Callable[[Tensor, Tensor, Tensor], Tensor]


def mean_loss(impl: str, device: torch.device) -> LossFunction:
    """Mean cross-entropy of `(weight_VH, rows_NH, targets_N)`, targets of -100 left out."""
    if impl == "torch_linear_ce":
        return lambda weight, rows, targets: torch_linear_ce(rows, weight, targets, "mean")
    if device.type == "cuda":
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss  # needs Triton: not on a CPU

        return LigerFusedLinearCrossEntropyLoss()
    return lambda weight, rows, targets: nn.functional.cross_entropy((rows @ weight.T).float(), targets)


def torch_linear_ce(rows_NH: Tensor, weight_VH: Tensor, targets_N: Tensor, reduction: str) -> Tensor:
    """PyTorch's own fused loss in its chunked form.

    Raises:
        UserError: the installed PyTorch has none.
    """
    if not hasattr(nn.functional, "linear_cross_entropy"):
        raise UserError(f"torch_linear_ce: PyTorch {torch.__version__} has no linear_cross_entropy; 2.13 has")
    options = nn.LinearCrossEntropyOptions()
    return nn.functional.linear_cross_entropy(rows_NH, weight_VH, targets_N, reduction=reduction, options=options)


class OriginalStep:
    """Trains a `JointModel`'s weights in the original's way, by `original` or `torch_linear_ce`.

    The weights, gradients and optimizer states have the model's dtype; of the recipe it takes learning rate, clipping
    and decay.
    """

    def __init__(self, recipe: Recipe, model: JointModel, impl: str) -> None:
        self.recipe, self.model, train = recipe, model, recipe.train
        self.params = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.device = self.params[0].device
        self.loss = mean_loss(impl, self.device)
        self.optimizer = torch.optim.AdamW(
            self.params,
            lr=train.lr,
            betas=(train.betas[0], train.betas[1]),
            eps=train.eps,
            weight_decay=train.weight_decay,
            fused=self.device.type == "cuda",
        )

    def __call__(self, batch: MicroBatch, step: int) -> float:
        """One step; returns its loss."""
        model, ids, labels = self.model.train(), batch.input_ids.to(self.device), batch.labels.to(self.device)
        with torch.set_grad_enabled(self.recipe.stage == 2):
            hidden_BSH = model.backbone.base_model(input_ids=ids, use_cache=False).last_hidden_state
        weights = loss_weights(step, TOTAL_STEPS, len(model.heads), self.recipe.stage, self.recipe.loss)
        total: Any = 0.0
        for k in range(0 if self.recipe.stage == 2 else 1, len(weights)):
            rows_NH = hidden_BSH[:, : -(k + 1)].flatten(0, 1)
            head: Any = model.heads[k - 1] if k else None
            rows_NH = head.blocks(rows_NH) if head is not None else rows_NH
            rows_NH = rows_NH if rows_NH.requires_grad else rows_NH.detach().requires_grad_()
            owner: Any = (head.projection if head is not None else None) or model.backbone.get_output_embeddings()
            with record_function(f"head {k} projection and CE"):
                loss = self.loss(owner.weight, rows_NH, labels[:, k + 1 :].flatten())
            total = total + weights[k] * loss
        total.backward()
        if self.recipe.train.max_grad_norm:
            nn.utils.clip_grad_norm_(self.params, self.recipe.train.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.train.lr * lr_factor(step, TOTAL_STEPS, self.recipe.train)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(total.detach())
