"""Hub datasets, local files and the shipped sample become conversations, in one format and fully accounted for.

Every row of a source is kept as a row here, usable or not, with where it came from and why it was rejected, so that
rows in = rows used + rows rejected, from the cache too. Local JSON is parsed by `json`, strictly, a line a row:
`datasets` reads a line that holds a lone surrogate or `1e999` as several rows.
"""

import functools
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from datasets import Dataset, Features, Value, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetGenerationError

from medusa_ds.config.recipe import DataSpec, SourceSpec
from medusa_ds.data.dialogues import UnusableRow
from medusa_ds.errors import UserError

MAX_ROW_BYTES = 16 << 20
MAX_ARRAY_BYTES = 4 << 30
SUFFIXES = (".json", ".jsonl", ".parquet")
_FORMAT = 1  # of the cached rows; counted up when their meaning changes
_SAMPLE = Path(__file__).with_name("sample")
_FEATURES = Features({name: Value("large_string") for name in ("messages", "source", "reason")})
_ROLES = {
    "system": "system",
    "developer": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}


@dataclass(frozen=True)
class Conversations:
    """Datasets with columns `messages` (JSON of `{"messages": [...], "tools": [...] or null}`) and `source`.

    `rows` read = `used` + the counts of `rejected` (reason -> count and first source); a weight above 1 repeats rows in
    `train`, which counts as one use. `key` tells the state of the files and of the settings.
    """

    train: Dataset
    validation: Dataset
    rejected: dict[str, tuple[int, str]]
    rows: int
    used: int
    key: str


def load_conversations(spec: DataSpec) -> Conversations:
    """Read all sources, reject what is unusable, split and weight.

    The split is by the conversation's text, so that one text never stands on both sides. The shipped sample brings its
    own validation part.

    Raises:
        UserError: a source cannot be found or read, or nothing usable is left.
    """
    sources = [SourceSpec(path=spec.path, split=spec.split)] if isinstance(spec.path, str) else spec.path
    rejected: dict[str, tuple[int, str]] = {}
    train, validation, keys, rows, used = [], [], [], 0, 0
    for number, source in enumerate(sources):
        where = "data.path" if isinstance(spec.path, str) else f"data.path.{number}.path"
        data, key = _read(where, source)
        usable = usable_rows(data, rejected)
        if not len(usable):
            raise UserError(f"{where}: {source.path}: no usable conversation in {len(data)} rows: {summary(rejected)}")
        held = _held_out(data, usable, spec, source.path == "sample")
        kept = np.setdiff1d(usable, held)
        drawn = np.random.default_rng([spec.seed, number]).permutation(kept)
        repeats, rest = divmod(round(source.weight * len(kept)), max(len(kept), 1))
        chosen = kept if source.weight == 1 else np.concatenate([np.tile(drawn, repeats), drawn[:rest]])
        reject(rejected, "left out by the source's weight", data, np.setdiff1d(kept, chosen))
        train.append(data.select(chosen))
        validation.append(data.select(held))
        rows, used = rows + len(data), used + len(held) + len(np.unique(chosen))
        keys.append([key, source.weight])
    joined = [concatenate_datasets(parts).remove_columns("reason") for parts in (train, validation)]
    if not len(joined[0]):
        raise UserError("data: no conversation is left to train on; lower data.validation or raise the weights")
    state = [keys, spec.validation, spec.validation_max, spec.seed]
    return Conversations(joined[0], joined[1], rejected, rows, used, _digest(state))


def usable_rows(data: Dataset, rejected: dict[str, tuple[int, str]]) -> np.ndarray:
    """Numbers of the rows without a `reason`; the others are counted into `rejected`."""
    reasons = np.array(data["reason"][:] if len(data) else [], dtype=object)
    for reason in dict.fromkeys(filter(None, reasons)):
        reject(rejected, reason, data, np.flatnonzero(reasons == reason))
    return np.flatnonzero(reasons == "")


def reject(rejected: dict[str, tuple[int, str]], reason: str, data: Dataset, rows: np.ndarray) -> None:
    """Count rows under a reason and keep the first one's source."""
    if len(rows):
        count, first = rejected.get(reason) or (0, data[int(rows[0])]["source"])
        rejected[reason] = (count + len(rows), first)


def summary(rejected: dict[str, tuple[int, str]]) -> str:
    """One line for messages."""
    return "; ".join(f"{count} x {reason}, first {at}" for reason, (count, at) in rejected.items()) or "nothing in it"


