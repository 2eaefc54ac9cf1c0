"""Decode with Medusa heads in transformers alone: `medusa-ds export` puts this file into `custom_generate/generate.py`.

    model.generate(**inputs, custom_generate=WHERE, medusa_heads=WHERE, trust_remote_code=True)

with the directory or `owner/repo` of the export as WHERE; twice, as transformers does not tell this file where it is.

Works with transformers 5.17 to 5.24 (the oldest and the newest tried), with every causal language model that has a
dynamic cache, at any batch size. The heads' best guesses form a chain that the next forward pass verifies: greedy
output is the model's own, sampling has its distribution (a token is drawn from the model first and then compared with
the guess). A chain, not a tree: it needs no attention mask of its own, so that flash attention, sliding windows and
padding work as in plain `generate`. Rows of a batch advance together, by the guesses that are right in all of them.
A pass verifies as many guesses as pay on the machine at hand, down to none, by the times that passes took here and the
guesses that held; neither greedy nor sampled text depends on it, as one token is drawn for each that is kept. Beam
search, the output of scores, inputs other than tokens, and texts so long that positions turn are refused.
"""

import functools
import json
import os
import time
import weakref
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import linear, pad, rms_norm, silu
from transformers import generation

from medusa_ds.decoding.pace import Pace
from medusa_ds.model.rope import turns_beyond

_loaded: Any = weakref.WeakKeyDictionary()  # heads by model: read once


def generate(model: Any, medusa_heads: str | None = None, **kwargs: Any) -> Any:
    """The `generate` of transformers with the heads of a directory or repository."""
    where: Any = {key: kwargs.pop(key) for key in ("revision", "token", "cache_dir") if key in kwargs}
    if medusa_heads is None:
        raise ValueError("give medusa_heads= what custom_generate= has: where heads/heads.safetensors is")
    if kwargs.get("stop_strings") and kwargs.get("tokenizer"):  # transformers hands the latter to no function
        ends = generation.StopStringCriteria(kwargs.pop("tokenizer"), kwargs.pop("stop_strings"))
        kwargs["stopping_criteria"] = generation.StoppingCriteriaList([*(kwargs.get("stopping_criteria") or ()), ends])
    source = (medusa_heads, where.get("revision"))
    if source not in _loaded.setdefault(model, {}):
        _loaded[model][source] = Heads(model, medusa_heads, where)
    decoding = functools.partial(decode, heads=_loaded[model][source], streamer=kwargs.get("streamer"))
    return model.generate(**kwargs, custom_generate=decoding)


