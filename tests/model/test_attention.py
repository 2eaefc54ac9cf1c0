"""Where documents of packed sequences begin, and which attention a backbone gets; the kernel itself: `tests/gpu`."""

import pytest
import torch
from support import SIZES

from medusa_ds.config.recipe import ModelSpec
from medusa_ds.model import backbone as backbones
from medusa_ds.model.attention import find_documents, hidden_states, within_documents

CONFIG = SIZES | {"model_type": "llama", "num_hidden_layers": 1, "vocab_size": 50}


def test_starts_are_counted_over_all_sequences_and_filled_up():
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]])
    starts, longest = find_documents(positions)
    assert starts.dtype == torch.int32 and starts.tolist() == [0, 3, 5, 6] + [10] * 12
    assert longest == 128
    starts, longest = find_documents(torch.cat([torch.zeros(16, dtype=torch.long), torch.arange(129)])[None])
    assert starts.tolist() == [*range(17)] + [145] * 15 and longest == 256
    assert find_documents(torch.arange(5).expand(2, 5)) is None


def test_sequences_of_one_document_get_causal_attention():
    """Mutation: leave out `is_causal` or the scale."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, 5, 8, dtype=torch.float64) for heads in (4, 2, 2))
    found, _ = within_documents(None, query, key, value, None, scaling=0.3)
    key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
    scores = (query @ key.mT * 0.3).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    torch.testing.assert_close(found, (scores.softmax(-1) @ value).transpose(1, 2))


@pytest.mark.parametrize(
    ("changes", "attention"),
    [
        ({}, "documents"),
        ({"attention": "eager"}, "eager"),
        ({"config": CONFIG | {"model_type": "mistral", "sliding_window": 8}}, "sdpa"),
        ({"config": CONFIG | {"model_type": "mistral", "sliding_window": None}}, "documents"),
        ({"config": CONFIG | {"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": False}}, "documents"),
        ({"config": CONFIG | {"hidden_size": 48}}, "sdpa"),
        ({"config": CONFIG | {"model_type": "gemma"}}, "sdpa"),
    ],
)
def test_only_backbones_that_pack_on_a_gpu_get_it(monkeypatch, changes, attention):
    """Built without a device, as under ZeRO-3, on a machine that claims a GPU; elsewhere there is no such kernel."""
    spec = ModelSpec(**{"name": "x", "init": "random", "config": CONFIG, "liger_kernels": False} | changes)
    usual = spec.attention or "sdpa"

    def found(dtype=torch.bfloat16, packed=True):
        return backbones.load_backbone(spec, dtype, device=None, packed=packed).config._attn_implementation

    assert found() == usual
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert found() == usual
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert found() == attention
    assert found(torch.float32) == found(packed=False) == usual


def test_hidden_states_hand_the_starts_to_every_layer(monkeypatch):
    """Mutation: leave `document_starts` out of what the backbone is asked."""
    spec = ModelSpec(name="x", init="random", config=CONFIG)
    backbone = backbones.load_backbone(spec, torch.float32, device="cpu")
    ids, positions = torch.randint(0, 50, (2, 6)), torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5]])
    expected = hidden_states(backbone, ids, positions)
    seen = []

    def masked(module, query, key, value, attention_mask, document_starts=None, scaling=None, **_):
        seen.append(document_starts)
        number = torch.zeros(12).index_fill(0, document_starts[document_starts < 12].long(), 1.0).cumsum(0).view(2, 6)
        mask = (number[:, None, :, None] == number[:, None, None, :]) & torch.ones(6, 6).tril().bool()
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=True).transpose(1, 2), None

    backbones.AttentionInterface.register("documents", masked)
    try:
        backbone.set_attn_implementation("documents")
        torch.testing.assert_close(hidden_states(backbone, ids, positions), expected)
    finally:
        backbones.AttentionInterface.register("documents", within_documents)
    assert seen[0].tolist() == [0, 3, 6] + [12] * 13
