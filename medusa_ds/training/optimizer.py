"""Parameter groups and schedules: pure functions of the recipe and the step.

No scheduler object: the learning rate and the coefficient of a step follow from its number alone, so resuming has
nothing to restore and a skipped step cannot shift them (DeepSpeed's schedulers keep a counter of their own).
"""

import math
from typing import Any

from torch import nn

from medusa_ds.config.recipe import LossSpec, TrainSpec

ALONE = 2**26
"""Elements from which on a parameter of the heads is a group of its own."""


def lr_factor(step: int, total_steps: int, train: TrainSpec) -> float:
    """The learning rate of a step, from 0, over its peak.

    Returns:
        `(step + 1) / warmup` while it rises, then 1 falling to `min_lr_ratio` on a line or half a cosine.
    """
    warmup = round(train.warmup_ratio * total_steps)
    if step < warmup:
        return (step + 1) / warmup
    if train.schedule == "constant":
        return 1.0
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    fall = progress if train.schedule == "linear" else 0.5 * (1 - math.cos(math.pi * progress))
    return 1 - (1 - train.min_lr_ratio) * fall


def coefficient(step: int, total_steps: int, loss: LossSpec) -> float:
    """Weight of the heads' loss beside the LM loss in stage 2 (Medusa, arXiv 2401.10774, section 2.2.2).

    Rises from 0 at step 0 to `loss.coefficient` over `coefficient_warmup_ratio` of the steps, on a line or a quarter
    sine; 1 where the recipe names none (stage 1).
    """
    if loss.coefficient is None:
        return 1.0
    warmup = loss.coefficient_warmup_ratio * total_steps
    if loss.coefficient_schedule == "constant" or step >= warmup:
        return loss.coefficient
    risen = step / warmup
    return loss.coefficient * (risen if loss.coefficient_schedule == "linear" else math.sin(math.pi / 2 * risen))


def loss_weights(step: int, total_steps: int, num: int, stage: int, loss: LossSpec) -> list[float]:
    """Weights of the LM loss (index 0) and of heads 1..num: stage 1 `decay^k`, stage 2 `coefficient * decay^k`."""
    heads = coefficient(step, total_steps, loss)
    return [1.0 if stage == 2 else 0.0] + [heads * loss.decay**k for k in range(1, num + 1)]


def parameter_groups(model: nn.Module, train: TrainSpec) -> list[dict[str, Any]]:
    """Optimizer groups: heads and backbone, each with and without weight decay.

    `model` has submodules `heads` and `backbone`; trainable is what requires a gradient. Biases and norms, that is,
    parameters of fewer than two dimensions, have no weight decay.

    Returns:
        Groups that are not empty, each with `name` (`heads`, `heads_no_decay`, ...) and `lr_scale`, its learning rate
        over that of the backbone. A head's large projection has a group of its own, under the same name: ZeRO 1 and 2
        make the fp32 gradient of one group at a time, and need not copy a single tensor to flatten the group. The
        rates themselves are 0 until a step sets them: some of DeepSpeed's optimizers take a step while they are made.
    """
    groups: dict[str, dict[str, Any]] = {}
    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        part = name.split(".", 1)[0]
        assert part in ("heads", "backbone"), name
        shape = getattr(param, "ds_shape", param.shape)  # ZeRO-3 leaves an empty tensor behind
        scale = (train.lr_multiplier or 1.0) if part == "heads" else 1.0
        key = part if len(shape) >= 2 else f"{part}_no_decay"
        decay = train.weight_decay if len(shape) >= 2 else 0.0
        new = {"params": [], "name": key, "lr": 0.0, "lr_scale": scale, "weight_decay": decay}
        alone = part == "heads" and math.prod(shape) >= ALONE
        groups.setdefault(name if alone else key, new)["params"].append(param)
    return list(groups.values())
