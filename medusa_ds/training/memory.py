"""What training needs of memory, by arithmetic, and the settings that fit the memory that is there.

States follow DeepSpeed's own estimators (`estimate_zero2_model_states_mem_needs`, `estimate_zero3_...`), which take
every parameter for trainable; a frozen backbone is added here, with its 16-bit weights alone. A test holds the two
equal where nothing is frozen. Activations count the tensors that a decoder layer keeps for its backward pass
(arXiv 2205.05198, section 4, for a gated MLP and attention without a stored score matrix). All are estimates.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from transformers import AutoModelForCausalLM

from medusa_ds.config.deepspeed import Zero, load, zero_settings
from medusa_ds.config.recipe import Recipe, shipped
from medusa_ds.errors import counted
from medusa_ds.heads.kinds import KINDS, make_heads
from medusa_ds.model.attention import base_model
from medusa_ds.model.backbone import load_config
from medusa_ds.ranks import Ranks
from medusa_ds.training.flops import active_parameters
from medusa_ds.training.gpus import GPUS

GIB = 1 << 30
CONTEXT_BYTES = GIB  # CUDA context, NCCL and workspaces
SLACK = 1.1  # fragmentation
MARGIN = 1.03  # of a choice: an 8B shape in stage 2 under ZeRO 2 reserved 135.5 GiB where 138.2 were estimated
OFFLOAD_FACTOR = 1.5  # DeepSpeed's `additional_buffer_factor`


@dataclass(frozen=True)
class Parameters:
    """Parameters by part; `lm_head` is 0 where it is tied to the embeddings, `projections` with `lm_head: shared`."""

    backbone: int
    lm_head: int
    blocks: int
    projections: int
    largest: int
    """Of the largest module that ZeRO-3 gathers."""
    start: int = 0
    """Of the frozen start that `loss.target` asks for in stage 2."""
    active: int = 0
    """Of the backbone, those that a token is multiplied by."""

    def trainable(self, stage: int) -> int:
        """Parameters that have a gradient."""
        heads = self.blocks + self.projections
        return heads + (self.backbone + self.lm_head if stage == 2 else 0)

    def frozen(self, stage: int) -> int:
        """Parameters that have none."""
        all_but_start = self.backbone + self.lm_head + self.blocks + self.projections
        return all_but_start - self.trainable(stage) + self.start


def count_parameters(recipe: Recipe, config: Any) -> Parameters:
    """Count the parameters of each part, of a model built on the meta device from its config."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=recipe.model.trust_remote_code)
        tokens = None if recipe.heads.vocab == "full" else torch.zeros(recipe.heads.vocab, dtype=torch.int64)
        blocks, projections = make_heads(recipe.heads.sized(config), token_map=tokens).count_parameters()
    projection = model.get_output_embeddings().weight
    tied = projection is model.get_input_embeddings().weight
    total = sum(parameter.numel() for parameter in model.parameters())
    return Parameters(
        backbone=total if tied else total - projection.numel(),
        lm_head=0 if tied else projection.numel(),
        blocks=blocks,
        projections=projections,
        largest=projection.numel(),
        active=active_parameters(base_model(model), config),
        start=total if recipe.has_frozen_start else 0,
    )


def states_bytes(parts: Parameters, stage: int, zero: Zero, ranks: int, width: int) -> tuple[int, int]:
    """Bytes of weights, gradients and optimizer states on each of `ranks` GPUs of a node.

    `width` are bytes of a working weight: 2 for bf16, 4 for fp32.

    Returns:
        On each GPU; and in the node's CPU memory where something is offloaded (else 0).
    """
    trained, frozen = parts.trainable(stage), parts.frozen(stage)
    full = 16 * trained  # fp32 weight, gradient and two moments
    cpu = 0.0
    if zero.offloads_optimizer:
        least = 4 * ranks if zero.stage < 3 else 0
        cpu = OFFLOAD_FACTOR * trained * max(least, 16 + (width if zero.offloads_parameters else 0))
        cpu += OFFLOAD_FACTOR * frozen * width if zero.offloads_parameters else 0
    if zero.stage == 3:
        gpu: float = 2 * width * parts.largest
        gpu += 0 if zero.offloads_parameters else width * (trained + frozen) / ranks
        gpu += 0 if zero.offloads_optimizer else full / ranks
    else:
        gpu = width * (trained + frozen)
        if not zero.offloads_optimizer:
            gradients = width * trained
            gpu += gradients / ranks if zero.stage == 2 else gradients
            gpu += full / ranks if zero.stage else full
    return int(gpu), int(cpu)


