#!/usr/bin/env bash
# Beam search of MiniMax in transformers goes on with one beam's words and another beam's state.
#
# When beams change places, the cache has to follow. MiniMax keeps the states of its linear attention in a list of its own
# beside the keys and values, and `MiniMaxCache.reorder_cache`, which it inherits, moves the keys and values alone. So half
# of the layers go on from whatever beam stood in that place before. The text is worse than without a cache, and the score
# that `generate` returns is not that of the text; greedy search and sampling never move beams and are right.
# Seen 2026-11-29 with transformers 5.24.0 and torch 2.14.1 on a CPU, random weights, 3 beams, 20 new tokens; mean
# log-probability of a token as `sequences_scores` says it, and as the model gives it to that text in one pass:
#     MiniMax, with a cache (the default):  -4.0175, -4.1420
#     MiniMax, without:                     -3.9956, -3.9956
#     Qwen3-Next, which has linear attention too, with and without: -4.1094, -4.1094
# What helps: `use_cache=False` with beams.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet transformers==5.24.0 torch==2.14.1
TRANSFORMERS_VERBOSITY=error "$work/venv/bin/python" - <<'PY'
import sys

import torch
from transformers import AutoModelForCausalLM, MiniMaxConfig, Qwen3NextConfig

new, prompt = 20, torch.randint(1, 999, (1, 12), generator=torch.Generator().manual_seed(0))
sizes = {"vocab_size": 1000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16}
sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "layer_types": ["linear_attention", "full_attention"]}
minimax = MiniMaxConfig(**sizes, num_local_experts=2, block_size=8)
linear = {"linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
qwen = Qwen3NextConfig(**sizes, **linear, num_experts=2, num_experts_per_tok=2, moe_intermediate_size=64)


@torch.no_grad()
def scores(config, use_cache):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for key, weight in model.named_parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
    options = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, "use_cache": use_cache}
    options |= {"num_beams": 3, "return_dict_in_generate": True, "output_scores": True}
    output = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    text = output.sequences
    each = model(text, use_cache=False).logits[0, :-1].log_softmax(-1).gather(1, text[0, 1:, None])
    said, own = float(output.sequences_scores), float(each[-new:].mean())
    print(f"{config.model_type:10} use_cache={use_cache!s:5} beam search says {said:.4f}, the model {own:.4f}")
    return said, own


(wrong, kept), (plain, own) = scores(minimax, True), scores(minimax, False)
(other, other_own), (other_plain, _) = scores(qwen, True), scores(qwen, False)
near = max(abs(plain - own), abs(other - other_own), abs(other - other_plain)) < 1e-4
sys.exit(0 if near and abs(wrong - kept) > 0.02 else "this has changed")
PY
