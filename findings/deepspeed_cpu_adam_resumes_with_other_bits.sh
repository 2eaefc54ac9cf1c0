#!/usr/bin/env bash
# A run that resumes with DeepSpeedCPUAdam is not the run that went on: other bits, although every state is restored.
#
# The optimizer keeps the powers of its betas in C++, in fp32, and multiplies them up step by step; no state dict has them.
# One that loads a state dict of step 5 and goes on takes them by `pow` instead, which rounds otherwise, so that the bias
# correction of later steps differs: of step 6, where 1 - 0.999^t is still small, by 1e-5 of itself. Who compares
# a resumed run with one that never stopped, bit for bit, looks for the fault in the checkpoint, where it is not.
# Seen 2026-11-29 with DeepSpeed 0.19.8 and torch 2.14.1 on an x86-64 CPU, rate 0.01, default betas, 1,000 weights: three
# steps from a state dict that was saved after 5, 50 and 500 steps, against the same three steps of the optimizer it is of:
#     DeepSpeedCPUAdam:                                  551, 113 and 49 weights differ, by up to 2.4e-7
#     DeepSpeedCPUAdam, brought to the step as below:    none
#     torch.optim.AdamW:                                 none
# What helps: after loading, take as many steps on a scratch weight, at a rate of 0, as the state dict has seen.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet deepspeed==0.19.8 torch==2.14.1
export PATH="$work/venv/bin:$PATH" TORCH_EXTENSIONS_DIR="$work/built" DS_ACCELERATOR=cpu  # the optimizer is compiled
"$work/venv/bin/python" - <<'PY'
import copy
import logging
import sys

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam

logging.disable(logging.WARNING)


def train(weights, optimizer, steps):
    for step in steps:
        weights.grad = torch.randn(1000, generator=torch.Generator().manual_seed(step))
        optimizer.step()


def replay(optimizer, steps):
    groups, scratch = optimizer.param_groups, torch.zeros(1)
    scratch.grad = torch.zeros(1)
    optimizer.param_groups = [groups[0] | {"params": [scratch], "lr": 0.0}]
    for _ in range(steps):
        optimizer.step()
    optimizer.param_groups = groups


def differing(kind, saved_after, replayed=False):
    torch.manual_seed(0)
    weights = torch.nn.Parameter(torch.randn(1000))
    optimizer = kind([weights], lr=0.01)
    train(weights, optimizer, range(saved_after))
    state, resumed = copy.deepcopy(optimizer.state_dict()), torch.nn.Parameter(weights.detach().clone())
    later = range(saved_after, saved_after + 3)
    train(weights, optimizer, later)
    second = kind([resumed], lr=0.01)
    second.load_state_dict(state)
    if replayed:
        replay(second, saved_after)
    train(resumed, second, later)
    number, largest = int((weights != resumed).sum()), (weights - resumed).detach().abs().max().item()
    name = kind.__name__ + ", brought to the step" * replayed
    print(f"{name:40} saved after {saved_after:3}: {number} of 1000 weights differ, by up to {largest:.1e}")
    return number


own = [differing(DeepSpeedCPUAdam, steps) for steps in (5, 50, 500)]
plain = [differing(torch.optim.AdamW, steps) for steps in (5, 50, 500)]
plain += [differing(DeepSpeedCPUAdam, steps, replayed=True) for steps in (5, 50, 500)]
sys.exit(0 if own[0] > 0 and max(own) > 100 and max(plain) == 0 else "this has changed")
PY
