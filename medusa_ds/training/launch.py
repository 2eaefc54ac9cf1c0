"""The ranks of a launch find each other."""

import os
import socket
from datetime import timedelta
from pathlib import Path

import deepspeed
import torch
from torch.utils.cpp_extension import get_default_build_root

from medusa_ds.config.recipe import Recipe
from medusa_ds.errors import UserError
from medusa_ds.files import explained
from medusa_ds.ranks import Ranks

_SHARED_MEMORY = "deepspeed_shm_comm"
BESIDE_A_GPU = 4
"""Threads of a rank that trains on a GPU."""


def start_process_group(recipe: Recipe) -> torch.device:
    """Join the ranks of this launch, once in a process; returns this rank's device.

    Raises:
        UserError: the port where they meet is another program's.
    """
    on_gpu = torch.cuda.is_available()
    if Ranks().size == 1:  # nobody else has to know the port, and the launcher's may be another training's
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    device = torch.device("cuda", Ranks().local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
        # for a norm in fp64 DeepSpeed copies each gradient to fp64: 4 GiB for a projection of the 8B shape
        deepspeed.accelerator.get_accelerator().is_fp64_supported = lambda: False
    elif Ranks().size == 1:
        deepspeed.ops.__compatible_ops__[_SHARED_MEMORY] = False  # for all-reduces of ranks: not compiled for one
    else:
        announce(_SHARED_MEMORY)
    # the supervisor, which names the hung rank and shows stacks, comes first
    timeout = timedelta(seconds=recipe.train.hang_timeout + 5)
    try:
        deepspeed.init_distributed(dist_backend="nccl" if on_gpu else "gloo", verbose=False, timeout=timeout)
    except torch.distributed.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        port = os.environ["MASTER_PORT"]
        mend = "name another, as in deepspeed --master_port 29501 RECIPE"
        raise UserError(f"port {port}: in use, as by another training of this machine; {mend}", one_rank=True) from None
    return device


def announce(op: str) -> None:
    """Say, once a host, that DeepSpeed is about to compile an operator that this machine does not have yet.

    Raises:
        UserError: there is no place for it.
    """
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    with explained(f"{root}: cannot be made", "set TORCH_EXTENSIONS_DIR to a directory"):
        root.mkdir(parents=True, exist_ok=True)
    if Ranks().local_rank == 0 and not any(root.rglob(f"{op}.so")):
        print(f"DeepSpeed compiles {op} for this machine, once, which takes minutes: see {root}", flush=True)


def share_cores(on_gpu: bool, offloads_optimizer: bool) -> None:
    """Give this rank its share of the host's cores, where `OMP_NUM_THREADS` does not say how many.

    Beside a GPU few are enough, unless the optimizer runs on the CPU: with more, jobs on one host wait for each other.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        threads = torch.get_num_threads() // max(1, Ranks().local_size)
        most = BESIDE_A_GPU if on_gpu and not offloads_optimizer else threads
        if (wanted := max(1, min(threads, most))) < torch.get_num_threads():
            torch.set_num_threads(wanted)
