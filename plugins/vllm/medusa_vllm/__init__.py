"""Medusa and Hydra heads in vLLM, as a plug-in that vLLM finds by its entry point `vllm.general_plugins`.

Heads are served as a "multi-token prediction" draft of several modules: vLLM hands step k the target's last hidden
state, the token before the one that is guessed and the number k, and takes logits. Nothing of vLLM is replaced; it is
imported when vLLM loads the plug-in, and a vLLM that is not known refuses the heads, never anything else.
"""


def register() -> None:
    """Make the heads' config and model known to vLLM; called once in each of its processes, more calls do no harm."""
    from transformers import AutoConfig
    from vllm import ModelRegistry
    from vllm.transformers_utils import config as vllm_configs

    from medusa_vllm.config import MedusaConfig, unknown_version

    AutoConfig.register("medusa", MedusaConfig, exist_ok=True)
    if unknown_version() is None:
        # up to 0.32 vLLM prefers a reader of its own, for a draft that has no place in the V2 model runner
        vllm_configs._CONFIG_REGISTRY.pop("medusa", None)
        vllm_configs._SPECULATIVE_DECODING_CONFIGS.discard("medusa")
    ModelRegistry.register_model("MedusaMTPModel", "medusa_vllm.model:MedusaMTPModel")
