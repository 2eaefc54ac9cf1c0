"""Files that are there whole or not at all, locks and digests."""

import contextlib
import errno
import hashlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support import files_of_at_most, tiny_tokenizer

from medusa_ds import files
from medusa_ds.errors import UserError


class Dead(BaseException):
    """Stands for SIGKILL: nothing after it runs."""


CALLS = ("open", "fsync", "replace", "rename")


def cut_off(monkeypatch: pytest.MonkeyPatch, at: int, error: BaseException) -> list[str]:
    """Raise at the n-th file call; from there on at all of them when it stands for a kill."""
    done: list[str] = []

    def wrap(name: str, call: Any) -> Any:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            done.append(name)
            if len(done) == at or (len(done) > at and isinstance(error, Dead)):
                raise error
            return call(*arguments, **options)

        return wrapped

    for name in CALLS:
        monkeypatch.setattr(os, name, wrap(name, getattr(os, name)))
    monkeypatch.setattr("builtins.open", wrap("open", open))
    return done


@pytest.mark.parametrize("error", [Dead(), OSError(errno.ENOSPC, "No space left on device")], ids=["kill", "full"])
def test_a_file_cut_off_at_any_call_is_the_old_one_or_the_new(tmp_path, error):
    """Mutation: open `target` itself in `write`."""
    file, seen = tmp_path / "file", set()
    for at in range(1, 30):
        file.write_bytes(b"old")
        with pytest.MonkeyPatch.context() as patch:
            done = cut_off(patch, at, error)
            with contextlib.suppress(Dead, OSError):
                files.write(file, "n", b"ew")
        seen.add(file.read_bytes())
        if len(done) < at:
            break
        if isinstance(error, OSError):
            assert os.listdir(tmp_path) == ["file"]
    assert seen == {b"old", b"new"} and at > 5


def test_names_are_flushed_after_the_rename_and_the_content_before(tmp_path, monkeypatch):
    done = cut_off(monkeypatch, 99, Dead())
    files.write(tmp_path / "file", "text")
    assert done == ["open", "fsync", "open", "fsync", "replace", "open", "fsync"]


def test_a_directory_is_replaced_when_its_maker_is_done(tmp_path):
    target = tmp_path / "made" / "target"
    for text in ("first", "second"):
        with files.replacing(target) as work:
            (work / "inner").mkdir(parents=True)
            (work / "inner" / "file").write_text(text)
            assert text == "first" or (target / "inner" / "file").read_text() == "first"
    with contextlib.suppress(ValueError), files.replacing(target) as work:
        work.mkdir()
        raise ValueError
    assert (target / "inner" / "file").read_text() == "second"
    assert os.listdir(target.parent) == ["target"]


@contextlib.contextmanager
def another(work: str, path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that works on a path, and has told that it has begun."""
    text = f"import sys; from pathlib import Path; from medusa_ds import files\nwith files.{work}"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", text, str(path)], **pipes) as other:
        assert other.stdout is not None and other.stdout.readline() == b"begun\n"
        yield other


def test_two_processes_that_replace_one_directory_leave_a_whole_one(tmp_path):
    """The later one wins. Mutation: one temporary name for all processes."""
    touch = "work.mkdir(); (work / 'a').touch(); print('begun', flush=True); sys.stdin.read(); (work / 'b').touch()"
    target = tmp_path / "target"
    with another(f"replacing(Path(sys.argv[1])) as work: {touch}", target) as other:
        with files.replacing(target) as work:
            work.mkdir()
            (work / "c").touch()
        assert os.listdir(target) == ["c"]
        other.communicate()
    assert other.returncode == 0 and sorted(os.listdir(target)) == ["a", "b"]
    assert os.listdir(tmp_path) == ["target"]


def test_a_file_takes_no_directorys_place(tmp_path):
    """Mutation: leave it to `replacing`, which puts directories in the place of others."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "heads").touch()
    with pytest.raises(IsADirectoryError):
        files.write(tmp_path / "run", "text")
    assert (tmp_path / "run" / "heads").exists() and os.listdir(tmp_path) == ["run"]


def test_a_place_that_cannot_be_written_is_refused_and_nothing_is_made(tmp_path):
    (tmp_path / "file").touch()
    files.check_writable(tmp_path / "to" / "be" / "made", "--out")
    files.check_writable(tmp_path, "OUT", directory=True)
    sealed = tmp_path / "sealed"
    sealed.mkdir(mode=0o555)
    places = [tmp_path, tmp_path / "file" / "in", *([sealed / "in"] if os.geteuid() else [])]
    for place in places:
        with pytest.raises(UserError, match=r"^--out: .* cannot be written \(.* is "):
            files.check_writable(place, "--out")
    assert sorted(os.listdir(tmp_path)) == ["file", "sealed"]


def test_what_a_killed_writer_has_left_is_replaced(tmp_path):
    with subprocess.Popen(["true"]) as dead:
        dead.wait()
    (tmp_path / f".tmp-file.{socket.gethostname()}.{dead.pid}").mkdir()
    files.write_json(tmp_path / "file", {"a": [1]})
    assert (tmp_path / "file").read_text() == '{\n  "a": [\n    1\n  ]\n}\n' and len(os.listdir(tmp_path)) == 1


def test_what_another_host_or_nobody_is_writing_is_left_alone(tmp_path):
    """Mutation: leave the host out of the name, or any digits be a process."""
    others = [f".tmp-file.other-host.{os.getpid()}", f".tmp-file.{socket.gethostname()}.{'9' * 20}"]
    for name in others:
        (tmp_path / name).touch()
    files.write(tmp_path / "file", "text")
    assert sorted(os.listdir(tmp_path)) == sorted([*others, "file"])


def test_digest_is_of_the_parts_one_after_another(tmp_path):
    (tmp_path / "file").write_bytes(b"x" * 5_000_000)
    whole = "ä".encode() + b"b" + b"x" * 5_000_000
    assert files.digest("ä", b"b", tmp_path / "file") == hashlib.sha256(whole).hexdigest()
    wanted = hashlib.blake2b(whole, digest_size=32).hexdigest()
    assert files.digest("ä", b"b", tmp_path / "file", algorithm="blake2b") == wanted


def test_a_lock_names_its_holder_and_ends_with_it(tmp_path):
    hold = "lock(Path(sys.argv[1])): print('begun', flush=True); sys.stdin.read()"
    with another(hold, tmp_path / "lock") as holder:
        with pytest.raises(files.InUseError, match=f"host .* pid {holder.pid}"), files.lock(tmp_path / "lock"):
            pass
        holder.kill()
    with files.lock(tmp_path / "lock", wait=True):
        assert f"pid {os.getpid()}" in (tmp_path / "lock").read_text()


@pytest.mark.parametrize(
    "write", [lambda file: save_file({"a": torch.zeros(999)}, file), tiny_tokenizer().save_pretrained]
)
def test_a_full_disk_is_an_os_error_whatever_language_met_it(tmp_path, write):
    """safetensors and tokenizers raise exceptions of their own."""
    with files_of_at_most(2000), pytest.raises(OSError) as caught, files.replacing(tmp_path / "new") as work:
        write(work)
    assert caught.value.errno == errno.EFBIG and not list(tmp_path.iterdir())


def test_what_the_system_refuses_is_a_users_mistake_at_its_place():
    """Mutation: fill the reason in by `str.format`, which stumbles over braces in a path."""
    wanted = r"^/a/\{b\}: cannot be written \(No space left on device, rank 1\); make room$"
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(UserError, match=wanted), files.explained("/a/{b}: cannot be written", "make room", ", rank 1"):
        raise full
