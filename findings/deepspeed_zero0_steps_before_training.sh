#!/usr/bin/env bash
# Under ZeRO 0 in bf16 DeepSpeed takes an optimizer step before training: weights decay, Adam starts at its second step.
#
# To make Adam's states, `FP16_UnfusedOptimizer` (bf16 without ZeRO) steps with gradients of zero inside
# `deepspeed.initialize`; ZeRO 1, 2 and 3 do not. The step is a real one: AdamW takes `lr * weight_decay` of every fp32
# master weight, at the optimizer's own rate and not at the first one of a warm-up, and its count of steps stays at 1. So
# the first update corrects the bias of a second step: it moves a weight by 0.744 of the rate where Adam moves it by all
# of it, whatever the gradient, and the next ones are short as well. The same recipe has other losses under ZeRO 0 than
# under ZeRO 1. Who looks at the bf16 weights after `initialize` sees nothing: they follow the masters with the next step.
# Seen 2026-11-29 with DeepSpeed 0.19.8 and torch 2.14.1 on a CPU. Weight 1, gradient 1, AdamW at 0.01 with betas of 0.9
# and 0.999: master weight after `initialize` and after each of three steps, Adam's count of steps after `initialize`:
#     weight decay 0:    ZeRO 0: 1.000000 0.992559 0.983974 0.974877, 1   ZeRO 1: 1.000000 0.990000 0.980000 0.970000, none
#     weight decay 0.1:  ZeRO 0: 0.999000 0.990560 0.980985 0.970907, 1   ZeRO 1: 1.000000 0.989000 0.978011 0.967033, none
# What helps: ZeRO 1, also on one GPU; or a rate of 0 while the engine is made, and Adam's count set back to 0.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet deepspeed==0.19.8 torch==2.14.1
DS_ACCELERATOR=cpu "$work/venv/bin/python" - "$work" <<'PY'
import logging
import os
import sys

os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
import deepspeed
import torch

logging.disable(logging.WARNING)
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # not compiled for one process
torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/store", rank=0, world_size=1)
deepspeed.init_distributed(dist_backend="gloo", verbose=False)


def weights(stage, decay):
    model = torch.nn.Linear(4, 1, bias=False)
    torch.nn.init.ones_(model.weight)
    adam = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=decay, eps=1e-12)
    config = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "zero_optimization": {"stage": stage}}
    engine = deepspeed.initialize(model=model, optimizer=adam, config=config | {"zero_allow_untested_optimizer": True})[0]
    wrapped = engine.optimizer
    master = wrapped.fp32_groups[0][0] if stage == 0 else wrapped.single_partition_of_fp32_groups[0]
    count = [float(state["step"]) for state in adam.state.values()]
    found = [master.flatten()[0].item()]
    for _ in range(3):
        engine.backward(engine(torch.ones(1, 4, dtype=torch.bfloat16)).sum())
        engine.step()
        found.append(master.flatten()[0].item())
    print(f"decay {decay}, ZeRO {stage}:", *(f"{weight:.6f}" for weight in found), f"count {count}", type(wrapped).__name__)
    return found, count


near = lambda found, wanted: all(abs(a - b) < 1e-5 for a, b in zip(found, wanted, strict=True))
same = True
for decay, early, usual in (
    (0.0, [1.0, 0.992559, 0.983974, 0.974877], [1.0, 0.99, 0.98, 0.97]),
    (0.1, [0.999, 0.99056, 0.980985, 0.970907], [1.0, 0.989, 0.978011, 0.967033]),
):
    (zero0, count0), (zero1, count1) = weights(0, decay), weights(1, decay)
    same &= near(zero0, early) and near(zero1, usual) and count0 == [1.0] and count1 == []
sys.exit(0 if same else "this has changed")
PY
