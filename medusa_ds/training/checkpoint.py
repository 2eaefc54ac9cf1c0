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
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from medusa_ds import files
from medusa_ds.errors import UserError
from medusa_ds.ranks import Ranks

FORMAT = 1
MAX_FILE_BYTES = 1 << 29  # a file holds tensors up to here, or one larger tensor: bounds the memory of a save
_MAX_JSON_BYTES = 1 << 24
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float8_e4m3fn: "F8_E4M3"}
_STEP = re.compile(r"step-(\d{6,})")
_FILE = re.compile(r"rank\d{5}-\d{5}\.safetensors|state\.json")


def name_of(step: int) -> str:
    """Directory name of a step's checkpoint."""
    return f"step-{step:06d}"


def completed(root: Path) -> list[Path]:
    """Checkpoint directories that a rename has finished, newest step first."""
    found = [path for path in root.glob("step-*") if _STEP.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: -int(path.name[5:]))


def save(
    root: Path, step: int, tensors: Iterator[tuple[str, torch.Tensor]], state: dict[str, Any], bytes_needed: int
) -> Path:
    """Write a checkpoint into `root`, a directory that all ranks share; every rank calls it. Returns its directory.

    `tensors` are names and full tensors, the same order on every rank; making one may be a collective call, so every
    rank takes them all, and tensor i is written by rank i % ranks. `state`: what else a resumed run needs; JSON.
    `bytes_needed`: estimate of the checkpoint's size, for the check of free space.

    Raises:
        UserError: no room, read-only, quota or any other failed file operation on any rank, or a tensor that is not
            finite (on all ranks, in one line); what was begun is removed, older checkpoints are untouched.
    """
    ranks, final, work = Ranks(), root / name_of(step), root / (files.TEMPORARY + name_of(step))
    explained = files.explained(
        f"{root}: the checkpoint cannot be written",
        f"it needs {bytes_needed} bytes in a writable directory; older checkpoints are whole",
        f", rank {ranks.rank}",
    )

    @explained
    def begin() -> bool:
        root.mkdir(parents=True, exist_ok=True)
        if final.exists() and not check(final):
            return True
        files.remove(work)
        free = shutil.disk_usage(root).free
        if free < bytes_needed:
            raise OSError(f"{free} bytes are free")
        work.mkdir()
        return False

    @explained
    def write_share() -> dict[str, Any]:
        entries: dict[str, Any] = {}
        batch: dict[str, torch.Tensor] = {}

        def flush() -> None:
            file = work / f"rank{ranks.rank:05d}-{len(entries):05d}.safetensors"
            entries[file.name] = write_tensors(file, batch)
            batch.clear()

        try:
            for index, (name, tensor) in enumerate(tensors):
                if index % ranks.size != ranks.rank:
                    continue
                if batch and sum(held.nbytes for held in batch.values()) + tensor.nbytes > MAX_FILE_BYTES:
                    flush()
                batch[name] = tensor.detach().cpu().contiguous()
                if not batch[name].sum(dtype=torch.float64).isfinite():  # exact for fp32, 20 times as fast as isfinite
                    raise OSError(f"{name} is not finite")
            if batch:
                flush()
        finally:
            deque(tensors, maxlen=0)  # after a failure too: the others wait for this rank in collective calls
        return entries

    @explained
    def finish() -> None:
        entries = {name: entry for share in shares for name, entry in share.items()}
        entries["state.json"] = write_file(work / "state.json", json.dumps(state).encode())
        files.flush(work / "manifest.json", encode_manifest(step, entries))
        files.sync_directory(work)
        if final.exists():  # a damaged one, which resuming has skipped
            files.discard(final)
        os.rename(work, final)
        files.sync_directory(root)

    try:
        if ranks.first(begin):
            return final
        shares = ranks.together(write_share)
        ranks.first(finish)
    except UserError:
        if ranks.rank == 0:
            files.remove(work)
        raise
    return final


def newest(root: Path) -> "Reader | None":
    """The newest whole checkpoint, or None when there is none at all; every rank calls it.

    What an interrupted run has left is removed first, so no other run may be using `root`. A damaged checkpoint is
    named on rank 0 and skipped.

    Raises:
        UserError: there are checkpoints and all of them are damaged; starting anew would overwrite them silently.
    """
    ranks = Ranks()

    def names() -> list[str]:
        for path in root.glob(f"{files.TEMPORARY}*"):
            files.remove(path)
        return [path.name for path in completed(root)]

    problems: list[str] = []
    for name in ranks.first(names):
        answers = ranks.gather(check(root / name, ranks.rank, ranks.size))
        found = list(dict.fromkeys(line for answer in answers for line in answer))
        if not found:
            if ranks.rank == 0 and problems:
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
        opened = [safe_open(path / name, framework="pt") for name in read_manifest(path) if name != "state.json"]
        self._of = {key: file for file in opened for key in file.keys()}  # noqa: SIM118 - not a mapping

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor."""
        return {name: tuple(file.get_slice(name).get_shape()) for name, file in self._of.items()}

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU."""
        return self._of[name].get_tensor(name)


