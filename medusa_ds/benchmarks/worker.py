"""Measures one case in its own process: `python -m medusa_ds.benchmarks.worker CASE RESULT [TRACE]`, JSON files."""

import gc
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from medusa_ds.benchmarks.cases import EPOCHS, ORIGINALS, Case
from medusa_ds.benchmarks.head import measure_head
from medusa_ds.benchmarks.steps import start
from medusa_ds.benchmarks.trace import trace_step
from medusa_ds.data.packing import MicroBatch, Sequences
from medusa_ds.decoding.measure import seconds_of
from medusa_ds.errors import UserError
from medusa_ds.files import write
from medusa_ds.model.rows import count_targets
from medusa_ds.ranks import Ranks, exit_on_user_error
from medusa_ds.training.hidden_cache import count_rows
from medusa_ds.training.loop import ahead
from medusa_ds.training.report import Meter, library_versions, quiet_libraries

GIB = 2**30
NUM_BATCHES = 4


def measure_step(case: Case, trace: Path | None, folder: Path) -> dict[str, Any]:
    """Seconds of every measured step (of the slowest rank), peak memory of a GPU, tokens and model FLOP/s of all.

    Raises:
        UserError: what building the model refuses; out of memory, with that as its cause.
    """
    recipe, rank, on_gpu = case.load_recipe(), Ranks().rank, torch.cuda.is_available()
    started = time.perf_counter()
    training = start(case, recipe, rank, folder)
    step, model, all_steps = training.step, training.model, case.warmup + case.steps
    batches = [training.feed(number) for number in range(NUM_BATCHES)]
    feed: Iterator[MicroBatch] = (batches[number % NUM_BATCHES] for number in range(all_steps))
    if runs_whole := case.part == "epochs" and case.impl not in ORIGINALS:
        assert training.data is not None
        all_steps = EPOCHS * training.data.train.steps_per_epoch(case.batch * case.gpus)
        feed = ahead(training.feed, range(all_steps))
    startup_s = time.perf_counter() - started
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    losses, ends = [], [time.perf_counter()]
    for number, batch in enumerate(feed):
        if number == case.warmup and on_gpu and not runs_whole:
            torch.cuda.reset_peak_memory_stats()
        losses.append(step(batch, number))
        if on_gpu and number in (case.warmup - 1, all_steps - 1):
            torch.cuda.synchronize()
        ends.append(time.perf_counter())  # in between, the host may prepare a step while the GPU ends the last one
    seconds = [after - before for before, after in pairwise(ends)][0 if runs_whole else case.warmup :]
    known_V = None if model.known_V is None else model.known_V.cpu()
    rows = torch.stack([count_targets(b.labels, b.position_ids, case.heads, known_V) for b in batches]).double().mean(0)
    own = {
        "seconds": seconds,
        "startup_s": startup_s,
        "rows": rows.tolist(),
        "tokens": statistics.fmean(batch.input_ids.numel() for batch in batches),
        "peak_allocated_gib": torch.cuda.max_memory_allocated() / GIB if on_gpu else None,
        "peak_reserved_gib": torch.cuda.max_memory_reserved() / GIB if on_gpu else None,
    }
    ranks = Ranks().gather(own)
    context = statistics.fmean(float(batch.position_ids.double().mean()) + 1 for batch in batches)
    result = {**_of_all(ranks), "losses": losses}
    tokens, rows, median = result["tokens"], result.pop("rows"), statistics.median(result["seconds"])
    device = torch.device("cuda" if on_gpu else "cpu")
    flops = Meter(recipe, model, device, 1, 0).flops.total(int(tokens), context, sum(rows[1:]), rows[0])
    result |= {
        "trained_with": training.deepspeed,
        "median_s": median,
        "min_s": min(result["seconds"]),
        "max_s": max(result["seconds"]),
        "supervised": rows[1],
        "tokens_per_s": tokens / median,
        "supervised_tokens_per_s": rows[1] / median,
        "flops": flops,
        "tflops": flops / median / 1e12,
    }
    if case.part == "epochs":
        result |= _epochs(case, training.data.train, result)  # type: ignore[union-attr]
    if trace is not None:
        result["profile"] = trace_step(lambda: step(batches[0], number + 1), model, trace if rank == 0 else None)
    return result


