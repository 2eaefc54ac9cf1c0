"""What ends a rank early, and how: signals, a lost launcher, a dead, a stopped or a hung rank.

A thread does the watching (`faulthandler.dump_traceback_later` could end a hung rank, but with no status of its own and
without the name of a stopped one), because the main thread may be inside a collective call that never returns, where
Python's signal handlers do not run; signals reach the thread through `signal.set_wakeup_fd`. The stock launcher leaves
much to its ranks: SIGTERM to `deepspeed` leaves them orphaned, and Ctrl-C reaches each of them twice (from the terminal
and from the launcher), which counts as one signal here. Before the first `beat` there is nothing to save, so a signal
ends the rank at once.
"""

import contextlib
import ctypes
import faulthandler
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import NoReturn

import psutil

PATIENCE_S = 30.0
"""Seconds after a signal to it at which the stock launcher kills its ranks (`terminate_process_tree`); Slurm's
`KillWait` is the same by default."""
SHARE = 0.8
"""Of that time, which a step and its checkpoint may take before a rank counts as short of it."""
SAME_SIGNAL_S = 3.0
"""Signals within this time of the first are the same request, seconds."""
DEAD_RANK_GRACE_S = 5.0
"""How long a rank may take to report its own error once another has died, seconds."""
HUNG_STATUS = 124
"""Exit status of a rank that finished no step within `train.hang_timeout`."""

