"""The ends of a model without its layers: all that training needs of a backbone whose hidden states are cached."""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.utils import cached_file

from medusa_ds.config.recipe import ModelSpec
from medusa_ds.model.backbone import UNREADABLE, lm_head_weight, load_backbone, load_config, model_path
from medusa_ds.model.projection import VocabularyProjection


class LmHeadAlone(nn.Module):
    """Stands in for a backbone whose hidden states are read from a cache: its config, and its ends where needed.

    These are the LM head, where heads share it, and the input embeddings, where heads see tokens.
    """

    def __init__(
        self, config: PretrainedConfig, lm_head: VocabularyProjection | None, embeddings: nn.Embedding | None
    ) -> None:
        super().__init__()
        self.config, self.base_model = config, nn.Module()
        self.lm_head, self.embeddings = lm_head, embeddings

    def get_output_embeddings(self) -> VocabularyProjection | None:
        """The LM head, as of a model of transformers."""
        return self.lm_head

    def get_input_embeddings(self) -> nn.Embedding | None:
        """The input embeddings, as of a model of transformers."""
        return self.embeddings


class Ends(NamedTuple):
    """What training needs of a backbone whose hidden states are cached.

    `lm_head`: its weight [V, H]. `embeddings`: what the input embeddings give for every token [V, H], where needed.
    """

    lm_head: torch.Tensor
    embeddings: torch.Tensor | None = None


def read_ends(spec: ModelSpec, dtype: torch.dtype, device: torch.device, sees_tokens: bool) -> Ends:
    """The ends of a model, on the CPU, without the rest of it where they lie in safetensors files.

    Input embeddings are read for heads that see tokens: their weight, where they are nothing more than that.

    Raises:
        UserError: see `load_backbone`.
    """
    lm_head = _read_weight(spec, dtype, lm_head_weight)
    embeddings = _read_weight(spec, dtype, _plain_embeddings) if sees_tokens else None
    if lm_head is None or (sees_tokens and embeddings is None):
        model: Any = load_backbone(spec, dtype, device=device, liger=False)
        lm_head, embed = lm_head_weight(model).detach(), model.get_input_embeddings()
        if sees_tokens:
            embeddings = embed(torch.arange(embed.num_embeddings, device=device)).detach()
    return Ends(lm_head.cpu(), None if embeddings is None else embeddings.cpu())


def _plain_embeddings(model: Any) -> torch.Tensor | None:
    embed = model.get_input_embeddings()
    return embed.weight if type(embed) is nn.Embedding else None  # others scale what they look up


def _read_weight(spec: ModelSpec, dtype: torch.dtype, choose: Callable[[Any], Any]) -> torch.Tensor | None:
    """The weight that `choose` returns of a model, read from its safetensors file alone; None where that cannot be."""
    if spec.init != "pretrained":
        return None
    with suppress(*UNREADABLE):  # of which loading the model tells
        path = model_path(spec)
        revision = spec.revision if path == spec.name else None
        options: dict[str, Any] = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
        with torch.device("meta"):
            whole = AutoModelForCausalLM.from_config(load_config(spec), trust_remote_code=spec.trust_remote_code)
        weight = choose(whole)
        names = [name for name, other in whole.named_parameters(remove_duplicate=False) if other is weight]
        index = cached_file(path, "model.safetensors.index.json", **options)
        files = dict.fromkeys(names, "model.safetensors")
        if index:  # megabytes where there are many experts
            files = json.loads(Path(index).read_bytes())["weight_map"]
        for name in names:
            file = cached_file(path, files[name], **options) if name in files else None
            if file is not None:
                with safe_open(file, framework="pt") as content:
                    if name in content.keys():  # noqa: SIM118 - not a mapping
                        return content.get_tensor(name).to(dtype)
    return None
