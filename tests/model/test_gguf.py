"""A GGUF file becomes the model and the tokenizer that were written, or is refused."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from support import SIZES
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from medusa_ds.errors import UserError
from medusa_ds.model import backbone

TEXT = "Mix:\n\n1. Stir 24 eggs.\n\nServe at 20."


def smollm_tokenizer() -> Tokenizer:
    """A byte-level BPE that sets each digit apart first."""
    tokenizer = Tokenizer(models.BPE())
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), in_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"vocab_size": 300, "initial_alphabet": alphabet, "special_tokens": ["<end>"], "show_progress": False}
    tokenizer.train_from_iterator([TEXT] * 10, trainers.BpeTrainer(**options))
    return tokenizer


def write(folder: Path, model: LlamaForCausalLM, tokenizer: Tokenizer, pre: str = "smollm", **more: Any) -> None:
    """`folder/model.gguf` as llama.cpp's converter writes it, with `more` numbers."""
    config, bpe = model.config, json.loads(tokenizer.to_str())["model"]
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * (len(tokens) - 1))
    writer.add_token_merges([" ".join(pair) for pair in bpe["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    for key, number in more.items():
        if key == "rope_freqs.weight":
            writer.add_tensor(key, np.full(8, number, np.float32))
        else:
            writer.add_float32(key, number)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        rows = tensor.numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads:
            rows = rows.reshape(heads, 2, -1, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), np.ascontiguousarray(rows))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def written() -> tuple[LlamaForCausalLM, Tokenizer]:
    tokenizer = smollm_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES | {"vocab_size": tokenizer.get_vocab_size()}, tie_word_embeddings=False)
    return LlamaForCausalLM(config).eval(), tokenizer


def test_the_converted_directory_is_the_model_and_its_tokenizer(written, tmp_path):
    """Mutation: leave the tokenizer as transformers makes it."""
    model, tokenizer = written
    write(tmp_path, model, tokenizer)
    backbone._convert(tmp_path, tmp_path / "made")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "made", dtype=torch.float32).eval()
    ids = torch.tensor([tokenizer.encode(TEXT).ids])
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    found = AutoTokenizer.from_pretrained(tmp_path / "made")
    assert found(TEXT, add_special_tokens=False)["input_ids"] == ids[0].tolist()
    assert "ĊĊ" in found.tokenize("Mix:\n\n1.")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"pre": "stablelm2"}, r"its tokenizer cuts texts by the rule stablelm2 \(known are gpt-2, smollm\)"),
        ({"llama.rope.scaling.factor": 4.0}, "its rotary embeddings are scaled"),
        ({"rope_freqs.weight": 0.5}, "its rotary embeddings are scaled"),
    ],
)
def test_what_transformers_leaves_out_is_refused(written, tmp_path, change, says):
    """Of GGUF files, by transformers 5.24.0, without a word."""
    write(tmp_path, *written, **change)
    with pytest.raises(UserError, match=rf"^model\.package\.file: {says}.*in safetensors as model\.name"):
        backbone._convert(tmp_path, tmp_path / "made")


def test_a_base_that_was_not_read_is_refused(written, tmp_path, monkeypatch):
    """As that of StarCoder2, by transformers 5.24.0."""
    write(tmp_path, *written)
    read = SimpleNamespace(config=SimpleNamespace(rope_parameters={"rope_theta": 1e6}))
    monkeypatch.setattr(backbone.AutoModelForCausalLM, "from_pretrained", lambda **_: read)
    with pytest.raises(UserError, match="its rotary embeddings have the base 10000"):
        backbone._convert(tmp_path, tmp_path / "made")
