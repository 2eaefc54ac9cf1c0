"""A step compiled in parts."""

import pytest
import torch
from decoding_models import FAMILIES, random_heads
from transformers import AutoConfig, AutoModelForCausalLM

from medusa_ds.decoding.decoder import Decoder
from medusa_ds.decoding.kernels.packed import pack_projections
from medusa_ds.decoding.trees import chain, default_tree


@pytest.mark.parametrize(("family", "parts"), [("llama", 5), ("qwen3_mixed", 6)])
def test_layers_share_one_compilation_and_the_text_is_the_same(family, parts, monkeypatch):
    """Both kinds of layers of a mixed model are compiled. Mutation: leave out `cache.current = slots`."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family.removesuffix("_mixed"),
        vocab_size=120,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=96,
        initializer_range=0.3,
        eos_token_id=3,
        pad_token_id=0,
        **FAMILIES[family],
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    pack_projections(model)
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda part, dynamic, options: compile_(part, dynamic=dynamic, backend=count))
    torch._dynamo.reset()
    plain, compiled = (Decoder(model, random_heads(), default_tree(3, 24), compile_step=fuse) for fuse in (False, True))
    for prompt in ([5, 9, 12], [7] * 20):
        assert compiled.generate([prompt], 30)[0].tokens == plain.generate([prompt], 30)[0].tokens
    assert len(graphs) == parts


@pytest.mark.parametrize("patched", ["forward", "class"])
def test_a_patched_model_is_refused(patched):
    """Liger replaces modules' `forward`, and classes for models built later. Mutation: ask for one of them only."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", vocab_size=120, **sizes))
    norm = model.model.layers[0].input_layernorm
    if patched == "forward":
        norm.forward = norm.forward
    else:
        norm.__class__ = type("LigerRMSNorm", (type(norm),), {"__module__": "liger_kernel.transformers.rms_norm"})
    with pytest.raises(AssertionError, match="patched"):
        Decoder(model, [], chain(0), compile_step=True)
