"""How `config.json` of exported heads reads to vLLM: a draft of the kind "mtp" with a module for each head."""

from typing import Any

import vllm
from packaging.version import Version
from transformers import PretrainedConfig

OLDEST, NEWEST = (0, 28), (0, 33)
OTHER_METHODS = ("eagle-", "eagle3", "dflash", "dspark")


def unknown_version() -> str | None:
    """What is wrong with the installed vLLM, in a line; None for one whose interface is known."""
    if OLDEST <= Version(vllm.__version__).release[:2] <= NEWEST:
        return None
    oldest, newest = (".".join(map(str, version)) for version in (OLDEST, NEWEST))
    return f"medusa_vllm: found vLLM {vllm.__version__}; heads run in {oldest} to {newest}"


class MedusaConfig(PretrainedConfig):
    """Config of Medusa (`blocks`) or Hydra (`steps`) heads.

    Raises:
        ValueError: a vLLM of unknown interface, or a path by which vLLM would take the heads for another method's.
    """

    model_type = "medusa"

    def __init__(
        self,
        hidden_size: int = 4096,
        vocab_size: int = 32000,
        medusa_num_heads: int = 3,
        medusa_num_layers: int = 1,
        medusa_fc_bias: bool = True,
        original_lm_head: bool = False,
        heads_kind: str = "medusa",
        **kwargs: Any,
    ) -> None:
        kwargs["architectures"] = ["MedusaMTPModel"]
        super().__init__(**kwargs)
        path = str(kwargs.get("name_or_path", ""))
        misread = [part for part in OTHER_METHODS if part in path.lower()]
        problem = unknown_version()
        if misread:
            problem = f"{path}: vLLM reads a path with {misread[0]!r} in it as another method's; rename the directory"
        elif heads_kind not in ("medusa", "hydra"):
            problem = f"{path}: heads_kind: found {heads_kind!r}; allowed are medusa and hydra"
        if problem:
            raise ValueError(problem)
        self.hidden_size, self.vocab_size = hidden_size, vocab_size
        self.medusa_num_heads, self.medusa_num_layers = medusa_num_heads, medusa_num_layers
        self.medusa_fc_bias, self.original_lm_head, self.heads_kind = medusa_fc_bias, original_lm_head, heads_kind
        # what vLLM asks of a draft: the kind, the modules, and that it has no attention and no cache
        self.model_type = "mtp"
        self.n_predict = self.num_nextn_predict_layers = medusa_num_heads
        self.num_hidden_layers = self.num_attention_heads = self.num_key_value_heads = 0
        self.max_position_embeddings = 1 << 20
