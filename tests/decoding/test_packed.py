"""Packed projections give transformers' own outputs."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from medusa_ds.decoding.kernels import packed
from medusa_ds.decoding.kernels.packed import pack_projections


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_outputs_are_those_of_the_unpacked_model(family):
    """Mutation: swap the two parts that follow the first."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family,
        vocab_size=90,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.3,
    )
    model = AutoModelForCausalLM.from_config(config).double().eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    ids = torch.randint(0, 90, (2, 11))
    wanted, parameters = model(ids).logits, sum(p.numel() for p in model.parameters())
    pack_projections(model)
    torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-12, atol=1e-12)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert not any(name.endswith(("k_proj.weight", "up_proj.weight")) for name, _ in model.named_parameters())
    pack_projections(model)  # again: nothing is left to pack
    torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("family", "act", "gated"), [("llama", "silu", 2), ("llama", "gelu", 0), ("qwen3", "silu", 2)])
def test_what_the_kernel_gates_is_what_the_model_gates(family, act, gated, monkeypatch):
    """The kernel's place, in plain PyTorch. Mutations: gate whatever has the class; pack what is packed again."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family,
        vocab_size=90,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.3,
        hidden_act=act,
    )
    model = AutoModelForCausalLM.from_config(config).double().eval()
    ids, calls = torch.randint(0, 90, (2, 11)), []
    wanted = model(ids).logits

    def gated_linear(hidden, weight, ahead):
        calls.append(ahead)
        gate, up = torch.nn.functional.linear(hidden, weight).chunk(2, -1)
        return torch.nn.functional.silu(gate) * up

    monkeypatch.setattr(packed, "gates", lambda hidden, weight: True)
    monkeypatch.setattr(packed, "gated_linear", gated_linear)
    pack_projections(model)
    pack_projections(model)
    torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-12, atol=1e-12)
    assert len(calls) == gated
