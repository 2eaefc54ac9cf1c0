"""The checkpoint directory: written whole or not at all, checked before anything of it is used.

    OUTPUT/checkpoints/step-000040/   rank00000-00000.safetensors ...   state.json   manifest.json
    OUTPUT/checkpoints/best -> step-000040

Tensors are logical ones (a whole parameter, in fp32), so that a checkpoint knows neither ranks nor ZeRO stages. A save
goes to `.tmp-step-000040`; every file is flushed, the manifest with sizes and checksums comes last, and one rename
makes the checkpoint. Reading takes the newest whole one; only safetensors and JSON are parsed, never a pickle, and no
name in a manifest leads out of its directory. Unlike DeepSpeed's format there is no `latest` file that could point
at something unfinished, and order is by step, never by a clock.
"""

import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open

from medusa_ds.errors import UserError
from medusa_ds.training.manifest import (
    check,
    encode_manifest,
    name_of,
    read_manifest,
    sync_directory,
    write_file,
    write_tensors,
)

MAX_FILE_BYTES = 1 << 29  # a file holds tensors up to here, or one larger tensor: bounds the memory of a save
_STEP = re.compile(r"step-(\d{6,})")


def completed(root: Path) -> list[Path]:
    """Checkpoint directories that a rename has finished, newest step first."""
    found = [path for path in root.glob("step-*") if _STEP.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: -int(path.name[5:]))


def save(
    root: Path, step: int, tensors: Iterable[tuple[str, torch.Tensor]], state: dict[str, Any], bytes_needed: int
) -> Path:
    """Write a checkpoint; every rank calls it.

    Args:
        root: `OUTPUT/checkpoints`, on a file system that all ranks share.
        step: optimizer steps done.
        tensors: names and full tensors, the same order on every rank; making one may be a collective call, so every
            rank takes them all, and tensor i is written by rank i % ranks.
        state: what else a resumed run needs; JSON.
        bytes_needed: estimate of the checkpoint's size, for the check of free space.

    Returns:
        The finished directory.

    Raises:
        UserError: no room, read-only, quota or any other failed file operation on any rank, or a tensor that is not
            finite (on all ranks, in one line); what was begun is removed, older checkpoints are untouched.
    """
    rank, final, temporary = dist.get_rank(), root / name_of(step), root / f".tmp-{name_of(step)}"
    files: dict[str, Any] = {}
    parts: list[dict[str, Any]] = []

    def begin() -> None:
        root.mkdir(parents=True, exist_ok=True)
        if final.exists() and not check(final):
            files["there"] = True
            return
        shutil.rmtree(temporary, ignore_errors=True)
        free = shutil.disk_usage(root).free
        if free < bytes_needed:
            raise OSError(f"{free} bytes are free")
        temporary.mkdir()

    def finish() -> None:
        entries = {name: entry for part in parts for name, entry in part.items()}
        entries |= write_file(temporary / "state.json", json.dumps(state).encode())
        write_file(temporary / "manifest.json", encode_manifest(step, entries))
        sync_directory(temporary)
        if final.exists():  # a damaged one, which resuming has skipped
            discard(final)
        os.rename(temporary, final)
        sync_directory(root)

    what = f"the checkpoint cannot be written ({{}}); it needs {bytes_needed} bytes in a writable directory; older "
    what = f"{root}: {what}checkpoints are whole"
    problem = _attempt(begin) if rank == 0 else None
    if _agree(problem, files, what, temporary)[0]:
        return final
    batch: dict[str, torch.Tensor] = {}

    def flush() -> None:
        files.update(write_tensors(temporary / f"rank{rank:05d}-{len(files):05d}.safetensors", batch))
        batch.clear()

    for index, (name, tensor) in enumerate(tensors):
        if index % dist.get_world_size() != rank or problem is not None:
            continue  # a failed rank goes on taking tensors: the others wait for it in collective calls
        if batch and sum(held.nbytes for held in batch.values()) + tensor.nbytes > MAX_FILE_BYTES:
            problem = _attempt(flush)
        batch[name] = tensor.detach().cpu().contiguous()
        if not batch[name].sum(dtype=torch.float64).isfinite():  # exact for fp32, and 20 times as fast as `isfinite`
            problem = f"{name} is not finite"
    if problem is None and batch:
        problem = _attempt(flush)
    parts = _agree(problem, files, what, temporary)
    problem = _attempt(finish) if rank == 0 else None
    _agree(problem, files, what, temporary)
    return final


