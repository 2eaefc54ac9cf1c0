#!/usr/bin/env bash
# Mamba, FalconMamba and Jamba in transformers drop their state when more than one token follows a cache.
#
# One token after a cache goes on from the state of the text before it. Several tokens carry the convolution over but
# start the recurrence at zero, so that these layers read them as the beginning of a text: all logits are wrong from there
# on, and so is the state that is kept. That is what a second turn of a chat does whose cache is handed to `generate`, and
# for Jamba `prefill_chunk_size`. The pure ones fare no better in a second turn: their cache cannot tell its length, so
# `generate` gives them the whole text again, which Mamba2, right otherwise, then reads on top of the first turn.
# Nothing warns. Falcon-H1, whose layers are Mamba2's beside attention, does all of it right.
# Seen 2026-11-29 with transformers 5.24.0 and torch 2.14.1 on a CPU, random weights: 20 tokens into a cache, then 4 one
# by one and at once; `generate` with a first turn's cache; a prompt of 24 in chunks of 8. Largest difference from one pass:
#                  one by one   at once   second turn   chunks     logits up to
#     Jamba        0.000        1.447     0.566         0.192      4.6
#     Mamba        0.000        0.219     0.017         -          5.0
#     FalconMamba  0.000        0.698     0.086         -          6.4
#     Mamba2       0.000        0.000     0.027         -          3.8
#     Falcon-H1    0.000        0.000     0.000         0.000      4.1
# What helps: one token at a time, or the whole text without the old cache.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet transformers==5.24.0 torch==2.14.1
TRANSFORMERS_VERBOSITY=error "$work/venv/bin/python" - <<'PY'
import sys

import torch
from transformers import AutoModelForCausalLM, FalconH1Config, FalconMambaConfig, JambaConfig, Mamba2Config, MambaConfig

ids = torch.randint(1, 99, (1, 24), generator=torch.Generator().manual_seed(0))
sizes = {"vocab_size": 1000, "hidden_size": 64, "num_hidden_layers": 2}
attention = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128}
jamba = {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1, "use_mamba_kernels": False}
falcon = {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 16}
mamba2 = {"num_heads": 8, "head_dim": 16, "n_groups": 1, "state_size": 16, "chunk_size": 16}
configs = {
    "Jamba": JambaConfig(**sizes, **attention, **jamba),
    "Mamba": MambaConfig(**sizes),
    "FalconMamba": FalconMambaConfig(**sizes),
    "Mamba2": Mamba2Config(**sizes, **mamba2),
    "Falcon-H1": FalconH1Config(**sizes, **attention, **falcon),
}


@torch.no_grad()
def differences(name, config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for key, weight in model.named_parameters():
        if weight.dim() > 1 and "A_log" not in key:
            torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
    whole = model(ids, use_cache=False).logits

    def after_a_cache(pieces):
        output, logits = model(ids[:, :20], use_cache=True), []
        for piece in ids[:, 20:].split(pieces, 1):
            output = model(piece, cache=output.cache, use_cache=True)
            logits.append(output.logits)
        return float((torch.cat(logits, 1) - whole[:, 20:]).abs().max())

    def turn(text, **options):
        options |= {"max_new_tokens": 1, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        options |= {"return_dict_in_generate": True, "output_logits": True}
        return model.generate(text, attention_mask=torch.ones_like(text), **options)

    found = [after_a_cache(1), after_a_cache(4)]
    turns = [turn(ids, cache=turn(ids[:, :20]).cache)]
    if name in ("Jamba", "Falcon-H1"):
        turns.append(turn(ids, prefill_chunk_size=8))
    found += [float((output.logits[0] - whole[:, -1]).abs().max()) for output in turns]
    print(f"{name:12}", *(f"{difference:.3f}" for difference in found), f"of {whole.abs().max():.1f}")
    return ["right" if difference < 1e-4 else "wrong" if difference > 5e-3 else "?" for difference in found]


found = {name: differences(name, config) for name, config in configs.items()}
right, wrong = "right", "wrong"
wanted = {"Jamba": [right, wrong, wrong, wrong], "Mamba": [right, wrong, wrong], "FalconMamba": [right, wrong, wrong]}
wanted |= {"Mamba2": [right, right, wrong], "Falcon-H1": [right] * 4}
sys.exit(0 if found == wanted else "this has changed")
PY
