"""Measures one case in a process of its own: `python -m medusa_ds.benchmark.worker CASE RESULT [TRACE]`, JSON files."""

import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from medusa_ds.benchmark.batches import make_batches
from medusa_ds.benchmark.cases import Case
from medusa_ds.benchmark.head import measure_head
from medusa_ds.benchmark.original import TOTAL_STEPS, OriginalStep
from medusa_ds.benchmark.trace import trace_step
from medusa_ds.data.packing import MicroBatch
from medusa_ds.errors import UserError, exit_on_user_error
from medusa_ds.model.medusa import MedusaModel
from medusa_ds.model.rows import count_targets
from medusa_ds.recipe import Recipe
from medusa_ds.training.build import build_model
from medusa_ds.training.engine import MedusaEngine
from medusa_ds.training.report import Meter, library_versions, quiet_libraries

Step = Callable[[MicroBatch, int], float]
GIB = 2**30


def make_step(case: Case, recipe: Recipe) -> tuple[Step, MedusaModel]:
    """The step of an implementation, which returns its loss, and the model that it trains."""
    if case.impl in ("original", "torch_linear_ce"):
        on_gpu = torch.cuda.is_available()
        device = torch.device("cuda" if on_gpu else "cpu")
        dtype = torch.bfloat16 if on_gpu and recipe.train.precision != "fp32" else torch.float32
        model = build_model(recipe, dtype, device, None, lambda _: nullcontext())
        return OriginalStep(recipe, model, case.impl), model
    engine = MedusaEngine(recipe, TOTAL_STEPS)
    return lambda batch, step: engine.train_batch([batch], step).loss, engine.model


def measure_step(case: Case, trace: Path | None) -> dict[str, Any]:
    """Seconds of every measured step, peak memory, tokens and model FLOP/s.

    Raises:
        UserError: what building the model refuses; out of memory, with that as its cause.
    """
    recipe = case.load_recipe()
    started = time.perf_counter()
    step, model = make_step(case, recipe)
    batches = make_batches(case, recipe, model.heads.vocab_size)
    on_gpu = torch.cuda.is_available()
    startup_s = time.perf_counter() - started
    losses = [step(batches[index % len(batches)], index) for index in range(case.warmup)]
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds, number = [], case.warmup
    for number in range(case.warmup, case.warmup + case.steps):
        _synchronize()
        started = time.perf_counter()
        losses.append(step(batches[number % len(batches)], number))
        _synchronize()
        seconds.append(time.perf_counter() - started)
    rows = torch.stack([count_targets(b.labels, b.position_ids, case.heads) for b in batches]).double().mean(0).tolist()
    tokens = statistics.fmean(batch.input_ids.numel() for batch in batches)
    context = statistics.fmean(float(batch.position_ids.double().mean()) + 1 for batch in batches)
    device = torch.device("cuda" if on_gpu else "cpu")
    flops = Meter(recipe, model, device, 1, 0).flops.total(int(tokens), context, sum(rows[1:]), rows[0])
    median = statistics.median(seconds)
    result = {
        "seconds": seconds, "median_s": median, "min_s": min(seconds), "max_s": max(seconds), "losses": losses,
        "startup_s": startup_s, "tokens": tokens, "supervised": rows[1], "tokens_per_s": tokens / median,
        "supervised_tokens_per_s": rows[1] / median, "flops": flops, "tflops": flops / median / 1e12,
        "peak_allocated_gib": torch.cuda.max_memory_allocated() / GIB if on_gpu else None,
        "peak_reserved_gib": torch.cuda.max_memory_reserved() / GIB if on_gpu else None,
    }  # fmt: skip
    if trace is not None:
        result["profile"] = trace_step(lambda: step(batches[0], number + 1), model, trace)
    return result


def measure_machine() -> dict[str, Any]:
    """Hardware, and what it reaches: a large bf16 matrix product (TFLOP/s) and a copy (GB/s read and written)."""
    on_gpu = torch.cuda.is_available()
    device, size = ("cuda", 8192) if on_gpu else ("cpu", 512)
    left, right = (torch.randn(size, size, device=device).to(torch.bfloat16 if on_gpu else torch.float32) for _ in "ab")
    product_s = _best(lambda: left @ right, 50 if on_gpu else 5)
    source = torch.empty((2**31 if on_gpu else 2**24) // 2, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    copy_s = _best(lambda: target.copy_(source), 20 if on_gpu else 3)
    impls = ["ours", "eager", "original"]
    if on_gpu and torch.cuda.get_device_capability() >= (8, 9):
        impls.append("ours_fp8")
    if hasattr(torch.nn.functional, "linear_cross_entropy"):
        impls.append("torch_linear_ce")
    return {
        "impls": impls,
        "versions": library_versions(),
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "memory_gib": torch.cuda.get_device_properties(0).total_memory / GIB if on_gpu else None,
        "matmul_tflops": 2 * size**3 / product_s / 1e12,
        "copy_gb_per_s": 2 * source.nbytes / copy_s / 1e9,
    }


def _best(function: Callable[[], Any], repeats: int) -> float:
    """Median seconds of one call, each timed alone."""
    seconds = []
    for _ in range(repeats + 3):
        _synchronize()
        started = time.perf_counter()
        function()
        _synchronize()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[3:])


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _out_of_memory(error: BaseException) -> bool:
    causes = (error, error.__cause__)
    return any(isinstance(one, torch.OutOfMemoryError | MemoryError) for one in causes)


def main(case_file: str, result_file: str, trace_file: str | None = None) -> None:
    """Measure the case of a file, or the machine where it holds none."""
    quiet_libraries(0)
    fields = json.loads(Path(case_file).read_text())
    gc.freeze()
    try:
        if not fields:
            result = measure_machine()
        elif fields["part"] == "head":
            result = measure_head(Case(**fields))
        else:
            result = measure_step(Case(**fields), Path(trace_file) if trace_file else None)
    except (UserError, RuntimeError, MemoryError) as error:
        if not _out_of_memory(error):
            raise
        result = {"out_of_memory": str(error).splitlines()[0][:200]}
    Path(result_file).write_text(json.dumps(result))


if __name__ == "__main__":
    with exit_on_user_error():
        main(*sys.argv[1:])
