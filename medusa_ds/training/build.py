"""A recipe becomes a `JointModel`: backbone, heads that start from its LM head or from a finished run.

Under ZeRO-3 nothing is ever whole on one rank: the caller hands over how to construct modules partitioned and how to
gather parameters for a moment, so that this file need not know DeepSpeed.
"""

import gc
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from medusa_ds.config import deepspeed as ds_config
from medusa_ds.config.recipe import HeadsSpec, Recipe
from medusa_ds.errors import UserError
from medusa_ds.heads.files import load_heads
from medusa_ds.heads.joint import JointModel
from medusa_ds.heads.kinds import make_heads
from medusa_ds.model.backbone import facts_of, lm_head_weight, load_backbone, load_config
from medusa_ds.model.fp8 import check_device, quantise
from medusa_ds.model.lm_head import Ends, LmHeadAlone
from medusa_ds.model.loss import resolve_impl
from medusa_ds.model.projection import VocabularyProjection
from medusa_ds.training.memory import recomputed_layers

Partitioned = Callable[[], AbstractContextManager[Any]]  # zero.Init
Gathered = Callable[[Iterable[nn.Parameter]], AbstractContextManager[Any]]  # zero.GatheredParameters


def build_model(
    recipe: Recipe,
    dtype: torch.dtype,
    device: torch.device,
    partitioned: Partitioned | None,
    gathered: Gathered,
    token_map: torch.Tensor | None = None,
    ends: Ends | None = None,
) -> JointModel:
    """Build backbone and heads, and the frozen start where `loss.target` needs it: the recipe's model once more.

    Under ZeRO-3, modules are built in the context `partitioned`, and parameters are whole in `gathered`, where all
    ranks get what rank 0 leaves there. `token_map`: tokens that heads project onto, see `data.vocabulary` (None: all);
    heads of `heads.init_from` keep their own. `ends`: of the backbone, which is not loaded then, since the hidden
    states come from a cache.

    Raises:
        UserError: the model or the heads cannot be loaded; shapes of `heads.init_from` are refused before the
            backbone is loaded.
    """
    shape = _shape(recipe)
    start = None
    if recipe.heads.init_from:
        start = load_start(recipe.heads, shape)
        token_map = start.get("token_map")
    own, sizes = recipe.heads.lm_head == "own", (shape["vocab_size"], shape["hidden_size"])
    backbone = load_frozen(recipe, dtype, None if partitioned else device) if ends is None else None
    tokens = None if token_map is None else token_map.to(device)
    logits = facts_of(recipe.model).logits
    with partitioned() if partitioned else device:
        heads = make_heads(shape, dtype=dtype, token_map=tokens, logits=logits)
        base: Any = backbone or LmHeadAlone(
            load_config(recipe.model),
            None if own else VocabularyProjection(*sizes[::-1], dtype, logits=logits),
            nn.Embedding(*sizes, dtype=dtype) if heads.sees_tokens else None,
        )
    whole = [*(backbone.get_output_embeddings() if backbone else base).parameters()]
    with gathered([*whole, *heads.parameters()]):
        if ends is None:
            ends = Ends(lm_head_weight(base))
        else:
            for end, weight in ((base.lm_head, ends.lm_head), (base.embeddings, ends.embeddings)):
                if end is not None:
                    end.weight.data.copy_(weight)
        if start is None:
            heads.initialize(ends.lm_head, base.get_output_embeddings().bias if logits.bias else None)
        else:
            heads.load_state_dict(start)
    if backbone and recipe.stage == 1 and own and recipe.loss.target == "label":
        backbone.set_output_embeddings(None)  # nobody reads it
    frozen = None
    if recipe.has_frozen_start:
        frozen = load_backbone(recipe.model, dtype, device=None if partitioned else device, packed=True)
    loss = recipe.loss.model_copy(update={"impl": resolve_impl(recipe.loss.impl, device)})
    return JointModel(base, heads, recipe.stage, loss, frozen)


def load_frozen(recipe: Recipe, dtype: torch.dtype, device: torch.device | None) -> PreTrainedModel:
    """The backbone as a step of stage 1 runs it, or as stage 2 trains it.

    Raises:
        UserError: it cannot be loaded, or `frozen_precision: fp8` is not for this device.
    """
    fp8 = recipe.model.frozen_precision == "fp8"
    if fp8:
        check_device(device or torch.device("cpu"))
    backbone = load_backbone(
        recipe.model,
        dtype,
        device=device,
        recomputed=recomputed_layers(recipe.train.activation_checkpointing) if recipe.stage == 2 else 0,
        liger=False if fp8 else recipe.model.liger_kernels,
        packed=True,
    )
    if fp8:
        quantise(backbone)
    return backbone


def heads_meta(recipe: Recipe) -> dict[str, Any]:
    """What saved heads say of themselves, see `heads.files.save_heads`."""
    origin = {"base_model": recipe.model.name, "revision": recipe.model.revision, "recipe": recipe.to_yaml()}
    return origin | _shape(recipe)


def _shape(recipe: Recipe) -> dict[str, Any]:
    return recipe.heads.sized(load_config(recipe.model).get_text_config())


def complete_config(config: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """What a DeepSpeed config still lacks: sizes that follow from the model, fp32 accumulation, places of monitors.

    A single micro-batch has nothing to add up: its bf16 gradients then go to the optimizer without fp32 copies. What
    DeepSpeed would do in passes of its own over all gradients is left to others: averages to the loss, which is made of
    sums (ZeRO 3 knows only averages), norm and clipping to `step.clip` where it can (see `ds_config.clips_in_adam`).
    """
    config = ds_config.fill_sizes(config, load_config(recipe.model).get_text_config().hidden_size)
    zero_stage = ds_config.zero_settings(config).stage
    micro_batches = config["gradient_accumulation_steps"]
    if config["bf16"]["enabled"] and zero_stage > 0 and micro_batches > 1:
        # DeepSpeed's default adds micro-batches up in bf16; ZeRO 0 knows nothing else
        config.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
    if zero_stage < 3:
        config["gradient_allreduce_op"] = "sum"
    if ds_config.clips_in_adam(config):
        config["gradient_clipping"] = 0.0
        config["zero_optimization"]["compute_grad_norm"] = config["bf16"]["check_grad_overflow"] = False
    # with which DeepSpeed 0.19.8 reads and writes other parameters' states (findings/deepspeed_round_robin_*)
    config.get("zero_optimization", {}).pop("round_robin_gradients", None)
    config.setdefault("timers", {"throughput": {"enabled": False}})  # which waits for the GPU twice a step
    if config["tensorboard"]["enabled"]:
        config["tensorboard"] = {"output_path": recipe.output, "job_name": "tensorboard"} | config["tensorboard"]
    return config


def load_start(heads: HeadsSpec, shape: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Weights of the finished run's heads that `heads` start from.

    Raises:
        UserError: they cannot be read, or are of another shape or onto another number of tokens.
    """
    config, tensors = load_heads(str(heads.init_from))
    config["vocab"] = len(tensors["token_map"]) if "token_map" in tensors else "full"
    wanted = shape | {"vocab": heads.vocab}
    if differ := [key for key, value in wanted.items() if config[key] != value]:
        found, this = (", ".join(f"{key} {each[key]}" for key in differ) for each in (config, wanted))
        raise UserError(f"heads.init_from: {heads.init_from}: found {found}; this recipe has {this}: make them equal")
    return tensors


def free_models(device: torch.device) -> None:
    """Give back the memory of models that nobody uses: patched and compiled layers refer to themselves."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
