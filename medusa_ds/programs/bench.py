"""Measure training steps, memory and one head's loss beside the original example; without a recipe, Llama-3-8B.

Every case runs in a fresh process, and every figure comes from this run: the hardware's own limits, our step, the
baselines. Without a recipe, it is Llama-3-8B's shape with random weights; another recipe is measured as it is written.

Example:
    medusa-ds bench --heads 3 --sequence 2048 --impl ours,original
"""

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from medusa_ds.benchmarks.cases import DEFAULT_ZERO, IMPLS, LLAMA3_8B, Case, Impl, matrix
from medusa_ds.benchmarks.processes import Workers
from medusa_ds.benchmarks.report import compare, describe
from medusa_ds.config.parsing import read_json
from medusa_ds.config.recipe import Recipe
from medusa_ds.config.settings import Commas, Positional, ProgramSettings
from medusa_ds.config.types import Count, Stage
from medusa_ds.errors import UserError
from medusa_ds.files import check_writable, explained, write_json


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
    zeros: Commas[str] | None = Field(None, alias="zero", title="NAME")
    """DeepSpeed configs, or `auto`; stage 1 takes the first. Without it, zero2 in stage 1 and zero3 in stage 2."""
    warmup: Count = 3
    """Steps before the measured ones."""
    steps: Count = 10
    """Measured steps."""
    json_file: str = Field("bench.json", alias="json", title="FILE")
    """The report."""
    pictures: str | None = Field(None, title="DIR")
    """Draw it."""
    drawn: Commas[str] | None = Field(None, alias="draw", title="FILE")
    """Reports of earlier runs to draw into --pictures together; nothing is measured."""
    profile: str | None = Field(None, title="DIR")
    """Write a profiler trace of one step a case, and on a GPU say where time goes."""
    timeout_s: Count = Field(1800, alias="timeout", title="S")
    """Seconds of one case; one that takes longer is recorded as failed."""


def run(settings: Settings) -> None:
    """Measure all cases, write the report after each, print it as a table; SIGINT or SIGTERM ends it with what it has.

    Raises:
        UserError: a case that its recipe does not allow, a file cannot be read or written, or not one
            case could be measured.
    """
    for option, place in (("--pictures", settings.pictures), ("--profile", settings.profile)):
        if place:
            check_writable(Path(place), option, directory=True)
    if settings.drawn:
        _draw(_read(settings.drawn), settings.pictures or "pictures")
        return
    check_writable(Path(settings.json_file), "--json")
    planned = _plan(settings)  # every mistake before anything is measured
    lost = sorted(set(settings.impls or []) - {case.impl for case in planned})
    if lost and settings.parts != ["head"]:
        raise UserError(f"--impl: found {lost[0]}, of which these parts, stages and numbers of GPUs have no case")
    report: dict[str, Any] = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "command": sys.argv, "results": []}
    with _stopped_by_signals():
        with closing(Workers(None)) as machine:
            report["machine"] = machine.measure(settings.timeout_s)
        if failure := report["machine"].get("failed"):
            raise UserError(f"bench: the machine could not be measured: {failure}")
        able = _able(settings, report["machine"])
        try:
            _measure(able, settings, report)
        finally:
            if report["results"]:
                print(describe(report), flush=True)
                if settings.pictures:
                    _draw(report, settings.pictures)
    failed = [result for result in report["results"] if "failed" in result]
    if len(failed) == len(report["results"]):
        raise UserError(f"bench: no case could be measured; the first said: {failed[0]['failed']}")


def _measure(cases: list[Case], settings: Settings, report: dict[str, Any]) -> None:
    workers: Workers | None = None
    following: Workers | None = None
    try:
        for case, after in zip(cases, [*cases[1:], None], strict=True):
            workers = following or Workers(case, _trace_file(settings.profile, case))
            # the next ones start while these build their model, so that no one waits for imports
            following = Workers(after, _trace_file(settings.profile, after)) if after else None
            print(case.name, flush=True)
            report["results"].append(asdict(case) | workers.measure(settings.timeout_s))
            workers.close()
            compare(report)
            with explained(f"--json: {settings.json_file}: cannot be written", "name another file"):
                write_json(Path(settings.json_file), report)
    finally:
        for running in filter(None, (workers, following)):
            running.close()


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    def stop(number: int, _: Any) -> None:
        print(f"received {signal.Signals(number).name}: ending with what was measured", file=sys.stderr, flush=True)
        sys.exit(128 + number)

    old = [(number, signal.signal(number, stop)) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        yield
    finally:
        for number, handler in old:
            signal.signal(number, handler)


def _able(settings: Settings, machine: dict[str, Any]) -> list[Case]:
    """Cases that this machine can do; a line for each that it cannot, and for each number of GPUs that it lacks."""
    there = [number for number in settings.gpus if number <= (machine["gpus"] or number)]
    for number in sorted({*settings.gpus} - {*there}):
        print(f"left out, as this machine has {machine['gpus']}: all cases of {number} GPUs", flush=True)
    cases = _plan(settings.model_copy(update={"gpus": there}))
    able = [case for case in cases if case.part == "head" or case.impl in machine["impls"]]
    for case in cases:
        if case not in able:
            print(f"left out, as this machine or its PyTorch cannot: {case.name}", flush=True)
    if not able:
        raise UserError("bench: no case could be measured: this machine can do none of them")
    return able


def _draw(report: dict[str, Any], directory: str) -> None:
    from medusa_ds.benchmarks.pictures import draw

    print("\n".join(f"drew {file}" for file in draw(report, directory)))


def _read(files: list[str]) -> dict[str, Any]:
    """Reports as one: the results of all, the machine of the first."""
    reports = [read_json(Path(file)) for file in files]
    for file, report in zip(files, reports, strict=True):
        if not isinstance(report, dict) or not report.get("results"):
            raise UserError(f"--draw: {file}: no results; name a report of medusa-ds bench")
        if report["machine"]["device"] != reports[0]["machine"]["device"]:
            raise UserError(f"--draw: {file}: found another GPU than in {files[0]}; draw each apart")
    return reports[0] | {"results": [result for report in reports for result in report["results"]]}


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
        parts=settings.parts,
        stages=stages or [1, 2],
        heads=settings.heads,
        sequences=settings.sequences,
        batch=settings.batch,
        impls=settings.impls or IMPLS,
        zeros=settings.zeros,
        warmup=settings.warmup,
        steps=settings.steps,
        gpus=settings.gpus,
    )


def _trace_file(directory: str | None, case: Case) -> Path | None:
    if not directory or case.part == "head":
        return None
    Path(directory).mkdir(parents=True, exist_ok=True)
    name = f"{case.part}_stage{case.stage}_heads{case.heads}_{case.batch}x{case.sequence}_{case.impl}"
    name += f"_{case.gpus}gpus" if case.gpus > 1 else ""
    name += "" if case.zero == DEFAULT_ZERO[case.stage] else f"_{Path(case.zero).stem}"
    return Path(directory).absolute() / f"{name}.json"
