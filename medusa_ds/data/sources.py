"""Hub datasets, local files and the shipped sample become conversations, in one format and fully accounted for.

Every row of a source is kept as a row here, usable or not, with where it came from and why it was rejected, so that
rows in = rows used + rows rejected, from the cache too. JSON is parsed by `json`, strictly, a line a row, that of the
hub too: `datasets` takes the types of all rows from the first ones, decodes texts that spell JSON where another row has
a list in their place, and rounds floats where columns are mixed (5.2.0, see `findings/datasets_*`).
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import (
    Dataset,
    DownloadManager,
    Features,
    List,
    ReadInstruction,
    Value,
    concatenate_datasets,
    load_dataset_builder,
)
from datasets.exceptions import DatasetGenerationError

from medusa_ds.config.recipe import DataSpec, SourceSpec
from medusa_ds.data.layouts import DECODER, Row, UnusableRow, read_row
from medusa_ds.errors import UserError, counted
from medusa_ds.files import DATA_SUFFIXES, digest

_FORMAT = 6  # of the cached rows; counted up when their meaning changes
_SAMPLE = Path(__file__).with_name("sample")
_TEXTS = ("messages", "source", "reason", "layout")
_FEATURES = Features({name: Value("large_string") for name in _TEXTS} | {"notes": List(Value("large_string"))})

Counts = dict[str, tuple[int, str]]
"""How often something was met, and where first."""


@dataclass(frozen=True)
class Conversations:
    """Datasets with columns `messages` (JSON, see `Row.text`), `source`, `layout` and `notes` (see `Row`).

    `rows` read = those of `once` and `validation` + the counts of `rejected`; a weight above 1 repeats rows in `train`,
    of which `once` are the numbers of rows that repeat none before. `key` tells the state of the files and of the
    settings.
    """

    train: Dataset
    validation: Dataset
    once: np.ndarray
    rejected: Counts
    rows: int
    key: str


def load_conversations(spec: DataSpec) -> Conversations:
    """Read all sources, reject what is unusable, split and weight.

    The split is by the conversation's text, so that one text never stands on both sides, whichever sources have it. The
    shipped sample brings its own validation part.

    Raises:
        UserError: a source cannot be found or read, or nothing usable is left.
    """
    sources = [SourceSpec(path=spec.path, split=spec.split)] if isinstance(spec.path, str) else spec.path
    rejected: Counts = {}
    held_texts: set[str] = set()
    train: list[Dataset] = []
    validation, once, rows = [], [], 0
    read: list[tuple[SourceSpec, Dataset, np.ndarray, np.ndarray]] = []
    keys: list[list[Any]] = []
    if isinstance(spec.validation, str):
        data, usable, key = _read("data.validation", SourceSpec(path=spec.validation), rejected)
        validation.append(data.select(usable))
        held_texts, rows = set(validation[0]["messages"][:]), len(data)
        keys.append([key, "validation"])
    for number, source in enumerate(sources):
        where = "data.path" if isinstance(spec.path, str) else f"data.path.{number}.path"
        data, usable, key = _read(where, source, rejected)
        held = _held_out(data, usable, spec, source.path == "sample")
        validation.append(data.select(held))
        held_texts.update(validation[-1]["messages"][:])
        read.append((source, data, usable, held))
        keys.append([key, source.weight])
    held_array = pa.array(held_texts, pa.large_string())
    for number, (source, data, usable, held) in enumerate(read):
        kept = np.setdiff1d(usable, held)
        is_held = pc.is_in(data.data.column("messages"), held_array).to_numpy()
        count(rejected, "stands in data.validation too", data, kept[is_held[kept]])
        kept = kept[~is_held[kept]]
        drawn = np.random.default_rng([spec.seed, number]).permutation(kept)
        repeats, rest = divmod(round(source.weight * len(kept)), max(len(kept), 1))
        chosen = kept if source.weight == 1 else np.concatenate([np.tile(drawn, repeats), drawn[:rest]])
        count(rejected, "left out by the source's weight", data, np.setdiff1d(kept, chosen))
        once.append(np.unique(chosen, return_index=True)[1] + sum(len(part) for part in train))
        train.append(data.select(chosen))
        rows += len(data)
    joined = [concatenate_datasets(parts).remove_columns("reason") for parts in (train, validation)]
    if not len(joined[0]):
        mend = "hold out fewer in data.validation, or raise the weights"
        raise UserError(f"data: no conversation is left to train on: {summary(rejected)}; {mend}")
    state = [keys, spec.validation, spec.validation_max, spec.seed]
    return Conversations(joined[0], joined[1], np.concatenate(once), rejected, rows, _key(state))


def usable_rows(data: Dataset, rejected: Counts, once: np.ndarray) -> np.ndarray:
    """Numbers of the rows without a `reason`; those of the others that are in `once` are counted into `rejected`."""
    reasons = data["reason"][:]
    for row in once:
        if reasons[row]:
            count(rejected, reasons[row], data, [row])
    return np.flatnonzero([not reason for reason in reasons])


def no_rows(features: Features) -> Dataset:
    """A data set of these columns without a row."""
    return Dataset.from_dict({name: [] for name in features}, features=features)


def count(counts: Counts, text: str, data: Dataset, rows: Iterable[int]) -> None:
    """Count rows under a text."""
    for row in rows:
        number, first = counts.get(text) or (0, data[int(row)]["source"])
        counts[text] = (number + 1, first)


def summary(rejected: Counts) -> str:
    """One line for messages."""
    told = [f"{number} x {reason}, first {at}" for reason, (number, at) in rejected.items()]
    return "; ".join(told[:5] + [f"{len(told) - 5} other reasons"] * (len(told) > 5)) or "nothing in it"


def _held_out(data: Dataset, usable: np.ndarray, spec: DataSpec, sample: bool) -> np.ndarray:
    """Rows for validation: the sample's own, or those whose text has the lowest seeded hashes."""
    if not spec.validation or isinstance(spec.validation, str):
        return usable[:0]
    if sample:
        return np.array([row for row in usable if "validation.jsonl:" in data[int(row)]["source"]], dtype=int)
    column = data.data.column("messages")  # read a row at a time, straight from the file
    goal = min(spec.validation_max, max(round(spec.validation * len(usable)), 1))
    texts: dict[bytes, list[int]] = {}
    for row in usable:
        text = column[int(row)].as_py().encode()
        texts.setdefault(blake2b(text, key=str(spec.seed).encode()).digest(), []).append(int(row))
    held: list[int] = []
    for text_hash in sorted(texts)[1:]:
        held += texts[text_hash] if len(held) + len(texts[text_hash]) <= goal else []
    return np.sort(np.array(held, dtype=int))


