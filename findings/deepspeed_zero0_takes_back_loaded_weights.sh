#!/usr/bin/env bash
# Under ZeRO 0 in bf16 the first step after `load_checkpoint(..., load_optimizer_states=False)` undoes the loading.
#
# The bf16 weights are loaded, and a loss or an evaluation before the first step is that of the checkpoint. But
# `FP16_UnfusedOptimizer` (bf16 without ZeRO) keeps fp32 masters, which this way of loading leaves alone: ZeRO 1, 2 and 3
# restore them from the weights, ZeRO 0 does not. The first step updates the masters of the model that the engine was made
# of and copies them over what was loaded. A fine-tuning run has the right first loss, and from then on trains the model
# that its process began with. Nothing warns. In fp32 there are no masters, and all is well.
# Seen 2026-11-29 with DeepSpeed 0.19.8 and torch 2.14.1 on a CPU: a weight of 1 is saved and loaded into an engine whose
# weight is 9; the weight after loading and after a step of AdamW at a rate of 0.5 with a gradient of 1:
#     ZeRO 0, fp32:                            1.0, 0.5
#     ZeRO 0, bf16:                            1.0, 8.6
#     ZeRO 0, bf16, and load_module_only=True: 1.0, 0.6
#     ZeRO 1, 2 and 3, bf16:                   1.0, 0.5
# (Under ZeRO 0 Adam counts one step more, which DeepSpeed takes while the engine is made.)
# What helps: ZeRO 1, also on one GPU, or `engine.optimizer.refresh_fp32_params()` after loading.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet deepspeed==0.19.8 torch==2.14.1
DS_ACCELERATOR=cpu "$work/venv/bin/python" -W ignore - "$work" <<'PY'
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


def engine(weight, stage, dtype):
    model = torch.nn.Linear(4, 1, bias=False)
    torch.nn.init.constant_(model.weight, weight)
    adam = torch.optim.AdamW(model.parameters(), lr=0.5, weight_decay=0.0)
    config = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": dtype == torch.bfloat16}}
    config |= {"zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True}
    return deepspeed.initialize(model=model, optimizer=adam, config=config)[0]


def weights(stage, dtype=torch.bfloat16, refreshed=False, **options):
    """The weight after loading, and after a step."""
    folder = f"{sys.argv[1]}/{stage}-{dtype}-{refreshed}-{len(options)}"
    engine(1.0, stage, dtype).save_checkpoint(folder)
    target, found = engine(9.0, stage, dtype), []
    target.load_checkpoint(folder, load_optimizer_states=False, **options)
    if refreshed:
        target.optimizer.refresh_fp32_params()
    for step in range(2):
        with deepspeed.zero.GatheredParameters([target.module.weight]):
            found.append(round(target.module.weight[0, 0].item(), 1))
        if step == 0:
            target.backward(target(torch.ones(1, 4, dtype=dtype)).sum())
            target.step()
    print(f"ZeRO {stage}, {dtype}, {options}" + ", refreshed" * refreshed + ":", *found)
    return found


right = [weights(0, torch.float32), weights(0, load_module_only=True), weights(0, refreshed=True)]
right += [weights(stage) for stage in (1, 2, 3)]
wrong = weights(0)
first, steps = all(start == 1.0 for start, _ in right), all(0.3 <= end <= 0.7 for _, end in right)
sys.exit(0 if first and steps and wrong[0] == 1.0 and wrong[1] > 8.0 else "this has changed")
PY
