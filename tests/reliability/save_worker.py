"""Two ranks that cut a save off at every one of its file calls, resume, and compare the losses; in one process each.

A kill is an exception after which no file call of that rank has any effect; the other rank learns of it at the next
collective call of the save, as it does from gloo.
"""

import errno
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1] / "training"), str(Path(__file__).parent / "inject")]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from file_faults import FileCalls  # noqa: E402
from worker import STEPS, end, make_recipe, micro_batches  # noqa: E402

from medusa_ds.errors import UserError  # noqa: E402
from medusa_ds.training import checkpoint  # noqa: E402
from medusa_ds.training.engine import MedusaEngine  # noqa: E402


class Killed(BaseException):
    """Nothing after it runs."""


GATHER = dist.all_gather_object
STATE = {"data": "fingerprint"}


def gather_with_dead(answers: list[Any], mine: Any) -> None:
    dead: list[Any] = [None] * dist.get_world_size()
    GATHER(dead, False)
    if any(dead):
        raise Killed
    GATHER(answers, mine)


def cut_off(engine: MedusaEngine, root: Path, victim: int | None, at: int, code: int | None) -> tuple[int, str | None]:
    """Save with a fault at call `at` of rank `victim` (None: of every rank); calls made, and the error if any."""

    def act(number: int, name: str, path: str, half: Any) -> None:
        if victim not in (None, engine.rank) or number < at:
            return
        if code is not None:
            if number == at:
                raise OSError(code, os.strerror(code), path)
        elif number == at:
            half()
            raise Killed
        else:
            raise Killed

    calls, message, died = FileCalls(root, act), None, False
    dist.all_gather_object = gather_with_dead
    calls.install()
    try:
        engine.save(STATE, 2.0)
    except Killed:
        died = True
    except UserError as error:
        message = str(error)
    finally:
        calls.remove()
        dist.all_gather_object = GATHER
    if died and calls.count >= at and victim in (None, engine.rank):  # tell those who wait, once
        GATHER([None] * dist.get_world_size(), True)
    counts: list[Any] = [None] * dist.get_world_size()
    GATHER(counts, calls.count if victim in (None, engine.rank) else 0)
    return max(counts), message


def every_call(out: Path, zero: str, stage: int, short: bool) -> dict[str, Any]:
    """Checkpoints of steps 1 and 2 are there; the save of step 3 is cut off everywhere."""
    recipe = make_recipe(out, zero, stage, train={"keep_last": 1})
    engine, template, losses = MedusaEngine(recipe, STEPS), out / "template", []
    read = engine._tensors.read
    engine._tensors.read = lambda: iter(list(read()))
    checkpoint.MAX_FILE_BYTES = 40_000 if stage == 1 else 150_000
    kept: dict[int, dict[str, torch.Tensor]] = {}
    root = out / "checkpoints"
    for step in range(STEPS):
        losses.append(engine.train_batch(micro_batches(step, engine), step).loss.hex())
        if step < 3:
            kept[step + 1] = {name: tensor.detach().clone() for name, tensor in engine._tensors.read()}
        if step == 0:
            engine.save(STATE, 1.0)
        if step == 1:
            engine.save(STATE, None)
            if engine.rank == 0:
                shutil.copytree(root, template, symlinks=True)
    result: dict[str, Any] = {"trials": 0, "newest": [], "messages": []}
    faults = [(0, None), (1, None), (1, errno.ENOSPC)]
    if not short:
        faults += [(None, None), (0, errno.ENOSPC), (0, errno.EROFS), (1, errno.EDQUOT)]
    for victim, code in faults:
        at = 1
        while True:
            dist.barrier()
            if engine.rank == 0:
                shutil.rmtree(root)
                shutil.copytree(template, root, symlinks=True)
            dist.barrier()
            assert engine.resume_newest("fingerprint") == STATE
            assert engine.train_batch(micro_batches(2, engine), 2).loss.hex() == losses[2]
            calls, message = cut_off(engine, root, victim, at, code)
            if at > calls:
                break
            dist.barrier()
            assert code is None or message is not None or at > calls or _harmless(root)
            assert not any(checkpoint.check(path) for path in checkpoint.completed(root)), (victim, at, code)
            dist.barrier()
            assert engine.resume_newest("fingerprint") == STATE, (victim, at, code)
            first = engine.steps_taken
            for name, tensor in engine._tensors.read():
                assert torch.equal(tensor, kept[first][name]), (victim, at, code, name)
            for step in range(first, STEPS):
                assert engine.train_batch(micro_batches(step, engine), step).loss.hex() == losses[step]
            if engine.rank == 0:
                assert not list(root.glob(".tmp*"))
                best = root / "best"
                assert os.readlink(best) == ("step-000003" if first == 3 else "step-000001"), (victim, at, code)
                assert best.is_dir(), (victim, at, code)
            result["trials"] += 1
            result["newest"].append(first)
            if message is not None:
                result["messages"].append(message)
            at += 1
    end(engine)
    return result


def _harmless(root: Path) -> bool:
    """A failed call that the save has got over: the new checkpoint is there."""
    return (root / "step-000003").is_dir() and not checkpoint.check(root / "step-000003")


def main() -> None:
    folder, jobs = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(1)
    results = {f"{job[0]}-{job[1]}": every_call(folder / f"{job[0]}-{job[1]}", *job) for job in jobs}
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
