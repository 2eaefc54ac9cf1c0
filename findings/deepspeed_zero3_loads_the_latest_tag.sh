#!/usr/bin/env bash
# Under ZeRO 3 DeepSpeed loads the weights of the latest checkpoint, whatever tag it is asked for, if they come alone.
#
# `engine.load_checkpoint(folder, tag="first", load_optimizer_states=False)` is how weights of an earlier step are had
# without Adam's moments, to fine-tune from them or to evaluate them. Under ZeRO 3 they are put together from the shards
# by `get_fp32_state_dict_from_zero_checkpoint(load_dir)`, which is not told the tag and follows the folder's file `latest`.
# The path that is returned, the client state, the count of steps and the schedule are those of the tag; so a curve over
# all checkpoints of a run is flat, every point of it the last one. ZeRO 0, 1 and 2 load what they are asked for, and so
# does ZeRO 3 with the moments. A line on the standard output names the folder that was read; nothing warns.
# Seen 2026-11-29 with DeepSpeed 0.19.8 and torch 2.14.1 on a CPU: a weight of 1 saved with the tag `first`, then one of 2
# with the tag `second`, and the first one loaded into an engine whose weight is 9; weight and `client_state` afterwards:
#     ZeRO 0, 1 and 2, load_optimizer_states=False:                      1, first
#     ZeRO 3, with the optimizer's states:                               1, first
#     ZeRO 3, load_optimizer_states=False:                               2, first
#     ZeRO 3, load_optimizer_states=False, saved with save_latest=False: ValueError: Unable to find 'latest' file at ...
# What helps: the tag in the file `latest` while loading, or `get_fp32_state_dict_from_zero_checkpoint(folder, tag=...)`.
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


def engine(weight, stage):
    model = torch.nn.Linear(4, 1, bias=False)
    torch.nn.init.constant_(model.weight, weight)
    config = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "zero_optimization": {"stage": stage}}
    adam = torch.optim.AdamW(model.parameters())
    return deepspeed.initialize(model=model, optimizer=adam, config=config | {"zero_allow_untested_optimizer": True})[0]


def loaded(stage, save_latest=True, **options):
    """The weight, and the tag as the client state knows it, after `first` was loaded."""
    folder = f"{sys.argv[1]}/{stage}-{save_latest}-{len(options)}"
    for weight, tag in ((1.0, "first"), (2.0, "second")):
        engine(weight, stage).save_checkpoint(folder, tag, client_state={"saved_as": tag}, save_latest=save_latest)
    target = engine(9.0, stage)
    try:
        client_state = target.load_checkpoint(folder, "first", **options)[1]
    except ValueError as error:
        print(f"ZeRO {stage}, save_latest={save_latest}, {options}: {error}")
        return "ValueError"
    with deepspeed.zero.GatheredParameters([target.module.weight]):
        found = target.module.weight[0, 0].item(), client_state["saved_as"]
    print(f"ZeRO {stage}, {options}:", *found)
    return found


alone = {"load_optimizer_states": False}
right = [loaded(stage, **alone) for stage in (0, 1, 2)] + [loaded(3)]
wrong, refused = loaded(3, **alone), loaded(3, save_latest=False, **alone)
same = right == [(1.0, "first")] * 4 and wrong == (2.0, "first") and refused == "ValueError"
sys.exit(0 if same else "this has changed")
PY
