"""The Triton kernel, run by Triton's interpreter."""

import os
import subprocess
import sys

TOP_TOKENS = """
import torch
from medusa_ds.decoding import top_tokens

top_tokens.PART = 64  # smaller blocks than on a GPU: the interpreter is slow
torch.manual_seed(0)
for vocab, number in ((50, 10), (200, 4), (64, 1)):
    for logits in (torch.randn(2, 1, vocab), -torch.rand(2, 1, vocab), torch.randint(-3, 3, (2, 1, vocab)).float()):
        order = logits.sort(dim=-1, descending=True, stable=True).indices
        assert top_tokens.top_tokens(logits, number).equal(order[..., :number])
print("equal")
"""


def test_top_tokens_equal_a_stable_sort():
    """Mutation: order negative logits by their bits."""
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, "-c", TOP_TOKENS], env=env, capture_output=True, text=True)
    assert run.stdout == "equal\n", run.stderr
