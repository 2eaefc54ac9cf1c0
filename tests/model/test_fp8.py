"""The frozen forward in fp8 against the same layers in bf16; cuBLASLt's rules aside, a CPU computes the same."""

import pytest
import torch
from support import SIZES
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from medusa_ds.errors import UserError
from medusa_ds.model.fp8 import Fp8Linear, check_device, quantise


def _multiplies() -> bool:
    try:
        Fp8Linear(nn.Linear(16, 16, bias=False, dtype=torch.bfloat16))(torch.ones(16, 16, dtype=torch.bfloat16))
    except RuntimeError:
        return False
    return True


on_this_cpu = pytest.mark.skipif(not _multiplies(), reason="PyTorch 2.8 multiplies fp8 on a CPU with one scale alone")


@on_this_cpu
@torch.no_grad()
def test_products_have_the_error_of_three_mantissa_bits():
    """Mutation: one scale for the whole weight; then the small rows' outputs are lost."""
    torch.manual_seed(0)
    linear = nn.Linear(64, 48, bias=False, dtype=torch.bfloat16)
    linear.weight.mul_(torch.logspace(-6, 0, 48)[:, None])  # rows of very different size
    x = torch.randn(2, 33, 64, dtype=torch.bfloat16) * torch.logspace(-3, 3, 33)[:, None]
    exact = x.double() @ linear.weight.double().T
    found = Fp8Linear(linear)(x)
    assert found.shape == (2, 33, 48)
    usual = x.double().norm(dim=-1, keepdim=True) * linear.weight.double().norm(dim=-1) / 64**0.5
    error = ((found.double() - exact) / usual).square().mean(dim=(0, 1)).sqrt()
    assert 0.01 < float(error.min()) < float(error.max()) < 0.06
    linear.bias = nn.Parameter(torch.randn(48, dtype=torch.bfloat16))
    torch.testing.assert_close(Fp8Linear(linear)(x), found + linear.bias, rtol=0.02, atol=0.02)


@on_this_cpu
def test_deepspeeds_cast_of_the_module_changes_nothing():
    """Mutation: hold the weight as a float8 tensor, or the scale in fp32."""
    torch.manual_seed(0)
    layer = Fp8Linear(nn.Linear(64, 48, bias=False, dtype=torch.bfloat16))
    x = torch.randn(5, 64, dtype=torch.bfloat16)
    before = layer(x)
    assert torch.equal(layer.bfloat16()(x), before)
    assert layer.weight.element_size() == 1


@on_this_cpu
def test_layers_are_replaced_and_hidden_states_stay_near(monkeypatch):
    monkeypatch.setattr(nn.Module, "compile", lambda self, **_: compiled.append(self))
    compiled: list[nn.Module] = []
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **SIZES | {"hidden_size": 64, "intermediate_size": 96}, vocab_size=101)
    backbone = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)
    numbers = sum(p.numel() for p in backbone.parameters())
    ids = torch.randint(0, 101, (2, 24))
    before = backbone.base_model(input_ids=ids, use_cache=False).last_hidden_state.float()
    quantise(backbone)
    after = backbone.base_model(input_ids=ids, use_cache=False).last_hidden_state.float()
    assert 0.001 < float((after - before).norm() / before.norm()) < 0.1
    assert compiled == [*backbone.base_model.layers]
    assert sum(isinstance(module, Fp8Linear) for module in backbone.modules()) == 2 * 7
    assert type(backbone.lm_head) is nn.Linear
    assert sum(p.numel() for p in backbone.parameters()) == numbers


def test_a_cpu_is_refused():
    with pytest.raises(UserError, match=r"model.frozen_precision: found fp8, which needs a GPU of .* 8.9 or more"):
        check_device(torch.device("cpu"))
