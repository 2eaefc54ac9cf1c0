"""Runs of the worker on one and on two ranks, each started once for all tests."""

import json
from pathlib import Path
from typing import Any

import pytest
from forks import run_forks
from worker import ZEROS

WORKER = Path(__file__).with_name("worker.py")
FAILURES = [(zero, "gradient", "fp32") for zero in ZEROS]
FAILURES += [(zero, "loss", "fp32") for zero in ("zero0", "zero2", "zero3")]
FAILURES += [(zero, "gradient", "bf16") for zero in ("zero0", "zero1", "zero2")]
TARGETS = [(target, lm_head) for target in ("argmax", "distribution") for lm_head in ("own", "shared")]


def run_ranks(world: int, folder: Path, jobs: list[tuple[str, str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Run jobs one after another on `world` processes; returns each rank's results by job name."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    logs = [folder / f"rank{rank}.log" for rank in range(world)]
    statuses = run_forks(WORKER, str(folder), str(folder / "jobs.json"), logs=logs, cwd=folder, timeout=1800)
    assert set(statuses) == {0}, "\n".join(log.read_text()[-4000:] for log in logs)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(world)]


def numbers(values: list[str]) -> list[float]:
    """What the worker wrote as hexadecimal text."""
    return [float.fromhex(value) for value in values]


class Runs:
    """Results and files of the worker's jobs."""

    def __init__(self, folder: Path, ranks: list[dict[str, Any]]) -> None:
        self.folder, self.ranks = folder, ranks

    def __getitem__(self, name: str) -> dict[str, Any]:
        return self.ranks[0][name]


def _target_jobs(*zeros: str) -> list[Any]:
    return [
        (
            f"{zero}-{target}-{lm_head}",
            "trajectory",
            {"zero": zero, "stage": 1, "loss": {"target": target}, "heads": {"lm_head": lm_head}},
        )
        for zero in zeros
        for target, lm_head in TARGETS
    ]


def _start_jobs(*zeros: str) -> list[Any]:
    return [
        (f"{zero}-{target}-stage2", "trajectory", {"zero": zero, "stage": 2, "save": True, "loss": {"target": target}})
        for zero in zeros
        for target in ("argmax", "distribution")
    ]


def _hydra_jobs(*zeros: str) -> list[Any]:
    return [
        (f"{zero}-{stage}-hydra", "trajectory", {"zero": zero, "stage": stage, "heads": {"kind": "hydra", "layers": 2}})
        for zero in zeros
        for stage in (1, 2)
    ]


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Every ZeRO config and stage on two ranks, each trained through and resumed in the middle, and failures."""
    folder = tmp_path_factory.mktemp("two")
    jobs: list[Any] = []
    for zero in ZEROS:
        for stage in (1, 2):
            name = f"{zero}-{stage}"
            jobs.append((name, "trajectory", {"zero": zero, "stage": stage, "save": True}))
            source = {"source": str(folder / name)}
            jobs.append((f"{name}-resumed", "resumed", {"zero": zero, "stage": stage, **source}))
    jobs += [
        (f"{zero}-nan-{where}-{precision}", "not_finite", {"zero": zero, "where": where, "precision": precision})
        for zero, where, precision in FAILURES
    ]
    for zero in ("zero0", "zero1", "zero2", "zero3"):
        whole = {"micro_batch_size": 2} if zero == "zero2" else {}  # one micro-batch: its gradients stay bf16
        arguments = {"zero": zero, "stage": 2, "train": {"precision": "bf16", **whole}}
        jobs.append((f"{zero}-bf16", "trajectory", arguments | {"save": True}))
        jobs.append((f"{zero}-bf16-resumed", "resumed", arguments | {"source": str(folder / f"{zero}-bf16")}))
    jobs += [
        (f"{zero}-layers0", "trajectory", {"zero": zero, "stage": 1, "heads": {"layers": 0}})
        for zero in ("zero2", "zero3")
    ]
    jobs += _hydra_jobs("zero2_offload", "zero3")
    jobs += [(f"zero3-{stage}-whole-layers", "whole_layers", {"stage": stage}) for stage in (1, 2)]
    jobs += [(f"{zero}-left", "left", {"zero": zero}) for zero in ("zero0", "zero2", "zero3")]
    jobs += [(f"{zero}-export", "export", {"zero": zero}) for zero in ("zero2", "zero3")]
    jobs += _target_jobs("zero3") + _start_jobs("zero2_offload", "zero3")
    jobs.append(("zero3-start-export", "export", {"zero": "zero3", "loss": {"target": "distribution"}}))
    jobs.append(("stop", "stop_flag", {}))
    return Runs(folder, run_ranks(2, folder, jobs))


@pytest.fixture(scope="session")
def one_rank(tmp_path_factory: pytest.TempPathFactory, two_ranks: Runs) -> Runs:
    """Some of it on one rank, other cuts of the global batch, and checkpoints of two ranks resumed on one."""
    folder = tmp_path_factory.mktemp("one")
    jobs: list[Any] = []
    for stage in (1, 2):
        jobs.append((f"zero0-{stage}", "trajectory", {"zero": "zero0", "stage": stage}))
        for origin, zero in zip(ZEROS, (*ZEROS[1:], ZEROS[0]), strict=True):
            arguments = {"zero": zero, "stage": stage, "source": str(two_ranks.folder / f"{origin}-{stage}")}
            jobs.append((f"{origin}-{stage}-elsewhere", "resumed", arguments))
        for size in (2, 4):
            arguments = {"zero": "zero0", "stage": stage, "train": {"micro_batch_size": size}}
            jobs.append((f"micro{size}-{stage}", "trajectory", arguments))
    jobs += _target_jobs("zero0") + _start_jobs("zero0") + _hydra_jobs("zero3")
    arguments = {"zero": "zero0", "stage": 2, "source": str(two_ranks.folder / "zero3-distribution-stage2")}
    jobs.append(("start-elsewhere", "resumed", arguments | {"loss": {"target": "distribution"}}))
    return Runs(folder, run_ranks(1, folder, jobs))
