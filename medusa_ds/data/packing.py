"""Tokenised conversations become sequences and micro-batches, in an order that is a pure function of (seed, step).

An epoch shuffles the conversations and packs them best-fit: each goes into the open sequence with the least room that
takes it. The numbers of sequences of two epochs can differ by a few, so a step finds its epoch by counting sequences
and not by division; every conversation is used exactly once an epoch. Token rows stay in the memory-mapped Arrow file.
"""

import functools
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset, Features, List, Value
from filelock import FileLock
from transformers import PreTrainedTokenizerBase

from medusa_ds import files
from medusa_ds.config.recipe import DataSpec, Recipe, TrainSpec
from medusa_ds.data.dialogues import Chat
from medusa_ds.data.layouts import UnusableRow
from medusa_ds.data.marks import IGNORED, Encoded
from medusa_ds.data.sources import Counts, count, load_conversations, no_rows, summary, usable_rows
from medusa_ds.errors import UserError, counted

_FORMAT = 4  # of the tokenised rows; counted up when their meaning changes
_MAP_ROWS_PER_PROCESS = 10_000
_FEATURES = Features(
    {
        "input_ids": List(Value("int32")),
        "supervised": List(Value("bool")),
        "length": Value("int32"),
        "cut": Value("bool"),
        "source": Value("large_string"),
        "reason": Value("large_string"),
        "notes": List(Value("large_string")),
    }
)


class CachedRows(NamedTuple):
    """Hidden states of a micro-batch that were computed before.

    `states` [M, H]: of the positions from which some head learns. `row`: LongTensor [B*S], where in `states` such a
    position is. `scales` [M]: what to multiply the states by; None: nothing.
    """

    states: torch.Tensor
    row: torch.Tensor
    scales: torch.Tensor | None


class MicroBatch(NamedTuple):
    """Sequences of one forward pass; LongTensors [B, S], documents told apart by positions that restart at 0."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    sources: list[list[str]]
    hidden: CachedRows | None = None


class Sequences:
    """Conversations of one split, shuffled and packed anew each epoch into sequences of `max_length` tokens.

    `data` are tokenised rows, columns as `_FEATURES`, `rows` the usable ones. Without `packing` each sequence is one
    conversation. `pad_id` is the input id of padding. `hidden` gives the hidden states of conversations that lie in a
    micro-batch in this order; None: nobody does.
    """

    hidden: Callable[[np.ndarray, torch.Tensor, torch.Tensor], CachedRows] | None = None

    def __init__(self, data: Dataset, rows: np.ndarray, spec: DataSpec, pad_id: int) -> None:
        self.data, self.rows = data.with_format("numpy"), rows
        self.max_length, self.packing, self.seed = spec.max_length, spec.packing is not False, spec.seed
        self.pad_id, self.lengths = pad_id, np.asarray(self.data["length"][:])[rows]
        self.epoch = functools.lru_cache(maxsize=2)(self._pack)
        self._size = functools.cache(lambda epoch: len(self.epoch(epoch) if self.packing else rows))

    def __len__(self) -> int:
        """Sequences of the first epoch."""
        return self._size(0)

    def example(self, number: int) -> Encoded:
        """Conversation `number` of this split."""
        row = self.data[int(self.rows[number])]
        return Encoded(row["input_ids"].tolist(), np.where(row["supervised"], row["input_ids"], IGNORED).tolist())

    def steps_per_epoch(self, global_batch_size: int) -> int:
        """Steps of the first epoch; another one can have a few sequences more or less."""
        return math.ceil(len(self) / global_batch_size)

    def global_batch(self, step: int, global_batch_size: int) -> list[np.ndarray]:
        """The sequences of a step (from 0), each the numbers of its conversations; empty ones fill an epoch's last."""
        assert len(self) > 0
        epoch = 0
        while step >= (steps := math.ceil(self._size(epoch) / global_batch_size)):
            epoch, step = epoch + 1, step - steps
        batch = self.epoch(epoch)[step * global_batch_size : (step + 1) * global_batch_size]
        return batch + [np.zeros(0, int)] * (global_batch_size - len(batch))

    def micro_batches(
        self, step: int, global_batch_size: int, micro_batch_size: int, rank: int, world_size: int
    ) -> list[MicroBatch]:
        """What one rank processes in a step: every `world_size`-th run of `micro_batch_size` sequences."""
        assert global_batch_size % (micro_batch_size * world_size) == 0
        sequences, batches = self.global_batch(step, global_batch_size), []
        for start in range(rank * micro_batch_size, global_batch_size, micro_batch_size * world_size):
            group = sequences[start : start + micro_batch_size]
            batch = self.collate(group)
            if self.hidden is not None:
                batch = batch._replace(hidden=self.hidden(np.concatenate(group), batch.labels, batch.position_ids))
            batches.append(batch)
        return batches

    def _pack(self, epoch: int) -> list[np.ndarray]:
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.rows))
        if not self.packing:
            return list(order[:, None])
        return best_fit(order, self.lengths, self.max_length)

    def collate(self, batch: list[np.ndarray], size: int | None = None) -> MicroBatch:
        """Sequences of conversations, given by their numbers, padded to one size: by default the split's."""
        rows = self.data[self.rows[np.concatenate(batch)]]
        totals = [int(self.lengths[sequence].sum()) for sequence in batch]
        least = self.max_length if self.packing else max(8 * math.ceil(max(totals) / 8), 8)
        size = size or min(least, self.max_length)  # beyond which a model may have no positions, for padding neither
        ids, labels = np.full((len(batch), size), self.pad_id), np.full((len(batch), size), IGNORED)
        positions = np.zeros((len(batch), size), dtype=np.int64)
        sources: list[list[str]] = []
        documents = zip(rows["input_ids"], rows["supervised"], rows["source"], strict=True)
        for line, sequence in enumerate(batch):
            at, names = 0, []
            for tokens, supervised, source in islice(documents, len(sequence)):
                end = at + len(tokens)
                ids[line, at:end] = tokens
                labels[line, at:end] = np.where(supervised, tokens, IGNORED)
                positions[line, at:end] = np.arange(end - at)
                at = end
                names.append(str(source))
            positions[line, at:] = np.arange(size - at)
            sources.append(names)
        return MicroBatch(torch.from_numpy(ids), torch.from_numpy(labels), torch.from_numpy(positions), sources)


