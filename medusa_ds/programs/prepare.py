"""Tokenise and cache the data of a recipe, and report what became of its rows.

A run of the same recipe finds the cache. Under the launcher (`deepspeed --module medusa_ds.cli prepare ...`) the ranks
share the work of `--hidden`.

Example:
    medusa-ds prepare smollm2_135m_stage1 data.path=mine.jsonl
"""

from pathlib import Path
from typing import Any

import torch

from medusa_ds.config.recipe import Recipe
from medusa_ds.config.settings import RecipeSettings
from medusa_ds.data.packing import Data, load_data
from medusa_ds.data.vocabulary import always_in, coverage, label_counts, most_frequent
from medusa_ds.errors import UserError
from medusa_ds.model.backbone import load_config, load_tokenizer, settled
from medusa_ds.ranks import Ranks
from medusa_ds.training.build import load_start
from medusa_ds.training.report import quiet_libraries

_SIZES = (8192, 16384, 32768)  # of vocabularies to tell about where the recipe names none


class Settings(RecipeSettings):
    """What the command line says."""

    hidden: bool = False
    """Fill data.hidden_cache too, so that no run needs the backbone."""


def run(settings: Settings) -> None:
    """Fill the caches and print the report.

    Raises:
        UserError: a mistake of the recipe or its data.
    """
    recipe = settings.load_recipe()
    if settings.hidden and recipe.data.hidden_cache == "off":
        raise UserError("--hidden: found data.hidden_cache: off; set it to auto or to a directory")
    rank, start = Ranks().rank, recipe.heads.init_from
    kept = load_start(recipe.heads, recipe.heads.shape).get("token_map") if start and Path(start).exists() else None
    quiet_libraries(rank)
    recipe, tokenizer = settled(recipe), load_tokenizer(recipe.model)
    data = load_data(recipe, tokenizer)
    if rank == 0:
        print(data.summary(recipe.train.global_batch_size))
        for line in _vocabulary(recipe, data, tokenizer, kept):
            print(line)
        print(f"fingerprint of the training rows: {data.fingerprint}")
    if settings.hidden:
        from medusa_ds.training.hidden_cache import open_hidden_cache
        from medusa_ds.training.launch import start_process_group  # deepspeed is slow to import

        open_hidden_cache(recipe, data, start_process_group(recipe))
        torch.distributed.destroy_process_group()


def _vocabulary(recipe: Recipe, data: Data, tokenizer: Any, kept: torch.Tensor | None) -> list[str]:
    """What a truncated vocabulary covers, for the recipe's size or, where it has all tokens, for some.

    `kept`: the tokens of the heads of `heads.init_from`, which stay.
    """
    config, chosen, start = load_config(recipe.model).get_text_config(), recipe.heads.vocab, recipe.heads.init_from
    if start and chosen != "full" and kept is None:
        return [f"heads.vocab: what it covers is known once the heads of {start} are there, whose tokens stay"]
    splits = {"training": data.train, "held-out": data.validation}
    counts = {name: label_counts(sequences, config.vocab_size) for name, sequences in splits.items()}
    always, lines = always_in(tokenizer, config), []
    sizes = (
        [chosen] if isinstance(chosen, int) else [size for size in _SIZES if len(always) <= size < config.vocab_size]
    )
    for size in sizes:
        tokens = most_frequent(counts["training"], size, always) if kept is None else kept.numpy()
        shares = ", ".join(f"{coverage(of, tokens):.2%} of {name} labels" for name, of in counts.items() if of.any())
        lines.append(f"heads.vocab: {len(tokens):,} of {config.vocab_size:,} tokens cover {shares}")
    return lines
