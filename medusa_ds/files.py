"""Files that are there whole or not at all, locks between processes, and digests.

What is written gets a temporary name beside its own, one a process of a host, is flushed to the disk, and takes its
name in one rename, which is flushed too: a process or a machine that dies at any moment leaves the old content or the
new, and perhaps a `.tmp-*` that the host's next writer removes.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import psutil

from medusa_ds.errors import UserError

DATA_SUFFIXES = (".json", ".jsonl", ".parquet")
"""Of files that hold conversations or prompts."""
TEMPORARY = ".tmp-"
"""How the names of unfinished and of discarded files begin."""


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
_REFUSED = (errno.EACCES, errno.EPERM, errno.EIO)


class InUseError(Exception):
    """A lock is another process's; the message says whose."""


@contextmanager
def system_errors() -> Iterator[None]:
    """Raise as OSError what safetensors and tokenizers, written in Rust, tell of the system in their own way."""
    try:
        yield
    except Exception as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


@contextmanager
def explained(what: str, mend: str, who: str = "", one_rank: bool = False) -> Iterator[None]:
    """Raise what the system refuses as a user's mistake: `WHAT (what the system says WHO); MEND`.

    Raises:
        UserError: in place of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{what} ({error.strerror or error}{who}); {mend}", one_rank=one_rank) from None


@contextmanager
def storage(place: Any, kept: str = "") -> Iterator[None]:
    """One line for a disk that is full, or that refuses a file somewhere in the body; `kept` says what is whole.

    Raises:
        UserError: in place of an OSError; it names the error's file, or else `place`.
    """
    try:
        with system_errors():
            yield
    except OSError as error:
        if error.errno not in _FULL + _REFUSED:
            raise
        way = "written" if error.errno in _FULL else "read or written"
        mend = f"make room, or make it writable{kept}"
        raise UserError(
            f"{error.filename or place}: cannot be {way} ({error.strerror}); {mend}", one_rank=True
        ) from None


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A path beside `target`; the file, link or directory that the caller makes there takes the target's place at last.

    The directory of `target` is made if missing. When the body raises, nothing of it stays and `target` is as it was.

    Raises:
        OSError: it cannot be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    work = _temporary(target)
    try:
        with system_errors():
            yield work
        sync(work)
        if target.is_dir() and not target.is_symlink():
            discard(target)
        os.replace(work, target)
    except Exception:
        remove(work)
        raise
    sync_directory(target.parent)


def _temporary(target: Path, prefix: str = TEMPORARY) -> Path:
    """A free name beside a target for this process; what dead ones have left there is removed."""
    ours = f"{prefix}{target.stem}.{socket.gethostname()}."
    name = re.compile(rf"{re.escape(ours)}(\d{{1,9}}){re.escape(target.suffix)}")
    for path in target.parent.iterdir():
        found = name.fullmatch(path.name)
        if found and (int(found[1]) == os.getpid() or not psutil.pid_exists(int(found[1]))):
            remove(path)
    return target.with_name(f"{ours}{os.getpid()}{target.suffix}")


def check_writable(target: Path, where: str, directory: bool = False) -> None:
    """Refuse a place before the work whose result nobody could write there; its directories, if missing, will be made.

    `where` is the option that names it; it is or will be a directory itself if `directory` says so.

    Raises:
        UserError: it is one and may not, or the other way round; or it lies in a file, or in a directory that cannot be
            written.
    """
    above = next(parent for parent in target.absolute().parents if parent.exists())
    problems = {
        f"{target} is a directory": target.is_dir() and not directory,
        f"{target} is no directory": directory and target.is_file(),
        f"{above} is no directory": not above.is_dir(),
        f"{above} is not writable": not os.access(above, os.W_OK | os.X_OK),
    }
    for problem in (text for text, holds in problems.items() if holds):
        raise UserError(f"{where}: {target}: cannot be written ({problem}); name another place")


def write(target: Path, *parts: Any) -> None:
    """Write a file whole from parts: text, bytes or arrays of bytes.

    Raises:
        OSError: it cannot be written, as in place of a directory; what was there before still is.
    """
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
    with replacing(target) as work:
        flush(work, *parts)


def flush(file: Path, *parts: Any) -> None:
    """Write a file and flush it to the disk, under its own name: for one in a directory that is itself unfinished."""
    with open(file, "wb") as stream:
        for part in parts:
            stream.write(part.encode() if isinstance(part, str) else part)
        stream.flush()
        os.fsync(stream.fileno())


def write_json(target: Path, value: Any) -> None:
    """Write a file of indented JSON whole."""
    write(target, json.dumps(value, indent=2) + "\n")


def with_nulls(value: Any) -> Any:
    """Data for JSON, which has no NaN and no infinity: null in their place."""
    return json.loads(json.dumps(value), parse_constant=lambda _: None)


def read_json_lines(file: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines, to which a run may still be writing its last one.

    Raises:
        OSError, ValueError: it cannot be read, or a line is not JSON.
    """
    text = file.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def remove(path: Path) -> None:
    """Remove a file, a link or a directory, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def discard(path: Path) -> None:
    """Remove a directory: first out of sight in one move, so that no half of it is ever found."""
    hidden = _temporary(path, f"{TEMPORARY}old-")
    os.rename(path, hidden)
    remove(hidden)


def sync(path: Path) -> None:
    """Flush a file, or a directory with all that is in it, to the disk; a link has nothing of its own."""
    if path.is_symlink():
        return
    if path.is_dir():
        for child in path.iterdir():
            sync(child)
        sync_directory(path)
    else:
        with open(path, "rb") as stream:
            os.fsync(stream.fileno())


def sync_directory(path: Path) -> None:
    """Flush the names in a directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest(*parts: Any, algorithm: str = "sha256") -> str:
    """Hex digest of parts one after another: text, bytes, arrays of bytes, and the content of files (a `Path`).

    `blake2b` has 32 bytes here, as `sha256` has.
    """
    state = hashlib.blake2b(digest_size=32) if algorithm == "blake2b" else hashlib.new(algorithm)
    for part in parts:
        if isinstance(part, Path):
            with open(part, "rb") as stream:
                while block := stream.read(1 << 22):
                    state.update(block)
        else:
            state.update(part.encode() if isinstance(part, str) else part)
    return state.hexdigest()


@contextmanager
def lock(file: Path, wait: bool = False) -> Iterator[None]:
    """Hold a file, made if missing, that says who holds it; the lock ends with the body or with the process.

    Raises:
        InUseError: another process holds it, and is not to be waited for.
        OSError: the file cannot be opened.
    """
    with open(file, "a+", encoding="utf-8", errors="replace") as stream:
        take(stream, wait)
        stream.truncate(0)
        stream.write(f"host {socket.gethostname()} pid {os.getpid()}")
        stream.flush()
        yield


def take(stream: IO[Any], wait: bool = False) -> None:
    """Lock an open file until it is closed.

    Raises:
        InUseError: another process holds it.
    """
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        stream.seek(0)
        raise InUseError(str(stream.read(200)).strip() or "another process") from None