def _held_out(data: Dataset, usable: np.ndarray, spec: DataSpec, sample: bool) -> np.ndarray:
    """Rows for validation: the sample's own, or those whose text has the lowest seeded hashes."""
    if not spec.validation:
        return usable[:0]
    if sample:
        return np.array([row for row in usable if "validation.jsonl:" in data[int(row)]["source"]], dtype=int)
    column = data.data.column("messages")  # read a row at a time, straight from the file
    goal = min(spec.validation_max, max(round(spec.validation * len(usable)), 1))
    texts: dict[bytes, list[int]] = {}
    for row in usable:
        text = column[int(row)].as_py().encode()
        texts.setdefault(hashlib.blake2b(text, key=str(spec.seed).encode()).digest(), []).append(int(row))
    held: list[int] = []
    for digest in sorted(texts)[1:]:
        held += texts[digest] if len(held) + len(texts[digest]) <= goal else []
    return np.sort(np.array(held, dtype=int))


def _read(where: str, source: SourceSpec) -> tuple[Dataset, str]:
    """A source's rows, and a digest of its state."""
    rows, key = open_source(where, source)
    return _convert(rows, key), key


_Rows = Callable[[], Iterator[tuple[str, Any]]]


def open_source(where: str, source: SourceSpec) -> tuple[_Rows, str]:
    """What gives a source's rows, each with where it stands, and a digest of the source's state.

    Raises:
        UserError: the source cannot be found or read.
    """
    path = _SAMPLE if source.path == "sample" else Path(source.path)
    if not path.exists():
        if path.suffix in SUFFIXES:
            raise UserError(f"{where}: {path}: found no such file; name a file, a directory or a hub id")
        return _open_hub(where, source)
    if source.split != "train":
        raise UserError(f"{where}: {path}: found split {source.split!r}, which only hub datasets have; remove it")
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    files = [file for file in files if file.suffix in SUFFIXES and file.is_file()]
    if not files:
        raise UserError(f"{where}: {path}: found no file that ends with {', '.join(SUFFIXES)}; name one")
    key = _digest([[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files])
    return functools.partial(_file_rows, files), key


def _open_hub(where: str, source: SourceSpec) -> tuple[_Rows, str]:
    name = f"{source.path}[{source.split}]"
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source.path):
        raise UserError(
            f"{where}: found {source.path}; allowed are `sample`, an existing file or directory, or a hub id"
        )
    try:
        data = load_dataset(source.path, split=source.split)
    except Exception as error:  # whatever the HTTP, file and format layers below the hub client raise
        why = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error).strip() else ''}"
        raise UserError(f"{where}: {name}: cannot be loaded ({why}); check id, split, network and HF_TOKEN") from None
    key = _digest([name, data._fingerprint])
    return lambda: ((f"{name}:{number}", row) for number, row in enumerate(data)), key


def _convert(rows: _Rows, key: str) -> Dataset:
    """Write rows in our one format into the cache of `datasets`, under a name that tells the source's state."""

    def generate() -> Iterator[dict[str, str]]:
        for source, row in rows():
            try:
                yield {"messages": _conversation(row), "source": source, "reason": ""}
            except UnusableRow as error:
                yield {"messages": "", "source": source, "reason": str(error)}
            except (TypeError, ValueError, RecursionError):
                reason = "not text that UTF-8 and JSON can hold (a lone surrogate, a date, too deep)"
                yield {"messages": "", "source": source, "reason": reason}

    try:
        return Dataset.from_generator(generate, features=_FEATURES, fingerprint=key)
    except DatasetGenerationError as error:
        raise error.__cause__ if isinstance(error.__cause__, UserError | OSError) else error from None
    except ValueError as error:
        if "corresponds to no data" not in str(error):
            raise
        return Dataset.from_dict({name: [] for name in _FEATURES}, features=_FEATURES)


def _file_rows(files: list[Path]) -> Iterator[tuple[str, Any]]:
    """Rows with their `FILE:LINE`, or an `UnusableRow` in the place of one."""
    for file in files:
        if file.suffix == ".parquet":
            yield from _parquet_rows(file)
            continue
        with file.open("rb") as handle:
            head = handle.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")
        yield from _array_rows(file) if head.startswith(b"[") else _line_rows(file)


