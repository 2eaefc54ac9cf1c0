"""The frozen backbone's products in float8: weights quantised once, activations as they come, a scale a row.

    y = (x / s_x) @ (W / s_W).T * s_x * s_W,    s = max |row| / 448, the largest number of e4m3

torchao does the same with tensor subclasses and any recipe of scaling; here is the one that a frozen forward needs,
without gradients, which runs on a CPU too and survives DeepSpeed, whose `module.bfloat16()` casts every floating
tensor: weights are held as bytes, and their scales are bf16 numbers from the start. Each layer is compiled, so that
finding a row's scale is part of the norm or activation before it.

Shapes: N rows, I inputs, O outputs.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from medusa_ds.errors import UserError

_LARGEST = 448.0
_ALIGNMENT = 16  # of both sides of a weight, in cuBLASLt


class Fp8Linear(nn.Module):
    """A linear layer without gradients, whose weight [O, I] takes one byte an element."""

    scale_O1: Tensor

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight_OI = linear.weight.detach().float()
        scale_O1 = row_scales(weight_OI).bfloat16()
        quantised = (weight_OI / scale_O1.float()).clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn)
        self.weight = nn.Parameter(quantised.view(torch.uint8), requires_grad=False)
        self.register_buffer("scale_O1", scale_O1)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """Products [..., O] of [..., I], in its dtype."""
        x_NI = x.reshape(-1, x.shape[-1])
        scale_N1 = row_scales(x_NI)
        quantised = (x_NI.float() / scale_N1).clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn)
        product_NO = torch._scaled_mm(
            quantised,
            self.weight.view(torch.float8_e4m3fn).t(),
            scale_a=scale_N1,
            scale_b=self.scale_O1.float().t(),
            bias=self.bias,
            out_dtype=x.dtype,
            use_fast_accum=True,
        )
        return product_NO.view(*x.shape[:-1], -1)


def quantise(backbone: PreTrainedModel) -> None:
    """Replace the linear layers inside the backbone's layers by `Fp8Linear` and compile each layer, in place."""
    known = torch._inductor.list_options()
    # the first: 2.5 ms less of 89 for Llama-3-8B's shape, on an H200. Its choices cannot be read back for kernels that
    # the launcher below took from Inductor's cache: a second process would end with a TypeError
    wanted = {"triton.multi_kernel": 1, "use_static_cuda_launcher": False, "use_static_triton_launcher": False}
    options: dict[str, Any] = {name: value for name, value in wanted.items() if name in known}
    for layer in backbone.base_model.layers:  # type: ignore[union-attr]
        for name, module in [*layer.named_modules()]:
            if isinstance(module, nn.Linear) and not any(size % _ALIGNMENT for size in module.weight.shape):
                layer.set_submodule(name, Fp8Linear(module))
        layer.compile(options=options)


def check_device(device: torch.device) -> None:
    """Refuse a device without float8 products.

    Raises:
        UserError: not a GPU of compute capability 8.9 or more.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        needs = "a GPU of compute capability 8.9 or more (L4, H100)"
        raise UserError(f"model.frozen_precision: found fp8, which needs {needs}; use bf16")


def row_scales(rows: Tensor) -> Tensor:
    """Scale [N, 1] of rows [N, I], fp32."""
    return rows.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / _LARGEST
