"""The draft: heads on the target's last hidden state.

    Medusa (arXiv 2401.10774)    logits_k = P_k block_kL(... block_k1(h)),     block(x) = x + SiLU(W x + b)
    Hydra (arXiv 2402.05109)     the same of s_k in place of h,    s_k = s_{k-1} + SiLU(W_k [s_{k-1}; e_k] + b_k)

h = s_0 is the target's hidden state at the last accepted token, e_k the target's embedding, divided by its root mean
square, of the token before the one that head k guesses (of its own next token for the first head). W_k is the first of
a Hydra head's layers, its blocks the others. P_k is a head's own projection, or the target's LM head; either may be
cut to the tokens of `token_map`, whose logits then take their places in the vocabulary, -inf elsewhere.

The forward of a step runs at every token of the batch and returns the state that the next step gets: unchanged for
Medusa, whose heads guess independently. Where they share a projection, the first step therefore guesses for all of
them, since a few rows more cost nothing beside reading the projection once a head. Blocks run with the projection, at
the few rows that are guessed from. Shapes are static and Python runs per step, never per token, so that vLLM can
record all steps as one CUDA graph. Under tensor parallelism projections are split over the vocabulary and the rest is
replicated.

Shapes: N tokens of a batch, R rows guessed from, H hidden size, V vocabulary.
"""

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, silu
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, maybe_prefix

from medusa_vllm.config import MedusaConfig


class Blocks(nn.Module):
    """Residual blocks of a head."""

    def __init__(self, size: int, layers: int, bias: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(size, size, bias) for _ in range(layers))

    def forward(self, hidden_RH: Tensor) -> Tensor:
        """Apply the blocks to [R, H]."""
        for layer in self.layers:
            hidden_RH = hidden_RH + silu(layer(hidden_RH))
        return hidden_RH


class Heads(nn.Module):
    """All heads but their projections; vLLM sets the target's `embed_tokens` here."""

    def __init__(self, config: MedusaConfig) -> None:
        super().__init__()
        number, size, bias = range(config.medusa_num_heads), config.hidden_size, config.medusa_fc_bias
        is_hydra = config.heads_kind == "hydra"
        self.steps = nn.ModuleList(nn.Linear(2 * size, size, bias) for _ in number if is_hydra)
        self.blocks = nn.ModuleList(Blocks(size, config.medusa_num_layers - is_hydra, bias) for _ in number)

    def forward(self, input_ids_N: Tensor, state_NH: Tensor, step: int) -> Tensor:
        """The state after a step."""
        if not self.steps:
            return state_NH
        embedded_NH = rms_norm(self.embed_tokens(input_ids_N), state_NH.shape[-1:], eps=1e-6)
        return state_NH + silu(self.steps[step](torch.cat([state_NH, embedded_NH], -1)))


