#!/usr/bin/env bash
# GPT-Neo's local layers in transformers read the wrong tokens as soon as a static cache is longer than their window.
#
# They cut their window out of a table of their own by the length of the keys, and a static cache's keys are as long as
# the cache: the window of every token is counted back from the cache's end, not from the token. The causal mask hides
# what is left of it, so that such a layer averages over all slots, the empty ones too. `generate` with
# `cache_implementation="static"` takes the model without a warning and writes another text from the first token on.
# Published GPT-Neo models, small ones of stories among them, have windows of 256 in every other layer: with a limit of
# 200 tokens all is well, with 300 nothing is.
# Seen 2026-11-29 with transformers 5.24.0 and torch 2.14.1 on a CPU: random weights, window 256, a prompt of 20 tokens,
# greedy; new tokens that are those of a run without a cache, and how far the prompt's own logits are off:
#     static cache, 200 new tokens:                  200 of 200, 0.000
#     static cache, 300 new tokens:                  5 of 300, 3.031
#     static cache, 300 new tokens, no local layer:  300 of 300, 0.000
#     dynamic cache (the default), 300 new tokens:   300 of 300
# What helps: the dynamic cache, or a static one no longer than the window.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet transformers==5.24.0 torch==2.14.1
TRANSFORMERS_VERBOSITY=error "$work/venv/bin/python" - <<'PY'
import sys

import torch
from transformers import GPTNeoConfig, GPTNeoForCausalLM, StaticCache

ids = torch.randint(1, 999, (1, 20), generator=torch.Generator().manual_seed(0))
sizes = {"vocab_size": 1000, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 1024}


@torch.no_grad()
def found(second_layer, new):
    """New tokens that are the same as without a cache (static cache, dynamic one), and how far the prompt's logits are off."""
    torch.manual_seed(0)
    config = GPTNeoConfig(**sizes, attention_types=[[["global", second_layer], 1]], window_size=256)
    model = GPTNeoForCausalLM(config).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)

    def text(**options):
        mask = torch.ones_like(ids)
        options |= {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        return model.generate(ids, attention_mask=mask, **options)[0, 20:]

    wanted, static = text(use_cache=False), text(cache_implementation="static", disable_compile=True)
    cache = StaticCache(config=config, max_cache_len=20 + new)
    whole, cached = model(ids, use_cache=False).logits, model(ids, cache=cache, use_cache=True).logits
    result = int((static == wanted).sum()), int((text() == wanted).sum()), float((cached - whole).abs().max())
    print(f"global, {second_layer}; {new} new tokens: static {result[0]}, dynamic {result[1]}; logits {result[2]:.3f}")
    return result


short, long, alone = found("local", 200), found("local", 300), found("global", 300)
right = short[:2] == (200, 200) and long[1] == 300 and alone[:2] == (300, 300) and max(short[2], alone[2]) < 1e-3
sys.exit(0 if right and long[0] < 100 and long[2] > 1 else "this has changed")
PY
