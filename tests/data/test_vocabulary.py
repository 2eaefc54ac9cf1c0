"""Counting labels and choosing the tokens that heads project onto, against plain loops."""

from collections import Counter

import numpy as np
import pytest
from datasets import Dataset
from support import tiny_tokenizer
from transformers import LlamaConfig

from medusa_ds.config.recipe import DataSpec
from medusa_ds.data.packing import _FEATURES, Data, Sequences
from medusa_ds.data.vocabulary import always_in, coverage, label_counts, most_frequent, token_map
from medusa_ds.errors import UserError

CONFIG = LlamaConfig(vocab_size=300, eos_token_id=[2, 7])


def make_sequences(number=1500):
    draw = np.random.default_rng(0)
    rows = []
    for _ in range(number):
        ids = draw.zipf(1.3, draw.integers(2, 20)).clip(3, 299).astype(int)
        rows.append(
            {
                "input_ids": ids.tolist(),
                "supervised": (draw.random(len(ids)) < 0.6).tolist(),
                "length": len(ids),
                "cut": False,
                "source": "a:1",
                "reason": "",
                "notes": [],
            }
        )
    data = Dataset.from_list(rows, features=_FEATURES)
    usable = np.arange(number)[np.arange(number) % 3 > 0]
    return Sequences(data, usable, DataSpec(path="sample", max_length=64), 0), [rows[i] for i in usable]


def test_labels_of_usable_rows_are_counted():
    """Mutation: count input tokens in place of supervised ones."""
    sequences, rows = make_sequences()
    pairs = (pair for row in rows for pair in zip(row["input_ids"], row["supervised"], strict=True))
    wanted = Counter(token for token, supervised in pairs if supervised)
    assert {token: count for token, count in enumerate(label_counts(sequences, 300)) if count} == wanted


def test_the_most_frequent_tokens_are_chosen_and_ties_go_to_the_lower_id():
    """Mutation: an unstable sort, or the highest id first."""
    counts = np.array([0, 5, 5, 9, 5, 0, 0, 1])
    assert most_frequent(counts, 3, [6]).tolist() == [1, 3, 6]
    assert most_frequent(counts, 4, [6, 900, -1]).tolist() == [1, 2, 3, 6]
    assert most_frequent(counts, 2, [3]).tolist() == [1, 3]
    assert coverage(counts, np.array([1, 3])) == 14 / 25
    for number in (8, 9, 1):
        with pytest.raises(UserError, match=rf"heads.vocab: found {number}; allowed are full, or 2 .* to 7"):
            most_frequent(counts, number, [5, 6])


def test_special_and_end_tokens_are_always_in():
    sequences, _ = make_sequences()
    tokenizer = tiny_tokenizer()
    chosen = token_map(64, Data(sequences, sequences, {}), tokenizer, CONFIG)
    assert {0, 1, 2, 7} <= set(chosen.tolist()) and len(chosen) == 64
    assert always_in(tokenizer, CONFIG) == {0, 1, 2, 7}
    assert token_map("full", Data(sequences, sequences, {}), tokenizer, CONFIG) is None
