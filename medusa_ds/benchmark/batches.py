"""Batches that a case trains on: full ones of random tokens, or real conversations, packed or padded."""

from itertools import count

import torch

from medusa_ds.benchmark.cases import Case
from medusa_ds.data.packing import Data, MicroBatch, load_data
from medusa_ds.model.backbone import load_tokenizer
from medusa_ds.recipe import Recipe

NUM_BATCHES = 4


def make_batches(case: Case, recipe: Recipe, vocab_size: int) -> list[MicroBatch]:
    """A few batches that the steps take in turn; the same for every implementation of a case.

    Raises:
        UserError: `chat` without data or tokenizer, see `load_data`.
    """
    if case.part == "chat":
        return _chat(case, recipe, vocab_size)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocab_size, (NUM_BATCHES, case.batch, case.sequence), generator=draw)
    positions = torch.arange(case.sequence).expand(case.batch, -1)
    return [MicroBatch(part, part, positions, [["random"]] * case.batch) for part in ids]


def _chat(case: Case, recipe: Recipe, vocab_size: int) -> list[MicroBatch]:
    """Packed for us, and in the original's way otherwise: one conversation a sequence, padded to the full length.

    A model that is built at random has no tokenizer: SmolLM2's stands in, its tokens mapped into the vocabulary.
    """
    named = recipe if recipe.model.init == "pretrained" else Recipe.load("smollm2_135m_stage1", planning=True)
    if recipe.model.init == "random":
        data_spec = recipe.data if _is_local(recipe) else recipe.data.model_copy(update={"path": "sample"})
        recipe = recipe.model_copy(update={"data": data_spec})
    data = load_data(recipe, load_tokenizer(named.model))
    if case.impl in ("original", "torch_linear_ce"):
        batches = [_padded(data, case, first * case.batch) for first in range(NUM_BATCHES)]
    else:
        batches = [data.train.micro_batches(step, case.batch, case.batch, 0, 1)[0] for step in range(NUM_BATCHES)]
    return [
        batch._replace(
            input_ids=batch.input_ids % vocab_size,
            labels=torch.where(batch.labels < 0, batch.labels, batch.labels % vocab_size),
        )
        for batch in batches
    ]


def _is_local(recipe: Recipe) -> bool:
    return isinstance(recipe.data.path, str) and (recipe.data.path == "sample" or recipe.data.path.startswith("/"))


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
