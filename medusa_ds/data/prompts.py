"""What users say in a source, to be answered anew."""

import json
from collections.abc import Iterator
from typing import Any

from medusa_ds.data.dialogues import UnusableRow
from medusa_ds.data.sources import open_source, read_messages, read_turn
from medusa_ds.recipe import SourceSpec


def load_prompts(where: str, path: str, split: str = "train") -> Iterator[tuple[str, list[dict[str, Any]] | str]]:
    """Read prompts.

    Args:
        where: the option or key, for messages.
        path: see `SourceSpec.path`; a row may also be `{"turns": [text, ...]}`.
        split: of a hub dataset.

    Yields:
        Where a row stands, and its system and user turns as messages, or why it cannot be used.

    Raises:
        UserError: the source cannot be found or read.
    """
    for at, row in open_source(where, SourceSpec(path=path, split=split))[0]():
        try:
            turns = row.get("turns") if isinstance(row, dict) else None
            if not isinstance(turns, list):
                messages, _ = read_messages(row)
                messages = [message for message in messages if message["role"] != "assistant"]
            else:
                messages = [read_turn({"role": "user", "content": turn}) for turn in turns]
            if any(message["role"] == "tool" for message in messages):
                raise UnusableRow("turns of tools")
            if not any(message["role"] == "user" for message in messages):
                raise UnusableRow("no user turn")
            json.dumps(messages, ensure_ascii=False).encode()
            yield at, messages
        except UnusableRow as error:
            yield at, str(error)
        except (TypeError, ValueError, RecursionError):
            yield at, "not text that UTF-8 and JSON can hold"
