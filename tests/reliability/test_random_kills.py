"""SIGKILL at random moments, of one rank, all, the launcher or the runner: the losses are those of no kill."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest
from support import Run, launch, losses_of, metrics_of, train

KILLS = int(os.environ.get("KILLS", "100"))
SETTINGS = ("train.steps=60", "train.save_every=1", "train.eval_every=20", "train.keep_last=2")
TARGETS = ("rank 0", "rank 1", "all", "all", "launcher", "runner")


def tree(run: Run) -> list[psutil.Process]:
    try:
        runner = psutil.Process(run.process.pid)
        return [runner, *runner.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def kill(run: Run, target: str) -> bool:
    """Kill part of a launch; whether there was such a process."""
    processes = tree(run)
    if target == "all":
        if processes:
            os.killpg(run.process.pid, signal.SIGKILL)
        return bool(processes)
    found = None
    for process in processes:
        try:
            command, parent = " ".join(process.cmdline()), process.ppid()
        except psutil.Error:
            continue
        kind = "runner" if process.pid == run.process.pid else "launcher" if parent == run.process.pid else None
        if kind is None and f"--local_rank={target[-1]}" in command:
            kind = target
        if kind == target:
            found = process
    if found is None:
        return False
    found.kill()
    return True


@pytest.mark.long
def test_random_kills_leave_the_losses_unchanged(tiny_recipe: Path, tmp_path: Path) -> None:
    """Prints how many kills were tried, how many launches resumed, and how many runs ended with equal losses."""
    draw = random.Random(int(os.environ.get("KILLS_SEED", "0")))
    out, straight = tmp_path / "out", tmp_path / "straight"
    train(tiny_recipe, *SETTINGS, f"output={straight}", ranks=2, log_dir=tmp_path)
    tried = resumed = finished = 0
    by_target: dict[str, int] = {}
    phases: dict[str, int] = {}
    began = time.monotonic()
    limit = float(os.environ.get("KILLS_SECONDS", "inf"))
    while tried < KILLS and time.monotonic() - began < limit:
        run, target = launch(tiny_recipe, *SETTINGS, ranks=2, log_dir=tmp_path), draw.choice(TARGETS)
        if draw.random() < 0.2:
            time.sleep(draw.uniform(0, 9))
        else:
            while "validation at step 0" not in run.text and "resuming" not in run.text and run.process.poll() is None:
                time.sleep(0.02)
            time.sleep(draw.uniform(0, 2.5))
        members, text = tree(run), run.text
        if kill(run, target):
            tried += 1
            by_target[target] = by_target.get(target, 0) + 1
            phase = "start" if "data:" not in text else "load" if "step" not in text.split("data:")[1][60:] else "steps"
            phases[phase] = phases.get(phase, 0) + 1
        _, alive = psutil.wait_procs(members, timeout=60)
        assert not alive, (target, run.text)
        run.process.wait()
        command = list(run.process.args)  # type: ignore[call-overload]
        port = command[command.index("--master_port") + 1]
        for file in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):  # 66 MiB a rank, DeepSpeed's
            file.unlink()
        assert "Traceback" not in run.text or target.startswith("rank"), run.text
        resumed += "resuming after step" in run.text
        if (out / "heads" / "heads.json").exists():
            assert losses_of(out) == losses_of(straight)
            ends = [metrics_of(folder, "validation")[-1] for folder in (out, straight)]
            assert ends[0] == ends[1]
            assert (out / "heads" / "heads.safetensors").read_bytes() == (
                straight / "heads" / "heads.safetensors"
            ).read_bytes()
            finished += 1
            shutil.rmtree(out)
        print(json.dumps([tried, target, finished, round(time.monotonic() - began)]), flush=True)
    if out.exists():
        train(tiny_recipe, *SETTINGS, ranks=2, log_dir=tmp_path)
        assert losses_of(out) == losses_of(straight)
        finished += 1
    print(f"kills tried {tried} ({by_target}; {phases}), launches that resumed {resumed}, runs ended equal {finished}")
    assert finished
