#!/usr/bin/env bash
# A second backward pass through Liger's cross-entropy multiplies by the loss's factor a second time.
#
# Liger computes the gradients in the forward pass and keeps them. The backward pass multiplies what it kept, in place, by
# the factor that comes from above: a loss's weight, 1 / accumulation steps, a loss scale. PyTorch allows another pass
# through the same graph with `retain_graph=True`, and each one takes what the one before it left. Who measures the
# gradients of each of several losses (as those that balance heads by their gradients do) and then calls `backward()`
# on the weighted sum trains with the squares of the weights. With a factor of exactly 1 nothing is multiplied, so that a
# test of the plain loss passes. Nothing warns. `LigerJSD` and `reduction="none"` of the fused loss do it right.
# Seen 2026-11-29 with liger-kernel 0.8.5, torch 2.14.1 and triton 3.8.0 in Triton's interpreter: norms of the gradients
# of three passes through half the loss, as parts of the first one's:
#     PyTorch's cross-entropy:                          1, 1, 1
#     LigerCrossEntropyLoss:                            1, 0.5, 0.25
#     LigerFusedLinearCrossEntropyLoss, both gradients: 1, 0.5, 0.25
#     the same, of the loss itself, not of half of it:  1, 1, 1
#     LigerFusedLinearJSD, both gradients:              1, 0.5, 0.25
# and of the weights of two heads, whose losses count by 0.5 and 0.25, after `backward()` on the sum:
#     PyTorch's, and Liger's if nothing was measured before: 0.792, 0.359
#     Liger's after one `torch.autograd.grad` for each loss: 0.396, 0.090
# What helps: another forward pass for whatever is measured, or factors on the measured gradients and not on the losses.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet liger-kernel==0.8.5 torch==2.14.1 triton==3.8.0 numpy==2.4.6 packaging==26.4
TRITON_INTERPRET=1 "$work/venv/bin/python" -W ignore - <<'PY'
import logging
import sys

import torch
from liger_kernel.transformers import LigerCrossEntropyLoss, LigerFusedLinearCrossEntropyLoss, LigerFusedLinearJSD

logging.disable(logging.WARNING)
torch.manual_seed(0)
states, weight, teacher, other = torch.randn(6, 8), torch.randn(12, 8), torch.randn(12, 8), torch.randn(12, 8)
logits, targets = torch.randn(6, 12), torch.randint(0, 12, (6,))


def plain(weight, states):
    return torch.nn.functional.cross_entropy(states @ weight.T, targets)


def fused(weight, states):
    return LigerFusedLinearCrossEntropyLoss()(weight, states, targets)


def parts(name, loss_of, *inputs, factor=0.5):
    """Norms of the gradients of three passes, by the first one's, for each input."""
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    loss = factor * loss_of(*inputs)
    passes = [[float(part.norm()) for part in torch.autograd.grad(loss, inputs, retain_graph=True)] for _ in range(3)]
    found = [[round(norm / first, 3) for norm, first in zip(norms, passes[0])] for norms in passes]
    print(f"{name:40}", *found)
    return found


def heads(name, loss_of, measured):
    """Norms of two heads' gradients after a backward pass over their weighted sum."""
    both, shared = [tensor.clone().requires_grad_() for tensor in (weight, other)], states.clone().requires_grad_()
    losses = [factor * loss_of(head, shared) for factor, head in zip((0.5, 0.25), both)]
    if measured:
        for loss in losses:
            torch.autograd.grad(loss, shared, retain_graph=True)
    sum(losses).backward()
    found = [round(float(head.grad.norm()), 3) for head in both]
    print(f"{name + ', measured before' * measured:40}", *found)
    return found


right = [parts("torch", plain, weight, states), parts("fused, factor 1", fused, weight, states, factor=1.0)]
wrong = [parts("fused", fused, weight, states)]
wrong += [parts("fused JSD", lambda x, w: LigerFusedLinearJSD()(x, w, states, teacher, targets), states, weight)]
single = parts("cross-entropy", lambda y: LigerCrossEntropyLoss()(y, targets), logits)
same = right == [[[1, 1]] * 3] * 2 and wrong == [[[1, 1], [0.5, 0.5], [0.25, 0.25]]] * 2 and single == [[1], [0.5], [0.25]]
wanted, once = heads("torch", plain, True), heads("fused", fused, False)
twice = heads("fused", fused, True)
near = all(abs(a - b) < 2e-3 for a, b in zip(wanted, once))
squared = all(abs(a - factor * b) < 2e-3 for a, b, factor in zip(twice, wanted, (0.5, 0.25)))
sys.exit(0 if same and near and squared else "this has changed")
PY
