"""Decode with Medusa heads in transformers alone: `medusa-ds export` puts this file into `custom_generate/generate.py`.

    model.generate(**inputs, custom_generate=WHERE, medusa_heads=WHERE, trust_remote_code=True)

with the directory or `owner/repo` of the export as WHERE; twice, as transformers does not tell this file where it is.

Works with transformers 5.17 to 5.24 (the oldest and the newest tried), with every causal language model that has a
dynamic cache, at any batch size. The heads' best guesses form a chain that the next forward pass verifies: greedy
output is the model's own, sampling has its distribution (a token is drawn from the model first and then compared with
the guess). A chain, not a tree: it needs no attention mask of its own, so that flash attention, sliding windows and
padding work as in plain `generate`. Rows of a batch advance together, by the guesses that are right in all of them.
Beam search and the output of scores are refused.
"""

import functools
import json
import os
import weakref
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import linear, pad, silu
from transformers import generation

_loaded: Any = weakref.WeakKeyDictionary()  # heads by model: read once


def generate(model: Any, medusa_heads: str | None = None, **kwargs: Any) -> Any:
    """The `generate` of transformers with the heads of a directory or repository."""
    where: Any = {key: kwargs.pop(key) for key in ("revision", "token", "cache_dir") if key in kwargs}
    if medusa_heads is None:
        raise ValueError("give medusa_heads= what custom_generate= has: where heads/heads.safetensors is")
    source = (medusa_heads, where.get("revision"))
    if source not in _loaded.setdefault(model, {}):
        _loaded[model][source] = Heads(model, medusa_heads, where)
    decoding = functools.partial(decode, heads=_loaded[model][source], streamer=kwargs.get("streamer"))
    return model.generate(**kwargs, custom_generate=decoding)


class Heads:
    """Projections of `x + SiLU(Wx + b)` blocks, on the LM head's device and in its dtype."""

    def __init__(self, model: Any, source: str, where: dict[str, Any]) -> None:
        self.lm_head = model.get_output_embeddings()
        names = ("heads/heads.json", "heads/heads.safetensors")
        local = os.path.isdir(source)
        paths = [os.path.join(source, name) if local else hf_hub_download(source, name, **where) for name in names]
        with open(paths[0], encoding="utf-8") as file:
            self.config = json.load(file)
        weights = load_file(paths[1])
        token_map = weights.pop("token_map", None)
        self.token_map = None if token_map is None else token_map.to(self.lm_head.weight.device)
        self.weights = {name: self._like(tensor) for name, tensor in weights.items()}

    def _like(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.lm_head.weight.device, self.lm_head.weight.dtype)

    def guess(self, hidden: Tensor) -> Tensor:
        """Best token of every head [B, heads] after hidden states [B, H]."""
        tokens = []
        for k in range(self.config["num"]):
            x = hidden
            for block in range(self.config["layers"]):
                weight, bias = (self._like(self.weights[f"{k}.blocks.{block}.{part}"]) for part in ("weight", "bias"))
                x = x + silu(linear(x, weight, bias))
            projection = self.weights.get(f"{k}.projection.weight")
            projection = self.lm_head.weight if projection is None else self._like(projection)
            tokens.append(linear(x, projection).argmax(-1))
        rows = torch.stack(tokens, 1)
        return rows if self.token_map is None else self.token_map[rows]


def decode(
    model: Any,
    input_ids: Any,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    heads: Any = None,
    streamer: Any = None,
    **inputs: Any,
) -> Any:
    """The decoding loop that transformers calls after its usual preparations (the `Callable` of `custom_generate`)."""
    config = generation_config
    cache_name = "cache" if "cache" in inputs else "past_key_values"  # the latter before 5.24
    cache = inputs.get(cache_name)
    asked = [
        name
        for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
        if getattr(config, name, False)
    ]
    if asked or (config.num_beams or 1) > 1:
        raise ValueError(f"Medusa heads do not support {', '.join(asked) or 'beam search'}")
    if cache is None or not config.use_cache or any(layer.is_compileable for layer in cache.layers):
        raise ValueError("Medusa heads need use_cache=True and a dynamic cache (no cache_implementation)")
    keeps_past = hasattr(cache, "activate_past_recording")  # sliding windows keep what a crop may need
    if keeps_past:
        cache.activate_past_recording()
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    filler = config.pad_token_id if config.pad_token_id is not None else (ends[0] or 0)
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    finished = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    guesses, seen_hidden = input_ids[:, :0], []
    hook = heads.lm_head.register_forward_pre_hook(lambda _, args: seen_hidden.append(args[0]))
    try:
        while not finished.all():
            length, width = input_ids.shape[1], guesses.shape[1] + 1
            tokens, known = torch.cat([input_ids, guesses], 1), cache.get_seq_length()
            passed: dict[str, Any] = {cache_name: cache}
            if positions is not None:
                ahead = torch.arange(1, tokens.shape[1] - positions.shape[1] + 1, device=positions.device)
                passed["position_ids"] = torch.cat([positions, positions[:, -1:] + ahead], 1)[:, known:]
            if mask is not None:
                passed["attention_mask"] = pad(mask, (0, tokens.shape[1] - mask.shape[1]), value=1)
            if "logits_to_keep" in inputs:
                passed["logits_to_keep"] = width
            logits = model(input_ids=tokens[:, known:], use_cache=True, **passed).logits
            logits = logits[:, -width:].to(input_ids.device, torch.float32, copy=True)
            hidden = seen_hidden.pop()[:, -width:]
            chosen = []
            for i in range(width):
                scores = logits_processor(tokens[:, : length + i], logits[:, i])
                drawn = torch.multinomial(scores.softmax(-1), 1)[:, 0] if config.do_sample else scores.argmax(-1)
                chosen.append(drawn)
            right = (torch.stack(chosen, 1)[:, :-1] == guesses).int().cumprod(1).sum(1)
            accepted = int(right[~finished].min())  # guess i is kept or not whatever its own draw: sampling stays exact
            if keeps_past or accepted < width - 1:
                cache.crop(accepted - width + 1)
            for token in chosen[: accepted + 1]:
                token = token.masked_fill(finished, filler)
                input_ids = torch.cat([input_ids, token[:, None]], 1)
                if streamer is not None:
                    streamer.put(token.cpu())
                finished = finished | stopping_criteria(input_ids, None)
                if finished.all():
                    break
            room = max(config.max_length - input_ids.shape[1] - 1, 0)
            guesses = heads.guess(hidden[:, accepted])[:, :room].to(input_ids.device)
    finally:
        hook.remove()
    if streamer is not None:
        streamer.end()
    if config.return_dict_in_generate:
        return generation.GenerateDecoderOnlyOutput(sequences=input_ids)
    return input_ids
