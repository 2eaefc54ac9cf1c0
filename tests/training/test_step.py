"""Clipping inside the fused AdamW, against PyTorch's own clipping in float64."""

import pytest
import torch

from medusa_ds.training.step import clip

pytestmark = pytest.mark.usefixtures("group_of_one")


def steps(gradients, max_norm, fused, dtype):
    """Weights, norms and Adam's count after one step a row of gradients."""
    torch.manual_seed(0)
    params = [torch.randn(5, 3, dtype=dtype), torch.randn(7, dtype=dtype)]
    optimizer = torch.optim.AdamW([{"params": [param]} for param in params], lr=0.1, fused=fused)
    norms = []
    for row in gradients:
        for param, gradient in zip(params, row, strict=True):
            param.grad = gradient.to(dtype, copy=True)  # clipped in place
        if fused:
            norms.append(clip(optimizer, [param.grad for param in params], max_norm, torch.tensor(0.0)))
        else:
            norms.append(torch.nn.utils.clip_grad_norm_(params, max_norm or float("inf")))
        optimizer.step()
    return params, torch.stack(norms), [int(state["step"]) for state in optimizer.state.values()]


@pytest.mark.parametrize("max_norm", [0.0, 0.3, 2.0, 100.0])
def test_weights_are_those_of_pytorchs_clipping(max_norm):
    """Mutation: dividing by the norm also where it is small, or leaving out `grad_scale`."""
    draw = torch.Generator().manual_seed(1)
    gradients = [[torch.randn(5, 3, generator=draw), torch.randn(7, generator=draw)] for _ in range(4)]
    gradients[2] = [0.01 * gradient for gradient in gradients[2]]
    params, norms, counts = steps(gradients, max_norm, True, torch.float32)
    wanted, wanted_norms, _ = steps(gradients, max_norm, False, torch.float64)
    for found, expected in zip(params, wanted, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(norms.double(), wanted_norms)
    assert counts == [4, 4]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nothing_changes_where_a_gradient_is_not_finite(bad):
    """Mutation: without `found_inf` the weights become NaN."""
    good = [torch.ones(5, 3), torch.ones(7)]
    before, _, _ = steps([good], 1.0, True, torch.float32)
    spoilt = [torch.ones(5, 3), torch.tensor([bad] + [1.0] * 6)]
    after, norms, counts = steps([good, spoilt], 1.0, True, torch.float32)
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
    assert not norms[1].isfinite()
    assert counts == [1, 1]
