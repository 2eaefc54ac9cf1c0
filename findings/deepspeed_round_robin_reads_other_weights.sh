#!/usr/bin/env bash
# With `round_robin_gradients` and two ranks, DeepSpeed's accessors read and write other parameters' weights and moments.
#
# Under ZeRO 1 and 2 the option lays the parameters of a group into the flat partition in another order, so that ranks take
# turns. `safe_get_full_fp32_param` and its likes go by a link from each parameter to its place there, and links are made as
# if the order were that of the group: `_link_all_hp_params` hands on the places that it knows only where the alignment needs
# padding. Training is right, and so is what one writes and reads back on as many ranks; a checkpoint made by these accessors
# holds parts of other parameters under each name, without a word, and resumes wrong on another number of ranks.
# Seen 2026-11-29 with DeepSpeed 0.19.8 and torch 2.14.1 on a CPU: three layers in fp32, whether each one's master, as read
# before the first step, is its own weight:
#     one rank, with and without the option:   yes, yes, yes
#     two ranks, without it:                   yes, yes, yes
#     two ranks, with it, ZeRO 1 and ZeRO 2:   yes, no, no
# What helps: leave `round_robin_gradients` out, which changes no gradient.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet deepspeed==0.19.8 torch==2.14.1
cat >"$work/ask.py" <<'PY'
import logging
import os
import sys

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param


def main(rank, ranks, stage, option, store):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    logging.disable(logging.WARNING)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # not compiled
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(4, 4, bias=False) for _ in range(3)))
    adam = torch.optim.AdamW(model.parameters(), lr=0.1)
    zero = {"stage": stage, "round_robin_gradients": option}
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, "zero_allow_untested_optimizer": True}
    deepspeed.initialize(model=model, optimizer=adam, config=config)
    own = [torch.equal(safe_get_full_fp32_param(layer.weight), layer.weight) for layer in model]
    if rank == 0:
        print(f"ZeRO {stage}, {ranks} ranks, option {option}: each master its own weight: {own}", flush=True)
    if all(own) == (option and ranks > 1):
        raise SystemExit("this has changed")


if __name__ == "__main__":
    for ranks in (1, 2):
        for stage in (1, 2):
            for option in (False, True):
                store = f"{sys.argv[1]}/store-{ranks}-{stage}-{option}"
                torch.multiprocessing.spawn(main, (ranks, stage, option, store), nprocs=ranks)
PY
DS_ACCELERATOR=cpu "$work/venv/bin/python" -W ignore "$work/ask.py" "$work"