def _of_all(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """Figures of all ranks: each step as long as on the slowest one, the largest memory, the sum of what was done."""
    most = ("startup_s", "peak_allocated_gib", "peak_reserved_gib")
    result = {key: max((rank[key] for rank in ranks if rank[key] is not None), default=None) for key in most}
    result["seconds"] = [max(times) for times in zip(*(rank["seconds"] for rank in ranks), strict=True)]
    result["rows"] = [sum(counts) for counts in zip(*(rank["rows"] for rank in ranks), strict=True)]
    return result | {"tokens": sum(rank["tokens"] for rank in ranks)}


def _epochs(case: Case, sequences: Sequences, result: dict[str, Any]) -> dict[str, Any]:
    """What follows for all epochs, from the loaded process on; the original's are computed from the steps it took."""
    if case.impl in ORIGINALS:
        steps = EPOCHS * math.ceil(len(sequences.rows) / case.batch)
        total_s = result["startup_s"] + steps * result["median_s"]
    else:
        steps, total_s = len(result["seconds"]), result["startup_s"] + sum(result["seconds"])
    supervised = EPOCHS * int(count_rows(sequences, 1).sum())
    return {
        "num_steps": steps,
        "total_s": total_s,
        "supervised": supervised / steps,
        "supervised_tokens_per_s": supervised / total_s,
    }


def measure_machine() -> dict[str, Any]:
    """Hardware, and what it reaches: a large bf16 matrix product (TFLOP/s) and a copy (GB/s read and written)."""
    on_gpu = torch.cuda.is_available()
    device, size = (torch.device("cuda"), 8192) if on_gpu else (torch.device("cpu"), 512)
    left, right = (torch.randn(size, size, device=device).to(torch.bfloat16 if on_gpu else torch.float32) for _ in "ab")
    product_s = statistics.median(seconds_of(lambda: left @ right, 50 if on_gpu else 5, device))
    source = torch.empty((2**31 if on_gpu else 2**24) // 2, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    copy_s = statistics.median(seconds_of(lambda: target.copy_(source), 20 if on_gpu else 3, device))
    impls = ["ours", "eager", "original", "cached", "cached_vocab"]
    if on_gpu and torch.cuda.get_device_capability() >= (8, 9):
        impls += ["ours_fp8", "cached_fp8"]
    if hasattr(torch.nn.functional, "linear_cross_entropy"):
        impls.append("torch_linear_ce")
    return {
        "impls": impls,
        "versions": library_versions(),
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "gpus": torch.cuda.device_count(),
        "memory_gib": torch.cuda.get_device_properties(0).total_memory / GIB if on_gpu else None,
        "matmul_tflops": 2 * size**3 / product_s / 1e12,
        "copy_gb_per_s": 2 * source.nbytes / copy_s / 1e9,
    }


def main(case_file: str, result_file: str, trace_file: str | None = None) -> None:
    """Measure the case of a file, or the machine where it holds none; the first rank of a case writes."""
    rank = Ranks().rank
    quiet_libraries(rank)
    fields = json.loads(Path(case_file).read_text())
    gc.freeze()
    status = 0
    try:
        if not fields:
            result = measure_machine()
        elif fields["part"] == "head":
            result = measure_head(Case(**fields))
        else:
            result = measure_step(Case(**fields), Path(trace_file) if trace_file else None, Path(result_file).parent)
    except (UserError, RuntimeError, MemoryError) as error:
        if not any(isinstance(one, torch.OutOfMemoryError | MemoryError) for one in (error, error.__cause__)):
            raise
        result, rank, status = {"out_of_memory": str(error).splitlines()[0][:200]}, 0, 1
    if rank == 0:
        write(Path(result_file), json.dumps(result))
    if status:
        sys.exit(status)  # other ranks wait for this one


if __name__ == "__main__":
    if not sys.stdin.readline():  # the line that says when; a GPU is another case's until then
        sys.exit("the benchmark has ended")
    with exit_on_user_error():
        main(*sys.argv[1:])
