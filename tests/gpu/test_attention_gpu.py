"""Attention within documents on a GPU: packed sequences give the hidden states of each document alone."""

import pytest
import torch

from medusa_ds.config.recipe import ModelSpec
from medusa_ds.model import fp8
from medusa_ds.model.attention import hidden_states
from medusa_ds.model.backbone import load_backbone

pytestmark = pytest.mark.gpu
CONFIG = {
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 3,
    "vocab_size": 1000,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize("quantised", [False, True])
@torch.no_grad()
def test_packed_documents_are_as_alone(quantised):
    """Mutation: give `document_starts` as None, or forget the second sequence's start."""
    if quantised and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no fp8 products on this GPU")
    model = load_backbone(ModelSpec(name="x", init="random", config=CONFIG), torch.bfloat16, device="cuda", packed=True)
    assert model.config._attn_implementation == "documents"
    if quantised:
        fp8.quantise(model)
    lengths = [[100, 156], [256], [1, 200, 55]]
    ids = torch.randint(0, 1000, (3, 256), device="cuda")
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths])
    packed = hidden_states(model, ids, positions).float()
    at = 0
    for row, line in zip(lengths, ids, strict=True):
        start = 0
        for length in row:
            alone = hidden_states(model, line[None, start : start + length], torch.arange(length)[None]).float()
            error = (packed[at : at + length] - alone).norm() / alone.norm()
            print(f"{length}: {error:.1e}")
            assert error < (0.05 if quantised else 0.02)
            start, at = start + length, at + length


def test_gradients_are_those_of_a_mask():
    """Stage 2. Mutation: detach the keys."""
    grads = []
    for packed in (True, False):
        spec = ModelSpec(name="x", init="random", config=CONFIG, liger_kernels=False)
        model = load_backbone(spec, torch.bfloat16, device="cuda", packed=packed)
        torch.manual_seed(0)
        ids = torch.randint(0, 1000, (2, 128), device="cuda")
        positions = torch.cat([torch.arange(50), torch.arange(78)]).expand(2, -1)
        hidden = hidden_states(model, ids, positions).float()
        (hidden * torch.randn_like(hidden)).sum().backward()  # of normalised rows the sum of squares is a constant
        grads.append(model.model.layers[0].self_attn.k_proj.weight.grad.float())
    error = float((grads[0] - grads[1]).norm() / grads[1].norm())
    print(error)
    assert error < 0.05
