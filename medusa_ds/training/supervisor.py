"""What ends a rank early, and how: signals, a lost launcher, a dead or a hung rank.

A thread does the watching, because the main thread may be inside a collective call that never returns, where Python's
signal handlers do not run; signals reach the thread through `signal.set_wakeup_fd`. The stock launcher leaves much to
its ranks: SIGTERM to `deepspeed` leaves them orphaned, and Ctrl-C reaches each of them twice (from the terminal and
from the launcher), which counts as one signal here.
"""

import faulthandler
import os
import signal
import socket
import sys
import threading
import time

import psutil

SAME_SIGNAL_S = 3.0
"""Signals within this time of the first are the same request, seconds."""
DEAD_RANK_GRACE_S = 5.0
"""How long a rank may take to report its own error once another has died, seconds."""
HUNG_STATUS = 124
"""Exit status of a rank that finished no step within `train.hang_timeout`."""


class Supervisor:
    """Watches from construction to `close`.

    Args:
        rank: this process's rank, for messages.
        local_world_size: ranks that the launcher started on this host; 0 when it was not the stock launcher.
        hang_timeout: seconds without `beat` after which this rank dumps its stacks and ends.
    """

    def __init__(self, rank: int, local_world_size: int, hang_timeout: float) -> None:
        self.rank, self.local_world_size, self.hang_timeout = rank, local_world_size, hang_timeout
        self.stop_status: int | None = None
        """Exit status to end with after the next step's checkpoint, or None to go on."""
        self._stop_at = 0.0
        self._beat_at = time.monotonic()
        self._dead_at: float | None = None
        self._parent = psutil.Process().parent()
        self._grandparent_pid = self._parent.ppid() if self._parent and _is_launcher(self._parent) else None
        self._read_fd, write_fd = os.pipe()
        os.set_blocking(self._read_fd, False)
        os.set_blocking(write_fd, False)
        self._write_fd = write_fd
        self._old = [(number, signal.signal(number, _ignore)) for number in (signal.SIGTERM, signal.SIGINT)]
        self._old_fd = signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="supervisor", daemon=True)
        self._thread.start()

    def beat(self) -> None:
        """Say that work goes on: after a step, a validation, a checkpoint."""
        self._beat_at = time.monotonic()

    def close(self) -> None:
        """Stop watching and put the previous signal handlers back."""
        self._closed.set()
        self._thread.join()
        signal.set_wakeup_fd(self._old_fd)
        for number, handler in self._old:
            signal.signal(number, handler)
        os.close(self._read_fd)
        os.close(self._write_fd)

    def _watch(self) -> None:
        while not self._closed.wait(0.2):
            try:
                received = os.read(self._read_fd, 64)
            except BlockingIOError:
                received = b""
            for number in received:
                self._on_signal(number)
            if self.stop_status is None and self._launcher_is_lost():
                self._request_stop(128 + signal.SIGHUP, "the launcher is gone")
            self._check_ranks()
            idle = time.monotonic() - self._beat_at
            if idle > self.hang_timeout:
                self._say(f"no step finished within train.hang_timeout ({self.hang_timeout:.0f} s); stacks follow")
                faulthandler.dump_traceback(all_threads=True)
                os._exit(HUNG_STATUS)

    def _on_signal(self, number: int) -> None:
        if number not in (signal.SIGTERM, signal.SIGINT):
            return
        if self.stop_status is None:
            self._request_stop(128 + number, f"received {signal.Signals(number).name}")
        elif time.monotonic() - self._stop_at > SAME_SIGNAL_S:
            self._say(f"received {signal.Signals(number).name} again; ending at once")
            os._exit(128 + number)

    def _request_stop(self, status: int, reason: str) -> None:
        self.stop_status, self._stop_at = status, time.monotonic()
        self._say(f"{reason}; a checkpoint is written after this step, then the run ends")

    def _launcher_is_lost(self) -> bool:
        if self._grandparent_pid is None or self._parent is None:
            return False
        try:
            return os.getppid() != self._parent.pid or self._parent.ppid() != self._grandparent_pid
        except psutil.NoSuchProcess:
            return True

    def _check_ranks(self) -> None:
        """End when another rank of this host has died: a collective call would wait for it for good."""
        if self.local_world_size < 2 or self._parent is None or os.getppid() != self._parent.pid:
            return
        try:
            alive = [child for child in self._parent.children() if child.status() != psutil.STATUS_ZOMBIE]
        except psutil.NoSuchProcess:
            return
        if len(alive) >= self.local_world_size:
            self._dead_at = None
        elif self._dead_at is None:
            self._dead_at = time.monotonic()
        elif time.monotonic() - self._dead_at > DEAD_RANK_GRACE_S and not self._closed.is_set():
            self._say("another rank has died; ending (its own message says why)")
            os._exit(1)

    def _say(self, text: str) -> None:
        print(f"rank {self.rank} on {socket.gethostname()} (pid {os.getpid()}): {text}", file=sys.stderr, flush=True)


def _ignore(number: int, frame: object) -> None:
    """The thread acts on the signal; a handler must be set so that it reaches `set_wakeup_fd`."""


def _is_launcher(process: psutil.Process) -> bool:
    try:
        return any("deepspeed" in part for part in process.cmdline())
    except psutil.Error:
        return False
