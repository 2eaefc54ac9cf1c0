#!/usr/bin/env bash
# `load_checkpoint(..., load_module_only=True)` loads no weight under ZeRO 3, and says that it did.
#
# The option is there to start from a checkpoint's weights and nothing else. Under ZeRO 3 the model's file has a place for
# each weight and no numbers; those are in the optimizer's shards, which this option leaves out. What DeepSpeed does
# instead is to refresh the fp32 masters from the weights that the engine already has. The path of the checkpoint and its
# client state come back as if all had gone well, so that training starts from a random or another model. ZeRO 0, 1 and 2
# load the weights. Together with `load_optimizer_states=False` ZeRO 3 does so too.
# Seen 2026-11-29 with DeepSpeed 0.19.8 and torch 2.14.1 on a CPU: a weight of 1 is saved and loaded into an engine whose
# weight is 9; the weight afterwards, and whether a path and a client state came back:
#     ZeRO 0, 1 and 2, load_module_only=True:                        1, both
#     ZeRO 3, nothing said:                                          1, both
#     ZeRO 3, load_module_only=True, in fp32 and in bf16:            9, both
#     ZeRO 3, load_module_only=True and load_optimizer_states=False: 1, both
# What helps: both options, with a look at the file `latest`, which is what is loaded then whatever the tag.
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


def engine(weight, stage, bf16):
    model = torch.nn.Linear(4, 1, bias=False)
    torch.nn.init.constant_(model.weight, weight)
    config = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": bf16}, "zero_optimization": {"stage": stage}}
    adam = torch.optim.AdamW(model.parameters())
    return deepspeed.initialize(model=model, optimizer=adam, config=config | {"zero_allow_untested_optimizer": True})[0]


def loaded(stage, bf16=True, **options):
    """The weight, and whether `load_checkpoint` returned a path and the client state."""
    folder = f"{sys.argv[1]}/{stage}-{bf16}-{len(options)}"
    engine(1.0, stage, bf16).save_checkpoint(folder, "first", client_state={"saved_as": "first"})
    target = engine(9.0, stage, bf16)
    path, client_state = target.load_checkpoint(folder, "first", **options)
    with deepspeed.zero.GatheredParameters([target.module.weight]):
        found = target.module.weight[0, 0].item(), bool(path) and client_state.get("saved_as") == "first"
    print(f"ZeRO {stage}, bf16 {bf16}, {options}:", *found)
    return found


right = [loaded(stage, load_module_only=True) for stage in (0, 1, 2)]
right += [loaded(3), loaded(3, load_module_only=True, load_optimizer_states=False)]
wrong = [loaded(3, bf16, load_module_only=True) for bf16 in (True, False)]
sys.exit(0 if right == [(1.0, True)] * 5 and wrong == [(9.0, True)] * 2 else "this has changed")
PY
