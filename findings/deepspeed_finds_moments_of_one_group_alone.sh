#!/usr/bin/env bash
# Under ZeRO 1 and 2 DeepSpeed's accessors find Adam's moments of the first parameter group and of no other.
#
# `safe_get_full_optimizer_state` and `safe_set_full_optimizer_state` go by a link from each parameter to its moments. All
# links are made at once, in the first step, but after the update of the first group, when the other groups have no moments
# yet; and never again. Two groups are what most training has, one with weight decay and one without. The second one trains
# and its moments exist, but both accessors raise, however many steps follow. ZeRO 3 finds them.
# Seen 2026-11-29 with DeepSpeed 0.19.8 and torch 2.14.1 on a CPU: two layers, a group each, three steps of AdamW; largest
# `exp_avg` of the first and of the second one as read:
#     ZeRO 1 and 2, fp32 and bf16:  0.040, ValueError: exp_avg not found in optimizer state fragment
#     ZeRO 3, fp32 and bf16:        0.040, 0.109
# What helps: one group, ZeRO 3, or the optimizer's own flat moments.
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
from deepspeed.utils import safe_get_full_optimizer_state, safe_set_full_optimizer_state

logging.disable(logging.WARNING)
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # not compiled for one process
torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/store", rank=0, world_size=1)
deepspeed.init_distributed(dist_backend="gloo", verbose=False)
MISSING = "exp_avg not found in optimizer state fragment"


def asked(stage, dtype):
    """What reading each group's moments gives, what setting the second one's gives, and how many groups have moments."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(4, 4, bias=False) for _ in range(2)))
    adam = torch.optim.AdamW([{"params": list(layer.parameters())} for layer in model], lr=0.1)
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage}}
    config |= {"zero_allow_untested_optimizer": True, "bf16": {"enabled": dtype == torch.bfloat16}}
    engine = deepspeed.initialize(model=model, optimizer=adam, config=config)[0]
    for _ in range(3):
        engine.backward(engine(torch.ones(1, 4, dtype=dtype)).sum())
        engine.step()

    def attempt(ask, *arguments):
        try:
            answer = ask(*arguments)
            return None if answer is None else round(float(answer.abs().max()), 3)
        except ValueError as error:
            return str(error)

    read = [attempt(safe_get_full_optimizer_state, layer.weight, "exp_avg") for layer in model]
    written = attempt(safe_set_full_optimizer_state, model[1].weight, torch.full((4, 4), 0.5), "exp_avg")
    exist = sum("exp_avg" in state for state in adam.state.values())
    print(f"ZeRO {stage}, {dtype}: read {read}, written {written}; moments of {exist} groups exist")
    return read, written, exist


same = True
for stage in (1, 2, 3):
    for dtype in (torch.float32, torch.bfloat16):
        read, written, exist = asked(stage, dtype)
        missing = [answer == MISSING for answer in (*read, written)]
        same &= exist == 2 and missing == [False, stage < 3, stage < 3]
sys.exit(0 if same else "this has changed")
PY
