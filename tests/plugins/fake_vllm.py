"""What the plug-in finds in vLLM 0.28 to 0.33, written down from their sources: names, signatures, what is asked of it.

`vllm/transformers_utils/config.py` (tables of config readers), `vllm/model_executor/layers/vocab_parallel_embedding.py`
(rows padded to 64), `.../logits_processor.py`, `.../models/utils.py`, and of `vllm/v1/worker/gpu/spec_decode/` the loop
`multi_module_mtp/speculator.py: _generate_drafts` and `eagle/utils.py: load_eagle_model`.
"""

import contextlib
from collections.abc import Iterable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn


class ParallelLMHead(nn.Module):
    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        bias: bool = False,
        params_dtype: torch.dtype | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__()
        padded = -(-num_embeddings // 64) * 64
        self.weight = nn.Parameter(torch.full((padded, embedding_dim), 9.0, dtype=params_dtype), requires_grad=False)
        self.weight.weight_loader = self.load  # type: ignore[attr-defined]
        self.rows = num_embeddings

    def load(self, parameter: Tensor, loaded: Tensor) -> None:
        assert len(loaded) == self.rows
        parameter[: self.rows].copy_(loaded)


class LogitsProcessor(nn.Module):
    def __init__(self, vocab_size: int, org_vocab_size: int | None = None, scale: float = 1.0) -> None:
        super().__init__()
        self.rows = org_vocab_size or vocab_size

    def forward(self, lm_head: nn.Module, hidden_states: Tensor, embedding_bias: Tensor | None = None) -> Tensor:
        return nn.functional.linear(hidden_states, lm_head.weight, embedding_bias)[..., : self.rows]

    def get_top_tokens(self, lm_head: nn.Module, hidden_states: Tensor, embedding_bias: Tensor | None = None) -> Tensor:
        return self(lm_head, hidden_states, embedding_bias).argmax(-1)


class WeightsMapper:
    def __init__(self, orig_to_new_prefix: dict[str, str]) -> None:
        self.prefixes = orig_to_new_prefix


class AutoWeightsLoader:
    def __init__(self, module: nn.Module) -> None:
        self.parameters = dict(module.named_parameters())

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], *, mapper: WeightsMapper) -> set[str]:
        loaded = set()
        for name, tensor in weights:
            for old, new in mapper.prefixes.items():
                name = new + name[len(old) :] if name.startswith(old) else name
            if name not in self.parameters:
                raise ValueError(f"There is no module or parameter named {name!r}")
            parameter = self.parameters[name]
            with torch.no_grad():
                getattr(parameter, "weight_loader", lambda p, t: p.copy_(t))(parameter, tensor)
            loaded.add(name)
        return loaded


class MultiModuleMTPSpeculator:
    """`_generate_drafts` of one request for each row.

    Attributes:
        passes_step: 0.32 and later name the step to the logits too.
        use_local_argmax_reduction: tokens are asked for in place of logits.
    """

    passes_step = True
    use_local_argmax_reduction = False

    def _run_model(self, num_tokens: int, spec_module_idx: int) -> None: ...

    def drafts(self, model: Any, hidden_NH: Tensor, tokens_N: Tensor, steps: int) -> Tensor:
        """Each row's drafts [N, steps]; rows are requests of one token."""
        drafts = []
        for step in range(steps):
            hidden_NH = model(
                input_ids=tokens_N,
                positions=torch.arange(len(tokens_N)),
                hidden_states=hidden_NH,
                inputs_embeds=None,
                spec_step_idx=step,
            )
            known = {"spec_step_idx": step} if self.passes_step else {}
            if self.use_local_argmax_reduction:
                tokens_N = model.get_top_tokens(hidden_NH, **known)
            else:
                tokens_N = model.compute_logits(hidden_NH, **known).argmax(-1)
            drafts.append(tokens_N)
        return torch.stack(drafts, 1)


def load_eagle_model(target_model: nn.Module, vllm_config: Any) -> Any: ...


@contextlib.contextmanager
def set_current_vllm_config(vllm_config: Any) -> Iterator[None]:
    yield


def modules(version: str = "0.32.0") -> dict[str, ModuleType]:
    """The modules by name, for `sys.modules`."""
    registry = SimpleNamespace(models={})
    registry.register_model = registry.models.__setitem__
    content: dict[str, dict[str, Any]] = {
        "vllm": {"__version__": version, "ModelRegistry": registry},
        "vllm.config": {"VllmConfig": object, "set_current_vllm_config": set_current_vllm_config},
        "vllm.transformers_utils": {},
        "vllm.transformers_utils.config": {
            "_CONFIG_REGISTRY": {"medusa": "MedusaConfig", "eagle": "EAGLEConfig"},
            "_SPECULATIVE_DECODING_CONFIGS": {"medusa", "eagle"},
        },
        "vllm.model_executor.layers.logits_processor": {"LogitsProcessor": LogitsProcessor},
        "vllm.model_executor.layers.vocab_parallel_embedding": {"ParallelLMHead": ParallelLMHead},
        "vllm.model_executor.models.utils": {
            "AutoWeightsLoader": AutoWeightsLoader,
            "WeightsMapper": WeightsMapper,
            "maybe_prefix": lambda prefix, name: f"{prefix}.{name}" if prefix else name,
        },
        "vllm.v1.worker.gpu.spec_decode.eagle.utils": {"load_eagle_model": load_eagle_model},
        "vllm.v1.worker.gpu.spec_decode.multi_module_mtp.speculator": {
            "MultiModuleMTPSpeculator": MultiModuleMTPSpeculator
        },
    }
    made = {}
    for name, attributes in content.items():
        made[name] = ModuleType(name)
        vars(made[name]).update(attributes)
    made["vllm.transformers_utils"].config = made["vllm.transformers_utils.config"]  # type: ignore[attr-defined]
    return made


def config_of(heads: Any, **changes: Any) -> Any:
    """A `VllmConfig` for these heads with as many steps, changed as named."""
    spec = {"method": "mtp", "num_speculative_tokens": heads.medusa_num_heads}
    spec |= {key: value for key, value in changes.items() if key in spec}
    draft = SimpleNamespace(hf_config=heads)
    return SimpleNamespace(
        speculative_config=SimpleNamespace(**spec, draft_model_config=draft),
        model_config=SimpleNamespace(dtype=torch.float32),
        use_v2_model_runner=changes.get("use_v2_model_runner", True),
    )
