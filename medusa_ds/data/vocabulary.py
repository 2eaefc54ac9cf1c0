"""Which tokens the heads project onto: the most frequent ones of the training labels (`heads.vocab: N`)."""

from collections.abc import Collection
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from medusa_ds.data.packing import Data, Sequences, read_tokens
from medusa_ds.errors import UserError


def label_counts(sequences: Sequences, vocab_size: int) -> np.ndarray:
    """How often each of V tokens is a label, int64 [V]."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for _, ids, supervised in read_tokens(sequences.data, sequences.rows):
        counts += np.bincount(ids[supervised], minlength=vocab_size)
    return counts


def most_frequent(counts: np.ndarray, number: int, always: Collection[int]) -> np.ndarray:
    """The tokens that get a row, ascending, so that equal logits are told apart as by a whole projection.

    These are `always` (special ones, ends), whatever their counts as labels, and the most frequent others, of equally
    frequent ones those with the lower id: `number` in all.

    Raises:
        UserError: more tokens than there are, or fewer than `always`.
    """
    needed = np.unique([token for token in always if 0 <= token < len(counts)]).astype(np.int64)
    if not len(needed) <= number < len(counts):
        raise UserError(
            f"heads.vocab: found {number}; allowed are full, or {max(len(needed), 1)} (the special tokens) to "
            f"{len(counts) - 1}, less than the model's {len(counts)} tokens"
        )
    ranked = np.argsort(-counts, kind="stable")
    others = ranked[~np.isin(ranked, needed)]
    return np.sort(np.concatenate([needed, others[: number - len(needed)]]))


def coverage(counts: np.ndarray, tokens: np.ndarray) -> float:
    """Share of the labels that are among the tokens."""
    return float(counts[tokens].sum() / max(1, counts.sum()))


def always_in(tokenizer: PreTrainedTokenizerBase, config: Any) -> set[int]:
    """Special tokens, and those that end a text by the model's config."""
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    return special | {*tokenizer.all_special_ids, *(end for end in ends if end is not None)}


def token_map(number: int | str, data: Data, tokenizer: PreTrainedTokenizerBase, config: Any) -> torch.Tensor | None:
    """The tokens of the heads' projections, LongTensor [N], from the training labels; None for all of them.

    Raises:
        UserError: see `most_frequent`.
    """
    if isinstance(number, str):
        return None
    counts = label_counts(data.train, config.vocab_size)
    return torch.from_numpy(most_frequent(counts, number, always_in(tokenizer, config)))
