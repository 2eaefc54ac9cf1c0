"""Estimate parameters, memory, communication, disk and hours of a recipe by arithmetic: nothing is trained.

Example:
    medusa-ds estimate llama3_8b_stage1 --gpus 8 --gpu a100-80gb --rows 121000

Memory is what DeepSpeed's own estimators say of its states, with activations and the loss beside them.
"""

import math
import re
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from medusa_ds.config import deepspeed as ds_config
from medusa_ds.config.deepspeed import zero_settings
from medusa_ds.config.parsing import read_text
from medusa_ds.config.recipe import Recipe, shipped
from medusa_ds.config.settings import Commas, RecipeSettings
from medusa_ds.config.types import Count, Positive, either
from medusa_ds.errors import UserError, counted
from medusa_ds.files import read_json_lines
from medusa_ds.training.communication import OFF_BY, Step, estimate_step
from medusa_ds.training.gpus import GPUS, find_gpu
from medusa_ds.training.memory import (
    CONTEXT_BYTES,
    GIB,
    Choice,
    Parameters,
    activations_bytes,
    choose,
    count_parameters,
    loss_bytes,
    parts_in_memory,
    recomputed_layers,
    smallest_gpu,
    states_bytes,
)

_decide_speed = attrgetter(
    *"model.name model.init model.config model.frozen_precision model.attention model.liger_kernels".split(),
    *"heads.kind heads.num heads.layers heads.lm_head heads.vocab stage loss.impl loss.chunk_mib loss.target".split(),
    *"data.max_length data.packing train.global_batch_size train.micro_batch_size train.precision".split(),
    *"train.activation_checkpointing deepspeed".split(),
)