class MedusaMTPModel(nn.Module):
    """Heads as vLLM's multi-module MTP draft; step 0 guesses with the first head.

    Raises:
        ValueError: a runner, method or number of steps with which vLLM would not ask each step's own head.
    """

    has_own_embed_tokens = False
    has_own_lm_head = False
    hf_to_vllm_mapper = WeightsMapper(orig_to_new_prefix={"blocks.": "model.blocks.", "steps.": "model.steps."})

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.vllm_config, self.prefix = vllm_config, prefix
        self.config = vllm_config.speculative_config.draft_model_config.hf_config
        if problem := unusable(vllm_config):
            raise ValueError(f"medusa_vllm: {problem}")
        self.model = Heads(self.config)
        self.token_map: Tensor | None
        self.register_buffer("token_map", None)
        own = 0 if self.config.original_lm_head else self.config.medusa_num_heads
        self._set_projections(own, self.config.vocab_size)
        self.step = 0
        self.guessed: tuple[Tensor | None, ...] = ()

    def _set_projections(self, number: int, rows: int) -> None:
        """Projections onto so many tokens: one a head, one for all of them, or none and vLLM sets `lm_head`."""
        names = [maybe_prefix(self.prefix, f"lm_heads.{i}") for i in range(number)]
        dtype, size = self.vllm_config.model_config.dtype, self.config.hidden_size
        self.lm_heads = nn.ModuleList(ParallelLMHead(rows, size, params_dtype=dtype, prefix=name) for name in names)
        self.logits_processor = LogitsProcessor(rows)

    def embed_input_ids(self, input_ids_N: Tensor) -> Tensor:
        """The target's embeddings [N, H]."""
        return self.model.embed_tokens(input_ids_N)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        hidden_states: Tensor,
        inputs_embeds: Tensor | None = None,
        spec_step_idx: int = 0,
    ) -> Tensor:
        """The state [N, H] that a step's logits are of and that the next step gets as `hidden_states`."""
        self.step = spec_step_idx
        return self.model(input_ids, hidden_states, spec_step_idx)

    def compute_logits(self, hidden_states: Tensor, spec_step_idx: int | None = None) -> Tensor | None:
        """Logits [R, V] of a step's head; without a number (vLLM up to 0.31) of the step whose forward ran last."""
        logits = self._guess(self.logits_processor, hidden_states, spec_step_idx)
        if self.token_map is None or logits is None:
            return logits
        whole = logits.new_full((len(logits), self.config.vocab_size), -torch.inf)
        return whole.index_copy(1, self.token_map, logits)

    def get_top_tokens(self, hidden_states: Tensor, spec_step_idx: int | None = None) -> Tensor:
        """The best tokens [R] by `compute_logits`, found without gathering the ranks' logits."""
        tokens = self._guess(self.logits_processor.get_top_tokens, hidden_states, spec_step_idx)
        return tokens if self.token_map is None else self.token_map[tokens]

    def _guess(self, of_rows: Callable[..., Any], state_RH: Tensor, step: int | None) -> Any:
        """Logits or tokens of a step's head; the steps after 0 of heads that share a projection are asked in order."""
        step, blocks = self.step if step is None else step, self.model.blocks
        projection = self.lm_heads[step % len(self.lm_heads)] if self.lm_heads else self.lm_head
        bias = getattr(projection, "bias", None)
        if len(self.lm_heads) > 1 or self.model.steps:
            return of_rows(projection, blocks[step](state_RH), bias)
        if step == 0:
            number = self.vllm_config.speculative_config.num_speculative_tokens
            found = of_rows(projection, torch.cat([block(state_RH) for block in blocks[:number]]), bias)
            self.guessed = (None,) * number if found is None else found.chunk(number)
        return self.guessed[step]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load tensors in vLLM's layout of Medusa heads; the names of the parameters that were set."""
        tensors = dict(weights)
        token_map = tensors.pop("token_map", None)
        names = [name for name in tensors if name.startswith("lm_heads.")]
        if token_map is not None:
            device = next(self.parameters()).device
            with set_current_vllm_config(self.vllm_config), device:
                self.token_map = token_map.to(device)
                self._set_projections(len(names), len(token_map))
            for name in names:  # files of other engines hold a row for every token
                tensors[name] = tensors[name][token_map]
        elif self.config.original_lm_head:  # a copy of the LM head
            for name in names:
                del tensors[name]
        return AutoWeightsLoader(self).load_weights(tensors.items(), mapper=self.hf_to_vllm_mapper)


def unusable(vllm_config: VllmConfig) -> str | None:
    """Why vLLM, as configured or as it is, would not ask the heads as they are meant; None when it does."""
    spec, heads = vllm_config.speculative_config, vllm_config.speculative_config.draft_model_config.hf_config
    number = heads.medusa_num_heads
    if spec.method != "mtp":
        return f'speculative method {spec.method!r}: start with "method": "mtp"'
    if spec.num_speculative_tokens > number:
        return f"num_speculative_tokens: found {spec.num_speculative_tokens}; allowed is at most {number}, one a head"
    if not vllm_config.use_v2_model_runner:
        return "vLLM's V1 model runner asks one head for all steps; set VLLM_USE_V2_MODEL_RUNNER=1"
    from vllm.v1.worker.gpu.spec_decode.eagle.utils import load_eagle_model
    from vllm.v1.worker.gpu.spec_decode.multi_module_mtp.speculator import MultiModuleMTPSpeculator as Speculator

    needed = {load_eagle_model: {"target_model", "vllm_config"}, Speculator._run_model: {"spec_module_idx"}}
    for function, parameters in needed.items():
        if missing := parameters - set(inspect.signature(function).parameters):
            return f"{function.__qualname__} has no {missing.pop()} in this vLLM; the plug-in does not know it"
    return None