def best_fit(order: Sequence[int] | np.ndarray, lengths: np.ndarray, capacity: int) -> list[np.ndarray]:
    """Pack items, in the order given, into bins of a capacity: each into the fullest one that has room for it.

    `lengths` are by item, each at most the capacity.

    Returns:
        The items of each bin, in the order in which the bins were opened.
    """
    bins: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0  # bit r is set when a bin with room r is open: the least room that is enough is the lowest bit from there
    for item in np.asarray(order).tolist():
        length = int(lengths[item])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            chosen = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
            bins[chosen].append(item)
        else:
            room, chosen = capacity, len(bins)
            bins.append([item])
        by_room[room - length].append(chosen)
        rooms |= 1 << (room - length)
    return [np.array(members) for members in bins]


@dataclass(frozen=True)
class Data:
    """The data of a run, the same in every process.

    `report`: `rows` read, `used`, `rejected` (reason -> count and first source), `notes` (the same of what used rows
    say and is not followed), `train_rows`, `validation_rows`, `cut` (conversations that lost their end to max_length),
    `tokens` and `supervised_tokens` of the training rows, `fingerprint`: sha256 over the tokenised training rows, by
    which a resumed run knows its data; `held_out_fingerprint`: the same of the validation rows. `template`: hash of the
    chat template and its arguments.
    """

    train: Sequences
    validation: Sequences
    report: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """Sha256 over the tokenised training rows."""
        return self.report["fingerprint"]

    def steps(self, train: TrainSpec) -> int:
        """Optimizer steps of a run."""
        return train.steps or max(1, round(train.epochs * self.train.steps_per_epoch(train.global_batch_size)))

    def summary(self, global_batch_size: int) -> str:
        """What became of the rows, for people."""
        report, train = self.report, self.train
        kinds = {"left out": report["rejected"], "in rows that were used": report["notes"]}
        told = (
            f"\n  {kind}: {number:,} x {what} (first: {first})"
            for kind, counts in kinds.items()
            for what, (number, first) in counts.items()
        )
        return (
            f"{counted(report['rows'], 'row')}: {counted(report['train_rows'], 'conversation')} to train on, "
            f"{report['validation_rows']:,} held out, {report['rows'] - report['used']:,} left out{''.join(told)}\n"
            f"{report['tokens']:,} tokens to train on, {report['supervised_tokens']:,} of them supervised, in "
            f"{counted(len(train), 'sequence')} of up to {train.max_length} tokens: "
            f"{counted(train.steps_per_epoch(global_batch_size), 'step')} an epoch; "
            f"cut at the end: {counted(report['cut'], 'conversation')}"
        )


