#!/usr/bin/env bash
# Moshi's decoder in transformers applies its sliding window to the cache and to nothing else.
#
# `MoshiConfig.sliding_window` makes `DynamicCache(config=...)` keep that many tokens of each layer, but the masks of the
# model know no window. So a text longer than the window gets other logits token by token through a cache than in one
# pass, although neither warns: a trainer, which reads whole texts, and `generate`, which steps through a cache, are at
# odds from the first token that the window leaves out. Who builds a small copy of the model to test something, with a
# small window, meets it at once; published configs have a window of 3,000 tokens.
# Seen 2026-11-29 with transformers 5.24.0 and torch 2.14.1 on a CPU, window of 6, random weights:
#     largest difference of logits: 0.00000 at tokens 0 to 5, 0.08 to 0.33 at every token from 6 on
#     the same model with a window as long as its positions: 0.00000 everywhere
# What helps: keep texts within the window, or build the cache without the config (`DynamicCache()`).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet transformers==5.24.0 torch==2.14.1
TRANSFORMERS_VERBOSITY=error "$work/venv/bin/python" - <<'PY'
import sys

import torch
from transformers import DynamicCache, MoshiConfig, MoshiForCausalLM

sizes = {"vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16}
ids = torch.randint(1, 99, (1, 20), generator=torch.Generator().manual_seed(0))


def differences(window, cache_knows):
    torch.manual_seed(0)
    config = MoshiConfig(**sizes, num_key_value_heads=4, ffn_dim=128, max_position_embeddings=64, sliding_window=window)
    model = MoshiForCausalLM(config).eval()
    cache = DynamicCache(config=config) if cache_knows else DynamicCache()
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits[0]
        steps = [model(input_ids=ids[:, t : t + 1], cache=cache, use_cache=True).logits[0, 0] for t in range(20)]
    return [float((a - b).abs().max()) for a, b in zip(whole, steps)]


small, large, plain = differences(6, True), differences(64, True), differences(6, False)
for name, found in (("window 6", small), ("window 64", large), ("window 6, DynamicCache()", plain)):
    print(f"{name:26}", " ".join(f"{difference:.3f}" for difference in found))
same = max(small[:6] + large + plain) < 1e-4
sys.exit(0 if same and min(small[6:]) > 0.05 else "this has changed")
PY
