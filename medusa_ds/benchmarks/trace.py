"""Where the time of one step goes, by a trace of torch's profiler.

A kernel belongs to the innermost range in which it was launched: the backbone's or a head's forward (ranges that hooks
open), autograd's backward pass, the optimizer's step (ranges that torch opens), and else to the bookkeeping between
them. Kernels of a collective call are communication wherever they were launched, alone where nothing else runs. Idle
is what no kernel covers.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from medusa_ds.heads.joint import JointModel

_BACKWARD, _OPTIMIZER = "autograd::engine::evaluate_function", "Optimizer.step#"
_NCCL = "communication"
_WORK = ("kernel", "gpu_memcpy", "gpu_memset")


def trace_step(step: Callable[[], Any], model: JointModel, file: Path | None) -> dict[str, Any] | None:
    """Run one step under the profiler, or without it on a rank that has no file.

    Returns:
        `parts`, `kernels` (the largest 25) and `gaps` (idle between two parts): milliseconds by name; `step_ms`. On a
        CPU only `step_ms` is above 0.
    """
    if file is None:
        step()
        return None
    ranges: list[tuple[str, Any]] = [("backbone", model.backbone.base_model)]
    for k, head in enumerate(model.heads, 1):
        ranges.append((f"head {k} blocks", head.blocks))
        if head.projection is not None:
            ranges.append((f"head {k} projection and CE", head.projection))
    names = [name for name, _ in ranges]
    handles = [handle for name, module in ranges for handle in _open_range(name, module)]
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    with profile(activities=activities) as profiler, record_function("whole step"):
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    for handle in handles:
        handle.remove()
    profiler.export_chrome_trace(str(file))
    return summarize(json.loads(file.read_text())["traceEvents"], names)


def _open_range(name: str, module: nn.Module) -> list[Any]:
    opened: list[Any] = []

    def enter(*_: Any) -> None:
        opened.append(record_function(name))
        opened[-1].__enter__()

    def leave(*_: Any) -> None:
        opened.pop().__exit__(None, None, None)

    return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]


def summarize(events: list[dict[str, Any]], names: list[str]) -> dict[str, Any]:
    """Sum the kernels of a chrome trace (`ts` and `dur` in microseconds) by part and by name."""
    complete = [event for event in events if event.get("ph") == "X"]
    ranges = []
    for event in complete:
        if event.get("cat") in ("user_annotation", "cpu_op"):
            name = event["name"]
            part = "backward" if name.startswith(_BACKWARD) else "optimizer" if name.startswith(_OPTIMIZER) else name
            if part in (*names, "backward", "optimizer"):
                ranges.append((event["ts"], event["ts"] + event["dur"], part))
    launches = {
        event["args"]["correlation"]: event["ts"]
        for event in complete
        if event.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in event.get("args", {})
    }
    parts: dict[str, float] = defaultdict(float)
    kernels: dict[str, float] = defaultdict(float)
    busy = []
    for event in complete:
        if event.get("cat") not in _WORK:
            continue
        launched = launches.get(event["args"].get("correlation"), -1)
        inside = [(end - start, part) for start, end, part in ranges if start <= launched <= end]
        part = _NCCL if "nccl" in event["name"].lower() else min(inside)[1] if inside else "bookkeeping"
        parts[part] += event["dur"] / 1e3
        kernels[event["name"][:90]] += event["dur"] / 1e3
        busy.append((event["ts"], event["ts"] + event["dur"], part))
    whole = next(event for event in complete if event["name"] == "whole step" and event["cat"] == "user_annotation")
    gaps: dict[str, float] = defaultdict(float)
    last, before, finish = whole["ts"], "start", whole["ts"] + whole["dur"]
    for start, end, part in [*sorted(busy), (finish, finish, "end")] if busy else []:
        gaps[f"{before} to {part}"] += max(0.0, start - last) / 1e3
        last, before = max(last, end), part
    parts["idle"] = sum(gaps.values())
    if _NCCL in parts:
        others = _covered((start, end) for start, end, part in busy if part != _NCCL)
        alone = _covered((start, end) for start, end, _ in busy) - others
        parts |= {f"{_NCCL}, alone": alone, f"{_NCCL}, beside others": parts.pop(_NCCL) - alone}
    largest = sorted(kernels.items(), key=lambda item: -item[1])[:25]
    return {"step_ms": whole["dur"] / 1e3, "parts": dict(parts), "kernels": dict(largest), "gaps": dict(gaps)}


def _covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Milliseconds that at least one of the intervals (in microseconds) covers."""
    total = last = 0.0
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, last)) / 1e3
        last = max(last, end)
    return total
