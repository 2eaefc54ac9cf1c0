"""What users say in a source, to be answered anew."""

import json
import sys
from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

from medusa_ds.config.recipe import SourceSpec
from medusa_ds.data.layouts import Message, UnusableRow, read_row
from medusa_ds.data.sources import open_source
from medusa_ds.errors import UserError

A_ROW = 'a row is {"turns": ["Hello"]}, or what data.path takes'


class Prompt(NamedTuple):
    """A conversation's system and user turns as messages, and what its row has as `category`, or an empty text."""

    messages: list[Message]
    category: Any


def load_prompts(where: str, path: str, split: str = "train") -> Iterator[tuple[str, Prompt | str]]:
    """Read prompts from a source, see `SourceSpec.path`, which the option or key `where` names.

    A row may also be `{"turns": [text, ...]}`, and have a `category`.

    Yields:
        Where a row stands, and its prompt, or why it cannot be used.

    Raises:
        UserError: the source cannot be found or read, or has no row.
    """
    at = None
    for at, row in open_source(where, SourceSpec(path=path, split=split))[0]():
        try:
            turns, category = (row.get("turns"), row.get("category")) if isinstance(row, dict) else (None, None)
            if isinstance(turns, list):
                row = row | {"messages": [{"role": "user", "content": turn} for turn in turns]}
            read = read_row(row)
            messages = [message for message in read.messages if message["role"] != "assistant"]
            if any(message["role"] == "tool" for message in messages):
                raise UnusableRow("turns of tools")
            if read.tools or read.template_args:
                raise UnusableRow("schemas of functions or chat_template_kwargs, without which it would be answered")
            if not any(message["role"] == "user" for message in messages):
                raise UnusableRow("no user turn")
            json.dumps(messages, ensure_ascii=False).encode()
            yield at, Prompt(messages, "" if category is None else category)
        except UnusableRow as error:
            yield at, str(error)
        except (TypeError, ValueError, RecursionError):
            yield at, "not text that UTF-8 and JSON can hold"
    if at is None:
        raise UserError(f"{where}: {path}: found no prompt; {A_ROW}")


def read_prompts(where: str, path: str, limit: int | None = None) -> list[Prompt]:
    """The first usable prompts of a source, with texts as categories; rows that are left out are named.

    Raises:
        UserError: the source cannot be found or read, or has no prompt.
    """
    prompts, problems = [], []
    for at, row in load_prompts(where, path):
        if isinstance(row, str):
            problems.append(f"{at}: {row}; {A_ROW}")
        elif not isinstance(row.category, str):
            problems.append(f"{at}: category: found {str(row.category)[:60]}; a text")
        else:
            prompts.append(row)
    if not prompts:
        raise UserError(*problems)
    for problem in islice(problems, 20):
        print(f"left out: {problem}", file=sys.stderr)
    if problems:
        print(f"{len(problems)} of {len(problems) + len(prompts)} prompts were left out", file=sys.stderr)
    return prompts[:limit]
