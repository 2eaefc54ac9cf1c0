"""What a recipe needs, by arithmetic: parameters, memory per GPU, disk and hours. Nothing is trained or allocated.

States follow DeepSpeed's own estimators (`estimate_zero2_model_states_mem_needs`, `estimate_zero3_...`), which take
every parameter for trainable; a frozen backbone is added here, with its 16-bit weights alone. A test holds the two
equal where nothing is frozen. Activations count the tensors that a decoder layer keeps for its backward pass
(arXiv 2205.05198, section 4, for a gated MLP and attention without a stored score matrix). All are estimates.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medusa_ds.config import deepspeed as ds_config
from medusa_ds.config.recipe import Recipe, shipped

GIB = 1 << 30
CONTEXT_BYTES = GIB  # CUDA context, NCCL and workspaces
SLACK = 1.1  # fragmentation
OFFLOAD_FACTOR = 1.5  # DeepSpeed's `additional_buffer_factor`
GPUS_GIB = {
    "RTX 3060": 12.0,
    "RTX 4080": 16.0,
    "L4": 22.5,
    "RTX 4090": 24.0,
    "A100 40GB": 39.6,
    "L40S": 45.0,
    "H100 80GB": 79.6,
    "H200": 140.4,
    "B200": 179.0,
}  # as nvidia-smi gives it; all do bf16


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
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=recipe.model.trust_remote_code)
    projection = model.get_output_embeddings().weight
    tied = projection is model.get_input_embeddings().weight
    total = sum(parameter.numel() for parameter in model.parameters())
    vocab_size, hidden_size = projection.shape
    heads = recipe.heads
    return Parameters(
        backbone=total if tied else total - projection.numel(),
        lm_head=0 if tied else projection.numel(),
        blocks=heads.num * heads.layers * (hidden_size * hidden_size + hidden_size),
        projections=heads.num * heads.rows(vocab_size) * hidden_size if heads.lm_head == "own" else 0,
        largest=projection.numel(),
        start=total if recipe.has_frozen_start else 0,
    )


def states_bytes(
    parts: Parameters, stage: int, zero: int, offload: tuple[bool, bool], ranks: int, width: int
) -> tuple[int, int]:
    """Bytes of weights, gradients and optimizer states.

    Args:
        parts: parameters.
        stage: of the recipe; 1 freezes the backbone.
        zero: ZeRO stage.
        offload: whether the optimizer, and the parameters, live in CPU memory.
        ranks: GPUs, taken to be on one node.
        width: bytes of a working weight: 2 for bf16, 4 for fp32.

    Returns:
        On each GPU; and in the node's CPU memory where something is offloaded (else 0).
    """
    trained, frozen = parts.trainable(stage), parts.frozen(stage)
    optimizer, parameters = offload
    full = 16 * trained  # fp32 weight, gradient and two moments
    cpu = 0.0
    if optimizer:
        least = 4 * ranks if zero < 3 else 0
        cpu = OFFLOAD_FACTOR * trained * max(least, 16 + (width if parameters else 0))
        cpu += OFFLOAD_FACTOR * frozen * width if parameters else 0
    if zero == 3:
        gpu: float = 2 * width * parts.largest
        gpu += 0 if parameters else width * (trained + frozen) / ranks
        gpu += 0 if optimizer else full / ranks
    else:
        gpu = width * (trained + frozen)
        if not optimizer:
            gradients = width * trained
            gpu += gradients / ranks if zero == 2 else gradients
            gpu += full / ranks if zero else full
    return int(gpu), int(cpu)


def activations_bytes(recipe: Recipe, config: Any, width: int) -> int:
    """Bytes kept for the backward pass of a micro-batch, when every position is supervised."""
    tokens = recipe.train.micro_batch_size * recipe.data.max_length
    hidden = config.hidden_size
    queries = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or hidden // queries
    keys_values = 2 * head_size * (getattr(config, "num_key_value_heads", None) or queries)
    layer = tokens * width * (6 * hidden + keys_values + 4 * getattr(config, "intermediate_size", 4 * hidden))
    if recipe.data.hidden_cache != "off":
        backbone = 0
    elif recipe.stage == 1:
        backbone = layer  # one layer at a time, nothing kept
    elif recipe.train.activation_checkpointing:
        backbone = config.num_hidden_layers * tokens * width * hidden + layer
    else:
        backbone = config.num_hidden_layers * layer
    if recipe.has_frozen_start:
        backbone += layer  # of the frozen start, one at a time
    heads = recipe.heads.num * tokens * width * hidden * (3 * recipe.heads.layers + 2)
    return backbone + heads


def loss_bytes(recipe: Recipe, config: Any, width: int) -> int:
    """Bytes of the loss: the chunk of logits, and the projections' gradients, which the forward pass computes."""
    trained = (recipe.heads.num if recipe.heads.lm_head == "own" else 0) + (recipe.stage == 2)
    if recipe.loss.impl == "eager":
        rows = recipe.train.micro_batch_size * recipe.data.max_length
        logits = recipe.heads.num * recipe.heads.rows(config.vocab_size) + (recipe.stage == 2) * config.vocab_size
        return logits * rows * (width + 3 * 4)
    projection = recipe.heads.rows(config.vocab_size) * config.hidden_size
    return (recipe.loss.chunk_mib << 20) + 4 * projection + trained * width * projection


