"""The Triton kernels, run by Triton's interpreter."""

import os
import subprocess
import sys

import pytest
import torch

from medusa_ds.decoding import kernels
from medusa_ds.decoding.kernels import few_rows, tree_attention

KERNELS = """
import torch
from torch.nn.functional import scaled_dot_product_attention
from medusa_ds.decoding.kernels import few_rows
from medusa_ds.decoding.kernels import top_tokens
from medusa_ds.decoding.kernels import tree_attention

torch.manual_seed(0)
top_tokens.PART = 64  # smaller blocks than on a GPU: the interpreter is slow
for vocab, number in ((50, 10), (200, 4), (64, 1)):
    for logits in (torch.randn(2, 1, vocab), -torch.rand(2, 1, vocab), torch.randint(-3, 3, (2, 1, vocab)).float()):
        order = logits.sort(dim=-1, descending=True, stable=True).indices
        assert top_tokens.top_tokens(logits, number).equal(order[..., :number])

shapes = {(5, 40, 200): 2, (64, 33, 1024): 4, (3, 4096, 1088): 1, (17, 8500, 72): 1}
for (rows, columns, depth), parts in shapes.items():
    hidden, weight = torch.randn(rows, depth), torch.randn(columns, depth)
    product = few_rows.few_rows_product(hidden, weight, weight)
    assert len(product) == few_rows.tiles(columns, depth).parts == parts
    torch.testing.assert_close(product.sum(0), hidden @ weight.T, rtol=1e-4, atol=1e-4)
hidden, weight = torch.randn(9, 72), torch.randn(8600, 72)
gate, up = (hidden @ weight.T).chunk(2, -1)
gated = few_rows.few_rows_product(hidden, weight, weight, True)[0]
torch.testing.assert_close(gated, torch.nn.functional.silu(gate) * up, rtol=1e-4, atol=1e-4)

tree_attention.TILES[32] = (32, 32, 64)
for group, size, nodes in ((1, 16, 20), (2, 32, 40)):
    query = torch.randn(1, nodes, 2, size).transpose(1, 2)
    key, value = torch.randn(2, 1, 2 // group, 256, size)
    mask = torch.zeros(1, 1, nodes, 256).masked_fill(torch.rand(1, 1, nodes, 256) < 0.5, -torch.inf)
    mask[..., 128:], mask[..., 0] = -torch.inf, 0.0  # a whole part is hidden, a slot is always seen
    wanted = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3, enable_gqa=True)
    out = tree_attention.tree_attention(query, key, value, mask.repeat(1, 1, group, 1), 0.3)
    torch.testing.assert_close(out, wanted.transpose(1, 2))
print("equal")
"""


def test_kernels_give_what_plain_pytorch_gives():
    """Mutations: order negative logits by their bits; leave the last part out; do not rescale the mean; gate by up."""
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, "-c", KERNELS], env=env, capture_output=True, text=True)
    assert run.stdout == "equal\n", run.stderr


class OnHopper:
    """What a kernel asks of a tensor, without the GPU."""

    is_cuda, device = True, "cuda"

    def __init__(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> None:
        self.shape, self.dtype = torch.Size(shape), dtype
        self.numel = self.shape.numel

    def __len__(self) -> int:
        return self.shape[0]


@pytest.mark.parametrize("on", [True, False])
def test_one_switch_is_for_all_kernels(monkeypatch, on):
    """Mutation: a kernel that asks for a GPU alone."""
    monkeypatch.setattr(kernels, "ENABLED", on)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    wide = OnHopper(1 << 15, 512)
    found = (
        kernels.enabled(wide),
        few_rows.applies(OnHopper(1, 20, 512), wide),
        few_rows.gates(OnHopper(1, 20, 512), wide),
        tree_attention.applies(OnHopper(1, 8, 20, 64)),
    )
    assert found == (on,) * 4
    assert not few_rows.applies(OnHopper(1, 20, 512, dtype=torch.float32), wide)