def load_data(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Data:
    """Read, tokenise and split the data of a recipe; one process works while others wait and take the cache.

    Raises:
        UserError: no usable data, no supervised token, a chat template that cannot be masked exactly, or no cache.
    """
    spec = recipe.data
    chat = Chat(tokenizer, spec.template_args)
    chat.check()
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    with files.explained(f"{cache}: cannot be made", "set HF_DATASETS_CACHE to a directory"):
        cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / "medusa_ds.lock"):
        conversations = load_conversations(spec)
        state = [
            _FORMAT,
            conversations.key,
            chat.template,
            spec.template_args,
            spec.max_length,
            tokenizer.backend_tokenizer.to_str(),
            tokenizer.special_tokens_map,
        ]
        key = files.digest(json.dumps(state, default=str))
        splits = {"train": conversations.train, "validation": conversations.validation}
        parts = [_tokenised(part, name, key, chat, spec.max_length) for name, part in splits.items()]
    rejected = dict(conversations.rejected)
    once = [conversations.once, np.arange(len(parts[1]))]
    usable = [usable_rows(part, rejected, rows) for part, rows in zip(parts, once, strict=True)]
    used = [np.intersect1d(*rows) for rows in zip(usable, once, strict=True)]
    notes: Counts = {}
    for part, rows in zip(parts, used, strict=True):
        found = part["notes"][:]
        for row in rows:
            for note in found[row]:
                count(notes, note, part, [row])
    report = _measure(parts[0], usable[0])
    report["held_out_fingerprint"] = _measure(parts[1], usable[1])["fingerprint"]
    report["template"] = files.digest(json.dumps([chat.template, spec.template_args]))[:32]
    report |= {
        "rows": conversations.rows,
        "used": sum(map(len, used)),
        "rejected": rejected,
        "notes": notes,
        "train_rows": len(usable[0]),
        "validation_rows": len(usable[1]),
    }
    if not report["supervised_tokens"]:
        raise UserError(f"data: no supervised token in {counted(conversations.rows, 'row')}: {summary(rejected)}")
    pad_id = tokenizer.pad_token_id or 0
    train, validation = (Sequences(part, rows, spec, pad_id) for part, rows in zip(parts, usable, strict=True))
    return Data(train, validation, report)


def _tokenised(conversations: Dataset, name: str, key: str, chat: Chat, max_length: int) -> Dataset:
    """Rows of tokens, from the cache where the same state of data and settings, told by the key, has left them."""
    if not len(conversations):
        return no_rows(_FEATURES)
    processes = min(os.cpu_count() or 1, len(conversations) // _MAP_ROWS_PER_PROCESS)
    return conversations.map(
        functools.partial(_tokenise, chat=chat, max_length=max_length),
        remove_columns=conversations.column_names,
        features=_FEATURES,
        desc=f"tokenise {name}",
        new_fingerprint=f"{key[:32]}{name}",
        num_proc=processes if processes > 1 else None,
    )


def _tokenise(row: dict[str, Any], chat: Chat, max_length: int) -> dict[str, Any]:
    out = {"input_ids": [], "supervised": [], "length": 0, "cut": False, "source": row["source"], "reason": ""}
    conversation = json.loads(row["messages"])
    out["notes"] = row["notes"] + chat.unread(conversation["messages"], conversation["tools"])
    try:
        ids, labels = chat.encode(**conversation)
        supervised = [label != IGNORED for label in labels[:max_length]]
        if not any(supervised[1:]):
            raise UnusableRow("no supervised token within data.max_length")
    except UnusableRow as error:
        return {**out, "reason": str(error)}
    return {
        **out,
        "input_ids": ids[:max_length],
        "supervised": supervised,
        "length": len(supervised),
        "cut": len(ids) > max_length,
    }


def _measure(data: Dataset, rows: np.ndarray) -> dict[str, Any]:
    """Counts and the hash of the usable training rows."""
    digest, tokens, supervised, cut = hashlib.sha256(), 0, 0, 0
    for batch, ids, mask in read_tokens(data, rows):
        for part in (batch["length"].to_numpy(), ids, np.packbits(mask)):
            digest.update(part.tobytes())
        tokens += len(ids)
        supervised += int(mask.sum())
        cut += int(batch["cut"].to_numpy().sum())
    return {"tokens": tokens, "supervised_tokens": supervised, "cut": cut, "fingerprint": digest.hexdigest()}


def read_tokens(data: Dataset, rows: np.ndarray) -> Iterator[tuple[Any, np.ndarray, np.ndarray]]:
    """Rows a thousand at a time: their table, their tokens one after another, and which of these are supervised."""
    data = data.with_format("arrow")
    for start in range(0, len(rows), 1000):
        batch = data[rows[start : start + 1000]]
        ids, supervised = (pc.list_flatten(batch[name]).to_numpy() for name in ("input_ids", "supervised"))
        yield batch, ids, supervised
