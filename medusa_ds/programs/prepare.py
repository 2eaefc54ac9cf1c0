"""Data before training: `prepare` fills the cache that a run reads, `show --data` prints what the heads will see."""

import os
import sys
from typing import Any

import torch

from medusa_ds.config.recipe import Recipe
from medusa_ds.data.dialogues import IGNORED, describe
from medusa_ds.data.packing import Data, load_data
from medusa_ds.data.vocabulary import always_in, coverage, label_counts, most_frequent
from medusa_ds.errors import UserError
from medusa_ds.model.backbone import load_config, load_tokenizer
from medusa_ds.training.report import quiet_libraries

_SIZES = (8192, 16384, 32768)  # of vocabularies to tell about where the recipe names none


def main(recipe: Recipe, hidden: bool = False) -> None:
    """Tokenise, cache and report; a run of the same recipe finds the cache.

    Args:
        recipe: whose data.
        hidden: fill its hidden cache too; under the `deepspeed` launcher the ranks share the work.
    """
    if hidden and recipe.data.hidden_cache == "off":
        raise UserError("--hidden: found data.hidden_cache: off; set it to auto or to a directory")
    rank = int(os.environ.get("RANK", "0"))
    quiet_libraries(rank)
    tokenizer = load_tokenizer(recipe.model)
    data = load_data(recipe, tokenizer)
    if rank == 0:
        _tell(recipe, data, tokenizer)
    if hidden:
        from medusa_ds.training.hidden_cache import open_hidden_cache
        from medusa_ds.training.launch import start_process_group  # deepspeed is slow to import

        open_hidden_cache(recipe, data, start_process_group(recipe))
        torch.distributed.destroy_process_group()


def _tell(recipe: Recipe, data: Data, tokenizer: Any) -> None:
    _report(recipe, data)
    for line in _vocabulary(recipe, data, tokenizer):
        print(line)
    print(f"fingerprint of the training rows: {data.fingerprint}")


def show_examples(recipe: Recipe, number: int) -> None:
    """Print the first conversations of the training split, what the heads learn from in green, and counts."""
    quiet_libraries(rank=0)
    tokenizer = load_tokenizer(recipe.model)
    data = load_data(recipe, tokenizer)
    colour = sys.stdout.isatty() or bool(os.environ.get("FORCE_COLOR"))
    for index in range(min(number, len(data.train.rows))):
        example = data.train.example(index)
        supervised = sum(label != IGNORED for label in example.labels)
        print(f"--- example {index + 1}: {len(example.input_ids)} tokens, {supervised} supervised (green)")
        text = describe(example, tokenizer)
        print(text if colour else text.replace("\x1b[32m", "[[").replace("\x1b[0m", "]]"))
    print("---" if colour else "--- not a terminal: supervised tokens stand in [[ ]]")
    _report(recipe, data)


def _vocabulary(recipe: Recipe, data: Data, tokenizer: Any) -> list[str]:
    """What a truncated vocabulary covers, for the recipe's size or, where it has all tokens, for some."""
    config, chosen = load_config(recipe.model).get_text_config(), recipe.heads.vocab
    splits = {"training": data.train, "held-out": data.validation}
    counts = {name: label_counts(sequences, config.vocab_size) for name, sequences in splits.items()}
    always, lines = always_in(tokenizer, config), []
    sizes = (
        [chosen] if isinstance(chosen, int) else [size for size in _SIZES if len(always) <= size < config.vocab_size]
    )
    for size in sizes:
        tokens = most_frequent(counts["training"], size, always)
        shares = ", ".join(f"{coverage(of, tokens):.2%} of {name} labels" for name, of in counts.items() if of.any())
        lines.append(f"heads.vocab: {size:,} of {config.vocab_size:,} tokens cover {shares}")
    return lines


def _report(recipe: Recipe, data: Data) -> None:
    report = data.report
    print(
        f"{report['rows']:,} rows: {report['train_rows']:,} conversations to train on, {report['validation_rows']:,} "
        f"held out, {report['rows'] - report['used']:,} left out"
    )
    for reason, (count, first) in report["rejected"].items():
        print(f"  left out: {count:,} x {reason} (first: {first})")
    sequences = len(data.train)
    print(
        f"{report['tokens']:,} tokens to train on, {report['supervised_tokens']:,} of them supervised, in "
        f"{sequences:,} sequences of up to {recipe.data.max_length} tokens: "
        f"{data.train.steps_per_epoch(recipe.train.global_batch_size):,} steps an epoch; {report['cut']:,} "
        "conversations were cut at the end"
    )
