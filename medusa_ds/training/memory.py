"""What training needs of memory, by arithmetic.

States follow DeepSpeed's own estimators (`estimate_zero2_model_states_mem_needs`, `estimate_zero3_...`), which take
every parameter for trainable; a frozen backbone is added here, with its 16-bit weights alone. A test holds the two
equal where nothing is frozen. Activations count the tensors that a decoder layer keeps for its backward pass
(arXiv 2205.05198, section 4, for a gated MLP and attention without a stored score matrix). All are estimates.
"""

from dataclasses import dataclass
from typing import Any

from medusa_ds.config.recipe import Recipe

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
