#!/usr/bin/env bash
# Liger's fused linear cross-entropy gives its weight no gradient where the hidden states need none.
#
# `LigerFusedLinearCrossEntropyLoss` computes the gradients in its forward pass, all or none of them, and asks the hidden
# states alone whether there are to be any. Who trains an LM head, or any other linear head, over a frozen backbone or
# over hidden states from a file has states without gradients. The loss is right, it requires a gradient, `backward()`
# passes, and `weight.grad` and `bias.grad` are None: the optimizer skips both, and the loss of every step is the first
# one's. `reduction="none"`, which computes the gradients later, has them, and so has `LigerFusedLinearJSD`.
# Seen 2026-11-29 with liger-kernel 0.8.5, torch 2.14.1 and triton 3.8.0 in Triton's interpreter: norms of the gradients
# of weight and bias, for states that need a gradient and for frozen ones (6 rows, width 8, 12 classes):
#     mean, states with a gradient:  1.4161, 0.5462
#     mean, frozen states:           None, None
#     sum, frozen states:            None, None
#     none and .mean(), frozen:      1.4161, 0.5462
#     PyTorch's own, frozen states:  1.4161, 0.5462
# What helps: `hidden.detach().requires_grad_()`, or `reduction="none"` and a mean of one's own.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet liger-kernel==0.8.5 torch==2.14.1 triton==3.8.0 numpy==2.4.6 packaging==26.4
TRITON_INTERPRET=1 "$work/venv/bin/python" -W ignore - <<'PY'
import logging
import sys

import torch
from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

logging.disable(logging.WARNING)
torch.manual_seed(0)
states, first = torch.randn(6, 8), torch.randn(12, 8)
targets = torch.randint(0, 12, (6,))


def norms(name, loss_of, needs_gradient):
    """The norms of the weight's and of the bias' gradient, or None."""
    weight, bias = first.clone().requires_grad_(), torch.zeros(12, requires_grad=True)
    loss = loss_of(weight, states.clone().requires_grad_(needs_gradient), bias).mean()
    assert loss.requires_grad
    loss.backward()
    found = [None if part.grad is None else round(float(part.grad.norm()), 4) for part in (weight, bias)]
    print(f"{name:5} states {'with a gradient' if needs_gradient else 'frozen':15} loss {loss:.4f}:", *found)
    return found


def liger(reduction):
    loss = LigerFusedLinearCrossEntropyLoss(reduction=reduction)
    return lambda weight, states, bias: loss(weight, states, targets, bias)


def plain(weight, states, bias):
    return torch.nn.functional.cross_entropy(states @ weight.T + bias, targets)


wanted = norms("torch", plain, False)
right = [norms("mean", liger("mean"), True), norms("none", liger("none"), False)]
wrong = [norms(reduction, liger(reduction), False) for reduction in ("mean", "sum")]
near = all(abs(a - b) < 1e-3 for found in right for a, b in zip(found, wanted))
sys.exit(0 if near and wrong == [[None, None]] * 2 else "this has changed")
PY
