"""What is known of GPUs, by name: their memory, their rate, and how they reach each other."""

import re
from typing import Literal, NamedTuple


class Gpu(NamedTuple):
    """A kind of GPU, which does bf16.

    Attributes:
        gib: memory as nvidia-smi gives it, GiB; 0: not one to plan for.
        tflops: dense bf16 peak of the vendor's data sheet, TFLOP/s; 0: not known.
        link: GB/s that its NVLink sends, or 16 PCIe lanes of generation 4.
        network: Gb/s of the network cards of a host together; these and NVLink's: NVIDIA's data sheets of DGX.
    """

    gib: float
    tflops: float
    link: float = 32.0
    network: float = 100.0


GPUS = {
    "RTX 3060": Gpu(12.0, 0),
    "RTX 4080": Gpu(16.0, 0),
    "L4": Gpu(22.5, 121.0),
    "A10G": Gpu(0, 70.0),
    "A10": Gpu(0, 125.0),
    "RTX 3090": Gpu(0, 71.0),
    "RTX 4090": Gpu(24.0, 165.2),
    "A100 40GB": Gpu(39.6, 312.0, 300.0, 1600.0),
    "L40S": Gpu(45.0, 362.0),
    "A6000": Gpu(0, 154.8),
    "A100 80GB": Gpu(79.3, 312.0, 300.0, 1600.0),
    "A100": Gpu(0, 312.0),
    "H100 PCIe": Gpu(0, 756.0),
    "H100 NVL": Gpu(0, 835.0),
    "H100 80GB": Gpu(79.6, 989.0, 450.0, 3200.0),
    "H100": Gpu(0, 989.0),
    "H200": Gpu(140.4, 989.0, 450.0, 3200.0),
    "GH200": Gpu(0, 989.0),
    "B200": Gpu(179.0, 2250.0, 900.0, 3200.0),
    "MI300X": Gpu(0, 1307.4),
}
"""By memory, so that the first one that fits is the smallest; a name before one that says less."""


def find_gpu(name: str, fact: Literal["gib", "tflops"]) -> str | None:
    """The first kind of which a fact is known and all words are in a name: `a100-80gb`, `NVIDIA A100-SXM4-80GB`."""
    words = set(re.split(r"[\s-]+", name.lower()))
    return next((kind for kind, gpu in GPUS.items() if getattr(gpu, fact) and set(kind.lower().split()) <= words), None)


def peak_tflops(device_name: str) -> float | None:
    """Dense bf16 peak of a GPU by its name, TFLOP/s; None for a CPU or an unknown GPU."""
    kind = find_gpu(device_name, "tflops")
    return GPUS[kind].tflops if kind else None