def keep(root: Path, step: int, best: int | None, keep_last: int | None = None) -> None:
    """Let `best` name the best checkpoint, and remove those that are no longer kept; every rank calls it.

    `step` is of the checkpoint that has just been written or read, and `best` of the best one so far: the link of an
    interrupted run is put right. `keep_last` up to `step` are kept beside it; None removes nothing. Later ones are
    damaged ones that resuming has skipped: they must not take a whole one's place.

    Raises:
        UserError: on all ranks, when a file operation has failed.
    """

    @files.explained(
        f"{root}: older checkpoints cannot be removed", f"make it writable; step {step} is whole", ", rank 0"
    )
    def tidy() -> None:
        link, best_name = root / "best", None if best is None else name_of(best)
        if best_name is None or not (root / best_name).is_dir():
            files.remove(link)
        elif not link.is_symlink() or os.readlink(link) != best_name:
            with files.replacing(link) as work:
                work.symlink_to(best_name)
        if keep_last is not None:
            last = [path.name for path in completed(root) if int(path.name[5:]) <= step][:keep_last]
            for path in completed(root):
                if path.name not in (*last, best_name):
                    files.discard(path)

    Ranks().first(tidy)


def check(path: Path, part: int = 0, parts: int = 1) -> list[str]:
    """What is wrong with a checkpoint: a line a problem, with file and reason; empty when it is whole.

    The manifest is read always, and of the files those whose index is `part` modulo `parts`, as callers share the work.
    """
    if path.is_symlink():
        return [f"{path}: is a link; a checkpoint is a directory"]
    try:
        entries = read_manifest(path)
    except (OSError, ValueError) as error:
        return [f"{path / 'manifest.json'}: {error}"]
    problems = []
    for name in sorted(entries)[part::parts]:
        try:
            check_file(path / name, entries[name])
        except (OSError, ValueError, SafetensorError, RecursionError) as error:
            problems.append(f"{path / name}: {error}")
    return problems


def read_manifest(path: Path) -> dict[str, Any]:
    """Files of a checkpoint with size and checksum.

    Raises:
        OSError: missing or unreadable.
        ValueError: not a manifest, not this directory's, or damaged: what it says must be, byte for byte, what
            `save` writes for it.
    """
    file = path / "manifest.json"
    if file.is_symlink() or file.stat().st_size > _MAX_JSON_BYTES:
        raise ValueError("is a link or larger than any manifest")
    content = file.read_bytes()
    try:
        found = json.loads(content)
        step, entries = found["step"], found["files"]
        outside = [name for name in entries if not _FILE.fullmatch(name)]
        damaged = encode_manifest(step, entries) != content
        kinds = {(type(entry["bytes"]), type(entry["blake2b"])) for entry in entries.values()}
        named = name_of(step)
    except (UnicodeDecodeError, KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(f"not a manifest ({type(error).__name__})") from None
    if outside:
        raise ValueError(f"names {outside[0]!r}, which is no checkpoint file")
    if damaged:
        raise ValueError("its own checksum differs: damaged, or written by another version")
    if named != path.name or "state.json" not in entries or kinds != {(int, str)}:
        raise ValueError(f"belongs to step {step}, lacks state.json, or a file's size and checksum")
    return entries


def check_file(file: Path, entry: dict[str, Any]) -> None:
    """Read a file through and compare it with its manifest entry.

    Raises:
        ValueError: it differs.
    """
    if file.is_symlink() or not file.is_file():
        raise ValueError("missing")
    if file.suffix == ".json" and entry["bytes"] > _MAX_JSON_BYTES:
        raise ValueError("larger than any state")
    if file.stat().st_size != entry["bytes"]:
        raise ValueError(f"found {file.stat().st_size} bytes; the manifest says {entry['bytes']}")
    if files.digest(file, algorithm="blake2b") != entry["blake2b"]:
        raise ValueError("its checksum differs from the manifest: damaged")
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt"):
            pass
    else:
        state = json.loads(file.read_bytes())
        if not isinstance(state, dict) or not all(isinstance(part, dict) for part in state.values()):
            raise ValueError("not a JSON object of objects")


def encode_manifest(step: int, entries: dict[str, Any]) -> bytes:
    """The bytes of a manifest, which holds its own checksum."""
    body = {"format": FORMAT, "step": step, "files": entries}
    own = files.digest(json.dumps(body, sort_keys=True), algorithm="blake2b")
    return json.dumps(body | {"blake2b": own}, sort_keys=True).encode()


def write_file(file: Path, *parts: Any) -> dict[str, Any]:
    """Write and flush a file from bytes or arrays of bytes; returns its manifest entry."""
    files.flush(file, *parts)
    return {"bytes": sum(map(len, parts)), "blake2b": files.digest(*parts, algorithm="blake2b")}


def write_tensors(file: Path, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Write and flush tensors on the CPU as safetensors, straight from their memory; returns the manifest entry.

    The library's own `save` copies every tensor twice, which took half of a checkpoint's time.
    """
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # what follows is aligned
    arrays = [tensor.contiguous().flatten().view(torch.uint8).numpy() for tensor in tensors.values()]
    return write_file(file, len(text).to_bytes(8, "little"), text, *arrays)