def newest(root: Path) -> "Reader | None":
    """The newest whole checkpoint, or None when there is none at all; every rank calls it.

    What an interrupted run has left is removed first, so no other run may be using `root`. A damaged checkpoint is
    named on rank 0 and skipped.

    Raises:
        UserError: there are checkpoints and all of them are damaged; starting anew would overwrite them silently.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    names: list[Any] = [[]]
    if rank == 0:
        remove_leftovers(root)
        names = [[path.name for path in completed(root)]]
    dist.broadcast_object_list(names)
    problems: list[str] = []
    for name in names[0]:
        answers: list[list[str]] = [[]] * ranks
        dist.all_gather_object(answers, check(root / name, rank, ranks))
        found = list(dict.fromkeys(line for answer in answers for line in answer))
        if not found:
            if rank == 0 and problems:
                print(*(f"warning: {line}; checkpoint skipped" for line in problems), sep="\n", flush=True)
            return Reader(root / name)
        problems += found
    if problems:
        raise UserError(
            *(f"{line}; no whole checkpoint is left, remove the directory to start anew" for line in problems)
        )
    return None


class Reader:
    """The tensors and the state of a checkpoint that `check` found whole."""

    def __init__(self, path: Path) -> None:
        self.path, self.step = path, int(path.name[5:])
        self.state: dict[str, Any] = json.loads((path / "state.json").read_bytes())
        names = [name for name in read_manifest(path) if name != "state.json"]
        self._files = [safe_open(path / name, framework="pt") for name in names]
        self._of = {key: file for file in self._files for key in file.keys()}  # noqa: SIM118 - not a mapping

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor."""
        return {name: tuple(file.get_slice(name).get_shape()) for name, file in self._of.items()}

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU."""
        return self._of[name].get_tensor(name)


def keep(root: Path, step: int, best: int | None, keep_last: int | None = None) -> None:
    """Let `best` name the best checkpoint, and remove those that are no longer kept; every rank calls it.

    Args:
        root: `OUTPUT/checkpoints`.
        step: of the checkpoint that has just been written or read.
        best: step of the best one so far; the link of an interrupted run is put right.
        keep_last: checkpoints to keep beside the best; None removes nothing.

    Raises:
        UserError: on all ranks, when a file operation has failed.
    """

    def tidy() -> None:
        mark_best(root, best)
        if keep_last is not None:
            prune(root, step, keep_last)

    problem = _attempt(tidy) if dist.get_rank() == 0 else None
    _agree(problem, {}, f"{root}: older checkpoints cannot be removed ({{}}); make it writable; step {step} is whole")


def mark_best(root: Path, step: int | None) -> None:
    """Let `best` name a step's checkpoint, replaced in one move; no link when that checkpoint is not there."""
    link, temporary = root / "best", root / ".tmp-best"
    if step is None or not (root / name_of(step)).is_dir():
        link.unlink(missing_ok=True)
    elif not link.is_symlink() or os.readlink(link) != name_of(step):
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(name_of(step))
        os.replace(temporary, link)


def prune(root: Path, step: int, keep_last: int) -> None:
    """Remove all but the `keep_last` checkpoints up to `step` and the best one.

    Later ones than `step`, which has just been written, are damaged ones that resuming has skipped: they must not
    take a whole one's place.
    """
    best = os.readlink(root / "best") if (root / "best").is_symlink() else None
    later = [path for path in completed(root) if int(path.name[5:]) > step]
    for path in later + completed(root)[len(later) :][keep_last:]:
        if path.name != best:
            discard(path)


def discard(path: Path) -> None:
    """Remove a checkpoint: first out of sight in one move, so that no half of one is ever offered."""
    hidden = path.with_name(f".tmp-old-{path.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    os.rename(path, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def remove_leftovers(root: Path) -> None:
    """Remove what an interrupted save or removal has left; only while no other run uses `root`."""
    for path in root.glob(".tmp-*"):
        if path.is_symlink() or path.is_file():
            path.unlink()
        else:
            shutil.rmtree(path, ignore_errors=True)


def _attempt(action: Any) -> str | None:
    """Run a file action; returns what the system said when it failed."""
    try:
        action()
    except OSError as error:
        return error.strerror or str(error)
    return None


def _agree(
    problem: str | None, files: dict[str, Any], what: str, temporary: Path | None = None
) -> list[dict[str, Any]]:
    """Every rank's files, or one error on all of them when any has failed: no rank goes on alone."""
    answers: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(answers, (problem, files))
    failed = [(rank, answer[0]) for rank, answer in enumerate(answers) if answer[0] is not None]
    if failed:
        if dist.get_rank() == 0 and temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(what.format(f"{failed[0][1]}, rank {failed[0][0]}"))
    return [answer[1] for answer in answers]
