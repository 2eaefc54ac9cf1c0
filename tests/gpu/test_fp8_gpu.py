"""Row-wise scaled fp8 products on a GPU against the same quantised numbers in float64."""

import pytest
import torch
from torch import nn

from medusa_ds.model.fp8 import Fp8Linear

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("sizes", [(576, 192), (4096, 4096), (14336, 4096)])
@torch.no_grad()
def test_products_are_those_of_the_quantised_numbers(sizes):
    """Mutation: leave one of the scales out."""
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no fp8 products on this GPU")
    torch.manual_seed(0)
    linear = nn.Linear(*sizes, bias=False, dtype=torch.bfloat16, device="cuda")
    x = (
        torch.randn(777, sizes[0], dtype=torch.bfloat16, device="cuda")
        * torch.logspace(-2, 2, 777, device="cuda")[:, None]
    )
    layer = Fp8Linear(linear)
    weight = layer.weight.view(torch.float8_e4m3fn).double() * layer.scale_O1.double()
    scale = x.abs().amax(-1, keepdim=True).float() / 448
    quantised = (x.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn).double() * scale.double()
    expected, found = quantised @ weight.T, layer(x.bfloat16()).double()
    error = float(((found - expected).norm(dim=1) / expected.norm(dim=1)).max())
    print(f"{sizes}: {error:.1e}")
    assert error < 0.01
