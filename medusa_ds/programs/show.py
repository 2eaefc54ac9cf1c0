"""Print the resolved recipe and DeepSpeed config (a recipe again), training examples, or the keys of recipes.

Example:
    medusa-ds show llama3_8b_stage2 train.lr=3e-5 --world-size 4
    medusa-ds show --keys lr
"""

import json
import os
import sys
from collections.abc import Iterator
from itertools import pairwise
from typing import Annotated, Any

from pydantic import Field

from medusa_ds.config.recipe import Recipe, manual
from medusa_ds.config.settings import Bare, Positional, RecipeSettings
from medusa_ds.config.types import Count
from medusa_ds.errors import UserError


class Settings(RecipeSettings):
    """What the command line says."""

    recipe: Positional[str | None] = None  # type: ignore[assignment]
    """Recipe file, or name of a shipped one."""
    keys: Annotated[str | None, Bare("")] = Field(None, title="PATTERN")
    """Print the keys that a recipe may have, or those that hold PATTERN, with type, default and meaning."""
    world_size: Count = 1
    """Ranks that train."""
    examples: Count | None = Field(None, alias="data")
    """Print N training examples, supervised tokens coloured."""


def run(settings: Settings) -> None:
    """Print what was asked for.

    Raises:
        UserError: a mistake of the recipe or its data.
    """
    if settings.keys is not None:
        found = manual(settings.keys)
        if not found:
            raise UserError(f"--keys: found no key that holds {settings.keys!r}; --keys alone prints all")
        print(found)
        return
    if settings.recipe is None:
        raise UserError(
            "medusa-ds show: found neither a recipe nor --keys; name a recipe, as medusa-ds list shows them"
        )
    recipe = settings.load_recipe()
    if settings.examples:
        _show_examples(recipe, settings.examples)
        return
    ranks = settings.world_size
    config = json.dumps(recipe.ds_config(ranks, on_gpu=True), indent=2)
    print(recipe.to_yaml())
    print(f"# DeepSpeed config of {ranks} rank{'s'[: ranks > 1]} with a GPU each; without one, precision auto is fp32.")
    if recipe.deepspeed == "auto":
        print("# deepspeed: auto takes another where the GPUs' memory asks for it: see medusa-ds estimate.")
    print('# Sizes that say "auto" follow from the hidden size when the model is loaded.')
    print("\n".join(f"# {line}" for line in config.splitlines()))


def _show_examples(recipe: Recipe, number: int) -> None:
    """The first conversations of the training split: layout, turns, what the heads learn from in green; and counts."""
    from medusa_ds.data.dialogues import describe
    from medusa_ds.data.marks import IGNORED
    from medusa_ds.data.packing import load_data
    from medusa_ds.data.sources import load_conversations
    from medusa_ds.model.backbone import load_tokenizer
    from medusa_ds.training.report import quiet_libraries

    quiet_libraries(rank=0)
    tokenizer = load_tokenizer(recipe.model)
    data = load_data(recipe, tokenizer)
    rows = load_conversations(recipe.data).train
    colour = sys.stdout.isatty() or bool(os.environ.get("FORCE_COLOR"))
    for index in range(min(number, len(data.train.rows))):
        example = data.train.example(index)
        supervised = sum(label != IGNORED for label in example.labels)
        print(f"--- example {index + 1}: {len(example.input_ids)} tokens, {supervised} supervised (green)")
        row = rows[int(data.train.rows[index])]
        messages = json.loads(row["messages"])["messages"]
        runs = sum(before == IGNORED != label for before, label in pairwise([IGNORED, *example.labels]))
        cut = data.train.data[int(data.train.rows[index])]["cut"]
        turns = _verdicts(messages, runs if cut else len(messages))
        print(f"{row['source']}, layout: {row['layout']}; turns: {', '.join(turns)}")
        text = describe(example, tokenizer)
        print(text if colour else text.replace("\x1b[32m", "[[").replace("\x1b[0m", "]]"))
    print("---" if colour else "--- not a terminal: supervised tokens stand in [[ ]]")
    print(data.summary(recipe.train.global_batch_size))


def _verdicts(messages: list[dict[str, Any]], runs: int) -> Iterator[str]:
    """Each turn's role, and whether the heads learn from it or why not, where so many turns' labels are left."""
    for message in messages:
        if message["role"] != "assistant":
            verdict = "no label"
        elif "untrained" in message:
            verdict = f"no label: {message['untrained']}"
        elif not runs:
            verdict = "no label: beyond data.max_length"
        else:
            runs -= 1
            verdict = "label, but not on its end: unfinished" if message.get("unfinished") else "label"
        yield f"{message['role']} ({verdict})"
