"""Small tokenizers of seven families: their kinds of pre-tokenisation, their control tokens, their chat templates."""

import json
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from medusa_ds.model.backbone import VICUNA

TEMPLATES = Path(__file__).with_name("templates")
TEXT = [
    "user assistant system You are a helpful AI assistant. Hi there, what is two and two? Four, said the other one.",
    "A chat between a curious user and an artificial intelligence assistant. USER: ASSISTANT: Be brief.\n\n\n",
    'name arguments function parameters {"type": "x"} [1, 2] <think> Hello world 0123456789 é à 中 \n ?!()%<|_|>[/]{}~',
] * 4
WORDS = r" ?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+"  # punctuation takes the line breaks after it along
SPECIAL = {
    "llama3": ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "qwen3": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "smollm2": ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>"],
    "mistral": (
        "<unk> <s> </s> [INST] [/INST] [TOOL_CALLS] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS]"
    ).split(),
    "vicuna": ["<unk>", "<s>", "</s>"],
    "deepseek": ["<|begin|>", "<|end|>"],
    "glm": ["<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"],
}
ADDED = {
    "deepseek": "<|User|> <|Assistant|> <think> </think> <|tool_call|> <|tool_output|> <|tool_end|>".split(),
    "glm": "<think> </think> <tool_call> </tool_call> <tool_response> </tool_response>".split(),
    "qwen3": "<think> </think> <tool_call> </tool_call> <tool_response> </tool_response> <|fim_prefix|>".split(),
}
BOS_EOS = {
    "llama3": ("<|begin_of_text|>", "<|eot_id|>"),
    "qwen3": (None, "<|im_end|>"),
    "smollm2": ("<|im_start|>", "<|im_end|>"),
    "mistral": ("<s>", "</s>"),
    "vicuna": ("<s>", "</s>"),
    "deepseek": ("<|begin|>", "<|end|>"),
    "glm": (None, "<|endoftext|>"),
}
FAMILIES = tuple(SPECIAL)


@cache
def backend(family: str) -> Tokenizer:
    sentencepiece = family in ("mistral", "vicuna")
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>" if sentencepiece else None))
    if family == "vicuna":  # as converted from Llama's sentencepiece model
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Metaspace()
    elif family == "mistral":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        tokenizer.decoder = decoders.Metaspace()
    else:
        split = pre_tokenizers.Split(Regex(WORDS), "isolated")
        gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=family == "smollm2")
        first = pre_tokenizers.Digits(individual_digits=True) if family == "smollm2" else split
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([first, gpt2])
        tokenizer.decoder = decoders.ByteLevel()
        if family == "qwen3":
            tokenizer.normalizer = normalizers.NFC()
    first = SPECIAL[family] if sentencepiece else []
    alphabet = [chr(code) for code in range(32, 127)] if sentencepiece else pre_tokenizers.ByteLevel.alphabet()
    pre_tokenizer = tokenizer.pre_tokenizer
    if sentencepiece:  # whose tokens hold a space at their start only
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=first, initial_alphabet=alphabet, show_progress=False, max_token_length=12
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    if sentencepiece:
        state = json.loads(tokenizer.to_str())
        state["pre_tokenizer"] = json.loads(pre_tokenizer.__getstate__()) if pre_tokenizer else None
        tokenizer = Tokenizer.from_str(json.dumps(state))
    return tokenizer


def tokenizer_of(family: str, template: str | None = None) -> PreTrainedTokenizerFast:
    """A fresh tokenizer; `template` names a file of `templates/` other than the family's own."""
    bos, eos = BOS_EOS[family]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(backend(family).to_str()),
        bos_token=bos,
        eos_token=eos,
        name_or_path=f"test/{family}",
    )
    special = [AddedToken(text, special=True, normalized=False) for text in SPECIAL[family]]
    tokenizer.add_tokens(special, special_tokens=True)
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ADDED.get(family, [])])
    if family == "vicuna":
        tokenizer.chat_template = VICUNA
    else:
        tokenizer.chat_template = (TEMPLATES / f"{template or family}.jinja").read_text(encoding="utf-8")
    return tokenizer


def tokens_text(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    """The text that tokens stand for, the spaces that sentencepiece adds included."""
    if any("▁" in token for token in tokenizer.get_vocab()):
        return "".join(tokenizer.convert_ids_to_tokens(ids)).replace("▁", " ")
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)
