"""Batches that a case trains on: full ones of random tokens, or real conversations, packed or padded."""

from collections.abc import Callable
from itertools import count
from typing import Any

import torch

from medusa_ds.benchmarks.cases import ORIGINALS, Case
from medusa_ds.config.recipe import Recipe
from medusa_ds.data.packing import Data, MicroBatch, load_data
from medusa_ds.model.backbone import load_tokenizer, settled

Feed = Callable[[int], MicroBatch]


def make_feed(case: Case, data: Data | None, vocab_size: int, rank: int) -> Feed:
    """Gives a rank's batch of each step, of random tokens where there are no data."""
    if data is None:
        positions = torch.arange(case.sequence).expand(case.batch, -1)

        def draw(step: int) -> MicroBatch:
            shape, source = (case.batch, case.sequence), torch.Generator().manual_seed(step * case.gpus + rank)
            ids = torch.randint(0, vocab_size, shape, generator=source)
            return MicroBatch(ids, ids, positions, [["random"]] * case.batch)

        return draw

    def read(step: int) -> MicroBatch:
        if case.impl in ORIGINALS:  # in the original's way: one conversation a sequence, padded to the full length
            batch = _padded(data, case, step * case.batch)
        else:
            batch = data.train.micro_batches(step, case.batch * case.gpus, case.batch, rank, case.gpus)[0]
        labels = torch.where(batch.labels < 0, batch.labels, batch.labels % vocab_size)
        return batch._replace(input_ids=batch.input_ids % vocab_size, labels=labels)

    return read


def load_conversations(recipe: Recipe) -> tuple[Data, Any]:
    """The data of a recipe, and the tokenizer.

    A model that is built at random has none: SmolLM2's stands in, and the sample for data of the hub.
    """
    named = recipe if recipe.model.init == "pretrained" else Recipe.load("smollm2_135m_stage1", planning=True)
    if recipe.model.init == "random":
        data_spec = recipe.data if _is_local(recipe) else recipe.data.model_copy(update={"path": "sample"})
        recipe = recipe.model_copy(update={"data": data_spec})
    tokenizer = load_tokenizer(named.model)
    return load_data(settled(recipe), tokenizer), tokenizer


def _is_local(recipe: Recipe) -> bool:
    given = recipe.data.path
    paths = [given] if isinstance(given, str) else [source.path for source in given]
    return all(path == "sample" or path.startswith("/") for path in paths)


def _padded(data: Data, case: Case, first: int) -> MicroBatch:
    ids, labels = (
        torch.zeros(case.batch, case.sequence, dtype=torch.long),
        torch.full((case.batch, case.sequence), -100),
    )
    for line, number in zip(range(case.batch), count(first), strict=False):
        example = data.train.example(number % len(data.train.rows))
        ids[line, : len(example.input_ids)] = torch.tensor(example.input_ids)
        labels[line, : len(example.labels)] = torch.tensor(example.labels)
    return MicroBatch(ids, labels, torch.arange(case.sequence).expand(case.batch, -1), [["chat"]] * case.batch)
