"""Options of a command line: how they are declared, and what their values may be."""

import argparse
from typing import Any, NoReturn

from medusa_ds.errors import UserError

Option = tuple[tuple[str, ...], dict[str, Any]]


class Parser(argparse.ArgumentParser):
    """Says a mistake as a `UserError`."""

    def error(self, message: str) -> NoReturn:
        """Raise it."""
        raise UserError(f"{self.prog}: {message}; see {self.prog} --help")


def option(*names: str, **settings: Any) -> Option:
    """An option for `add_argument`."""
    return names, settings


def positive(text: str) -> float:
    """A number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"found {text!r}; allowed is a number above 0")
    return value


def temperature(text: str) -> float:
    """A number of at least 0."""
    return 0.0 if text in ("0", "0.0") else positive(text)


def share(text: str) -> float:
    """A number above 0 and up to 1."""
    value = positive(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"found {text!r}; allowed is a share above 0 and up to 1")
    return value


def count(text: str) -> int:
    """A whole number of at least 1."""
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) >= 1):
        raise argparse.ArgumentTypeError(f"found {text!r}; allowed is a whole number of at least 1")
    return int(text)


def counts(text: str) -> list[int]:
    """Counts with commas between them."""
    return [count(part) for part in text.split(",")]


def names(text: str) -> list[str]:
    """Words with commas between them."""
    return text.split(",")
