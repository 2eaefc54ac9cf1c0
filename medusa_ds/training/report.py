"""What a run tells: progress on rank 0, a JSON line a step in `metrics.jsonl`, less noise from other libraries."""

import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from medusa_ds import files
from medusa_ds.config.recipe import Recipe
from medusa_ds.data.packing import MicroBatch
from medusa_ds.heads.joint import Counters, JointModel, metrics
from medusa_ds.model.attention import base_model
from medusa_ds.progress import LINE_EVERY_S
from medusa_ds.training.flops import active_parameters, step_flops
from medusa_ds.training.gpus import peak_tflops
from medusa_ds.training.step import StepResult


def quiet_libraries(rank: int) -> None:
    """Silence what users cannot act on: other ranks' logs, bars where there is no terminal, DeepSpeed's info lines."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(torch|deepspeed|transformers)\b.*")
    for name in ("DeepSpeed", "deepspeed", "transformers", "datasets", "torch.distributed", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR if rank else logging.WARNING)
    logging.getLogger("liger_kernel").setLevel(logging.ERROR)  # it tells which kernels it has not
    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()
    if rank or not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
        datasets.disable_progress_bars()


def library_versions() -> dict[str, str | None]:
    """Versions of this package and of those that a run's figures depend on; None where one is not installed."""
    versions: dict[str, str | None] = {}
    for name in ("medusa-ds", "torch", "deepspeed", "transformers", "liger-kernel", "datasets", "triton"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def tell(text: str) -> None:
    """Print a line; nothing more where the reader has gone, as `| tee` has at a Ctrl-C while a checkpoint is due."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Report:
    """Progress and metrics of a run in its `output`; every method does nothing on ranks other than 0.

    Lines of later steps than `first_step`, the steps done before, belong to lost work and are removed from
    `metrics.jsonl`.
    """

    def __init__(self, output: Path, rank: int, total_steps: int, first_step: int) -> None:
        self.active, self._started = rank == 0, time.monotonic()
        if not self.active:
            return
        self.file = output / "metrics.jsonl"
        if self.file.exists():
            lines = self.file.read_text(errors="replace").splitlines() if first_step else []
            kept = [line for line in lines if _step_of(line) <= first_step]
            files.write(self.file, *(line + "\n" for line in kept))
        self._stream = open(self.file, "a", encoding="utf-8")  # noqa: SIM115 - open for the whole run
        self._bar = tqdm(total=total_steps, initial=first_step, unit="step", disable=not sys.stderr.isatty())
        self._total, self._first = total_steps, first_step
        self._printed = self._started

    @property
    def seconds(self) -> float:
        """Since the start of this launch."""
        return time.monotonic() - self._started

    def say(self, text: str) -> None:
        """A line for the user."""
        if self.active:
            self._bar.clear()
            tell(text)
            self._bar.refresh()

    def record(self, values: dict[str, Any]) -> None:
        """Append a JSON line; NaN and infinities become null, so that every line is JSON."""
        if self.active:
            self._stream.write(json.dumps(files.with_nulls(values)) + "\n")
            self._stream.flush()

    def step(self, step: int, values: dict[str, Any]) -> None:
        """Record that a step, counted from 1, is done, and show its loss, acceptance length and speed."""
        if not self.active:
            return
        self.record({"kind": "train", "step": step, **values})
        shown = (
            f"loss {values['loss']:.4f}, acceptance length {values['acceptance_length']:.3f}, "
            f"{values['tokens_per_s']:,.0f} tokens/s"
        )
        self._bar.set_postfix_str(shown, refresh=False)
        self._bar.update(step - self._bar.n)
        now = time.monotonic()
        if self._bar.disable and (now - self._printed > LINE_EVERY_S or step in (self._first + 1, self._total)):
            self._printed = now
            left_s = (now - self._started) / (step - self._first) * (self._total - step)
            tell(f"step {step}/{self._total}: {shown}, {tqdm.format_interval(left_s)} left")

    def close(self) -> None:
        """End the bar and the file."""
        if self.active:
            self._bar.close()
            self._stream.close()


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return sys.maxsize  # a line cut off by a kill


def heads_table(before: dict[str, float], after: dict[str, float], num: int) -> str:
    """Held-out losses and accuracies by the first validation and the last one, a row a head."""
    lines = ["held-out        loss             accuracy         heads 1..k right"]
    rows = [("LM head", "lm_loss", "lm_acc", "")] if "lm_loss" in after else []
    rows += [("LM, labels", "lm_label_loss", "", "")] if "lm_label_loss" in after else []
    rows += [(f"head {k}", f"head{k}_loss", f"head{k}_acc", f"full_acc_{k}") for k in range(1, num + 1)]
    for name, loss, accuracy, full in rows:
        cells = [f"{before[loss]:6.3f} -> {after[loss]:6.3f}"]
        cells += [f"{before[share]:5.3f} -> {after[share]:5.3f}" for share in (accuracy, full) if share]
        lines.append(f"  {name:<10}" + "   ".join(cells))
    lines.append(
        f"acceptance length (chain, teacher-forced): {before['acceptance_length']:.3f} -> "
        f"{after['acceptance_length']:.3f} tokens per step"
    )
    return "\n".join(lines)


class Meter:
    """Turns a step's result and time into its line of `metrics.jsonl`, of this rank's training among `world_size`.

    `mean_context`: tokens that a position sees on average, half a conversation.
    """

    def __init__(
        self, recipe: Recipe, model: JointModel, device: torch.device, world_size: int, mean_context: float
    ) -> None:
        config = model.backbone.config.get_text_config()
        self.flops = step_flops(recipe, config, active_parameters(base_model(model.backbone), config))
        self.device, self.world_size, self.mean_context = device, world_size, mean_context
        self.peak = peak_tflops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None

    def values(self, result: StepResult, micro_batches: Sequence[MicroBatch], seconds: float) -> dict[str, Any]:
        """Losses and accuracies, rates, gradient norm, speeds, MFU and memory of a step of so many seconds.

        `micro_batches` are this rank's; every rank has as many tokens.
        """
        rows = Counters(*result.counters.T).count.tolist()
        tokens = sum(batch.input_ids.numel() for batch in micro_batches) * self.world_size
        flops = self.flops.total(tokens, self.mean_context, sum(rows[1:]), rows[0])
        tflops = flops / seconds / self.world_size / 1e12
        values = {
            "loss": result.loss,
            **metrics(result.counters),
            **{f"lr_{name}": rate for name, rate in result.learning_rates.items()},
            "coefficient": result.coefficient,
            "grad_norm": result.grad_norm,
            "seconds": seconds,
            "tokens_per_s": tokens / seconds,
            "supervised_tokens_per_s": max(rows) / seconds,
            "tflops_per_rank": tflops,
            "mfu": tflops / self.peak if self.peak else None,
        }
        if self.device.type == "cuda":
            values["peak_allocated_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
            values["peak_reserved_gib"] = torch.cuda.max_memory_reserved(self.device) / 2**30
        return values
