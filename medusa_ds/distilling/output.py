"""What a run of `distill` leaves: rows in OUT, and in OUT.progress its settings, made prompts and removed rows.

A file has one writer: of several ranks, the first writes these two, and each other one files of its own beside them
(`OUT.rank1`, `OUT.progress.rank1`). They are moved into the two at the end, or where a run was interrupted by the next
one, on however many ranks.
"""

import re
from pathlib import Path
from typing import Any

from medusa_ds.distilling.journal import Journal
from medusa_ds.errors import UserError
from medusa_ds.ranks import Ranks


class Output:
    """The files of a run; every rank makes one.

    Args:
        path: OUT.
        state: what the contents depend on; JSON.
        ranks: who writes.

    Attributes:
        written: numbers of the rows that were there at the start.
        before: what the progress file held at the start, on all ranks: rows with `prompt`, or `removed`.
        rows, progress: this rank's files to append to.

    Raises:
        UserError: in use, not writable, damaged, or of other settings.
    """

    def __init__(self, path: Path, state: dict[str, Any], ranks: Ranks) -> None:
        self.path, self._ranks = path, ranks
        self._paths = (path, Path(f"{path}.progress"))
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
        if not progress.rows:
            found = [journal.path for journal in self._open if journal.rows] + self._parts(rows) + self._parts(progress)
            if found:
                raise UserError(
                    f"{found[0]}: holds rows, but {progress.path} is missing; name another file in --out, or remove it"
                )
            progress.append(state)
        else:
            before = progress.rows[0]
            changed = [key for key in state if before.get(key) != state[key]]
            if changed:
                raise UserError(
                    *(f"{rows.path}: {key}: was made with {before.get(key)!r}; now {state[key]!r}" for key in changed),
                    f"{rows.path}: belongs to other settings; name another file in --out, or go back to the values "
                    "above",
                )
        self._absorb()
        return {row["row"] for row in rows.rows}, progress.rows[1:]

    def _absorb(self) -> None:
        """Move what other ranks have written; a row that an interrupted move has left twice is taken once."""
        for journal in self._open:
            known = {_key(row) for row in journal.rows}
            for file in self._parts(journal):
                part = Journal(file)
                for row in part.rows:
                    if _key(row) not in known:
                        journal.append(row)
                        journal.rows.append(row)
                part.close()
                file.unlink()

    @staticmethod
    def _parts(journal: Journal) -> list[Path]:
        name = re.compile(re.escape(journal.path.name) + r"\.rank\d+")
        return sorted(file for file in journal.path.parent.iterdir() if name.fullmatch(file.name))


def _key(row: dict[str, Any]) -> tuple[Any, bool]:
    return row.get("row"), "prompt" in row
