"""Heads that see the tokens before the one they guess: losses against float64 math, every document by itself."""

import pytest
import torch
from test_joint import NUM, PACKED, gradients, relative
from test_targets import assert_losses_and_gradients_of_single_documents, student
from torch import nn

from medusa_ds.heads.hydra import HydraHeads
from medusa_ds.model.attention import hidden_states
from medusa_ds.model.rows import any_head_rows

CASES = [
    (1, True, "label"),
    (1, False, "label"),
    (2, True, "label"),
    (1, True, "argmax"),
    (1, False, "distribution"),
    (2, True, "distribution"),
]


@pytest.mark.parametrize("impl", ["torch", "eager"])
@pytest.mark.parametrize(("stage", "own", "target"), CASES)
def test_losses_and_gradients_are_those_of_single_documents(stage, own, target, impl):
    """Mutations: the token at t+k+1 or t+k-1 in `JointModel._states`; the state before the step; learn E."""
    model = student(target, own, stage=stage, kind="hydra", impl=impl)
    assert_losses_and_gradients_of_single_documents(model, target)


@pytest.mark.parametrize("alone", [False, True])
def test_hidden_states_from_a_cache_and_gradients_one_by_one_change_nothing(alone):
    """Mutations: look tokens up by cached rows; detach the states in `in_backward`."""
    model = student(kind="hydra")
    ids, labels, positions = PACKED
    plain, wanted = gradients(model, PACKED)
    with torch.no_grad():
        hidden = hidden_states(model.backbone, ids, positions)
    some_R = any_head_rows(labels, positions, NUM).flatten()
    model.one_gradient = alone
    cached, found = gradients(model, (*PACKED, hidden[some_R], some_R.cumsum(0) - 1))
    torch.testing.assert_close(cached.counters, plain.counters, rtol=1e-5, atol=0)
    for name, gradient in wanted.items():
        assert relative(found[name], gradient) < 1e-5, name


def test_a_new_head_gives_what_its_projection_gives():
    heads, hidden = HydraHeads(NUM, 2, 8, 23), torch.randn(4, 8)
    heads.initialize(torch.randn(23, 8))
    states = heads.states(hidden, torch.zeros(NUM, 4, dtype=torch.long), nn.Embedding(23, 8))
    for head, state in zip(heads, states, strict=True):
        assert torch.equal(head.logits(state), hidden @ head.projection.weight.T)
    assert {name.split(".", 1)[1] for name in heads.state_dict()} == {
        *("step.weight", "step.bias", "blocks.0.weight", "blocks.0.bias", "projection.weight")
    }
    blocks, projections = heads.count_parameters()
    assert (blocks, projections) == (NUM * (8 * 16 + 8 + 8 * 8 + 8), NUM * 23 * 8)
