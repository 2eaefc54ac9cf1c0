"""The step of a case: what `train` would take, the same from a hidden cache, or the original's."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from medusa_ds.benchmarks.batches import Feed, load_conversations, make_feed
from medusa_ds.benchmarks.cases import CACHED, ORIGINALS, Case
from medusa_ds.benchmarks.original import TOTAL_STEPS, OriginalStep
from medusa_ds.config.recipe import Recipe
from medusa_ds.data.packing import Data, MicroBatch
from medusa_ds.data.vocabulary import token_map
from medusa_ds.errors import UserError
from medusa_ds.heads.joint import JointModel
from medusa_ds.model.backbone import load_config
from medusa_ds.training.build import build_model
from medusa_ds.training.engine import MedusaEngine
from medusa_ds.training.hidden_cache import open_hidden_cache
from medusa_ds.training.launch import start_process_group

Step = Callable[[MicroBatch, int], float]


class Training(NamedTuple):
    """`step` returns its loss; `model` is what it trains, `feed` gives a step's batch, `data` None: random tokens.

    `deepspeed`: the config, and the layers recomputed, as `auto` has chosen them; None for the originals.
    """

    step: Step
    model: JointModel
    feed: Feed
    data: Data | None
    deepspeed: str | None


def start(case: Case, recipe: Recipe, rank: int, folder: Path) -> Training:
    """Build a case's implementation by its recipe on a rank; all ranks may write into the folder.

    Raises:
        UserError: what building the model refuses; real conversations without data or tokenizer.
    """
    data: Data | None = None
    tokenizer: Any = None
    chosen: str | None = None
    fewer = recipe.heads.vocab != "full"
    if case.part != "step":
        data, tokenizer = load_conversations(recipe)
    if case.impl in ORIGINALS:
        on_gpu = torch.cuda.is_available()
        device = torch.device("cuda" if on_gpu else "cpu")
        dtype = torch.bfloat16 if on_gpu and recipe.train.precision != "fp32" else torch.float32
        model = build_model(recipe, dtype, device, None, lambda _: nullcontext())
        step: Step = OriginalStep(recipe, model, case.impl)
    else:
        build = build_model
        if data is None and fewer:
            build = partial(build_model, token_map=torch.arange(recipe.heads.rows(0)))
        elif data is not None and (fewer or case.impl in CACHED):
            config = load_config(recipe.model).get_text_config()
            if len(tokenizer) > config.vocab_size:
                raise UserError(
                    f"{case.impl}: the tokenizer has {len(tokenizer)} tokens, the model "
                    f"{config.vocab_size}; name a model with a tokenizer of its own"
                )
            ends = None
            if case.impl in CACHED:
                spec = recipe.data.model_copy(update={"hidden_cache": str(folder / "hidden")})
                recipe = recipe.model_copy(update={"data": spec})
                ends = open_hidden_cache(recipe, data, start_process_group(recipe))
            build = partial(build_model, token_map=token_map(recipe.heads.vocab, data, tokenizer, config), ends=ends)
        engine = MedusaEngine(recipe, TOTAL_STEPS, build)

        def take(batch: MicroBatch, number: int) -> float:
            return engine.train_batch([batch], number).loss

        step, model = take, engine.model
        recomputed = engine.recipe.train.activation_checkpointing if case.stage == 2 else False
        chosen = f"{Path(engine.recipe.deepspeed).stem}, recomputed: {recomputed}"
    vocab_size = recipe.heads.rows(model.heads.vocab_size) if data is None else model.heads.vocab_size
    return Training(step, model, make_feed(case, data, vocab_size, rank), data, chosen)
