"""SIGKILL at random moments, of one rank, all, the launcher or the runner: the losses are those of no kill."""

import os
import random
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
from forks import free_port
from support import Run, launch, losses_of, metrics_of, train

KILLS = int(os.environ.get("KILLS", "100"))
SETTINGS = ("train.steps=60", "train.save_every=1", "train.eval_every=20", "train.keep_last=2")
TARGETS = ("rank 0", "rank 1", "all", "all", "launcher", "runner")


def kill(run: Run, target: str) -> bool:
    """Kill part of a launch; whether there was such a process."""
    members = run.members()
    if target == "all" and members:
        os.killpg(run.process.pid, signal.SIGKILL)
    elif target in members:
        members[target].kill()
    return target in members or (target == "all" and bool(members))


@pytest.mark.long
def test_random_kills_leave_the_losses_unchanged(tiny_recipe, tmp_path):
    """Prints how many kills were tried, how many launches resumed, and how many runs ended with equal losses."""
    draw = random.Random(int(os.environ.get("KILLS_SEED", "0")))
    out, straight = tmp_path / "out", tmp_path / "straight"
    train(tiny_recipe, *SETTINGS, f"output={straight}", ranks=2, log_dir=tmp_path)
    tried = resumed = finished = 0
    by_target, phases = Counter[str](), Counter[str]()
    began = time.monotonic()
    while tried < KILLS:
        port, target = free_port(), draw.choice(TARGETS)
        run = launch(tiny_recipe, *SETTINGS, ranks=2, port=port, log_dir=tmp_path)
        if draw.random() < 0.2:
            time.sleep(draw.uniform(0, 9))
        else:
            while "validation at step 0" not in run.text and "resuming" not in run.text and run.process.poll() is None:
                time.sleep(0.02)
            time.sleep(draw.uniform(0, 2.5))
        members, text = list(run.members().values()), run.text
        if kill(run, target):
            tried += 1
            by_target[target] += 1
            phase = "start" if "data:" not in text else "load" if "step" not in text.split("data:")[1][60:] else "steps"
            phases[phase] += 1
        _, alive = psutil.wait_procs(members, timeout=60)
        assert not alive, (target, run.text)
        run.process.wait()
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
        print(tried, target, finished, round(time.monotonic() - began), flush=True)
    if out.exists():
        train(tiny_recipe, *SETTINGS, ranks=2, log_dir=tmp_path)
        assert losses_of(out) == losses_of(straight)
        finished += 1
    print(f"kills tried {tried} ({by_target}; {phases}), launches that resumed {resumed}, runs ended equal {finished}")
    assert finished
