"""Measure training steps, memory and one head's loss beside the original example; without a recipe, Llama-3-8B.

Every case runs in a fresh process, and every figure comes from this run: the hardware's own limits, our step, the
baselines. Without a recipe, it is Llama-3-8B's shape with random weights; another recipe is measured as it is written.

Example:
    medusa-ds bench --heads 3 --sequence 2048 --impl ours,original
"""

import json
import sys
import time
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from medusa_ds.benchmarks.cases import IMPLS, LLAMA3_8B, Case, Impl, matrix
from medusa_ds.benchmarks.processes import Workers
from medusa_ds.benchmarks.report import compare, describe
from medusa_ds.config.recipe import Recipe
from medusa_ds.config.settings import Commas, Positional, ProgramSettings
from medusa_ds.config.types import Count, Stage
from medusa_ds.errors import UserError


class Settings(ProgramSettings):
    """What the command line says."""

    recipe: Positional[str | None] = None
    """Recipe file or name; without it, Llama-3-8B's shape with random weights."""
    overrides: Positional[list[str]] = []
    """Dotted overrides, as in loss.chunk_mib=512."""
    parts: Commas[Literal["step", "head", "chat", "epochs"]] = Field(["step"], alias="part", title="A")
    """`step`, `head` (its loss alone), `chat`, `epochs`."""
    stages: Commas[Stage] | None = Field(None, alias="stage")
    """Without it, the recipe's, or 1 and 2."""
    heads: Commas[Count] = [3, 5]
    """Numbers of heads."""
    sequences: Commas[Count] = Field([1024, 2048, 4096, 8192], alias="sequence")
    """Sequence lengths."""
    batch: Count = 6
    """Sequences of a step on each GPU."""
    gpus: Commas[Count] = [1]
    """Numbers of GPUs, a rank on each."""
    impls: Commas[Impl] | None = Field(None, alias="impl", title="A")
    """`ours`, `ours_fp8`, `eager`, `cached`, `cached_vocab`, `cached_fp8`, `original` or `torch_linear_ce`; without it,
    all that the machine can do."""
    zero: str | None = Field(None, title="NAME")
    """DeepSpeed config; zero2 in stage 1, zero3 in stage 2."""
    warmup: Count = 3
    """Steps before the measured ones."""
    steps: Count = 10
    """Measured steps."""
    json_file: str = Field("bench.json", alias="json", title="FILE")
    """The report."""
    pictures: str | None = Field(None, title="DIR")
    """Draw it."""
    profile: str | None = Field(None, title="DIR")
    """Write a profiler trace of one step a case, and say where time goes."""
    timeout_s: Count = Field(1800, alias="timeout", title="S")
    """Seconds of one case; one that takes longer is recorded as failed."""


def run(settings: Settings) -> None:
    """Measure all cases, write the report after each, print it as a table.

    Raises:
        UserError: a case that its recipe does not allow, a file cannot be written, or not one
            case could be measured.
    """
    cases, json_file, pictures = _plan(settings), settings.json_file, settings.pictures
    trace, timeout_s = settings.profile, settings.timeout_s
    _write(json_file, {})
    report: dict[str, Any] = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "command": sys.argv, "results": []}
    machine = Workers(None)
    report["machine"] = machine.measure(timeout_s)
    machine.close()
    if failure := report["machine"].get("failed"):
        raise UserError(f"bench: the machine could not be measured: {failure}")
    able = [case for case in cases if case.part == "head" or case.impl in report["machine"]["impls"]]
    for case in cases:
        if case not in able:
            print(f"left out, as this machine or its PyTorch cannot: {case.name}", flush=True)
    following: Workers | None = None
    try:
        for case, after in zip(able, [*able[1:], None], strict=True):
            workers = following or Workers(case, _trace_file(trace, case))
            # the next ones start while these build their model, so that no one waits for imports
            following = Workers(after, _trace_file(trace, after)) if after else None
            print(case.name, flush=True)
            report["results"].append(case.to_json() | workers.measure(timeout_s))
            workers.close()
            _write(json_file, report)
    finally:
        if following:
            following.close()
    compare(report)
    _write(json_file, report)
    print(describe(report))
    if pictures:
        from medusa_ds.benchmarks.pictures import draw

        print("\n".join(f"drew {file}" for file in draw(report, pictures)))
    failed = [result for result in report["results"] if "failed" in result]
    if failed and len(failed) == len(report["results"]):
        raise UserError(f"bench: no case could be measured; the first said: {failed[0]['failed']}")


def _plan(settings: Settings) -> list[Case]:
    recipe, overrides, stages = settings.recipe, settings.overrides, settings.stages
    if recipe is not None and "=" in recipe:
        overrides, recipe = [recipe, *overrides], None
    if recipe is None:
        recipe, overrides = "llama3_8b_stage1", [*LLAMA3_8B, *overrides]
    elif not stages:
        stages = [Recipe.load(recipe, overrides, planning=True).stage]
    return matrix(
        recipe,
        tuple(overrides),
        settings.parts,
        stages or [1, 2],
        settings.heads,
        settings.sequences,
        settings.batch,
        settings.impls or [*IMPLS],
        settings.zero,
        settings.warmup,
        settings.steps,
        settings.gpus,
    )


def _trace_file(directory: str | None, case: Case) -> Path | None:
    if not directory or case.part == "head":
        return None
    Path(directory).mkdir(parents=True, exist_ok=True)
    name = f"{case.part}_stage{case.stage}_heads{case.heads}_{case.batch}x{case.sequence}_{case.impl}"
    name += f"_{case.gpus}gpus" if case.gpus > 1 else ""
    return Path(directory).absolute() / f"{name}.json"


def _write(file: str, report: dict[str, Any]) -> None:
    try:
        Path(file).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--json: {file}: cannot be written ({error.strerror}); name another file") from None