def measured_speed(recipe: Recipe) -> float | None:
    """Median tokens/s of the last steps of a run in the recipe's output; None where there is none of such a recipe.

    What the recipe leaves to training may have had any value.
    """
    output = Path(recipe.output)
    try:
        kept = Recipe.kept(read_text(output / "recipe.yaml"), "recipe.yaml")
        pairs = zip(_decide_speed(kept), _decide_speed(recipe), strict=True)
        cached = [each.data.hidden_cache != "off" for each in (kept, recipe)]
        if cached[0] != cached[1] or any(now not in (None, "auto", before) for before, now in pairs):
            return None
        records = read_json_lines(output / "metrics.jsonl")[-200:]
        speeds = sorted(float(r["tokens_per_s"]) for r in records if r.get("kind") == "train")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, UserError):
        return None
    return speeds[len(speeds) // 2] if speeds else None


class Settings(RecipeSettings):
    """What the command line says."""

    gpu: str | None = Field(None, title="KIND")
    """GPU to plan for: rtx-3060, l4, a100-80gb, h100-80gb, h200, ..., or its full name; without it, those of this
    machine."""
    gpus: Count = 8
    """How many of it, on one host; without --gpu and this, those of this machine."""
    nodes: Commas[Count] = [1, 4, 8, 16]
    """Hosts in the table of communication."""
    network: Positive | None = None
    """Gb/s of all network cards of a host; without it, those of NVIDIA's hosts of eight such GPUs."""
    rows: Count | None = None
    """Conversations of the data, where the recipe's split does not say, as train[:200000] does."""
    world_size: list[Count] = [1, 2, 4, 8]
    """Ranks in the table of memory; may be given several times."""
    tokens_per_second: Positive | None = None
    """Speed of all GPUs together; without it, that of --gpu, or what a run into the recipe's output measured."""
    count_data: bool = Field(False, alias="data")
    """Tokenise the data, as prepare does, to count its tokens."""


def run(settings: Settings) -> None:
    """Print the estimate.

    Raises:
        UserError: a mistake of the recipe, a model that cannot be found, or an unknown GPU.
    """
    from medusa_ds.data.packing import load_data
    from medusa_ds.decoding.session import describe
    from medusa_ds.model.backbone import load_config, load_tokenizer, settled

    recipe, (gpu, gpus) = settings.load_recipe(), _planned(settings)
    settings = settings.model_copy(update={"gpus": gpus})
    measured = None if settings.gpu else measured_speed(recipe)
    tokenizer = load_tokenizer(recipe.model) if settings.count_data else None
    recipe = settled(recipe, planning=True)
    print(*describe(recipe.model), "", sep="\n")
    data = load_data(recipe, tokenizer) if tokenizer else None
    config = load_config(recipe.model).get_text_config()
    parts = count_parameters(recipe, config)
    width = recipe.train.weight_bytes
    _print_parameters(recipe, parts)
    if recipe.data.hidden_cache != "off":
        print(
            f"\n{_hidden_cache(recipe, config, data)}; filling it takes {width * parts.backbone / GIB:.1f} GiB of "
            "backbone on each GPU, before what follows"
        )
    _print_memory(recipe, parts, config, settings.world_size)
    step = None
    if gpu:
        auto = {"deepspeed": "auto"}
        gpu_bytes = GPUS[gpu].gib * GIB
        choice = choose(recipe.model_copy(update=auto), parts, config, settings.gpus, gpu_bytes, math.inf)
        largest = _largest_micro_batch(recipe, choice, parts, config, settings.gpus, gpu_bytes)
        print(f"\n{settings.gpus} x {gpu}: take deepspeed: ds_configs/{choice.deepspeed.name}; {choice.why}")
        print(f"  with it, {largest}")
        if GPUS[gpu].tflops:
            step = _estimate_step(settings, recipe, parts, config, gpu, 1)[1]
            _print_steps(settings, recipe, parts, config, gpu)
    elif recipe.deepspeed == "auto":
        print("\ndeepspeed: auto takes what fits the GPUs; name them, as in --gpus 8 --gpu a100-80gb, to see what")
    trained = parts.trainable(recipe.stage)
    checkpoint = 12 * trained
    final = width * (parts.blocks + parts.projections)
    final += width * (parts.backbone + parts.lm_head) if recipe.stage == 2 else 0
    most = recipe.train.keep_last + 2  # the best one, and the one being written
    print(
        f"\ndisk: {checkpoint / GIB:.2f} GiB a checkpoint (fp32 weights and moments of what is trained), at most "
        f"{most} at a time: {most * checkpoint / GIB:.1f} GiB; saved at the end: {final / GIB:.2f} GiB"
    )
    print(_hours(settings, recipe, measured, _total_steps(recipe, data, settings.rows), gpu, step))


def _print_parameters(recipe: Recipe, parts: Parameters) -> None:
    print("parameters, millions")
    state = "frozen" if recipe.stage == 1 else "trained"
    tied = "tied to the embeddings" if not parts.lm_head else state
    for name, count, note in (
        ("backbone", parts.backbone, state),
        ("LM head", parts.lm_head, tied),
        ("heads: residual blocks", parts.blocks, "trained"),
        ("heads: projections", parts.projections, "trained" if parts.projections else "the LM head's"),
        *([("frozen start", parts.start, f"loss.target {recipe.loss.target} of stage 2")] if parts.start else []),
    ):
        print(f"  {name:24}{count / 1e6:12,.2f}  {note}")
    print(f"  {'trained':24}{parts.trainable(recipe.stage) / 1e6:12,.2f}")


def _print_memory(recipe: Recipe, parts: Parameters, config: Any, world_sizes: list[int]) -> None:
    """A line for each number of GPUs, a column for each ZeRO config."""
    train, resident = recipe.train, parts_in_memory(recipe, parts, config)
    activations = activations_bytes(recipe, config, recomputed_layers(train.activation_checkpointing))
    loss, width = loss_bytes(recipe, config), train.weight_bytes
    work = activations + loss + CONTEXT_BYTES
    print(
        f"\nmemory per GPU in {'fp32' if width == 4 else 'bf16'}, GiB: activations {activations / GIB:.1f}, loss "
        f"{loss / GIB:.1f}, CUDA {CONTEXT_BYTES / GIB:.0f} and weights, gradients and optimizer states by ZeRO config:"
    )
    files = {file.stem: file for file in sorted(shipped("ds_configs").glob("*.json"))}
    own = files["zero2"] if recipe.deepspeed == "auto" else Path(recipe.deepspeed)
    if own not in files.values():
        files[own.stem] = own
    print("  GPUs  " + "  ".join(f"{name:>{max(8, len(name))}}" for name in files) + f"  smallest GPU with {own.stem}")
    for ranks in world_sizes:
        cells, fits, cpu_own = [], "", 0
        for name, file in files.items():
            gpu, cpu = states_bytes(resident, recipe.stage, zero_settings(ds_config.load(file)), ranks, width)
            cells.append(f"{(gpu + work) / GIB:>{max(8, len(name))}.1f}")
            if file == own:
                fits, cpu_own = smallest_gpu(gpu + work), cpu
        note = f", and {cpu_own / GIB:.0f} GiB of CPU memory" if cpu_own else ""
        if train.global_batch_size % (train.micro_batch_size * ranks):
            note += f" (train.global_batch_size {train.global_batch_size} does not divide by {ranks} ranks)"
        print(f"  {ranks:4}  " + "  ".join(cells) + f"  {fits}{note}")


def _planned(settings: Settings) -> tuple[str | None, int]:
    """Kind and number of the GPUs to plan for, those asked for or those of this machine; None for a kind not known."""
    if settings.gpu is not None:
        kind = find_gpu(settings.gpu, "gib")
        if kind is None:
            known = [name.lower().replace(" ", "-") for name, gpu in GPUS.items() if gpu.gib]
            raise UserError(
                f"--gpu: found {settings.gpu!r}; allowed is {either(known)}, or a name that holds its words"
            )
        return kind, settings.gpus
    if not torch.cuda.is_available():
        return None, settings.gpus
    number = settings.gpus if "gpus" in settings.model_fields_set else torch.cuda.device_count()
    return find_gpu(torch.cuda.get_device_name(), "gib"), number


def _largest_micro_batch(
    recipe: Recipe, choice: Choice, parts: Parameters, config: Any, gpus: int, gpu_bytes: float
) -> str:
    """The largest `train.micro_batch_size` that fits with a choice and divides the global batch."""
    batch = recipe.train.global_batch_size
    if batch % gpus:
        return f"no train.micro_batch_size fits: train.global_batch_size {batch} does not divide by {gpus} GPUs"
    layers = config.num_hidden_layers if choice.recomputed is None else choice.recomputed
    for size in range(batch // gpus, 0, -1):
        train = recipe.train.model_copy(update={"micro_batch_size": size, "activation_checkpointing": layers})
        tried = recipe.model_copy(update={"train": train, "deepspeed": str(choice.deepspeed)})
        if batch // gpus % size == 0 and choose(tried, parts, config, gpus, gpu_bytes, math.inf).fits:
            return f"train.micro_batch_size up to {size} fits and divides train.global_batch_size {batch}"
    return "not one sequence fits: lower data.max_length, or take more or larger GPUs"


def _estimate_step(
    settings: Settings, recipe: Recipe, parts: Parameters, config: Any, gpu: str, nodes: int
) -> tuple[Choice, Step]:
    """What the recipe trains with on so many hosts, and a step of it."""
    found = choose(recipe, parts, config, settings.gpus * nodes, GPUS[gpu].gib * GIB, math.inf)
    chosen: dict[str, Any] = {"deepspeed": found.deepspeed, "recomputed": found.recomputed, "gpu": gpu}
    hosts: dict[str, Any] = {"gpus": settings.gpus, "nodes": nodes, "network_gbps": settings.network}
    return found, estimate_step(recipe, parts, config, **chosen, **hosts)


def _print_steps(settings: Settings, recipe: Recipe, parts: Parameters, config: Any, gpu: str) -> None:
    """A line for each number of hosts, and how far measured steps were from such estimates."""
    print(
        f"\na step of {gpu} GPUs by FLOPs and bytes (latency of collectives and a late host would make it longer; "
        "waits: share of it in which GPUs do nothing but send):\n"
        "  hosts  GPUs  deepspeed      GB sent    ms  communication ms  waits   tokens/s  of one GPU's rate"
    )
    for nodes in settings.nodes:
        choice, step = _estimate_step(settings, recipe, parts, config, gpu, nodes)
        ms, sent_ms, alone = 1e3 * step.seconds, 1e3 * step.communication_s, step.waiting_s / step.seconds
        print(
            f"  {nodes:5}  {nodes * settings.gpus:4}  {choice.deepspeed.stem:13}{step.sent_gb:9.1f}{ms:6.0f}"
            f"{sent_ms:18.0f}{alone:7.0%}{step.tokens_per_s:11,.0f}{step.one_gpu_s / step.seconds:19.2f}"
        )
    print(f"  such estimates of measured steps of one and two H200s were off by: {OFF_BY}")


def _hidden_cache(recipe: Recipe, config: Any, data: Any) -> str:
    from medusa_ds.training.hidden_cache import count_rows, row_bytes, stored_as

    _, stored = stored_as(recipe, on_gpu=True)
    size = row_bytes(stored, config.hidden_size)
    if data is None:
        return f"hidden cache in {stored}: {1e6 * size / GIB:.2f} GiB a million positions that a head learns from"
    rows = sum(int(count_rows(split, recipe.heads.num).sum()) for split in (data.train, data.validation))
    return f"hidden cache in {stored}: {rows * size / GIB:.2f} GiB for {rows:,} positions that a head learns from"


def _total_steps(recipe: Recipe, data: Any, rows: int | None) -> int | None:
    """Optimizer steps of the recipe, at most; None where they follow from data of unknown size."""
    train = recipe.train
    if train.steps is not None:
        return train.steps
    if data:
        return data.steps(train)
    sliced = re.fullmatch(r"\w+\[(\d*):(\d+)\]", recipe.data.split)
    if rows is None and sliced:
        rows = int(sliced[2]) - int(sliced[1] or 0)
    if rows is None:
        return None
    held_out = recipe.data.validation
    rows -= 0 if isinstance(held_out, str) else min(int(rows * held_out), recipe.data.validation_max)
    return max(1, math.ceil(rows / train.global_batch_size * train.epochs))  # packing needs fewer sequences than rows


def _hours(
    settings: Settings, recipe: Recipe, measured: float | None, steps: int | None, gpu: str | None, step: Step | None
) -> str:
    speed = settings.tokens_per_second or measured
    if steps is None:
        return "time: train.steps is not set; give --rows N, or --data to tokenise the data and count its steps"
    tokens = steps * recipe.train.global_batch_size * recipe.data.max_length
    spread = f"{counted(steps, 'step')} of at most {tokens // steps:,} tokens"
    if speed:
        source = "stated" if settings.tokens_per_second else "measured in the recipe's output"
        return f"time: {tokens / speed / 3600:.2f} hours for {spread} at {speed:,.0f} tokens/s ({source})"
    if step is None:
        more = "or run the recipe for some steps first"
        return f"time: {spread}; name a GPU with --gpu, state a speed with --tokens-per-second, {more}"
    hours = tokens / step.tokens_per_s / 3600
    takes = f"{hours:.1f} hours" if hours >= 0.1 else f"{60 * hours:.1f} minutes"
    return (
        f"time: about {takes} on {settings.gpus} x {gpu} for {spread}, "
        f"{step.token_gflop:.1f} GFLOP a token, at {step.tokens_per_s:,.0f} tokens/s (estimated)"
    )
