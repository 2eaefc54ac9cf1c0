"""Faults of real launches: the stock launcher, two ranks, ended, stopped or failed at a file call from outside."""

import re
import signal
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest
from support import Run, fault, launch, launched, losses_of, metrics_of, train, write_recipe

from medusa_ds.errors import UserError
from medusa_ds.programs.train import _claim

STEPS = ("train.steps=6", "train.save_every=2")


def processes(run: Run) -> dict[str, psutil.Process]:
    """The launch's processes by name, once they are all there."""
    end = time.monotonic() + 240
    while len(found := run.members()) < 4:
        assert time.monotonic() < end and run.process.poll() is None, run.text
        time.sleep(0.05)
    return found


def ended(run: Run, members: Any, timeout: float = 240) -> int:
    """Nothing is left running; the exit status of `deepspeed`."""
    end = time.monotonic() + timeout
    status = run.wait(timeout)
    _, alive = psutil.wait_procs([one for one in members if one.pid != run.process.pid], end - time.monotonic())
    assert not alive, run.text
    return status


def checkpoints(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").glob("*") if path.name != "best")


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, conversations: Path) -> Path:
    """A run of two ranks that nothing disturbs, with secrets in its environment."""
    folder = tmp_path_factory.mktemp("straight")
    recipe = write_recipe(folder, tiny_model, conversations)
    secrets = {"HF_TOKEN": "hf_" + "Q" * 34, "WANDB_API_KEY": "c0ffee" * 6 + "abcd"}
    text = launched(recipe, *STEPS, ranks=2, module=True, env=secrets, log_dir=folder)
    written = b"".join(file.read_bytes() for file in (folder / "out").rglob("*") if file.is_file()) + text.encode()
    assert not any(secret.encode() in written for secret in secrets.values()), "a secret was written"
    return folder / "out"


def test_rank_killed_while_it_writes_then_another_layout_goes_on(tiny_recipe, straight, tmp_path):
    """The newest whole checkpoint is that of step 2; one rank under ZeRO 3 goes on from it with the same losses."""
    out = tmp_path / "out"
    run = launch(tiny_recipe, *STEPS, ranks=2, env=fault(out, 1, "kill", 2, "step-000004"), log_dir=tmp_path)
    members = processes(run).values()
    assert ended(run, members) == 247, run.text
    assert "fault: kill at write" in run.text
    assert "another rank has died" in run.text and "Traceback" not in run.text
    assert "step-000002" in checkpoints(out) and "step-000004" not in checkpoints(out)
    text = train(tiny_recipe, *STEPS, "deepspeed=ds_configs/zero3.json", log_dir=tmp_path)
    assert "resuming after step 2 of 6" in text
    assert losses_of(out) == pytest.approx(losses_of(straight), rel=1e-6)
    assert losses_of(out)[:2] == losses_of(straight)[:2]


def test_all_killed_in_the_final_save_then_the_same_command_finishes(tiny_recipe, straight, tmp_path):
    """A heads directory that lacks heads.json is no finished run. Mutation: saving the tokenizer after it."""
    out = tmp_path / "out"
    die = fault(out, 0, "kill_all", 1, "heads/heads.json$")
    train(tiny_recipe, *STEPS, ranks=2, env=die, ends=(-signal.SIGKILL,), log_dir=tmp_path)
    assert (out / "heads" / "heads.safetensors").exists() and not (out / "heads" / "heads.json").exists()
    assert (out / "heads" / "tokenizer.json").exists()
    text = train(tiny_recipe, *STEPS, ranks=2, log_dir=tmp_path)
    assert "resuming after step 6 of 6" in text and "heads saved in" in text
    assert losses_of(out) == losses_of(straight)
    tensors = [folder / "heads" / "heads.safetensors" for folder in (out, straight)]
    assert tensors[0].read_bytes() == tensors[1].read_bytes()


def test_full_disk_is_one_line_and_data_that_changed_is_refused(tiny_recipe, conversations, tmp_path):
    out, held = tmp_path / "out", tmp_path / "held.jsonl"
    held.write_text(conversations.read_text().replace("from ", "after "))
    full, steps = fault(out, 1, "ENOSPC", 1, "step-000004/rank"), [*STEPS, f"data.validation={held}"]
    text = train(tiny_recipe, *steps, ranks=2, env=full, ends=(2,), log_dir=tmp_path)
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in text, text
    assert (
        f"error: {out / 'checkpoints'}: the checkpoint cannot be written (No space left on device, rank 1)" in errors[0]
    )
    assert re.search(r"it needs \d+ bytes in a writable directory; older checkpoints are whole", errors[0])
    assert checkpoints(out) == ["step-000002"]
    whole = held.read_text()
    held.write_text("".join(whole.splitlines(keepends=True)[:-1]))
    again = train(tiny_recipe, *steps, ends=(2,), log_dir=tmp_path)
    assert f"error: {out}: made with other held-out conversations" in again and "Traceback" not in again
    held.write_text(whole)
    changed = tmp_path / "changed.jsonl"
    changed.write_text("".join(conversations.read_text().splitlines(keepends=True)[:-1]))
    kept = (out / "recipe.yaml").read_text()
    (out / "recipe.yaml").write_text(kept.replace(str(conversations), str(changed)))
    again = train(tiny_recipe, *steps, f"data.path={changed}", ends=(2,), log_dir=tmp_path)
    assert "step-000002: made with other training data" in again and "Traceback" not in again


