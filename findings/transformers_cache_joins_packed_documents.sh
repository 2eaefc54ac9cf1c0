#!/usr/bin/env bash
# transformers keeps packed documents apart by their position ids, unless a cache is made, which is the default.
#
# Where `position_ids` begin again at 0 and no attention mask is given, Llama and its kind hide the documents of a row from
# each other, under `sdpa` and `eager`. But only if there is no cache, and `use_cache` of every config is true: a loop that
# calls `model(input_ids=..., position_ids=..., labels=...)` trains on documents that see all before them, in `train()` as
# in `eval()`. Activation checkpointing turns the cache off in training alone, where the documents are apart then, and the
# validation of the same run sees them joined. A mask of ones joins them too, and GPT-OSS, which hands no positions to its
# masks, always. Nothing warns.
# Seen 2026-11-29 with transformers 5.24.0 and torch 2.14.1 on a CPU: two documents of 7 and 9 tokens in a row, random
# weights; largest difference from each document alone, of the first and of the second one's logits (up to 0.6):
#     Llama, use_cache=False:                                 0.000 0.000
#     Llama, nothing said, in train() and in eval():          0.000 0.435
#     the same with activation checkpointing, in train():     0.000 0.000
#     the same with activation checkpointing, in eval():      0.000 0.435
#     Llama, use_cache=False and a mask of ones:              0.000 0.435
#     GPT-OSS, use_cache=False:                               0.000 0.351
# What helps: `use_cache=False` in every call (the Trainer sets it) and no mask; for GPT-OSS 4D masks of one's own, of
# which it takes a dict with one for each type of layer.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet transformers==5.24.0 torch==2.14.1
TRANSFORMERS_VERBOSITY=error "$work/venv/bin/python" - <<'PY'
import sys

import torch
from transformers import GptOssConfig, GptOssForCausalLM, LlamaConfig, LlamaForCausalLM

sizes = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16}
sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
torch.manual_seed(0)
llama = LlamaForCausalLM(LlamaConfig(**sizes))
torch.manual_seed(0)
gpt_oss = GptOssForCausalLM(GptOssConfig(**sizes, num_local_experts=4, num_experts_per_tok=2))
documents = [torch.randint(1, 99, (1, length), generator=torch.Generator().manual_seed(length)) for length in (7, 9)]
ids, positions = torch.cat(documents, 1), torch.cat([torch.arange(7), torch.arange(9)])[None]


def differences(name, model, train=False, **options):
    alone = torch.cat([model.eval()(input_ids=part, use_cache=False).logits[0] for part in documents])
    packed = model.train(train)(input_ids=ids, position_ids=positions, **options).logits[0]
    first, second = (part.abs().max().item() for part in (packed - alone).split([7, 9]))
    print(f"{name:40} {first:.3f} {second:.3f}")
    return first < 1e-5 and second < 1e-5, first < 1e-5 and second > 0.1


apart = [differences("Llama, use_cache=False", llama, use_cache=False)]
joined = [differences("Llama, eval()", llama), differences("Llama, train()", llama, train=True)]
mask = torch.ones_like(ids)
joined.append(differences("Llama, a mask of ones", llama, use_cache=False, attention_mask=mask))
joined.append(differences("GPT-OSS, use_cache=False", gpt_oss, use_cache=False))
llama.activation_checkpointing_enable()
apart.append(differences("Llama, train(), checkpointing", llama, train=True))
joined.append(differences("Llama, eval(), checkpointing", llama))
own = torch.block_diag(torch.ones(7, 7), torch.ones(9, 9)).tril().log()[None, None]
masks = {"full_attention": own, "sliding_attention": own}
apart.append(differences("GPT-OSS, masks of one's own", gpt_oss, use_cache=False, attention_mask=masks))
sys.exit(0 if all(same for same, _ in apart) and all(other for _, other in joined) else "this has changed")
PY