def activations_bytes(recipe: Recipe, config: Any, recomputed: int | None) -> int:
    """Bytes kept for the backward pass of a micro-batch, when every position is supervised.

    Of the first `recomputed` decoder layers (None: all) only the input is kept. The backward pass reaches them when it
    has freed what later layers kept: the one at work then adds nothing if there are any.
    """
    tokens, width = recipe.train.micro_batch_size * recipe.data.max_length, recipe.train.weight_bytes
    hidden = config.hidden_size
    queries = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or hidden // queries
    keys_values = 2 * head_size * (getattr(config, "num_key_value_heads", None) or queries)
    layer = tokens * width * (6 * hidden + keys_values + 4 * getattr(config, "intermediate_size", 4 * hidden))
    if recipe.data.hidden_cache != "off":
        backbone = 0
    elif recipe.stage == 1:
        backbone = layer  # one layer at a time, nothing kept
    else:
        layers = config.num_hidden_layers
        recomputed = layers if recomputed is None else min(recomputed, layers)
        backbone = recomputed * tokens * width * hidden + max(layers - recomputed, 1) * layer
    if recipe.has_frozen_start:
        backbone += layer  # of the frozen start, one at a time
    heads = recipe.heads.num * tokens * width * hidden * KINDS[recipe.heads.kind].kept(recipe.heads.layers)
    return backbone + heads


def loss_bytes(recipe: Recipe, config: Any) -> int:
    """Bytes of the loss: the chunk of logits, and the projections' gradients, which the forward pass computes."""
    width, trained = recipe.train.weight_bytes, recipe.heads.num * (recipe.heads.lm_head == "own") + (recipe.stage == 2)
    if recipe.loss.impl == "eager":
        rows = recipe.train.micro_batch_size * recipe.data.max_length
        logits = recipe.heads.num * recipe.heads.rows(config.vocab_size) + (recipe.stage == 2) * config.vocab_size
        return logits * rows * (width + 3 * 4)
    projection = recipe.heads.rows(config.vocab_size) * config.hidden_size
    return (recipe.loss.chunk_mib << 20) + 4 * projection + trained * width * projection


def smallest_gpu(need_bytes: float) -> str:
    """The smallest common GPU with that much memory."""
    return next((name for name, gpu in GPUS.items() if need_bytes * SLACK <= gpu.gib * GIB), "none")


def recomputed_layers(setting: bool | int | str) -> int | None:
    """Decoder layers that `train.activation_checkpointing` recomputes; None is all, and an open `auto` none."""
    return None if setting is True else 0 if setting == "auto" else int(setting)


def parts_in_memory(recipe: Recipe, parts: Parameters, config: Any) -> Parameters:
    """The parameters that training keeps: a hidden cache replaces the backbone, and what nobody reads is left out."""
    if recipe.data.hidden_cache != "off":
        ends = (not parts.projections) + KINDS[recipe.heads.kind].sees_tokens  # the LM head, the embeddings
        return replace(parts, backbone=0, lm_head=ends * config.vocab_size * config.hidden_size)
    if recipe.stage == 1 and parts.projections and recipe.loss.target == "label":
        return replace(parts, lm_head=0)
    return parts


class Choice(NamedTuple):
    """What `choose` has found.

    `deepspeed`: a DeepSpeed JSON. `recomputed`: decoder layers. `gpu_bytes`, `cpu_bytes`: what training then needs of
    a GPU, with a margin, and of the node. `fits`: whether it is there. `why`: the same in words.
    """

    deepspeed: Path
    recomputed: int | None
    gpu_bytes: int
    cpu_bytes: int
    fits: bool
    why: str