def _read(where: str, source: SourceSpec, rejected: Counts) -> tuple[Dataset, np.ndarray, str]:
    """A source's rows, the numbers of the usable ones, and a digest of its state."""
    rows, key = open_source(where, source)
    data = _convert(rows, key)
    usable = usable_rows(data, rejected, np.arange(len(data)))
    if not len(usable):
        raise UserError(
            f"{where}: {source.path}: no usable conversation in {counted(len(data), 'row')}: {summary(rejected)}"
        )
    return data, usable, key


_Rows = Callable[[], Iterator[tuple[str, Any]]]


def open_source(where: str, source: SourceSpec) -> tuple[_Rows, str]:
    """What gives a source's rows, each with where it stands, and a digest of the source's state.

    Raises:
        UserError: the source cannot be found or read.
    """
    path = _SAMPLE if source.path == "sample" else Path(source.path)
    if not path.exists():
        if path.suffix in DATA_SUFFIXES:
            raise UserError(f"{where}: {path}: found no such file; name a file, a directory or a hub id")
        return _open_hub(where, source)
    if source.split != "train":
        raise UserError(f"{where}: {path}: found split {source.split!r}, which only hub datasets have; remove it")
    there = {name for name in ("dataset_dict.json", "dataset_info.json", "state.json") if (path / name).is_file()}
    if there >= {"dataset_info.json", "state.json"} or "dataset_dict.json" in there:
        raise UserError(
            f"{where}: {path}: found a data set of save_to_disk; write it with its to_parquet, and name that"
        )
    entries = sorted(path.iterdir()) if path.is_dir() else [path]
    files = [file for file in entries if file.suffix in DATA_SUFFIXES and file.is_file()]
    if not files:
        raise UserError(f"{where}: {path}: found no file that ends with {', '.join(DATA_SUFFIXES)}; name one")
    state: list[Any] = [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    unread = [  # which may hold data, as `more/` and `a.json.gz`; not what `distill` keeps beside its rows
        str(entry)
        for entry in sorted({*entries} - {*files})
        if entry.is_dir() or any(suffix in entry.name.lower() for suffix in DATA_SUFFIXES)
        if not entry.name.startswith(".") and ".jsonl.progress" not in entry.name
    ]
    why = f"a folder in a folder, or a file that does not end in {', '.join(DATA_SUFFIXES)}"
    left_out = [(at, UnusableRow(why)) for at in unread]
    return lambda: chain(left_out, _file_rows(files)), _key(state + unread)


def _open_hub(where: str, source: SourceSpec) -> tuple[_Rows, str]:
    name = f"{source.path}[{source.split}]"
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source.path):
        raise UserError(
            f"{where}: found {source.path}; allowed are `sample`, an existing file or directory, or a hub id"
        )
    split, _, part = source.split.partition("[")
    try:
        builder = load_dataset_builder(source.path)
        if builder.name == "json" and not builder.config.field:
            files = [Path(file) for file in DownloadManager().download_and_extract(builder.config.data_files[split])]
            rows: Callable[[], Iterator[Any]] = lambda: (row for _, row in _file_rows(files))  # noqa: E731
            if part:
                total = sum(1 for _ in rows())
                (span,) = ReadInstruction.from_spec(source.split).to_absolute({split: total})
                whole, rows = rows, lambda: islice(whole(), span.from_, span.to)
            key = _key([name, [file.name for file in files]])
        else:
            builder.download_and_prepare()
            data = builder.as_dataset(split=source.split)
            rows, key = lambda: map(_without_none, data), _key([name, data._fingerprint])
    except Exception as error:  # whatever the HTTP, file and format layers below the hub client raise
        why = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error).strip() else ''}"
        raise UserError(f"{where}: {name}: cannot be loaded ({why}); check id, split, network and HF_TOKEN") from None
    return lambda: ((f"{name}:{number}", row) for number, row in enumerate(rows())), key