def test_signal_to_the_runner_before_any_rank_has_begun(tiny_recipe, tmp_path):
    """Mutation: without the look at the launcher at the start, both ranks train on as orphans."""
    run = launch(tiny_recipe, "train.steps=3000", ranks=2, log_dir=tmp_path)
    members = processes(run)
    run.process.send_signal(signal.SIGTERM)
    assert ended(run, members.values()) == -signal.SIGTERM
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_metrics_that_cannot_be_written_are_one_line(tiny_recipe, tmp_path):
    out = tmp_path / "out"
    full = fault(out, 0, "ENOSPC", 4, "metrics.jsonl")
    text = train(tiny_recipe, *STEPS, ranks=2, env=full, ends=(2, 1), log_dir=tmp_path)
    assert f"error: {out / 'metrics.jsonl'}: cannot be written (No space left on device)" in text
    assert "Traceback" not in text


def test_output_that_cannot_be_written_is_one_line():
    with pytest.raises(UserError, match=r"/proc/no/such: cannot be written .*name a writable directory in output"):
        _claim(Path("/proc/no/such"), None, ExitStack())  # type: ignore[arg-type]


@pytest.mark.long
def test_full_disk_in_the_final_save_is_one_line(tiny_recipe, tmp_path):
    out = tmp_path / "out"
    run = launch(tiny_recipe, *STEPS, ranks=2, env=fault(out, 0, "ENOSPC", 1, r"heads/\.tmp-heads"), log_dir=tmp_path)
    assert run.wait() == 2
    assert f"error: {out}: the heads cannot be written" in run.text and "Traceback" not in run.text, run.text
    assert "heads saved in" in train(tiny_recipe, *STEPS, ranks=2, log_dir=tmp_path)


LIVING = ("train.steps=3000", "train.save_every=1000", "train.eval_every=1000")


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("target", ["runner", "launcher", "rank 0", "rank 1"])
def test_signal_to_any_process_of_the_tree(target, number, tiny_recipe, tmp_path):
    run = launch(tiny_recipe, *LIVING, ranks=2, log_dir=tmp_path)
    run.wait_for("step 1/3000")
    members = processes(run)
    before = len(metrics_of(tmp_path / "out"))
    members[target].send_signal(number)
    status = ended(run, members.values())
    done = len(metrics_of(tmp_path / "out"))
    assert checkpoints(tmp_path / "out") == [f"step-{done:06d}"] and done >= before
    wanted = {"runner": {-number, 128 + number, 1}, "launcher": {1}}.get(target, {128 + number, 128 + signal.SIGTERM})
    assert status in wanted, (status, run.text)


@pytest.mark.long
def test_lost_launcher(tiny_recipe, tmp_path):
    """The stock runner then ends with 0, which nothing in its child can change."""
    run = launch(tiny_recipe, *LIVING, ranks=2, log_dir=tmp_path)
    run.wait_for("step 1/3000")
    members = processes(run)
    members["launcher"].kill()
    ended(run, members.values())
    assert checkpoints(tmp_path / "out") == [f"step-{len(metrics_of(tmp_path / 'out')):06d}"]


@pytest.mark.long
def test_second_signal_ends_at_once(tiny_recipe, tmp_path):
    """The first waits for a save that never ends."""
    out = tmp_path / "out"
    run = launch(tiny_recipe, *LIVING, ranks=2, env=fault(out, 0, "sleep", 1, "step-"), log_dir=tmp_path)
    run.wait_for("step 1/3000")
    members = processes(run)
    members["rank 0"].send_signal(signal.SIGTERM)
    run.wait_for("fault: sleep")
    time.sleep(4)
    members["rank 0"].send_signal(signal.SIGTERM)
    started = time.monotonic()
    members["rank 0"].wait(2)
    assert ended(run, members.values(), 30) == 128 + signal.SIGTERM
    assert time.monotonic() - started < 10
    assert "ending at once" in run.text


@pytest.mark.long
def test_stopped_rank_ends_the_job_with_its_name_and_stack(tiny_recipe, tmp_path):
    run = launch(tiny_recipe, *LIVING, "train.hang_timeout=30", ranks=2, log_dir=tmp_path)
    run.wait_for("step 1/3000")
    members = processes(run)
    stopped = members["rank 1"]
    stopped.suspend()
    began = time.monotonic()
    status = ended(run, members.values(), 60)
    assert time.monotonic() - began < 40, run.text
    assert status not in (0, None), run.text
    assert "no step finished within train.hang_timeout (30 s)" in run.text
    assert f"the rank with pid {stopped.pid} was stopped" in run.text
    assert re.search(rf"rank 1 on \S+ \(pid {stopped.pid}\): no step finished", run.text), run.text


@pytest.mark.long
def test_out_of_memory_on_one_rank_ends_all_and_names_the_settings(tiny_recipe, tmp_path):
    """Eager attention over 8,192 tokens asks for tensors of 1 GiB; rank 1 has room for none."""
    env = fault(tmp_path / "out", 1, "memory", 3_300_000_000)
    settings = ("data.max_length=8192", "model.attention=eager", "train.micro_batch_size=1", "train.eval_every=100")
    run = launch(tiny_recipe, *settings, ranks=2, env=env, log_dir=tmp_path)
    members = processes(run)
    assert ended(run, members.values(), 300) == 2, run.text
    assert re.search(r"out of memory .*lower train.micro_batch_size \(now 1\).*data.max_length \(now 8192\)", run.text)
    assert "Traceback" not in run.text


@pytest.mark.long
def test_rank_stopped_while_data_is_read(tiny_recipe, tmp_path):
    env = fault(tmp_path / "out", 0, "stop", 1, "lock$")
    run = launch(tiny_recipe, *LIVING, "train.hang_timeout=30", ranks=2, env=env, log_dir=tmp_path)
    members = processes(run)
    run.wait_for("fault: stop")
    began = time.monotonic()
    status = ended(run, members.values(), 80)
    assert status != 0 and time.monotonic() - began < 75, run.text
    assert "was stopped" in run.text
