"""What a step measures and how it fails: the parts of `train_batch` that know no DeepSpeed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from medusa_ds.errors import UserError
from medusa_ds.recipe import Recipe

if TYPE_CHECKING:
    from medusa_ds.data.packing import MicroBatch

_MAX_SOURCES = 16  # rows named per rank in an error


@dataclass(frozen=True)
class StepResult:
    """What a step measured, over all ranks.

    `counters`: float64 on the CPU, see `model.medusa.metrics`. `loss`: the weighted sum of mean losses that was
    minimised. `learning_rates`: by group name. `grad_norm`: before clipping. `coefficient`: of the heads' loss.
    `stop`: whether any rank asked to stop.
    """

    counters: torch.Tensor
    loss: float
    learning_rates: dict[str, float]
    grad_norm: float
    coefficient: float
    stop: bool


class NonFiniteError(UserError):
    """A loss or gradient that is not a number, on any rank; raised on all of them, before any weight was changed."""


def sum_over_ranks(
    loss: torch.Tensor, counters: Sequence[torch.Tensor], batches: Sequence[MicroBatch], step: int
) -> tuple[float, torch.Tensor]:
    """Add up what all ranks measured, unless one of them measured something that is not finite.

    Args:
        loss: this rank's share of the loss, float64 scalar.
        counters: of each micro-batch; column 0 holds loss sums.
        batches: the micro-batches, to be named.
        step: their step.

    Returns:
        The loss, and the counters on the CPU.

    Raises:
        NonFiniteError: on every rank, with step, ranks and source rows.
    """
    finite = torch.stack([part[:, 0].isfinite().all() for part in counters])
    local = torch.cat([(~finite).sum().double()[None], loss[None], torch.stack(list(counters)).sum(0).flatten()])
    dist.all_reduce(local)
    bad, total, *_ = local.tolist()
    if bad:
        rows = [batch.sources for batch, fine in zip(batches, finite.tolist(), strict=True) if not fine]
        raise non_finite("the loss", step, rows)
    return total, local[2:].reshape(counters[0].shape).cpu()


def non_finite(what: str, step: int, rows: Sequence[list[list[str]]]) -> NonFiniteError:
    """The error, which every rank makes together: `rows` are this rank's, empty where nothing went wrong."""
    names = [name for sequences in rows for sources in sequences for name in sources]
    answers: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(answers, names[:_MAX_SOURCES] + [f"{len(names)} in all"] * (len(names) > _MAX_SOURCES))
    where = "; ".join(f"rank {rank}: {', '.join(found)}" for rank, found in enumerate(answers) if found)
    return NonFiniteError(
        f"step {step}: {what} is not finite, no weight was changed; rows of the batch: {where or 'none'}; look at "
        "these rows, or lower train.lr or train.max_grad_norm and start from the last checkpoint"
    )


def norm_of(gradients: Sequence[torch.Tensor]) -> float:
    """Global 2-norm, in fp32; NaN or infinite when any gradient is."""
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
    return float(torch.stack(norms).norm()) if norms else math.nan


@contextmanager
def memory_hint(recipe: Recipe) -> Iterator[None]:
    """Turn an out-of-memory error into one that names the settings to change."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        out = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not out and "can't allocate memory" not in str(error):
            raise
        settings = [
            f"train.micro_batch_size (now {recipe.train.micro_batch_size})",
            f"loss.chunk_mib (now {recipe.loss.chunk_mib})",
            f"data.max_length (now {recipe.data.max_length})",
        ]
        more = "train.activation_checkpointing=true or " if recipe.stage == 2 else ""
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        problem = UserError(
            f"out of memory ({reason}); lower {', '.join(settings)}, or use {more}a "
            f"DeepSpeed config of a higher ZeRO stage or with offload (now {recipe.deepspeed})"
        )
        problem.one_rank = dist.is_initialized() and dist.get_world_size() > 1
        raise problem from error
