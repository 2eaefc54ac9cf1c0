"""The manifest that closes a checkpoint: its files with sizes and checksums, and how they are written and checked."""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

FORMAT = 1
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float8_e4m3fn: "F8_E4M3"}
_MAX_JSON_BYTES = 1 << 24
_ENTRY = [int, str]
_FILE = re.compile(r"rank\d{5}-\d{5}\.safetensors|state\.json")


def name_of(step: int) -> str:
    """Directory name of a step's checkpoint."""
    return f"step-{step:06d}"


def check(path: Path, part: int = 0, parts: int = 1) -> list[str]:
    """What is wrong with a checkpoint, empty when it is whole.

    Args:
        path: a checkpoint directory.
        part: which files to read through: those whose index is `part` modulo `parts`; the manifest always.
        parts: number of callers that share the work.

    Returns:
        A line a problem, each with file and reason.
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
        strange = [name for name, entry in entries.items() if [type(entry["bytes"]), type(entry["blake2b"])] != _ENTRY]
        named = name_of(step)
    except (UnicodeDecodeError, KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(f"not a manifest ({type(error).__name__})") from None
    if outside:
        raise ValueError(f"names {outside[0]!r}, which is no checkpoint file")
    if damaged:
        raise ValueError("its own checksum differs: damaged, or written by another version")
    if named != path.name or "state.json" not in entries or strange:
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
    digest = hashlib.blake2b(digest_size=32)
    with open(file, "rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    if digest.hexdigest() != entry["blake2b"]:
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
    text = json.dumps(body, sort_keys=True).encode()
    return json.dumps(body | {"blake2b": hashlib.blake2b(text, digest_size=32).hexdigest()}, sort_keys=True).encode()


def write_file(file: Path, *parts: Any) -> dict[str, Any]:
    """Write and flush a file from bytes or arrays of bytes; returns its manifest entry."""
    digest, size = hashlib.blake2b(digest_size=32), 0
    with open(file, "wb") as stream:
        for part in parts:
            stream.write(part)
            digest.update(part)
            size += len(part)
        stream.flush()
        os.fsync(stream.fileno())
    return {file.name: {"bytes": size, "blake2b": digest.hexdigest()}}


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
    arrays = (tensor.contiguous().flatten().view(torch.uint8).numpy() for tensor in tensors.values())
    return write_file(file, len(text).to_bytes(8, "little"), text, *arrays)


def sync_files(path: Path) -> None:
    """Flush a directory of files."""
    for file in path.iterdir():
        with open(file, "rb") as stream:
            os.fsync(stream.fileno())
    sync_directory(path)


def sync_directory(path: Path) -> None:
    """Flush the names in a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
