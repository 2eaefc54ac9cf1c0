"""Own Triton kernels for the few rows of a decoding step, behind one switch: `enabled`."""

import os

import torch
from torch import Tensor

ENABLED = os.environ.get("MEDUSA_DS_KERNELS") != "0"


def enabled(tensor: Tensor) -> bool:
    """Whether own kernels may work on a tensor; with MEDUSA_DS_KERNELS=0 PyTorch does everything, to compare."""
    return ENABLED and tensor.is_cuda


def enabled_for_half_on_hopper(tensor: Tensor) -> bool:
    """The same for kernels that were written for half precision on Hopper and measured there alone."""
    half = tensor.dtype in (torch.bfloat16, torch.float16)
    return enabled(tensor) and half and torch.cuda.get_device_capability(tensor.device)[0] == 9
