"""Packed projections give transformers' own outputs."""

import pytest
import torch
from support import SIZES
from transformers import AutoConfig, AutoModelForCausalLM

from medusa_ds.decoding.kernels import packed
from medusa_ds.decoding.kernels.packed import GatedMLP, pack_projections


def build(family, **changes):
    """A random model in fp64 with a bias wherever it has one, and token ids [2, 11]."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES, vocab_size=90, head_dim=8, initializer_range=0.3, **changes)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model, torch.randint(0, 90, (2, 11))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_outputs_are_those_of_the_unpacked_model(family):
    """Mutation: swap the two parts that follow the first."""
    model, ids = build(family)
    wanted, parameters = model(ids).logits, sum(p.numel() for p in model.parameters())
    pack_projections(model)
    torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-12, atol=1e-12)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert not any(name.endswith(("k_proj.weight", "up_proj.weight")) for name, _ in model.named_parameters())
    pack_projections(model)  # again: nothing is left to pack
    torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("family", "changes", "packs", "gated"),
    [
        ("llama", {}, 2, 2),
        ("llama", {"hidden_act": "gelu"}, 2, 0),
        ("llama", {"mlp_bias": True}, 2, 0),
        ("olmo2", {}, 2, 2),
        ("falcon_h1", {"mlp_multipliers": [0.5, 2.0], "mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8}, 0, 0),
        ("falcon_h1", {"mlp_multipliers": [1.0, 1.0], "mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8}, 2, 2),
    ],
)
def test_an_mlp_is_packed_and_gated_by_what_it_computes(family, changes, packs, gated, monkeypatch):
    """The kernel's place, in plain PyTorch. Mutations: pack whatever has the names; gate whatever is packed."""
    model, ids = build(family, **changes)
    calls, wanted = [], model(ids, use_cache=False).logits

    def gated_linear(hidden, weight, ahead):
        calls.append(ahead)
        gate, up = torch.nn.functional.linear(hidden, weight).chunk(2, -1)
        return torch.nn.functional.silu(gate) * up

    monkeypatch.setattr(packed, "gates", lambda hidden, weight: True)
    monkeypatch.setattr(packed, "gated_linear", gated_linear)
    pack_projections(model)
    pack_projections(model)
    torch.testing.assert_close(model(ids, use_cache=False).logits, wanted, rtol=1e-12, atol=1e-12)
    assert sum(isinstance(module, GatedMLP) for module in model.modules()) == packs
    assert len(calls) == gated
