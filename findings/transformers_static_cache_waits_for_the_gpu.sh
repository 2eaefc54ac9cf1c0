#!/usr/bin/env bash
# A pass of several tokens over transformers' static cache asks the GPU for a number, which a dynamic cache's never does.
#
# A static cache counts its tokens in a tensor on the GPU, so that graphs can be made of passes. Before it makes a mask,
# `sdpa_mask` compares that count with 0 (nothing but padding behind the prompt?), and Python needs the answer: the host
# waits until the GPU has done all that it was given.
# One token at a time asks nothing, and neither does eager attention nor a pass that is being compiled or captured as a
# CUDA graph, where the question is left out. What verifies guesses or reads a prompt in chunks, kernel by kernel, meets
# it in each pass; and PyTorch's `torch.cuda.set_sync_debug_mode("error")`, run before a capture to learn whether the
# capture will hold, raises although it would.
# Seen 2026-11-29 with transformers 5.24.0 and torch 2.14.1 on a CPU, where such questions can be counted (llama with
# 5.17.0: the same); numbers asked for by a pass of one token, of three tokens:
#     llama, sdpa:          dynamic cache 0, 0    static cache 0, 1
#     gemma3_text, sdpa:    dynamic cache 0, 0    static cache 0, 1
#     llama, eager:         dynamic cache 0, 0    static cache 0, 0
# What helps: masks made outside of what is captured (`create_masks_for_generate`, as `generate` does).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet transformers==5.24.0 torch==2.14.1
TRANSFORMERS_VERBOSITY=error "$work/venv/bin/python" - <<'PY'
import sys

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache


class Asked(TorchDispatchMode):
    """Count the numbers that Python asks tensors for; on a GPU it waits for each."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def asked(family, attention, static):
    """Numbers asked for by a pass of one token and by one of three, behind a prompt."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 4}
    config = AutoConfig.for_model(family, **sizes, intermediate_size=64, vocab_size=100, head_dim=16)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    cache = StaticCache(config=config, max_cache_len=64) if static else DynamicCache(config=config)
    model(torch.arange(1, 9)[None], cache=cache, use_cache=True)
    counts = []
    for width in (1, 3):
        with Asked() as seen:
            model(torch.arange(1, 1 + width)[None], cache=cache, use_cache=True)
        counts.append(seen.count)
    return counts


found = {}
for family, attention in (("llama", "sdpa"), ("gemma3_text", "sdpa"), ("llama", "eager")):
    found[family, attention] = [asked(family, attention, static) for static in (False, True)]
    print(f"{family}, {attention}: dynamic cache {found[family, attention][0]}, static cache {found[family, attention][1]}")
wanted = {("llama", "sdpa"): [[0, 0], [0, 1]], ("gemma3_text", "sdpa"): [[0, 0], [0, 1]], ("llama", "eager"): [[0, 0]] * 2}
sys.exit(0 if found == wanted else "this has changed")
PY
