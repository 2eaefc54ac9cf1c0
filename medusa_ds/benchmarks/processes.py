"""The fresh processes that measure a case, started before they are needed so that no one waits for imports."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from medusa_ds.benchmarks.cases import Case


class Workers:
    """Fresh processes for a case, one a GPU, that import what they need and wait to be told to measure.

    Without a case they measure the machine. The first writes a profiler's trace of one step, where a file is named.
    """

    def __init__(self, case: Case | None, trace: Path | None = None) -> None:
        self.folder = tempfile.TemporaryDirectory()
        ask, self.answer, self.log = (Path(self.folder.name) / name for name in ("case.json", "result.json", "log.txt"))
        ask.write_text(json.dumps(asdict(case) if case else {}))
        command = [sys.executable, "-m", "medusa_ds.benchmarks.worker", str(ask), str(self.answer)]
        self.processes = _start([*command, *([str(trace)] if trace else [])], case.gpus if case else 1, self.log)

    def measure(self, timeout_s: int) -> dict[str, Any]:
        """What they found: figures, or `out_of_memory` or `failed` with a line that says why."""
        status = _end(self.processes, timeout_s)
        if self.answer.exists():
            return dict(json.loads(self.answer.read_text()))
        if status is None:
            return {"failed": f"took more than {timeout_s} s"}
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        reason = next((line for line in reversed(lines) if "rror" in line), lines[-1] if lines else "")
        if status == -9:
            return {"out_of_memory": "killed: the machine's memory is used up"}
        return {"failed": reason[:300] or f"exit status {status}"}

    def close(self) -> None:
        """End them, and remove their files."""
        _stop(self.processes)
        self.folder.cleanup()


def _start(command: list[str], ranks: int, log: Path) -> list[subprocess.Popen[str]]:
    """A command on so many ranks, which each wait for a line of input."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    world = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    places = [os.environ | world | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    with open(log, "w") as stream:
        return [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=stream, stderr=stream, env=env, text=True)
            for env in places
        ]


def _end(processes: list[subprocess.Popen[str]], timeout_s: float) -> int | None:
    """Let ranks go on; the exit status of the first that failed, 0, or None: out of time. All have ended then."""
    for process in processes:
        assert process.stdin
        with suppress(BrokenPipeError):  # it has ended already
            process.stdin.write("go\n")
            process.stdin.close()
    end = time.monotonic() + timeout_s
    try:
        while time.monotonic() < end:
            states = [process.poll() for process in processes]
            if any(states) or None not in states:
                return next(filter(None, states), 0)
            time.sleep(0.05)
        return None
    finally:
        _stop(processes)


def _stop(processes: list[subprocess.Popen[str]]) -> None:
    for process in processes:
        process.kill()
        process.wait()
