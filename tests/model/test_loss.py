"""Chunked linear cross-entropy against float64 eager math and against plain PyTorch in the working precision."""

import runpy
import sys

import pytest
import torch
from torch import nn
from watch import Watch

from medusa_ds.errors import UserError
from medusa_ds.model import loss as loss_module
from medusa_ds.model.loss import linear_argmax, linear_cross_entropy, linear_kl, resolve_impl

SIZES = [(1, 7, 3), (13, 101, 17), (67, 1031, 33), (50, 5003, 9)]  # N, V, H


def planted(n, vocab, hidden, dtype=torch.float64):
    """Rows that lean towards their targets' weights, so that logits are not flat and no gradient row is negligible."""
    gen = torch.Generator().manual_seed(n + vocab)
    weight = torch.randn(vocab, hidden, generator=gen, dtype=torch.float64) / hidden**0.5
    targets = torch.randint(0, min(vocab, 1 + n // 2), (n,), generator=gen)
    rows = torch.randn(n, hidden, generator=gen, dtype=torch.float64) + 1.5 * weight[targets]
    return rows.to(dtype), weight.to(dtype), targets


def run(function, rows, weight, targets, upstream=1.0):
    rows, weight = rows.clone().requires_grad_(), weight.clone().requires_grad_()
    loss, predicted = function(rows, weight, targets)
    (loss * upstream).backward()
    is_target = torch.zeros(weight.shape[0], dtype=torch.bool)
    is_target[targets] = True
    return {
        "loss": loss.detach(),
        "input": rows.grad,
        "target rows": weight.grad[is_target],
        "other rows": weight.grad[~is_target],
        "predicted": predicted,
    }


def plain(rows, weight, targets):
    logits = (rows @ weight.T).to(torch.promote_types(rows.dtype, torch.float32))
    return nn.functional.cross_entropy(logits, targets, reduction="sum"), logits.argmax(-1)


def errors(found, reference):
    parts = [part for part in reference if part != "predicted" and reference[part].numel()]
    return {part: float((found[part].double() - reference[part]).norm() / reference[part].norm()) for part in parts}


def by(impl, chunk_mib=1024):
    return lambda rows, weight, targets: linear_cross_entropy(rows, weight, targets, impl, chunk_mib)


@pytest.mark.parametrize("impl", ["torch", "eager"])
@pytest.mark.parametrize("upstream", [1.0, -0.37])
@pytest.mark.parametrize(("n", "vocab", "hidden"), SIZES)
def test_float64_matches_eager_math(impl, n, vocab, hidden, upstream):
    """Mutations: zero the weight gradient's non-target rows; double a gradient; drop the upstream factor."""
    data = planted(n, vocab, hidden)
    found, reference = (run(function, *data, upstream) for function in (by(impl, 1), plain))
    assert found["loss"].dtype == torch.float64
    assert max(errors(found, reference).values()) < 1e-13
    assert torch.equal(found["predicted"], reference["predicted"])


@pytest.mark.parametrize(("dtype", "floor"), [(torch.float32, 3e-7), (torch.bfloat16, 5e-4)])
@pytest.mark.parametrize("impl", ["torch", "eager"])
@pytest.mark.parametrize(("n", "vocab", "hidden"), SIZES)
def test_working_precision_is_no_worse_than_plain_pytorch(impl, dtype, floor, n, vocab, hidden):
    """Mutation: compute the softmax in the working dtype."""
    rows, weight, targets = planted(n, vocab, hidden, dtype)
    reference = run(plain, rows.double(), weight.double(), targets)
    found, usual = (errors(run(f, rows, weight, targets), reference) for f in (by(impl, 1), plain))
    for part, error in found.items():
        assert error <= 1.5 * usual[part] + floor, (part, error, usual[part])


def test_weight_gradient_accumulates_in_fp32_over_many_chunks():
    """Mutation: accumulate in bf16 (errors of 5e-3 in target rows and 2e-2 in others)."""
    rows, weight, targets = planted(128, 131101, 4, torch.bfloat16)  # one row a chunk
    rows, targets = rows.abs() + 0.5, targets % 3  # all chunks add to the same gradient rows, in the same direction
    reference = run(plain, rows.double(), weight.double(), targets)
    found = errors(run(by("torch", 1), rows, weight, targets), reference)
    assert found["target rows"] < 3e-3
    assert found["other rows"] < 1e-2


@pytest.mark.parametrize("impl", ["torch", "eager", "liger"])
def test_no_rows_give_zero_and_zero_gradients(impl):
    rows, weight, targets = planted(5, 11, 3)
    found = run(by(impl), rows[:0], weight, targets[:0])
    assert found["loss"] == 0
    assert found["predicted"].shape == (0,)
    assert not found["other rows"].any() and found["other rows"].shape == (11, 3)


def test_nothing_is_computed_for_gradients_that_nobody_wants():
    """Mutation: ask `needs_input_grad` alone, which is true under `no_grad` too."""
    rows, weight, targets = planted(20, 101, 8)
    weight.requires_grad_()
    with Watch(8) as watch:
        linear_cross_entropy(rows, weight, targets, "torch")
    assert watch.products == 0, "the gradient of rows that need none"
    rows.requires_grad_()
    with torch.no_grad(), Watch(8) as watch:
        linear_cross_entropy(rows, weight, targets, "torch")
    assert watch.products == 0, "gradients under no_grad"
    with Watch(8) as watch:
        linear_cross_entropy(rows, weight, targets, "torch")
    assert watch.products == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("way", ["torch", "eager", "kl"])
def test_a_scale_multiplies_the_gradients_and_leaves_the_loss(way, dtype):
    """Mutations: leave `_times` out of the rows' or of the weight's gradient; round the scale to bf16 (0.15% off)."""
    scale, (rows, weight, targets) = torch.tensor(0.7021, dtype=torch.float64), planted(40, 101, 17, dtype)
    teacher, teacher_weight, _ = planted(40, 103, 17, dtype)

    def function(scale):
        if way == "kl":
            return lambda rows, weight, _: linear_kl(rows, weight, teacher, teacher_weight[:101], 1.5, 1, scale)
        return lambda rows, weight, targets: linear_cross_entropy(rows, weight, targets, way, 1, scale)

    found, wanted = run(function(scale), rows, weight, targets), run(function(None), rows, weight, targets)
    assert torch.equal(found["loss"], wanted["loss"])
    assert torch.equal(found["predicted"], wanted["predicted"])
    for name in ("input", "target rows", "other rows"):
        projected = (found[name].double() * wanted[name].double()).sum() / wanted[name].double().square().sum()
        assert projected == pytest.approx(float(scale), rel=1e-9 if dtype == torch.float64 else 1e-3), name


def test_a_scaled_loss_is_not_multiplied_again():
    """Mutation: without the check the factor 2 is lost without a word."""
    rows, weight, targets = planted(20, 101, 8)
    loss, _ = linear_cross_entropy(rows, weight.requires_grad_(), targets, "torch", scale=torch.tensor(0.5))
    with pytest.raises(AssertionError, match="the gradient of a scaled loss is 1"):
        (2 * loss).backward()


def test_a_second_backward_pass_gives_the_same_gradient():
    """Mutation: multiply the saved gradients in place, as Liger's own function does."""
    rows, weight, targets = planted(13, 101, 17)
    value = linear_cross_entropy(rows.requires_grad_(), weight, targets, "torch")[0] * 3
    first, second = (torch.autograd.grad(value, rows, retain_graph=True)[0].clone() for _ in range(2))
    assert torch.equal(first, second)


def test_implementation_follows_the_device():
    assert resolve_impl("auto", "cpu") == "torch"
    assert resolve_impl("auto", "cuda:1") == "liger"
    assert resolve_impl("eager", "cuda") == "eager"
    with pytest.raises(UserError, match=r"loss\.impl: found liger, whose kernels need a GPU"):
        resolve_impl("liger", "cpu")


def test_liger_is_not_imported_on_a_cpu(monkeypatch):
    """Mutation: import its kernel at the top of `loss.py`."""
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    fresh = runpy.run_path(loss_module.__file__)
    rows, weight, targets = planted(5, 11, 3)
    fresh["linear_cross_entropy"](rows, weight.requires_grad_(), targets, fresh["resolve_impl"]("auto", "cpu"))


@pytest.mark.parametrize("kind", ["cross-entropy", "eager", "divergence"])
@pytest.mark.parametrize("cap", [None, 2.0])
def test_bias_and_cap_match_eager_math_in_float64(kind, cap):
    """Chunks of several rows. Mutations: leave out the cap's slope; add a chunk's bias gradient only once."""
    rows, weight, targets = planted(13, 40_000, 17)
    teacher, bias = rows.flip(0) * 0.7, torch.linspace(-1, 1, 40_000, dtype=torch.float64)

    def reference(rows, weight, bias, cap):
        logits, others = rows @ weight.T + bias, teacher @ weight.detach().T + bias.detach()
        if cap is not None:
            logits, others = cap * (logits / cap).tanh(), cap * (others / cap).tanh()
        if kind == "divergence":
            share = (others / 1.5).log_softmax(-1)
            return 1.5**2 * (share.exp() * (share - (logits / 1.5).log_softmax(-1))).sum(), logits.argmax(-1)
        return nn.functional.cross_entropy(logits, targets, reduction="sum"), logits.argmax(-1)

    def ours(rows, weight, bias, cap):
        if kind == "divergence":
            return linear_kl(rows, weight, teacher, weight, 1.5, 1, bias=bias, cap=cap, teacher_bias=bias)
        impl = "eager" if kind == "eager" else "torch"
        return linear_cross_entropy(rows, weight, targets, impl, 1, bias=bias, cap=cap)

    results = []
    for function in (ours, reference):
        inputs = [tensor.clone().requires_grad_() for tensor in (rows, weight, bias)]
        loss, predicted = function(*inputs, cap)
        loss.backward()
        results.append([loss.detach(), predicted, *(tensor.grad for tensor in inputs)])
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)
    assert linear_argmax(rows, weight, 1, bias).equal(results[1][1])
