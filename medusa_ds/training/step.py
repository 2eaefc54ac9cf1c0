"""What a step measures and how it fails: the parts of `train_batch` that know no DeepSpeed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from medusa_ds.config.recipe import Recipe
from medusa_ds.errors import UserError
from medusa_ds.ranks import Ranks

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


class StepLeftError(Exception):
    """A rank was asked to stop and the step would have taken too long; weights are those of the step before."""


class Sums:
    """Float64 tensors by name, laid out as one, `flat`, for one call of all ranks and one copy to the host."""

    def __init__(self, **parts: torch.Tensor) -> None:
        self.shapes = {name: part.shape for name, part in parts.items()}
        self.flat = torch.cat([part.double().flatten() for part in parts.values()])
        self._event: torch.cuda.Event | None = None

    def __getitem__(self, name: str) -> torch.Tensor:
        parts = self.flat.split([shape.numel() for shape in self.shapes.values()])
        return dict(zip(self.shapes, parts, strict=True))[name].view(self.shapes[name])

    def to_host(self) -> Sums:
        """Set off for the CPU, behind what was launched before and not what comes after; see `wait`."""
        on_gpu, self.flat = self.flat.is_cuda, self.flat.to("cpu", non_blocking=True)
        if on_gpu:
            self._event = torch.cuda.Event()
            self._event.record()
        return self

    def wait(self) -> Sums:
        """Wait until they are on the CPU."""
        if self._event is not None:
            self._event.synchronize()
        return self


def non_finite(what: str, step: int, rows: Iterable[list[list[str]]]) -> NonFiniteError:
    """The error, which every rank makes together: `rows` are this rank's, empty where nothing went wrong.

    It counts steps from 1, as all that users see does, and `step` from 0.
    """
    names = [name for sequences in rows for sources in sequences for name in sources]
    answers = Ranks().gather(names[:_MAX_SOURCES] + [f"{len(names)} in all"] * (len(names) > _MAX_SOURCES))
    where = "; ".join(f"rank {rank}: {', '.join(found)}" for rank, found in enumerate(answers) if found)
    return NonFiniteError(
        f"step {step + 1}: {what} is not finite, no weight was changed; rows of the batch: {where or 'none'}; look at "
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

    `gradients` are this rank's parts; all ranks' parts together hold each gradient once. A `max_norm` of 0 clips
    nothing, and where `bad` is above 0 nothing changes for another reason.

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
        raise UserError(
            f"out of memory ({reason}); lower {', '.join(settings)}, or use {more}a "
            f"DeepSpeed config of a higher ZeRO stage or with offload (now {recipe.deepspeed})",
            one_rank=Ranks().size > 1,
        ) from error
