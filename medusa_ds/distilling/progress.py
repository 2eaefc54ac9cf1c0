"""How far a run is."""

import sys
import time

PLAIN_INTERVAL_S = 15.0


class Progress:
    """Rows, tokens a second and the time left: a line that is rewritten, or on no terminal one every 15 seconds.

    Args:
        total: rows to come.
        shown: False prints nothing.
    """

    def __init__(self, total: int, shown: bool = True) -> None:
        self.total, self.rows, self.tokens, self.shown = total, 0, 0, shown
        self.started = self.printed = time.monotonic()
        self.terminal = sys.stderr.isatty()

    def add(self, rows: int, tokens: int) -> None:
        """Count rows that have ended, and tokens."""
        self.rows, self.tokens = self.rows + rows, self.tokens + tokens
        if time.monotonic() - self.printed >= (0.5 if self.terminal else PLAIN_INTERVAL_S):
            self._print()

    def close(self) -> None:
        """Print how it ended."""
        self._print(last=True)

    def _print(self, last: bool = False) -> None:
        self.printed = time.monotonic()
        if not self.shown:
            return
        seconds = max(self.printed - self.started, 1e-9)
        left = "" if last else f", {seconds / max(self.rows, 1) * (self.total - self.rows):,.0f} s left"
        line = (
            f"{self.rows:,} of {self.total:,} rows, {self.tokens:,} tokens in {seconds:,.0f} s, "
            f"{self.tokens / seconds:,.0f} tokens/s{left}"
        )
        end = "\n" if last or not self.terminal else ""
        print(f"\r{line}\x1b[K" if self.terminal else line, end=end, file=sys.stderr, flush=True)
