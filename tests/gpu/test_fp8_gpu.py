"""Row-wise scaled fp8 products on a GPU against the same quantised numbers in float64."""

import os
import subprocess
import sys

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
    x = (torch.randn(777, sizes[0], device="cuda") * torch.logspace(-2, 2, 777, device="cuda")[:, None]).bfloat16()
    layer = Fp8Linear(linear)
    weight = layer.weight.view(torch.float8_e4m3fn).double() * layer.scale_O1.double()
    scale = x.abs().amax(-1, keepdim=True).float() / 448
    quantised = (x.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn).double() * scale.double()
    expected, found = quantised @ weight.T, layer(x).double()
    error = float(((found - expected).norm(dim=1) / expected.norm(dim=1)).max())
    print(f"{sizes}: {error:.1e}")
    assert error < 0.01


QUANTISED = """
import torch
from medusa_ds.model import fp8
from medusa_ds.model.attention import hidden_states
from medusa_ds.model.backbone import load_backbone
from medusa_ds.config.recipe import ModelSpec

config = {"model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
          "vocab_size": 500, "num_attention_heads": 4, "num_key_value_heads": 2}
model = load_backbone(ModelSpec(name="x", init="random", config=config), torch.bfloat16, device="cuda", liger=False)
fp8.quantise(model)
torch.manual_seed(0)
with torch.no_grad():
    hidden = hidden_states(model, torch.randint(0, 500, (2, 64), device="cuda"), torch.arange(64).expand(2, -1))
print("sum", float(hidden.double().sum()))
"""


def test_a_second_process_reads_the_first_ones_compiled_layers(tmp_path):
    """Mutation: leave Inductor's own launcher on."""
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no fp8 products on this GPU")
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    said = []
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", QUANTISED], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        said.append(done.stdout.splitlines()[-1])
    assert said[0] == said[1]
