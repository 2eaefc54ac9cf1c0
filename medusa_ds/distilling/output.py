"""What a run of `distill` leaves: rows in OUT, and in OUT.progress its settings, made prompts and removed rows.

Both are JSON lines. Each row is one write of a whole line, so that a process killed at any moment leaves whole lines
and at most one broken last line, which is cut off at the next start. A file has one writer: of several ranks, the first
writes these two, and each other one files of its own beside them (`OUT.rank1`, `OUT.progress.rank1`). They are moved
into the two at the end, or where a run was interrupted by the next one, on however many ranks.
"""

import json
import os
import re
from contextlib import closing
from pathlib import Path
from typing import Any

from medusa_ds.errors import UserError
from medusa_ds.files import InUseError, explained, take
from medusa_ds.ranks import Ranks

_BEGINNINGS = (b'{"row"', b'{"model"')
"""Of rows and of settings: what begins otherwise is not cut off, as it is another program's."""


class Journal:
    """A file of JSON lines, made with its directory if missing and locked while it is open.

    Attributes:
        rows: what the file held at the start.

    Raises:
        UserError: in use, not writable, or with a line that is not a JSON object.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with explained(f"{path}: cannot be written", "name another file in --out", one_rank=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a+b", buffering=0)  # noqa: SIM115 - open for the whole run
        try:
            take(self._file)
            self._file.seek(0)
            data = self._file.read()
            whole = data.rfind(b"\n") + 1
            if not any(data[whole:].startswith(begin[: len(data) - whole]) for begin in _BEGINNINGS):
                self._parse(data.count(b"\n") + 1, b"")
            self.rows = [self._parse(number, line) for number, line in enumerate(data[:whole].splitlines(), 1)]
            os.ftruncate(self._file.fileno(), whole)
        except InUseError:
            self.close()
            raise UserError(f"{path}: in use by another process; wait for it, or name another --out") from None
        except BaseException:
            self.close()
            raise

    def _parse(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("not an object")
            return row
        except ValueError as error:
            raise UserError(
                f"{self.path}:{number}: not a row that distill wrote ({str(error)[:80]}); remove the line or the file"
            ) from None

    def append(self, row: dict[str, Any]) -> None:
        """Write a row.

        Raises:
            UserError: the disk is full, or the file cannot be written any more.
        """
        line = json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        with explained(f"{self.path}: cannot be written", "make room: the same command goes on", one_rank=True):
            while line:
                line = line[self._file.write(line) :]

    def clear(self) -> None:
        """Forget what the file holds."""
        os.ftruncate(self._file.fileno(), 0)
        self.rows = []

    def close(self) -> None:
        """Let other processes have the file."""
        self._file.close()


class Output:
    """The files of a run into OUT, whose contents depend on a state of JSON; every rank makes one.

    Attributes:
        written: numbers of the rows that were there at the start.
        before: what the progress file held at the start, on all ranks: rows with `prompt`, or `removed`.
        rows, progress: this rank's files to append to.

    Raises:
        UserError: in use, not writable, damaged, or of other settings.
    """

    def __init__(self, path: Path, state: dict[str, Any], ranks: Ranks) -> None:
        self._ranks, self._paths = ranks, (path, Path(f"{path}.progress"))
        self._open: list[Journal] = []
        self.written: set[int]
        self.before: list[dict[str, Any]]
        try:
            self.written, self.before = ranks.first(lambda: self._read(state))
            if ranks.rank:
                self._open = [Journal(Path(f"{file}.rank{ranks.rank}")) for file in self._paths]
        except BaseException:
            self.close()
            raise
        self.rows, self.progress = self._open

    def merge(self) -> None:
        """Move all ranks' rows into the two files; every rank calls it, when it has written its last."""
        if self._ranks.rank:
            self.close()
        self._ranks.gather(None)
        self._ranks.first(self._absorb)

    def close(self) -> None:
        """Let other processes have the files."""
        for journal in self._open:
            journal.close()

    def _read(self, state: dict[str, Any]) -> tuple[set[int], list[dict[str, Any]]]:
        for file in self._paths:
            self._open.append(Journal(file))
        rows, progress = self._open
        found = [rows.path] * bool(rows.rows) + [part for journal in self._open for part in _parts(journal)]
        if not found and len(progress.rows) < 2:  # a file without rows is nobody's
            progress.clear()
            progress.append(state)
            return set(), []
        if not progress.rows:
            raise UserError(
                f"{found[0]}: holds rows, but {progress.path} is missing; name another file in --out, or remove it"
            )
        before = progress.rows[0]
        if changed := [key for key in state if before.get(key) != state[key]]:
            raise UserError(
                *(f"{rows.path}: {key}: was made with {before.get(key)!r}; now {state[key]!r}" for key in changed),
                f"{rows.path}: belongs to other settings; name another file in --out, or go back to the values above",
            )
        self._absorb()
        return {row["row"] for row in rows.rows}, progress.rows[1:]

    def _absorb(self) -> None:
        """Move what other ranks have written; a row that an interrupted move has left twice is taken once."""
        for journal in self._open:
            known = {_key(row) for row in journal.rows}
            for file in _parts(journal):
                with closing(Journal(file)) as part:
                    for row in part.rows:
                        if _key(row) not in known:
                            journal.append(row)
                            journal.rows.append(row)
                file.unlink()


def _parts(journal: Journal) -> list[Path]:
    """The files that other ranks have left beside one."""
    name = re.compile(re.escape(journal.path.name) + r"\.rank\d+")
    return sorted(file for file in journal.path.parent.iterdir() if name.fullmatch(file.name))


def _key(row: dict[str, Any]) -> tuple[Any, bool]:
    return row.get("row"), "prompt" in row
