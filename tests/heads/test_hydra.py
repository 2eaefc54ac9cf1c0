"""Heads that see the tokens before the one they guess: losses against float64 math, every document by itself."""

import copy

import pytest
import torch
import torch.nn.functional as F
from test_joint import DOCS, NUM, PACKED, build, gradients, relative
from torch import nn

from medusa_ds.heads.hydra import HydraHeads
from medusa_ds.heads.joint import JointModel
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


def student(stage=1, own=True, target="label", impl="torch", tokens=None):
    model = build(stage=stage, own=own, layers=2, tied=not own, tokens=tokens, kind="hydra")
    start = None
    if stage == 2 and target != "label":
        start = copy.deepcopy(model.backbone)
        with torch.no_grad():
            for parameter in model.backbone.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return JointModel(model.backbone, model.heads, stage, loss_impl=impl, chunk_mib=1, target=target, start=start)


def unit(embedded):
    return embedded / embedded.square().mean(-1, keepdim=True).add(1e-6).sqrt()


def reference(model, target):
    """Loss sums by head, and gradients of their weighted sum, by autograd over whole float64 logits."""
    backbone = copy.deepcopy(model.backbone).double()
    teacher = copy.deepcopy(model.start or model.backbone).double().requires_grad_(False)
    heads = {name: p.detach().double().requires_grad_() for name, p in model.heads.named_parameters()}
    lm_weight, embedded_VH = backbone.lm_head.weight, backbone.get_input_embeddings().weight.detach()
    sums = [torch.zeros((), dtype=torch.float64) for _ in range(NUM + 1)]
    for tokens, labels in DOCS:
        state = backbone.base_model(input_ids=tokens[None]).last_hidden_state[0]
        wanted = teacher(input_ids=tokens[None]).logits[0]
        for k in range(NUM + 1):
            x = state
            if k and k < len(tokens):
                pair = torch.cat([state[: len(tokens) - k], unit(embedded_VH[tokens[k:]])], 1)
                update = pair @ heads[f"{k - 1}.step.weight"].T + heads[f"{k - 1}.step.bias"]
                state = state[: len(tokens) - k] + F.silu(update)
                x = state + F.silu(state @ heads[f"{k - 1}.blocks.0.weight"].T + heads[f"{k - 1}.blocks.0.bias"])
            logits = x @ (heads.get(f"{k - 1}.projection.weight", lm_weight) if k else lm_weight).T
            for t in range(len(tokens) - k - 1):
                if labels[t + k + 1] == -100 or (k == 0 and model.stage == 1):
                    continue
                if target == "distribution":
                    p = wanted[t + k].softmax(-1)
                    sums[k] = sums[k] + (p * (p.log() - logits[t].log_softmax(-1))).sum()
                else:
                    learned = labels[t + k + 1] if target == "label" else wanted[t + k].argmax()
                    sums[k] = sums[k] - logits[t].log_softmax(-1)[learned]
    sum(w * loss for w, loss in zip((0.7, 1.0, 0.8, 0.5), sums, strict=True)).backward()
    grads = {f"backbone.{name}": p.grad for name, p in backbone.named_parameters() if p.requires_grad}
    return sums, grads | {f"heads.{name}": p.grad for name, p in heads.items()}


@pytest.mark.parametrize("impl", ["torch", "eager"])
@pytest.mark.parametrize(("stage", "own", "target"), CASES)
def test_losses_and_gradients_are_those_of_single_documents(stage, own, target, impl):
    """Mutations: the token at t+k+1 or t+k-1 in `JointModel._states`; the state before the step; learn E."""
    model = student(stage, own, target, impl)
    output, found = gradients(model, PACKED)
    sums, wanted = reference(model, target)
    for k in range(2 - stage, NUM + 1):
        assert output.losses[k].loss_sum.item() == pytest.approx(sums[k].item(), rel=1e-5)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert relative(found[name], gradient) < 2e-5, name


@pytest.mark.parametrize("alone", [False, True])
def test_hidden_states_from_a_cache_and_gradients_one_by_one_change_nothing(alone):
    """Mutations: look tokens up by cached rows; detach the states in `in_backward`."""
    model = student()
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
