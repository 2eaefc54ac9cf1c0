#!/usr/bin/env bash
# transformers reads a GGUF file's weights and leaves its RoPE scaling behind, and StarCoder2's base with it.
#
# `from_pretrained(..., gguf_file=...)` builds the config from the file's metadata. `rope.freq_base` is taken for most
# architectures; `rope.scaling.*` is looked for in files of GPT-OSS alone; and the tensor `rope_freqs.weight`, in which
# the files of Llama 3.1 and 3.2 keep what scales their frequencies, has no place to go. So the model turns its keys by
# the plain frequencies: every weight is right, short prompts read well, and the logits drift with each position. Of
# StarCoder2 not even the base is taken: it is 10,000 then, and that of the published 3B model 1,000,000. A fine-tuning
# from there, and `save_pretrained`, go on with the wrong config. Nothing warns.
# Seen 2026-11-29 with transformers 5.24.0, gguf 0.19.0 and torch 2.14.1 on a CPU, random weights in fp32: largest
# difference of the logits (up to 7) from the model that was written, at tokens 1, 9 and 199; all weights are equal:
#     Llama, base 500,000:                        0.000 0.000 0.000
#     Llama, linear scaling by 4:                 1.066 4.539 7.934
#     Llama, scaled as Llama 3.1 is, from 64 on:  0.015 0.620 4.019
#     Qwen2, YaRN by 4:                           0.136 0.871 3.241
#     StarCoder2, base 10,000:                    0.000 0.000 0.000
#     StarCoder2, base 1,000,000:                 0.025 0.844 3.383
# What helps: the original config, `from_pretrained(..., gguf_file=..., config=config)`.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet transformers==5.24.0 gguf==0.19.0 torch==2.14.1 accelerate==1.15.0
HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error "$work/venv/bin/python" - "$work" <<'PY'
import sys

import numpy as np
import torch
from gguf import MODEL_ARCH, GGUFWriter, RopeScalingType, get_tensor_name_map
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Starcoder2Config

sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.3}
ids = torch.randint(0, 64, (1, 200), generator=torch.Generator().manual_seed(0))


def write(model, kind, rope):
    """The file that llama.cpp's converter writes: its names, its order of the rows of Llama's queries and keys."""
    config, writer = model.config, GGUFWriter(f"{sys.argv[1]}/model.gguf", kind)
    writer.add_name("tiny")
    writer.add_context_length(512)
    writer.add_block_count(2)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_vocab_size(64)
    writer.add_token_list([f"token {place}" for place in range(64)])
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(rope["rope_theta"])
    if kind == "starcoder2":
        writer.add_layer_norm_eps(config.norm_epsilon)
    else:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if rope["rope_type"] == "llama3":
        plain = rope["rope_theta"] ** -(torch.arange(0, 8, 2) / 8)
        writer.add_tensor("rope_freqs.weight", (plain / model.model.rotary_emb.inv_freq).numpy().astype(np.float32))
    names = get_tensor_name_map(MODEL_ARCH[kind.upper()], 2)
    for name, tensor in model.state_dict().items():
        rows = tensor.numpy()
        if kind == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = 4 if "q_proj" in name else 2
            rows = rows.reshape(heads, 2, 4, 32).swapaxes(1, 2).reshape(rows.shape)
        if name != "lm_head.weight" or not config.tie_word_embeddings:
            writer.add_tensor(names.get_name(name, (".weight", ".bias")), np.ascontiguousarray(rows))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def differences(kind, config_class, rope):
    torch.manual_seed(0)
    config = config_class(**sizes, rope_parameters=dict(rope))
    model = AutoModelForCausalLM.from_config(config).eval()
    write(model, kind, rope)
    loaded = AutoModelForCausalLM.from_pretrained(sys.argv[1], gguf_file="model.gguf").eval()
    helped = AutoModelForCausalLM.from_pretrained(sys.argv[1], gguf_file="model.gguf", config=config).eval()
    weights = loaded.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        wanted = model(ids).logits
        assert (helped(ids).logits - wanted).abs().max() < 1e-4
        found = (loaded(ids).logits - wanted).abs().amax((0, 2))[[1, 9, 199]].tolist()
    print(f"{kind:10} {rope['rope_type']:8} {rope['rope_theta']:7}:", *(f"{number:.3f}" for number in found))
    return found


plain = {"rope_type": "default", "rope_theta": 10_000}
llama3 = {"rope_type": "llama3", "rope_theta": 500_000, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
yarn = {"rope_type": "yarn", "rope_theta": 1_000_000, "factor": 4.0, "original_max_position_embeddings": 128}
right = [differences("llama", LlamaConfig, plain | {"rope_theta": 500_000})]
right.append(differences("starcoder2", Starcoder2Config, plain))
wrong = [differences("llama", LlamaConfig, plain | {"rope_type": "linear", "factor": 4.0})]
wrong.append(differences("llama", LlamaConfig, llama3 | {"original_max_position_embeddings": 64}))
wrong.append(differences("qwen2", Qwen2Config, yarn))
wrong.append(differences("starcoder2", Starcoder2Config, plain | {"rope_theta": 1_000_000}))
same = all(max(found) < 1e-4 for found in right) and all(found[-1] > 1 for found in wrong)
sys.exit(0 if same else "this has changed")
PY
