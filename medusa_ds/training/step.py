"""What a step measures and how it fails: the parts of `train_batch` that know no DeepSpeed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from medusa_ds.config.recipe import Recipe
from medusa_ds.errors import UserError
from medusa_ds.heads.joint import Counters

_MAX_SOURCES = 16  # rows named per rank in an error


@dataclass(frozen=True)
class StepResult:
    """What a step measured, over all ranks.

    `counters`: float64 on the CPU, see `heads.joint.Counters`. `loss`: the weighted sum of mean losses that was
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
    loss: torch.Tensor, counters: Sequence[torch.Tensor], stop: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add up what all ranks measured, without waiting for it.

    Args:
        loss: this rank's share of the loss, float64 scalar.
        counters: of each micro-batch, see `heads.joint.Counters`.
        stop: above 0 where this rank was asked to stop.

    Returns:
        Sums, float64: micro-batches whose loss is not finite, ranks asked to stop, loss, counters; and which
        micro-batches of this rank are finite.
    """
    finite = torch.stack([Counters(*part.T).loss_sum.isfinite().all() for part in counters])
    sums = torch.cat([(~finite).sum()[None], stop[None], loss[None], torch.stack(list(counters)).sum(0).flatten()])
    dist.all_reduce(sums)
    return sums, finite


class Early:
    """Numbers on their way from the GPU, behind what was launched before them and not what comes after."""

    def __init__(self, numbers: torch.Tensor) -> None:
        self._numbers = numbers.to("cpu", non_blocking=True)
        self._event = torch.cuda.Event() if numbers.is_cuda else None
        if self._event is not None:
            self._event.record()

    def get(self) -> torch.Tensor:
        """Wait for them."""
        if self._event is not None:
            self._event.synchronize()
        return self._numbers


def checked(
    sums: torch.Tensor, finite: torch.Tensor, sources: Sequence[list[list[str]]], step: int
) -> tuple[float, torch.Tensor, bool]:
    """Loss, counters (on the CPU) and whether to stop, of `sum_over_ranks`.

    Raises:
        NonFiniteError: on every rank, with step, ranks and source rows, when a loss is not finite on any of them.
    """
    values = sums.cpu()
    if values[0]:
        rows = [found for found, fine in zip(sources, finite.tolist(), strict=True) if not fine]
        raise non_finite("the loss", step, rows)
    return float(values[2]), values[3:].reshape(-1, len(Counters._fields)), bool(values[1])


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


def norm_of(gradients: Iterable[torch.Tensor]) -> torch.Tensor:
    """2-norm over all of them, an fp32 scalar; NaN or infinite when any gradient is."""
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
    return torch.stack(norms).norm()


def clip(
    optimizer: torch.optim.Optimizer, gradients: Iterable[torch.Tensor], max_norm: float, bad: torch.Tensor
) -> torch.Tensor:
    """Have a fused AdamW clip by the global norm in its next step, and change nothing if the norm is not finite.

    Its kernel divides by `grad_scale` and does nothing where `found_inf` is 1, as `torch.amp.GradScaler` uses it, so
    that neither takes a pass over the gradients, and the host need not wait for the norm.

    Args:
        optimizer: PyTorch's AdamW with `fused=True`.
        gradients: this rank's parts; all ranks' parts together hold each gradient once.
        max_norm: 0 for no clipping.
        bad: above 0 where nothing shall change for another reason.

    Returns:
        The norm over all ranks, before clipping.
    """
    square = norm_of(gradients).square()
    dist.all_reduce(square)
    norm = square.sqrt()
    scale = ((norm + 1e-6) / max_norm).clamp(min=1.0) if max_norm else torch.ones_like(norm)
    optimizer.grad_scale = scale  # type: ignore[attr-defined]
    optimizer.found_inf = (~norm.isfinite() | (bad > 0)).float()  # type: ignore[attr-defined]
    return norm


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