def smallest_gpu(need_bytes: float) -> str:
    """The smallest common GPU with that much memory."""
    return next((name for name, gib in GPUS_GIB.items() if need_bytes * SLACK <= gib * GIB), "none")


def measured_speed(output: Path) -> float | None:
    """Median tokens/s of the last steps in a run's `metrics.jsonl`; None where there is no such run."""
    try:
        lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-200:]
        records = [json.loads(line) for line in lines]
        speeds = sorted(float(r["tokens_per_s"]) for r in records if r.get("kind") == "train")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return speeds[len(speeds) // 2] if speeds else None


def total_steps(recipe: Recipe, data: Any) -> int | None:
    """Optimizer steps of the recipe; None where they follow from data that was not counted."""
    if recipe.train.steps is not None:
        return recipe.train.steps
    return data and max(1, round(data.train.steps_per_epoch(recipe.train.global_batch_size) * recipe.train.epochs))


def main(recipe: Recipe, world_sizes: list[int], tokens_per_s: float | None, count_data: bool) -> None:
    """Print the estimate."""
    from medusa_ds.data.packing import load_data
    from medusa_ds.model.backbone import load_config, load_tokenizer

    data = load_data(recipe, load_tokenizer(recipe.model)) if count_data else None
    config = load_config(recipe.model).get_text_config()
    parts = count_parameters(recipe, config)
    stage, train = recipe.stage, recipe.train
    width = 4 if train.precision == "fp32" else 2
    trained = parts.trainable(stage)

    print("parameters, millions")
    state = "frozen" if stage == 1 else "trained"
    tied = "tied to the embeddings" if not parts.lm_head else state
    for name, count, note in (
        ("backbone", parts.backbone, state),
        ("LM head", parts.lm_head, tied),
        ("heads: residual blocks", parts.blocks, "trained"),
        ("heads: projections", parts.projections, "trained" if parts.projections else "the LM head's"),
        *([("frozen start", parts.start, f"loss.target {recipe.loss.target} of stage 2")] if parts.start else []),
    ):
        print(f"  {name:24}{count / 1e6:12,.2f}  {note}")
    print(f"  {'trained':24}{trained / 1e6:12,.2f}")

    cached = recipe.data.hidden_cache != "off"
    if cached:  # training needs no backbone, and of the LM head what the heads share
        needed = config.vocab_size * config.hidden_size if not parts.projections else 0
        print(
            f"\n{_hidden_cache(recipe, config, data)}; filling it takes {width * parts.backbone / GIB:.1f} GiB of "
            "backbone on each GPU, before what follows"
        )
        parts = dataclasses.replace(parts, backbone=0, lm_head=needed)
    elif recipe.stage == 1 and parts.projections and recipe.loss.target == "label":
        parts = dataclasses.replace(parts, lm_head=0)  # nobody reads it
    activations, loss = activations_bytes(recipe, config, width), loss_bytes(recipe, config, width)
    work = activations + loss + CONTEXT_BYTES
    print(
        f"\nmemory per GPU in {'fp32' if width == 4 else 'bf16'}, GiB: activations {activations / GIB:.1f}, loss "
        f"{loss / GIB:.1f}, CUDA {CONTEXT_BYTES / GIB:.0f} and weights, gradients and optimizer states by ZeRO config:"
    )
    files = {file.stem: file for file in sorted(shipped("ds_configs").glob("*.json"))}
    own = Path(recipe.deepspeed)
    if own not in files.values():
        files[own.stem] = own
    print("  GPUs  " + "  ".join(f"{name:>{max(8, len(name))}}" for name in files) + f"  smallest GPU with {own.stem}")
    for ranks in world_sizes:
        cells, fits, cpu_own = [], "", 0
        for name, file in files.items():
            gpu, cpu = states_bytes(parts, stage, *ds_config.zero_settings(ds_config.load(file)), ranks, width)
            cells.append(f"{(gpu + work) / GIB:>{max(8, len(name))}.1f}")
            if file == own:
                fits, cpu_own = smallest_gpu(gpu + work), cpu
        note = f", and {cpu_own / GIB:.0f} GiB of CPU memory" if cpu_own else ""
        if train.global_batch_size % (train.micro_batch_size * ranks):
            note += f" (train.global_batch_size {train.global_batch_size} does not divide by {ranks} ranks)"
        print(f"  {ranks:4}  " + "  ".join(cells) + f"  {fits}{note}")

    checkpoint = 12 * trained
    heads = width * (parts.blocks + parts.projections)
    final = heads + (width * (parts.backbone + parts.lm_head) if stage == 2 else 0)
    most = train.keep_last + 2  # the best one, and the one being written
    print(
        f"\ndisk: {checkpoint / GIB:.2f} GiB a checkpoint (fp32 weights and moments of what is trained), at most "
        f"{most} at a time: {most * checkpoint / GIB:.1f} GiB; saved at the end: {final / GIB:.2f} GiB"
    )
    print(_hours(recipe, tokens_per_s, total_steps(recipe, data)))


def _hidden_cache(recipe: Recipe, config: Any, data: Any) -> str:
    from medusa_ds.training.hidden_cache import count_rows, row_bytes, stored_as

    _, stored = stored_as(recipe, on_gpu=True)
    size = row_bytes(stored, config.hidden_size)
    if data is None:
        return f"hidden cache in {stored}: {1e6 * size / GIB:.2f} GiB a million positions that a head learns from"
    rows = sum(int(count_rows(split, recipe.heads.num).sum()) for split in (data.train, data.validation))
    return f"hidden cache in {stored}: {rows * size / GIB:.2f} GiB for {rows:,} positions that a head learns from"


def _hours(recipe: Recipe, stated: float | None, steps: int | None) -> str:
    speed = stated or measured_speed(Path(recipe.output))
    if steps is None:
        return "time: train.steps is not set; add --data to tokenise the data and count its steps"
    tokens = steps * recipe.train.global_batch_size * recipe.data.max_length
    counted = f"{steps:,} steps of at most {tokens // steps:,} tokens"
    if speed is None:
        return f"time: {counted}; state a speed with --tokens-per-second, or run the recipe for some steps first"
    source = "stated" if stated else "measured in the recipe's output"
    return f"time: {tokens / speed / 3600:.2f} hours for {counted} at {speed:,.0f} tokens/s ({source})"