class Heads:
    """Medusa or Hydra heads, on the LM head's device and in its dtype."""

    def __init__(self, model: Any, source: str, where: dict[str, Any]) -> None:
        self.lm_head, self.embed = model.get_output_embeddings(), model.get_input_embeddings()
        names = ("heads/heads.json", "heads/heads.safetensors")
        local = os.path.isdir(source)
        paths = [os.path.join(source, name) if local else hf_hub_download(source, name, **where) for name in names]
        with open(paths[0], encoding="utf-8") as file:
            config = json.load(file)
        weight, named = getattr(self.lm_head, "weight", None), (config["vocab_size"], config["hidden_size"])
        if not torch.is_tensor(weight) or not weight.is_floating_point():
            raise ValueError("Medusa heads need an LM head that is not quantised")
        if weight.shape[0] < named[0] or weight.shape[1] != named[1]:
            raise ValueError(
                f"Medusa heads in {source} are for an LM head of {named}; this model's is {(*weight.shape,)}"
            )
        self.num, self.sees_tokens = config["num"], config.get("kind") == "hydra"
        self.blocks = config["layers"] - self.sees_tokens
        self.weights = load_file(paths[1])
        self.paces: dict[int, Pace] = {}

    def pace(self, rows: int) -> Pace:
        """What a batch of so many rows has shown of its passes."""
        if rows not in self.paces:
            assumed = [0.6**k * 0.85 ** (k * (k - 1) / 2) for k in range(1, self.num + 1)]
            self.paces[rows] = Pace(range(self.num + 1), assumed)
        return self.paces[rows]

    def guess(self, hidden: Tensor, token: Tensor, number: int) -> Tensor:
        """Best tokens of the first heads [B, number] after hidden states [B, H] and the token [B] that they led to."""
        state, states, tokens = hidden, [], []
        for k in range(number):
            if self.sees_tokens:
                unit = rms_norm(self.embed(token).to(state.device), state.shape[-1:], eps=1e-6)
                state = state + self._silu(torch.cat([state, unit], -1), f"{k}.step")
            x = state
            for block in range(self.blocks):
                x = x + self._silu(x, f"{k}.blocks.{block}")
            states.append(x)
            if self.sees_tokens:
                token = self._best(states[k:], k)[0]
                tokens.append(token)
        if not number:
            return token[:, None][:, :0]
        return torch.stack(tokens, 1) if self.sees_tokens else self._best(states, 0).T

    def _silu(self, x: Tensor, name: str) -> Tensor:
        return silu(linear(x, self._weight(f"{name}.weight"), self._weight(f"{name}.bias")))

    def _best(self, states: list[Tensor], first: int) -> Tensor:
        """Tokens [heads, B] of heads from `first` on; a shared LM head's weight is read once for all of them."""
        if "0.projection.weight" not in self.weights:
            return linear(torch.stack(states), self.lm_head.weight, self.lm_head.bias).argmax(-1)
        names = [f"{k}.projection" for k in range(first, first + len(states))]
        biases = [self._weight(f"{name}.bias") if f"{name}.bias" in self.weights else None for name in names]
        weights = [self._weight(f"{name}.weight") for name in names]
        rows = torch.stack([linear(*parts).argmax(-1) for parts in zip(states, weights, biases, strict=True)])
        return self._weight("token_map")[rows] if "token_map" in self.weights else rows

    def _weight(self, name: str) -> Tensor:
        """A tensor where the LM head is, which may have been moved."""
        like, own = self.lm_head.weight, self.weights[name]
        self.weights[name] = own.to(like.device, like.dtype if own.is_floating_point() else None)
        return self.weights[name]


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
    known = {"attention_mask", "position_ids", "cache_position", "token_type_ids", "logits_to_keep"}
    asked += [name for name, value in inputs.items() if torch.is_tensor(value) and name not in known]
    if asked or (config.num_beams or 1) > 1:
        raise ValueError(f"Medusa heads do not support {', '.join(asked) or 'beam search'}")
    if any(hasattr(layer, "recurrent_states") for layer in getattr(cache, "layers", [])):
        raise ValueError("Medusa heads need layers that can go back to an earlier token; this model's cannot")
    if not config.use_cache or (cache is not None and cache.is_compileable):
        raise ValueError("Medusa heads need use_cache=True and a dynamic cache (no cache_implementation)")
    if cache is None:
        raise ValueError("Medusa heads need a cache that can go back to an earlier token; this model's code keeps none")
    if (limit := turns_beyond(model.config)) is not None and config.max_length > limit:
        raise ValueError(
            f"Medusa heads need at most {limit} tokens, prompt and new ones: then this model's positions turn"
        )
    if "prepare_inputs_for_generation" in vars(model):
        raise ValueError("Medusa heads do not support inputs that another makes for the model, as PEFT's prompt tuning")
    keeps_past = hasattr(cache, "activate_past_recording")  # sliding windows keep what a crop may need
    if keeps_past:
        cache.activate_past_recording()
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    fills = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)  # else rows that end go on
    filler = config.pad_token_id if config.pad_token_id is not None else (ends[0] or 0)
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    finished = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    guesses, pace = input_ids[:, :0], heads.pace(len(input_ids))
    seen_hidden: list[torch.Tensor] = []
    pace.begin()
    # what heads read is the base model's; what the LM head is given may be scaled, but not every model calls its base
    hooks = [
        heads.lm_head.register_forward_pre_hook(lambda _, args: None if seen_hidden else seen_hidden.append(args[0]))
    ]
    if model.base_model is not model:
        hooks.append(model.base_model.register_forward_hook(lambda *args: seen_hidden.append(args[2][0])))
    try:
        while not finished.all():
            started, size = time.perf_counter(), pace.choose()
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
            hidden = seen_hidden.pop()[:, -width:].to(heads.lm_head.weight.device)
            chosen: list[Tensor] = []
            for i in range(width):  # up to the first that is not the guess in some row
                scores = logits_processor(tokens[:, : length + i], logits[:, i])
                drawn = torch.multinomial(scores.softmax(-1), 1)[:, 0] if config.do_sample else scores.argmax(-1)
                chosen.append(drawn)
                if i == width - 1 or bool((drawn != guesses[:, i])[~(finished & fills)].any()):
                    break
            accepted = len(chosen) - 1
            for token in chosen:
                token = token.masked_fill(finished & fills, filler)
                input_ids = torch.cat([input_ids, token[:, None]], 1)
                if streamer is not None:
                    streamer.put(token.cpu())
                finished = finished | stopping_criteria(input_ids, None)
                if finished.all():
                    break
            beyond = length + width - input_ids.shape[1]  # guesses that are not in the text
            if keeps_past or beyond:
                cache.crop(-beyond)
            room = max(config.max_length - input_ids.shape[1] - 1, 0)
            guesses = heads.guess(hidden[:, accepted], chosen[-1], min(size, room)).to(input_ids.device)
            if known:  # not the prompt's own pass
                same = width - 1 == guesses.shape[1]
                pace.saw(width - 1, range(accepted), time.perf_counter() - started if same else None)
    finally:
        for hook in hooks:
            hook.remove()
    if streamer is not None:
        streamer.end()
    if config.return_dict_in_generate:
        return generation.GenerateDecoderOnlyOutput(sequences=input_ids, **{cache_name: cache})
    return input_ids
