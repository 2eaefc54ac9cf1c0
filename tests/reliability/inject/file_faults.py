"""Wraps the file calls of a process from outside, so that a test can end it or fail it at any one of them."""

import builtins
import errno
import io
import json
import os
import re
import resource
import shutil  # noqa: F401 - decides at import, from the unwrapped calls, how it walks directories
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

OS_CALLS = (
    "open",
    "fsync",
    "rename",
    "replace",
    "mkdir",
    "unlink",
    "remove",
    "rmdir",
    "symlink",
    "truncate",
    "ftruncate",
)


class FileCalls:
    """Counts calls that touch paths under a directory and asks `act(number, name, path, half)` before each.

    `half()` does the first half of the call where a call can be half done.
    """

    def __init__(self, under: str | Path, act: Callable[[int, str, str, Callable[[], None]], None], match: str = ""):
        self.under, self.act, self.match, self.count = os.path.abspath(under), act, re.compile(match), 0
        self._saved = [(os, name, getattr(os, name)) for name in OS_CALLS]
        self._saved += [(builtins, "open", builtins.open), (io, "open", io.open)]

    def install(self) -> None:
        for module, name, call in self._saved:
            setattr(module, name, self._wrap_open(call) if module is not os else self._wrap(name, call))

    def remove(self) -> None:
        for module, name, call in self._saved:
            setattr(module, name, call)

    def hit(self, name: str, target: Any, half: Callable[[], None] = lambda: None, dir_fd: int | None = None) -> None:
        path = _path_of(target, dir_fd)
        if path.startswith(self.under) and self.match.search(path):
            self.count += 1
            self.act(self.count, name, path, half)

    def _wrap(self, name: str, call: Any) -> Any:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            if arguments:
                target = arguments[1] if name in ("rename", "replace", "symlink") else arguments[0]
                self.hit(name, target, dir_fd=options.get("dir_fd"))
            return call(*arguments, **options)

        return wrapped

    def _wrap_open(self, call: Any) -> Any:
        def wrapped(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            if not set(mode) & set("wax+") or isinstance(file, int):
                return call(file, mode, *arguments, **options)
            self.hit("open", file, lambda: call(file, mode, *arguments, **options).close())
            path = _path_of(file, None)
            stream = call(file, mode, *arguments, **options)
            return _Writer(stream, path, self) if path.startswith(self.under) else stream

        return wrapped


class _Writer:
    """A file whose writes can be cut off half-way."""

    def __init__(self, stream: Any, path: str, calls: FileCalls) -> None:
        self.stream, self.path, self.calls = stream, path, calls

    def write(self, data: Any) -> Any:
        def half() -> None:
            self.stream.write(data[: len(data) // 2])
            self.stream.flush()

        self.calls.hit("write", self.path, half)
        return self.stream.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *_: Any) -> None:
        self.stream.close()


def _path_of(target: Any, dir_fd: int | None) -> str:
    try:
        if isinstance(target, int):
            return os.readlink(f"/proc/self/fd/{target}")
        base = os.readlink(f"/proc/self/fd/{dir_fd}") if dir_fd is not None else ""
        return os.path.abspath(os.path.join(base, os.fsdecode(target)))
    except (OSError, TypeError):
        return ""


def install_from_environment() -> None:
    """FAULT: JSON of `rank` (or null for all), `under`, `match`, `call` and `do`."""
    fault = json.loads(os.environ["FAULT"])
    if "RANK" not in os.environ or fault["rank"] not in (None, int(os.environ["RANK"])):
        return
    does = fault["do"]
    if does == "memory":  # `call` bytes of address space
        resource.setrlimit(resource.RLIMIT_AS, (fault["call"], fault["call"]))
        return

    def act(number: int, name: str, path: str, half: Callable[[], None]) -> None:
        if number < fault["call"] or (number > fault["call"] and not does.startswith("E")):
            return
        if number == fault["call"]:
            os.write(2, f"fault: {does} at {name} {path}\n".encode())
        half()
        if does == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif does == "kill_all":
            os.killpg(0, signal.SIGKILL)
        elif does == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif does == "sleep":
            time.sleep(10_000)
        else:
            code = getattr(errno, does)
            raise OSError(code, os.strerror(code), path)

    FileCalls(fault["under"], act, fault.get("match", "")).install()
