"""What is learned from the LM head's predictions, against float64 math, every document by itself."""

import copy

import pytest
import torch
import torch.nn.functional as F
from test_joint import DOCS, NUM, PACKED, build, gradients, relative

from medusa_ds.config.recipe import LossSpec
from medusa_ds.heads.joint import Counters, JointModel, metrics


def student(target="label", own=True, temperature=1.0, stage=1, tied=False, kind="medusa", impl="torch"):
    """Stage 2 beside its start: a model that has moved away from it."""
    options = {"kind": kind, "impl": impl, "target": target, "temperature": temperature}
    model = build(stage=stage, own=own, layers=2, tied=tied or not own, **options)
    if model.start is not None:
        with torch.no_grad():
            for parameter in model.backbone.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def reference(model, target, temperature):
    """Loss sums by head, and gradients of their weighted sum, by autograd over whole float64 logits."""
    backbone = copy.deepcopy(model.backbone).double()
    start = copy.deepcopy(model.start or model.backbone).double().requires_grad_(False)
    heads = {name: p.detach().double().requires_grad_() for name, p in model.heads.named_parameters()}
    lm_weight, embedded_VH = backbone.get_output_embeddings().weight, backbone.get_input_embeddings().weight.detach()
    embedded_VH = embedded_VH / embedded_VH.square().mean(-1, keepdim=True).add(1e-6).sqrt()
    sums = [torch.zeros((), dtype=torch.float64) for _ in range(NUM + 1)]
    for tokens, labels in DOCS:
        state = backbone.base_model(input_ids=tokens[None]).last_hidden_state[0]
        teacher = start(input_ids=tokens[None]).logits[0]
        for k in range(0 if model.stage == 2 else 1, NUM + 1):
            layers = ["blocks.0", "blocks.1"] if k else []
            if k and model.heads.kind == "hydra":  # the states become those that saw k more tokens
                pair = torch.cat([state[: max(len(tokens) - k, 0)], embedded_VH[tokens[k:]]], 1)
                update = pair @ heads[f"{k - 1}.step.weight"].T + heads[f"{k - 1}.step.bias"]
                state, layers = state[: len(pair)] + F.silu(update), ["blocks.0"]
            x = state
            for layer in layers:
                x = x + F.silu(x @ heads[f"{k - 1}.{layer}.weight"].T + heads[f"{k - 1}.{layer}.bias"])
            logits = x @ heads.get(f"{k - 1}.projection.weight", lm_weight).T
            for t in range(len(tokens) - k - 1):
                if labels[t + k + 1] == -100:
                    continue
                if target == "distribution":
                    p = (teacher[t + k] / temperature).softmax(-1)
                    log_q = (logits[t] / temperature).log_softmax(-1)
                    sums[k] = sums[k] + temperature**2 * (p * (p.log() - log_q)).sum()
                else:
                    learned = labels[t + k + 1] if target == "label" else teacher[t + k].argmax()
                    sums[k] = sums[k] - logits[t].log_softmax(-1)[learned]
    sum(w * loss for w, loss in zip((0.7, 1.0, 0.8, 0.5), sums, strict=True)).backward()
    grads = {f"backbone.{name}": p.grad for name, p in backbone.named_parameters() if p.requires_grad}
    return sums, grads | {f"heads.{name}": p.grad for name, p in heads.items()}


def assert_losses_and_gradients_of_single_documents(model, target, temperature=1.0, closeness=2e-5):
    output, found = gradients(model, PACKED)
    sums, wanted = reference(model, target, temperature)
    for k in range(2 - model.stage, NUM + 1):
        assert output.losses[k].loss_sum.item() == pytest.approx(sums[k].item(), rel=1e-5)
    assert found.keys() == wanted.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    for name, gradient in wanted.items():
        assert relative(found[name], gradient) < closeness, name


TARGETS = [("argmax", 1.0), ("distribution", 1.0), ("distribution", 2.0)]


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize(("target", "temperature"), [("label", 1.0), *TARGETS])
def test_loss_and_gradients_are_those_of_single_documents(target, temperature, own):
    """Mutations: the teacher at `rows_N` or `rows_N + k + 1` in `JointModel.forward`; no T in the gradient; shift
    labels by one more; share the residual blocks."""
    assert_losses_and_gradients_of_single_documents(student(target, own, temperature), target, temperature)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("target", "temperature"), TARGETS)
def test_stage_2_learns_from_the_frozen_start(target, temperature, tied):
    """Mutations: teach by the model in training; the teacher's weight from one and its hidden states from the other;
    the LM head's teacher at `rows_N + 1`; no gradient through the LM head's divergence."""
    model = student(target, temperature=temperature, stage=2, tied=tied).train()
    start = {name: weight.clone() for name, weight in model.start.state_dict().items()}
    assert_losses_and_gradients_of_single_documents(model, target, temperature, 5e-5)
    assert model.backbone.model.embed_tokens.weight.requires_grad
    assert not model.start.training
    assert all(torch.equal(weight, start[name]) for name, weight in model.start.state_dict().items())


@pytest.mark.parametrize("target", ["argmax", "distribution"])
def test_validation_measures_the_labels_beside_the_frozen_start(target):
    """Mutation: measure the start's loss on labels, or measure in training too."""
    model, column = student(target, stage=2), Counters._fields.index("label_loss_sum")
    plain = JointModel(model.backbone, model.heads, 2, LossSpec(impl="torch", chunk_mib=1))
    assert metrics(model.train()(*PACKED).counters).keys() == metrics(plain(*PACKED).counters).keys()
    with torch.no_grad():
        counters, labels = model.eval()(*PACKED).counters, plain.eval()(*PACKED).counters
    assert torch.equal(counters[:, 1:column], labels[:, 1:column])
    assert counters[0, column] == labels[0, 0] > 0
    assert not counters[1:, column].any()
    assert not labels[:, column].any()
    assert metrics(counters)["lm_label_loss"] == metrics(labels)["lm_loss"] != metrics(counters)["lm_loss"]


@pytest.mark.parametrize("target", ["argmax", "distribution"])
def test_rows_and_accuracies_are_those_of_labels(target):
    """Mutation: compare predictions with the learned targets instead of the labels."""
    found, wanted = (student(name)(*PACKED).counters for name in (target, "label"))
    assert torch.equal(found[:, 1:], wanted[:, 1:])