_LOST_RANK = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")  # gloo's words
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Supervisor:
    """Watches from construction to `close`.

    Args:
        rank: this process's rank, for messages.
        local_world_size: ranks that the launcher started on this host; 0 when it was not the stock launcher.
        hang_timeout: seconds without `beat` after which this rank dumps its stacks and ends.
        before_start: what to say of a signal that ends the rank before the first `beat`.
    """

    def __init__(
        self,
        rank: int,
        local_world_size: int,
        hang_timeout: float,
        before_start: str = "no step has begun, ending at once",
    ) -> None:
        self.rank, self.local_world_size, self.hang_timeout = rank, local_world_size, hang_timeout
        self._before_start = before_start
        self.stop_status: int | None = None
        """Exit status to end with after the next step's checkpoint, or None to go on."""
        self.pace_s = 0.0
        """Seconds that a step and its checkpoint take together, as far as they have been measured."""
        self._stop_at = 0.0
        self._beat_at: float | None = None
        self._dead_at: float | None = None
        self._stopped_at: dict[int, float] = {}
        self._parent = psutil.Process().parent()
        launched = "CROSS_SIZE" in os.environ and self._parent is not None and _is_launcher(self._parent)
        self._grandparent_pid = self._parent.ppid() if self._parent and launched else None
        if _is_orphan(self._parent):
            self._end(128 + signal.SIGHUP, "the launcher is gone; ending")
        self._read_fd, self._write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._old = [(number, signal.signal(number, _ignore)) for number in (signal.SIGTERM, signal.SIGINT)]
        self._old_fd = signal.set_wakeup_fd(self._write_fd, warn_on_full_buffer=False)
        self._closed = threading.Event()
        os.register_at_fork(after_in_child=self._after_fork)
        self._thread = threading.Thread(target=self._watch, name="supervisor", daemon=True)
        self._thread.start()

    def beat(self) -> None:
        """Say that work goes on: before the first step, and after a step, a validation, a checkpoint.

        From the first one on a signal waits for a checkpoint, and a rank without a further one counts as hung.
        """
        self._beat_at = time.monotonic()

    def asked_to_stop(self) -> bool:
        """Whether a signal has come or the launcher is lost."""
        return self.stop_status is not None

    def is_short_of_time(self) -> bool:
        """Whether a step that begins as a signal comes might not be saved before the launcher kills this rank."""
        return self.pace_s > SHARE * PATIENCE_S

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
            if self._beat_at is not None and time.monotonic() - self._beat_at > self.hang_timeout:
                self._say(f"no step finished within train.hang_timeout ({self.hang_timeout:.0f} s); stacks follow")
                faulthandler.dump_traceback(all_threads=True)
                self._wake_stopped()
                os._exit(HUNG_STATUS)

    def _on_signal(self, number: int) -> None:
        if number not in (signal.SIGTERM, signal.SIGINT):
            return
        if self.stop_status is None:
            self._request_stop(128 + number, f"received {signal.Signals(number).name}")
        elif time.monotonic() - self._stop_at > SAME_SIGNAL_S:
            self._end(128 + number, f"received {signal.Signals(number).name} again; ending at once")

    def _request_stop(self, status: int, reason: str) -> None:
        if self._beat_at is None:
            self._end(status, f"{reason}; {self._before_start}")
        self.stop_status, self._stop_at = status, time.monotonic()
        if self.is_short_of_time():
            then = "the last finished step is saved after this micro-batch, then the run ends"
        else:
            then = "a checkpoint is written after this step, then the run ends"
        pace = f" (a step and its checkpoint take about {self.pace_s:.0f} s)" if self.pace_s else ""
        self._say(f"{reason}; {then}; the launcher leaves {PATIENCE_S:.0f} s for it{pace}")

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
            states = {child.pid: child.status() for child in self._parent.children()}
        except psutil.NoSuchProcess:
            return
        alive = [pid for pid, state in states.items() if state != psutil.STATUS_ZOMBIE]
        now = time.monotonic()
        stopped = [pid for pid, state in states.items() if state == psutil.STATUS_STOPPED]
        self._stopped_at = {pid: self._stopped_at.get(pid, now) for pid in stopped}
        if stopped and now - min(self._stopped_at.values()) > self.hang_timeout:
            self._wake_stopped()
            self._end(HUNG_STATUS, "a rank was stopped for longer than train.hang_timeout; ending")
        if len(alive) >= self.local_world_size:
            self._dead_at = None
        elif self._dead_at is None:
            self._dead_at = time.monotonic()
        elif time.monotonic() - self._dead_at > DEAD_RANK_GRACE_S and not self._closed.is_set():
            self._end(1, "another rank has died; ending (its own message says why)")

    def _wake_stopped(self) -> None:
        """Name ranks that SIGSTOP holds, and let them run for a moment so that they show their own stacks."""
        for pid in self._stopped_at:
            self._say(f"the rank with pid {pid} was stopped (SIGSTOP)")
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGCONT)
        if self._stopped_at:
            time.sleep(1)

    def _end(self, status: int, text: str) -> NoReturn:
        self._say(text)
        os._exit(status)

    def _after_fork(self) -> None:
        """A forked worker takes signals as any process does, and dies with its rank, whose locks it holds open."""
        if not self._closed.is_set():
            signal.set_wakeup_fd(-1)
            for number, handler in self._old:
                signal.signal(number, handler)
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    def _say(self, text: str) -> None:
        after_bar = "\n" if sys.stderr.isatty() else ""
        where = f"{after_bar}rank {self.rank} on {socket.gethostname()} (pid {os.getpid()})"
        with contextlib.suppress(BrokenPipeError):  # a Ctrl-C ends what the lines went to, as `| tee`, too
            print(f"{where}: {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def end_with_others(rank: int) -> Iterator[None]:
    """One line where a collective call fails since another rank has gone."""
    try:
        yield
    except RuntimeError as error:
        if not any(text in str(error) for text in _LOST_RANK):
            raise
        print(f"rank {rank}: another rank has died; ending (its own message says why)", file=sys.stderr, flush=True)
        time.sleep(3)  # the launcher hands on the first status that it sees: let it be the other's
        sys.exit(1)


def _ignore(number: int, frame: object) -> None:
    """The thread acts on the signal; a handler must be set so that it reaches `set_wakeup_fd`."""


def _is_orphan(parent: psutil.Process | None) -> bool:
    """Whether the stock launcher died before this rank could look: on one node its parent was the runner."""
    if "CROSS_SIZE" not in os.environ:  # not the stock launcher's child
        return False
    if parent is None or not _is_launcher(parent):
        return True
    try:
        above = parent.parent()
        adopted = above is not None and (above.pid == 1 or above.name() == "systemd") and not _is_launcher(above)
        return os.environ["CROSS_SIZE"] == "1" and adopted
    except psutil.NoSuchProcess:
        return True


def _is_launcher(process: psutil.Process) -> bool:
    try:
        return any("deepspeed" in part for part in process.cmdline())
    except psutil.Error:
        return False