def _parquet_rows(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        batches = pq.ParquetFile(file).iter_batches(1000)
        for number, row in enumerate((row for batch in batches for row in batch.to_pylist()), 1):
            yield f"{file}:{number}", row
    except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
        raise UserError(f"{file}: not a readable Parquet file ({str(error).splitlines()[0][:200]})") from None


def _line_rows(file: Path) -> Iterator[tuple[str, Any]]:
    with file.open("rb") as handle:
        for number, line in enumerate(iter(lambda: handle.readline(MAX_ROW_BYTES + 1), b""), 1):
            row: Any = UnusableRow(f"a line of more than {MAX_ROW_BYTES >> 20} MiB")
            if len(line) <= MAX_ROW_BYTES:
                if not line.strip():
                    continue
                try:
                    row = _DECODER.decode(line.decode("utf-8-sig"))
                except (ValueError, RecursionError):
                    row = UnusableRow("not valid JSON")
            while len(line) > MAX_ROW_BYTES and not line.endswith(b"\n"):
                line = handle.readline(MAX_ROW_BYTES + 1) or b"\n"  # the rest of it
            yield f"{file}:{number}", row


def _array_rows(file: Path) -> Iterator[tuple[str, Any]]:
    """The items of a JSON array, decoded one by one so that each has its line."""
    if file.stat().st_size > MAX_ARRAY_BYTES:
        raise UserError(f"{file}: found a JSON array of more than {MAX_ARRAY_BYTES >> 30} GiB; convert it to JSONL")
    line, at = 1, 0
    try:
        text = file.read_text(encoding="utf-8-sig")
        border = re.compile(r"\s*\[\s*").match(text)
        while border and not (text.startswith("]", border.end()) and not at) and "]" not in border[0]:
            line += text.count("\n", at, border.end())
            row, end = _DECODER.raw_decode(text, border.end())
            yield f"{file}:{line}", row
            line, at = line + text.count("\n", border.end(), end), end
            border = re.compile(r"\s*[,\]]\s*").match(text, at)
        if not border:
            raise ValueError("expected , or ] after an item")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}:{line}: not a valid JSON array ({str(error)[:120]})") from None


def _finite(text: str) -> float:
    if not math.isfinite(float(text)):
        raise ValueError(f"{text} is not a JSON number in range")
    return float(text)


_DECODER = json.JSONDecoder(parse_float=_finite, parse_constant=_finite)


def _conversation(row: Any) -> str:
    """One row, ShareGPT or chat messages, in our one format."""
    messages, row = read_messages(row)
    if not any(turn["role"] == "assistant" for turn in messages):
        raise UnusableRow("no assistant turn" if messages else "an empty conversation")
    tools = _parsed(row.get("tools"))
    if not isinstance(tools, list | None):
        raise UnusableRow("tools that are not a list")
    text = json.dumps({"messages": messages, "tools": tools or None}, ensure_ascii=False)
    text.encode()
    return text


def read_messages(row: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The messages of a row, and the row without nulls."""
    if isinstance(row, UnusableRow):
        raise row
    row = _without_none(row) if isinstance(row, dict) else {}
    turns = row.get("messages", row.get("conversations"))
    if not isinstance(turns, list):
        raise UnusableRow("no list of messages or conversations")
    messages = [read_turn(turn) for turn in turns]
    if isinstance(row.get("system"), str) and messages and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": row["system"]})
    return [turn for turn in messages if turn["role"] != "system" or turn["content"].strip()], row


def read_turn(turn: Any) -> dict[str, Any]:
    """One turn, ShareGPT or chat message, as a message."""
    turn = turn if isinstance(turn, dict) else {}
    role = turn.get("from", turn.get("role"))
    role = _ROLES.get(role.strip().lower()) if isinstance(role, str) else None
    content, calls = turn.get("value", turn.get("content")), turn.get("tool_calls") or []
    if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
        content = "".join(part["text"] for part in content)
    if content is None and calls:
        content = ""
    if role is None:
        raise UnusableRow("unknown role")
    if not isinstance(content, str) or not isinstance(turn.get("reasoning_content", ""), str):
        raise UnusableRow("a content that is not text")
    if not content.strip() and not calls and role in ("user", "assistant"):
        raise UnusableRow(f"an empty {role} turn")
    kept = {key: turn[key] for key in ("reasoning_content", "tool_call_id", "name") if key in turn}
    if role == "assistant" and turn.get("unfinished") is True:
        kept["unfinished"] = True
    if calls:
        kept["tool_calls"] = [_call(call) for call in calls] if isinstance(calls, list) else [_call(calls)]
    return {"role": role, "content": content, **kept}


def _call(call: Any) -> dict[str, Any]:
    """A tool call, its arguments an object as templates want them and not text as the OpenAI API sends them."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UnusableRow("a tool call without a function name")
    function["arguments"] = _parsed(function.get("arguments", {}))
    return call


def _parsed(value: Any) -> Any:
    """The JSON in a text; anything else as it is."""
    try:
        return _DECODER.decode(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def _without_none(value: Any) -> Any:
    """Without the nulls that Arrow fills in for keys that other rows have."""
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def _digest(state: Any) -> str:
    return hashlib.sha256(json.dumps([_FORMAT, state]).encode()).hexdigest()[:40]