def choose(recipe: Recipe, parts: Parameters, config: Any, ranks: int, gpu_bytes: float, cpu_bytes: float) -> Choice:
    """The least ZeRO stage and offload, and with it the least recomputation, whose estimate fits.

    It has to fit `ranks` GPUs of `gpu_bytes` each on one node with `cpu_bytes`; what the recipe names itself stays as
    it is. ZeRO 2 comes first, since ZeRO 0 and 1 save no time here: its step alone clips inside Adam. Then ZeRO 3,
    which fetches weights over the network all the time, and then what waits for the CPU. Recomputing costs less than
    the next of these (measured in stage 2: 1.18 times the step against 1.25 times).
    """
    width, layers = recipe.train.weight_bytes, config.num_hidden_layers
    parts, setting = parts_in_memory(recipe, parts, config), recipe.train.activation_checkpointing
    counts: Sequence[int | None] = [recomputed_layers(setting)]
    if setting == "auto" and recipe.stage == 2:
        counts = range(layers + 1)
    names = ["zero2", "zero3", "zero2_offload", "zero3_offload"]
    if recipe.model.frozen_precision == "fp8":  # which ZeRO 3 cannot partition
        names = ["zero2", "zero2_offload"]
    files = [shipped("ds_configs") / f"{name}.json" for name in names]
    files = files if recipe.deepspeed == "auto" else [Path(recipe.deepspeed)]
    tried: list[Choice] = []
    for file in files:
        gpu, cpu = states_bytes(parts, recipe.stage, zero_settings(load(file)), ranks, width)
        for recomputed in counts:
            work = activations_bytes(recipe, config, recomputed) + loss_bytes(recipe, config)
            need = int((gpu + work + CONTEXT_BYTES) * MARGIN)
            fits = need <= gpu_bytes and cpu <= cpu_bytes
            why = f"{need / GIB:.1f} of {gpu_bytes / GIB:.1f} GiB on each of {counted(ranks, 'GPU')}"
            if cpu:
                why += f" and {cpu / GIB:.0f} of {cpu_bytes / GIB:.0f} GiB on the CPU"
            tried.append(Choice(file, recomputed, need, cpu, fits, why))
            if fits:
                less = f"; {_named(recipe, tried[-2], layers)} would take {tried[-2].why}" if len(tried) > 1 else ""
                return tried[-1]._replace(why=f"{_named(recipe, tried[-1], layers)} takes about {why}{less}")
    least = min(tried, key=lambda choice: choice.gpu_bytes)
    return least._replace(
        why=f"{_named(recipe, least, layers)} takes about {least.why}: that may not fit, but nothing needs less"
    )


def _named(recipe: Recipe, choice: Choice, layers: int) -> str:
    recomputed = layers if choice.recomputed is None else choice.recomputed
    return choice.deepspeed.stem + (f" with {recomputed} of {layers} layers recomputed" if recipe.stage == 2 else "")


def settle(recipe: Recipe, device: torch.device) -> Recipe:
    """The recipe with a value for each `auto` that follows from the memory that is there; every rank calls it.

    Rank 0 says what was chosen and why. On a CPU it is what costs no time: ZeRO 2 and no recomputation.
    """
    setting, ranks = recipe.train.activation_checkpointing, Ranks()
    if recipe.deepspeed != "auto" and setting != "auto":
        return recipe
    if device.type == "cuda" and (recipe.deepspeed == "auto" or recipe.stage == 2):
        config = load_config(recipe.model).get_text_config()
        gpu_bytes = min(ranks.gather(torch.cuda.mem_get_info(device)[0]))
        cpu_bytes = min(ranks.gather(psutil.virtual_memory().available))
        found = choose(recipe, count_parameters(recipe, config), config, ranks.size, gpu_bytes, cpu_bytes)
        if ranks.rank == 0:
            print(f"memory: {found.why}", flush=True)
        file, recomputed = str(found.deepspeed), found.recomputed
    else:
        file = str(shipped("ds_configs") / "zero2.json") if recipe.deepspeed == "auto" else recipe.deepspeed
        recomputed = recomputed_layers(setting)
    update = {"activation_checkpointing": True if recomputed is None else recomputed or False}
    return recipe.model_copy(update={"deepspeed": file, "train": recipe.train.model_copy(update=update)})
