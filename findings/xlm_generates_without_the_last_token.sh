#!/usr/bin/env bash
# transformers 5.24.0 writes XLM's texts without reading the token before: its cache holds the mask's state in its place.
#
# XLM predicts the next token at a mask token, which `prepare_inputs_for_generation` puts behind the text for each step;
# the whole text is given every time. 5.24.0 named the argument of all models that takes the cache `cache`, and XLM's
# forward had an argument of that name from before, which no `generate` had filled since caches are objects: now it is
# filled, and `forward` drops as many tokens from the left as the cache holds. The first step leaves the state of the mask
# there too, so that the second one reads the mask alone, in a place where the token that was just written should be. No
# warning; the text differs from the third token on here. `use_cache=False` gives the right one; 5.17.0 to 5.23.0 do
# so with both.
# Seen 2026-11-29, torch 2.14.1, XLMWithLMHeadModel of two layers with random weights, greedy, new tokens after 7 8 9:
#     transformers 5.23.0: 19 89 85 19 67 67 67 19, and the same with use_cache=False
#     transformers 5.24.0: 19 89 67 19 89 19 0 0, and 19 89 85 19 67 67 67 19 with use_cache=False
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
text() {
    "$work/venv/bin/pip" install --quiet "transformers==$1" torch==2.14.1
    "$work/venv/bin/python" -W ignore <<'PY'
import torch
from transformers import XLMConfig, XLMWithLMHeadModel

torch.manual_seed(0)
ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
shape = {"vocab_size": 99, "emb_dim": 32, "n_layers": 2, "n_heads": 4}
model = XLMWithLMHeadModel(XLMConfig(**shape, **ends, mask_token_id=5, lang_id=0, causal=True)).eval()
for parameter in model.parameters():
    if parameter.ndim > 1:
        torch.nn.init.normal_(parameter, std=0.3)
texts = [model.generate(torch.tensor([[7, 8, 9]]), max_new_tokens=8, do_sample=False, use_cache=use)[0, 3:].tolist()
         for use in (True, False)]
print(*texts[0], "/", *texts[1])
PY
}
before=$(text 5.23.0)
after=$(text 5.24.0)
printf '%s\n' "5.23.0: $before" "5.24.0: $after"
right=${before#*/ }
[ "$before" = "$right / $right" ] && [ "${after#*/ }" = "$right" ] && [ "${after% /*}" != "$right" ] || {
    echo "this has changed" >&2
    exit 1
}
