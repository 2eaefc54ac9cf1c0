"""CUDA graphs: kernels that a GPU runs one after another without being told each by Python."""

import warnings
from collections.abc import Callable
from typing import Any

import torch


def capture(step: Callable[[], None], pool: Any = None, warm_ups: int = 3) -> torch.cuda.CUDAGraph | None:
    """The CUDA graph of a step, which runs a few times before; None: it waits for the GPU, as some models' steps do.

    `pool`: of memory that graphs share which never run at the same time. Compiled code needs three warm-ups.
    """
    side, mode, waits = torch.cuda.Stream(), torch.cuda.get_sync_debug_mode(), False
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warm_ups - 1):
            step()
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
                torch.cuda.set_sync_debug_mode("error")
            step()
        except RuntimeError as error:
            if not (waits := "synchronizing CUDA operation" in str(error)):
                raise
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    torch.cuda.current_stream().wait_stream(side)
    if waits:
        return None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):  # other threads may allocate meanwhile
        step()
    return graph
