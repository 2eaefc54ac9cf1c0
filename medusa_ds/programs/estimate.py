"""Estimate parameters, memory per GPU, disk and hours of a recipe, by arithmetic: nothing is trained or allocated.

Example:
    medusa-ds estimate llama3_8b_stage1 --world-size 8

The arithmetic of memory is `training.memory`'s.
"""

import json
import math
from pathlib import Path
from typing import Any

from pydantic import Field

from medusa_ds.config import deepspeed as ds_config
from medusa_ds.config.recipe import Recipe, shipped
from medusa_ds.config.settings import RecipeSettings
from medusa_ds.config.types import Count, Positive
from medusa_ds.training.memory import (
    CONTEXT_BYTES,
    GIB,
    GPUS_GIB,
    activations_bytes,
    choose,
    count_parameters,
    loss_bytes,
    parts_in_memory,
    recomputed_layers,
    smallest_gpu,
    states_bytes,
)


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


class Settings(RecipeSettings):
    """What the command line says."""

    world_size: list[Count] = [1, 2, 4, 8]
    """Ranks; may be given several times."""
    tokens_per_second: Positive | None = None
    """Speed of all GPUs together; without it, the one that a run into the recipe's output measured."""
    count_data: bool = Field(False, alias="data")
    """Tokenise the data, as prepare does, to count its tokens."""


def run(settings: Settings) -> None:
    """Print the estimate."""
    from medusa_ds.data.packing import load_data
    from medusa_ds.model.backbone import load_config, load_tokenizer, settled

    recipe = settled(settings.load_recipe())
    data = load_data(recipe, load_tokenizer(recipe.model)) if settings.count_data else None
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

    if recipe.data.hidden_cache != "off":
        print(
            f"\n{_hidden_cache(recipe, config, data)}; filling it takes {width * parts.backbone / GIB:.1f} GiB of "
            "backbone on each GPU, before what follows"
        )
    resident = parts_in_memory(recipe, parts, config)
    recomputed = recomputed_layers(train.activation_checkpointing)
    activations = activations_bytes(recipe, config, width, recomputed)
    loss = loss_bytes(recipe, config, width)
    work = activations + loss + CONTEXT_BYTES
    print(
        f"\nmemory per GPU in {'fp32' if width == 4 else 'bf16'}, GiB: activations {activations / GIB:.1f}, loss "
        f"{loss / GIB:.1f}, CUDA {CONTEXT_BYTES / GIB:.0f} and weights, gradients and optimizer states by ZeRO config:"
    )
    files = {file.stem: file for file in sorted(shipped("ds_configs").glob("*.json"))}
    auto = recipe.deepspeed == "auto"
    own = files["zero2"] if auto else Path(recipe.deepspeed)
    if own not in files.values():
        files[own.stem] = own
    print("  GPUs  " + "  ".join(f"{name:>{max(8, len(name))}}" for name in files) + f"  smallest GPU with {own.stem}")
    for ranks in settings.world_size:
        cells, fits, cpu_own = [], "", 0
        for name, file in files.items():
            gpu, cpu = states_bytes(resident, stage, *ds_config.zero_settings(ds_config.load(file)), ranks, width)
            cells.append(f"{(gpu + work) / GIB:>{max(8, len(name))}.1f}")
            if file == own:
                fits, cpu_own = smallest_gpu(gpu + work), cpu
        note = f", and {cpu_own / GIB:.0f} GiB of CPU memory" if cpu_own else ""
        if train.global_batch_size % (train.micro_batch_size * ranks):
            note += f" (train.global_batch_size {train.global_batch_size} does not divide by {ranks} ranks)"
        print(f"  {ranks:4}  " + "  ".join(cells) + f"  {fits}{note}")
    if auto or (stage == 2 and train.activation_checkpointing == "auto"):
        print("\nwhat a run would choose (deepspeed: auto, train.activation_checkpointing: auto):")
        for ranks in settings.world_size:
            for gpu_name in ("A100 40GB", "H100 80GB", "H200"):
                found = choose(recipe, parts, config, ranks, GPUS_GIB[gpu_name] * GIB, math.inf)
                print(f"  {gpu_name}: {found.why}")

    checkpoint = 12 * trained
    heads = width * (parts.blocks + parts.projections)
    final = heads + (width * (parts.backbone + parts.lm_head) if stage == 2 else 0)
    most = train.keep_last + 2  # the best one, and the one being written
    print(
        f"\ndisk: {checkpoint / GIB:.2f} GiB a checkpoint (fp32 weights and moments of what is trained), at most "
        f"{most} at a time: {most * checkpoint / GIB:.1f} GiB; saved at the end: {final / GIB:.2f} GiB"
    )
    print(_hours(recipe, settings.tokens_per_second, total_steps(recipe, data)))


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
