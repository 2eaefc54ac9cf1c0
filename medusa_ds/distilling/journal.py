"""A file of JSON lines that a killed process leaves usable."""

import json
import os
from pathlib import Path
from typing import Any

from medusa_ds import files
from medusa_ds.errors import UserError


class Journal:
    """Rows in a file, appended one at a time.

    Each row is one write of a whole line, so that a process killed at any moment leaves whole lines and at most one
    broken last line, which is cut off at the next start.

    Args:
        path: the file; made with its directory if missing.

    Attributes:
        rows: what the file held at the start.

    Raises:
        UserError: in use, not writable, or with a line that is not a JSON object.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a+b", buffering=0)  # noqa: SIM115 - open for the whole run
        except OSError as error:
            raise _one_rank(f"{path}: cannot be written ({error.strerror}); name another file in --out") from None
        try:
            self._read()
        except BaseException:
            self._file.close()
            raise

    def _read(self) -> None:
        try:
            files.take(self._file)
        except files.InUseError:
            raise UserError(f"{self.path}: in use by another process; wait for it, or name another --out") from None
        self._file.seek(0)
        data = self._file.read()
        whole = data.rfind(b"\n") + 1
        for number, line in enumerate(data[:whole].splitlines(), 1):
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError("not an object")
            except ValueError as error:
                raise UserError(
                    f"{self.path}:{number}: not a row that distill wrote ({str(error)[:80]}); remove the line or the "
                    "file"
                ) from None
            self.rows.append(row)
        if whole < len(data):
            os.ftruncate(self._file.fileno(), whole)

    def append(self, row: dict[str, Any]) -> None:
        """Write a row.

        Raises:
            UserError: the disk is full, or the file cannot be written any more.
        """
        try:
            line = json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            raise _one_rank(
                f"{self.path}: cannot be written ({error.strerror}); make room: the same command goes on"
            ) from None

    def close(self) -> None:
        """Let other processes have the file."""
        self._file.close()


def _one_rank(problem: str) -> UserError:
    """A file has one writer, so that no other rank will say it."""
    return UserError(problem, one_rank=True)
