"""What GPUs send each other in a step, by arithmetic, and how long a step then takes.

Of `S` bytes on `n` GPUs each sends `2 (n-1)/n S` in an all-reduce and `(n-1)/n S` in an all-gather or reduce-scatter
(NVIDIA/nccl-tests, doc/PERFORMANCE.md). How often depends on the ZeRO stage (arXiv 1910.02054, section 7), with three
differences that DeepSpeed 0.19.8 makes and a test counts on two ranks: ZeRO 2 all-reduces gradients in place of the
paper's reduce-scatter, and after every micro-batch; ZeRO 3 keeps a weight that is used again before
`stage3_max_reuse_distance` others are, which the end of the forward pass is; so recomputed layers, whose weights are
used again at once, fetch nothing more.

What the model leaves out makes a step longer: collectives' latency, which grows with the number of GPUs, a host that
launches too late, and what communication takes of a GPU's memory bandwidth and processors while it runs beside others.
`OFF_BY` says how much that was.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from medusa_ds.config.deepspeed import load, zero_settings
from medusa_ds.config.recipe import Recipe
from medusa_ds.training.flops import step_flops
from medusa_ds.training.gpus import GPUS
from medusa_ds.training.memory import Parameters, parts_in_memory

EFFICIENCY = {(1, False): 0.63, (2, False): 0.6, (1, True): 0.13, (2, True): 0.07}
"""By stage and offload: FLOPs of a step, recomputed ones included, over the bf16 peak of one H200; without offload of a
step less its optimizer, which GPUs share."""
_OPTIMIZER_S = 16e-3 / 1.63e9  # of a parameter: 3 heads of Llama-3-8B on one H200, docs/experiments/training_speed.md
_LINK_SHARE = 0.6  # 258 to 283 of 450 GB/s between two H200: docs/experiments/training_speed.md, 2026-11-24
_NETWORK_SHARE = 0.9  # 91 of 100 GB/s between two hosts of A100s: NVIDIA/nccl-tests, issue 100

OFF_BY = "stage 1 -3% to +2% (8); stage 2 without ZeRO 3 -1% to +7% (12); stage 2 with ZeRO 3 -49% to -5% (11)"
"""By how much estimates of steps that were measured are longer, and how many those are; a test computes it."""


def sent_bytes(
    parts: Parameters, stage: int, deepspeed: dict[str, Any], ranks: int, width: int, micro_batches: int
) -> tuple[float, float]:
    """Bytes that each GPU sends in a step beside matrix products, and alone: of the weights and gradients in memory.

    Offloading changes none. In stage 1 all gradients exist before the backward pass, so none is sent beside it.
    `ranks` are GPUs, `micro_batches` of a step on each of them; `width` is bytes of a working weight, and of its
    gradient on the way.
    """
    zero = zero_settings(deepspeed).stage
    section = {key: value for key, value in (deepspeed.get("zero_optimization") or {}).items() if value != "auto"}
    overlaps, trained = section.get("overlap_comm"), parts.trainable(stage)
    share = width * (ranks - 1) / ranks * (micro_batches if zero >= 2 else 1)
    if zero == 3:
        again = max(0.0, trained - section.get("stage3_max_reuse_distance", 1e9) / 2)
        every = share * (trained + parts.frozen(stage) + again + trained)
        return (0, every) if overlaps is False else (every, 0)
    gradients, weights = 2 * share * trained, width * (ranks - 1) / ranks * trained if zero else 0
    return (gradients, weights) if overlaps and zero and stage == 2 else (0, gradients + weights)


class Step(NamedTuple):
    """Seconds of a step, of the same on one GPU, which has the optimizer for itself, and of what is sent.

    `waiting_s` is what communication adds to the step: less where it runs beside matrix products.
    """

    seconds: float
    one_gpu_s: float
    communication_s: float
    waiting_s: float
    sent_gb: float
    tokens_per_s: float
    token_gflop: float


def estimate_step(
    recipe: Recipe,
    parts: Parameters,
    config: Any,
    *,
    deepspeed: Path,
    recomputed: int | None,
    gpu: str,
    gpus: int,
    nodes: int = 1,
    network_gbps: float | None = None,
) -> Step:
    """A step on `nodes` hosts of `gpus` each, every GPU with the sequences that it has on one host.

    `parts` are of `count_parameters`, `recomputed` are decoder layers (None: all), `gpu` is one of
    `GPUS` whose peak is known, and `network_gbps` the rate of a host's network cards together (None: as there).
    """
    train, length, settings = recipe.train, recipe.data.max_length, load(deepspeed)
    micro_batches = max(1, train.global_batch_size // (train.micro_batch_size * gpus))
    flops = step_flops(recipe, config, parts.active)
    a_token = flops.total(1, length / 2, recipe.heads.num, 1)
    again = 0.0  # of what is computed twice
    if recipe.stage == 2:
        layers = config.num_hidden_layers
        share = 1.0 if recomputed is None else recomputed / layers
        again = replace(flops, passes=1).total(1, length / 2, 0, 0) * share
    tokens = micro_batches * train.micro_batch_size * length
    kind = GPUS[gpu]
    zero = zero_settings(settings)
    offloads = zero.offloads_optimizer or zero.offloads_parameters
    compute_s = tokens * (a_token + again) / (kind.tflops * 1e12 * EFFICIENCY[recipe.stage, offloads])
    optimizer_s = 0.0 if offloads else _OPTIMIZER_S * parts.trainable(recipe.stage)
    shared_s = optimizer_s / (gpus * nodes if zero.stage else 1)
    gb_per_s = _LINK_SHARE * kind.link
    if nodes > 1:  # every ring of NCCL's passes each host's cards once
        gb_per_s = min(gb_per_s, _NETWORK_SHARE * (network_gbps or kind.network) / 8)
    held = parts_in_memory(recipe, parts, config)
    sent = sent_bytes(held, recipe.stage, settings, gpus * nodes, train.weight_bytes, micro_batches)
    beside_s, alone_s = (part / gb_per_s / 1e9 for part in sent)
    waiting_s = max(0.0, beside_s - compute_s) + alone_s
    seconds = compute_s + shared_s + waiting_s
    return Step(
        seconds=seconds,
        one_gpu_s=compute_s + optimizer_s,
        communication_s=beside_s + alone_s,
        waiting_s=waiting_s,
        sent_gb=sum(sent) / 1e9,
        tokens_per_s=gpus * nodes * tokens / seconds,
        token_gflop=a_token / 1e9,
    )