def _convert(rows: _Rows, key: str) -> Dataset:
    """Write rows in our one format into the cache of `datasets`, under a name that tells the source's state."""

    def generate() -> Iterator[dict[str, Any]]:
        for source, row in rows():
            left_out = {"messages": "", "source": source, "layout": "", "notes": []}
            try:
                read = read_conversation(row)
                yield left_out | {"messages": read.text(), "reason": "", "layout": read.layout, "notes": read.notes}
            except UnusableRow as error:
                yield left_out | {"reason": str(error)}
            except (TypeError, ValueError, RecursionError):
                reason = "not text that UTF-8 and JSON can hold (a lone surrogate, a date, too deep)"
                yield left_out | {"reason": reason}

    try:
        return Dataset.from_generator(generate, features=_FEATURES, fingerprint=key)
    except DatasetGenerationError as error:
        raise error.__cause__ if isinstance(error.__cause__, UserError | OSError) else error from None
    except ValueError as error:
        if "corresponds to no data" not in str(error):
            raise
        return no_rows(_FEATURES)


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
            yield f"{file}:{number}", _without_none(row)
    except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
        raise UserError(f"{file}: not a readable Parquet file ({str(error).splitlines()[0][:200]})") from None


def _line_rows(file: Path) -> Iterator[tuple[str, Any]]:
    with file.open("rb") as handle:
        for number, line in enumerate(handle, 1):
            if not line.strip():
                continue
            try:
                row = DECODER.decode(line.decode("utf-8-sig"))
            except (ValueError, RecursionError):
                row = UnusableRow("not valid JSON")
                if number == 1 and line.strip() == b"{" and handle.peek().lstrip().startswith(b'"'):
                    yield f"{file}:1", UnusableRow("one JSON object over several lines, which is no row a line")
                    return
            yield f"{file}:{number}", row


def _array_rows(file: Path) -> Iterator[tuple[str, Any]]:
    """The items of a JSON array, decoded one by one so that each has its line."""
    line, at = 1, 0
    try:
        text = file.read_text(encoding="utf-8-sig")
        border = re.compile(r"\s*\[\s*").match(text)
        while border and not (text.startswith("]", border.end()) and not at) and "]" not in border[0]:
            line += text.count("\n", at, border.end())
            row, end = DECODER.raw_decode(text, border.end())
            yield f"{file}:{line}", row
            line, at = line + text.count("\n", border.end(), end), end
            border = re.compile(r"\s*[,\]]\s*").match(text, at)
        if not border:
            raise ValueError("expected , or ] after an item")
        if text[border.end() + (not at) :].strip():
            raise ValueError("text after the array")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}:{line}: not a valid JSON array ({str(error)[:120]})") from None


def _without_none(value: Any) -> Any:
    """A value of Arrow without the nulls that it fills in for keys that other rows have."""
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def read_conversation(row: Any) -> Row:
    """A row with something to learn from.

    Raises:
        UnusableRow: there is nothing, or see `read_row`.
    """
    read = read_row(row)
    turns = [message for message in read.messages if message["role"] == "assistant"]
    if not turns:
        raise UnusableRow("no assistant turn" if read.messages else "an empty conversation")
    if all("untrained" in message for message in turns):
        raise UnusableRow("every assistant turn is marked as one not to learn from")
    return read


def _key(state: Any) -> str:
    return digest(json.dumps([_FORMAT, state]))[:40]
