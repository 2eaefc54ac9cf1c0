"""What heads learn from the LM head's predictions, against float64 math, every document by itself."""

import pytest
import torch
import torch.nn.functional as F
from test_medusa import DOCS, NUM, PACKED, build, gradients, relative

from medusa_ds.model.loss import linear_argmax, linear_kl
from medusa_ds.model.medusa import MedusaModel


def student(target, own=True, temperature=1.0, chunk_mib=1):
    plain = build(own=own, layers=2, tied=not own)
    return MedusaModel(plain.backbone, plain.heads, 1, "torch", chunk_mib, target, temperature)


def reference(model, target, temperature):
    """Loss sums by head, and gradients of their weighted sum, by autograd over whole float64 logits."""
    lm_weight = model.backbone.get_output_embeddings().weight.detach().double()
    heads = {name: p.detach().double().requires_grad_() for name, p in model.heads.named_parameters()}
    sums = [torch.zeros((), dtype=torch.float64) for _ in range(NUM + 1)]
    for tokens, labels in DOCS:
        hidden = model.backbone.base_model(input_ids=tokens[None]).last_hidden_state[0].detach().double()
        teacher = hidden @ lm_weight.T
        for k in range(1, NUM + 1):
            x = hidden
            for layer in range(2):
                x = x + F.silu(x @ heads[f"{k - 1}.blocks.{layer}.weight"].T + heads[f"{k - 1}.blocks.{layer}.bias"])
            logits = x @ heads.get(f"{k - 1}.projection.weight", lm_weight).T
            for t in range(len(tokens) - k - 1):
                if labels[t + k + 1] == -100:
                    continue
                if target == "argmax":
                    sums[k] = sums[k] - logits[t].log_softmax(-1)[teacher[t + k].argmax()]
                else:
                    p = (teacher[t + k] / temperature).softmax(-1)
                    log_q = (logits[t] / temperature).log_softmax(-1)
                    sums[k] = sums[k] + temperature**2 * (p * (p.log() - log_q)).sum()
    sum(w * loss for w, loss in zip((0.7, 1.0, 0.8, 0.5), sums, strict=True)).backward()
    return sums, {name: p.grad for name, p in heads.items()}


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize(("target", "temperature"), [("argmax", 1.0), ("distribution", 1.0), ("distribution", 2.0)])
def test_loss_and_gradients_are_those_of_single_documents(target, temperature, own):
    """Mutations: the teacher at `rows_N` or `rows_N + k + 1` in `MedusaModel.forward`; no T in the gradient."""
    model = student(target, own, temperature)
    output, found = gradients(model, PACKED)
    sums, wanted = reference(model, target, temperature)
    for k in range(1, NUM + 1):
        assert output.losses[k].loss_sum.item() == pytest.approx(sums[k].item(), rel=1e-5)
    assert found.keys() == {f"heads.{name}" for name in wanted}
    for name, gradient in wanted.items():
        assert relative(found[f"heads.{name}"], gradient) < 2e-5, name


@pytest.mark.parametrize("target", ["argmax", "distribution"])
def test_rows_and_accuracies_are_those_of_labels(target):
    """Mutation: compare predictions with the learned targets instead of the labels."""
    found, wanted = (student(name)(*PACKED).counters for name in (target, "label"))
    assert torch.equal(found[:, 1:], wanted[:, 1:])


def test_the_divergence_of_the_teacher_from_itself_is_zero():
    rows, weight = torch.randn(7, 16), torch.randn(50, 16, requires_grad=True)
    loss, predicted = linear_kl(rows, weight, rows, weight)
    loss.backward()
    assert abs(loss.item()) < 1e-5
    assert weight.grad.norm() < 1e-5
    assert torch.equal(predicted, (rows @ weight.T).argmax(-1))


def test_chunks_change_nothing():
    """Mutation: leave the first chunk out of the weight's gradient."""
    torch.manual_seed(0)
    shape = {"dtype": torch.float64}
    rows, teacher, teacher_weight = (
        torch.randn(9, 8, **shape),
        torch.randn(9, 8, **shape),
        torch.randn(40_000, 8, **shape),
    )
    results = []
    for chunk_mib in (1, 1000):  # one row a chunk, all rows in one
        weight = torch.linspace(-1, 1, 320_000, **shape).reshape(40_000, 8).sin().requires_grad_()
        x = rows.clone().requires_grad_()
        loss, predicted = linear_kl(x, weight, teacher, teacher_weight, 1.5, chunk_mib)
        loss.backward()
        results.append((loss.detach(), predicted, x.grad, weight.grad, linear_argmax(rows, teacher_weight, chunk_mib)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
