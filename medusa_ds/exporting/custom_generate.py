"""Decode with Medusa heads in transformers alone: `medusa-ds export` puts this file into `custom_generate/generate.py`.

    model.generate(**inputs, custom_generate=WHERE, medusa_heads=WHERE, trust_remote_code=True)

with the directory or `owner/repo` of the export as WHERE; twice, as transformers does not tell this file where it is.

Works with transformers 5.17 to 5.24 (the oldest and the newest tried), with every causal language model that has a
dynamic cache, at any batch size. The heads' best guesses form a chain that the next forward pass verifies: greedy
output is the model's own, sampling has its distribution (a token is drawn from the model first and then compared with
the guess). A chain, not a tree: it needs no attention mask of its own, so that flash attention, sliding windows and
padding work as in plain `generate`. Rows of a batch advance together, by the guesses that are right in all of them.
A pass verifies as many guesses as pay on the machine at hand, down to none, by the times that passes took here and the
guesses that held; neither greedy nor sampled text depends on it, as one token is drawn for each that is kept. On
a GPU that holds the whole model, passes are replayed as CUDA graphs where the model's code allows it, as a small model
waits for Python to launch its kernels. Beam search, the output of scores, inputs other than
tokens, and texts so long that positions turn are refused.
"""

import contextlib
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
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer, StaticLayer
from transformers.masking_utils import create_masks_for_generate

from medusa_ds.decoding.capture import capture
from medusa_ds.decoding.pace import Pace
from medusa_ds.model.rope import turns_beyond

GRAPHS_ON = "cuda"  # devices of this type have their passes captured
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
    graphs = all(kwargs.get(name) is None for name in ("cache", "past_key_values"))  # else somebody reads it afterwards
    heads, streamer = _loaded[model][source], kwargs.get("streamer")
    decoding = functools.partial(decode, heads=heads, streamer=streamer, graphs=graphs)
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
            raise ValueError("These heads need an LM head that is not quantised")
        if weight.shape[0] < named[0] or weight.shape[1] != named[1]:
            raise ValueError(f"The heads in {source} are for an LM head of {named}; this model's is {(*weight.shape,)}")
        self.num, self.sees_tokens = config["num"], config.get("kind") == "hydra"
        self.blocks = config["layers"] - self.sees_tokens
        self.weights = load_file(paths[1])
        self.paces: dict[tuple[int, bool], Pace] = {}
        self.waits = False  # whether the model is known to wait for the GPU within a pass, so that none is captured

    def pace(self, rows: int, graphs: bool) -> Pace:
        """What a batch of so many rows has shown of its passes, captured or launched."""
        if (rows, graphs) not in self.paces:
            assumed = [0.6**k * 0.85 ** (k * (k - 1) / 2) for k in range(1, self.num + 1)]
            self.paces[rows, graphs] = Pace(range(self.num + 1), assumed)
        return self.paces[rows, graphs]

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


class _Places(StaticLayer):
    """A layer's keys and values in fixed places; new ones come behind a count of tokens that all layers share."""

    def __init__(self, layer: Any, slots: int, known: int, length: Tensor) -> None:
        super().__init__(slots)
        self.cumulative_length, self.is_initialized = length, True
        for name in ("keys", "values"):
            old = getattr(layer, name)[:, :, :known]  # of a sliding window the last ones alone
            places = old.new_zeros(*old.shape[:2], slots, old.shape[3])
            places[:, :, known - old.shape[2] : known] = old
            setattr(self, name, places)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write the states of new tokens; all keys and values."""
        assert self.keys is not None and self.values is not None
        slots = self.cumulative_length + torch.arange(key_states.shape[2], device=key_states.device)
        self.keys.index_copy_(2, slots, key_states)
        self.values.index_copy_(2, slots, value_states)
        return self.keys, self.values


class _Forward:
    """A model's pass over a cache."""

    def __init__(self, model: Any, lm_head: Any, cache_name: str) -> None:
        self.model, self.cache_name = model, cache_name
        self._seen: list[Tensor] = []
        # heads read what the base model gives, as the LM head's input may be scaled; not every model calls its base
        self._hooks = [lm_head.register_forward_pre_hook(lambda _, args: self._see(args[0]))]
        if model.base_model is not model:
            self._hooks.append(model.base_model.register_forward_hook(lambda *args: self._see(args[2][0])))

    def _see(self, hidden: Tensor) -> None:
        if not self._seen:
            self._seen.append(hidden)

    def __call__(self, past: Any, **inputs: Any) -> tuple[Tensor, Tensor]:
        """Logits and the hidden states that heads read, [B, tokens, V and H]."""
        self._seen.clear()
        logits = self.model(use_cache=True, **{self.cache_name: past}, **inputs).logits
        return logits, self._seen.pop()

    def masks(self, past: Any, mask: Tensor | None, input_ids: Tensor, **inputs: Any) -> Any:
        """What new tokens see of a cache of fixed places, as `generate` makes it for such caches."""
        make = getattr(self.model, "create_masks_for_generate", create_masks_for_generate)
        empty = torch.empty(*input_ids.shape, 0, dtype=self.model.dtype, device=input_ids.device)
        given = {"inputs_embeds": empty, "attention_mask": mask, "position_ids": inputs.get("position_ids")}
        return make(config=self.model.config, **given, **{self.cache_name: past})

    def remove(self) -> None:
        """Leave the model as it was."""
        for hook in self._hooks:
            hook.remove()


class FixedPasses:
    """Passes over keys and values in fixed places, on a GPU a CUDA graph for each count of new tokens.

    Args:
        forward: the model's pass.
        layers: of the cache that knows the text so far.
        known: its tokens.
        slots: tokens that there is to be room for.

    Attributes:
        waits: a pass waits for the GPU, so that it is launched, not replayed.
    """

    def __init__(self, forward: _Forward, layers: list[Any], known: int, slots: int) -> None:
        self.device = next(layer.keys.device for layer in layers if layer.keys is not None)
        self.slots, self.length, self.waits = slots, torch.zeros((), dtype=torch.long, device=self.device), False
        kept = [layer if layer.keys is None else _Places(layer, slots, known, self.length) for layer in layers]
        self.forward, self.cache, self.passes = forward, Cache(layers=kept), {}  # type: ignore[var-annotated]
        self.pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None

    def read(self, known: int, mask: Tensor | None, inputs: dict[str, Any]) -> list[Tensor]:
        """Read new tokens.

        Args:
            known: count of tokens before them.
            mask: [B, known and new tokens], zero where a row is padded.
            inputs: of the pass.

        Returns:
            Logits and hidden states, in tensors that the next pass of as many tokens writes over.
        """
        self.length.fill_(known)
        if mask is not None:
            mask = pad(mask, (0, self.slots - mask.shape[1]), value=1)
        # not in the graph: transformers 5.24.0 asks the GPU for the cache's length there, unless it knows of a capture
        inputs = {**inputs, "attention_mask": self.forward.masks(self.cache, mask, **inputs)}
        width = inputs["input_ids"].shape[1]
        if width not in self.passes:
            self.passes[width] = self._prepare(inputs)
        own, given, run = self.passes[width]
        _write(own, inputs)
        run()
        return given

    def agrees(self, hidden: Tensor, *given: Any) -> bool:
        """Whether a first pass gives the hidden states that it gave over the other cache, as a graph on a GPU."""
        try:
            apart = (self.read(*given)[1] - hidden).float().norm()
        except Exception:  # whatever a model's code may raise, as it wants to know the cache's length, or a full GPU
            return False
        return not self.waits and bool(apart <= torch.finfo(hidden.dtype).eps ** 0.5 / 2 * hidden.float().norm())

    def _prepare(self, inputs: dict[str, Any]) -> tuple[dict[str, Any], list[Tensor], Any]:
        """Tensors that a pass reads and writes, which a graph does not keep alive, and what runs it."""
        own, forward, cache = _own(inputs), self.forward, self.cache
        given: list[Tensor] = []

        def run() -> None:
            given[:] = forward(cache, **own)

        if self.pool is not None:
            with torch.cuda.device(self.device):
                graph = capture(run, self.pool, warm_ups=1)
            self.waits = graph is None
            return own, given, run if graph is None else graph.replay
        return own, given, run


def _own(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same inputs in tensors of their own; masks may be a dictionary by types of layers."""
    return {
        name: value.clone(memory_format=torch.contiguous_format)
        if torch.is_tensor(value)
        else (_own(value) if isinstance(value, dict) else value)
        for name, value in inputs.items()
    }


def _write(own: dict[str, Any], inputs: dict[str, Any]) -> None:
    """Put other values in their place."""
    for name, value in inputs.items():
        if torch.is_tensor(value):
            own[name].copy_(value)
        elif isinstance(value, dict):
            _write(own[name], value)


def _captured(model: Any) -> bool:
    """Whether to capture passes: a GPU holds the whole model, and its attention takes any mask."""
    devices = {parameter.device for parameter in model.parameters()}
    takes_masks = model.config._attn_implementation in ("sdpa", "eager")
    return takes_masks and len(devices) == 1 and devices.pop().type == GRAPHS_ON


def _fixed_passes(forward: _Forward, layers: list[Any], known: int, most: int) -> FixedPasses | None:
    """Passes over fixed places, few of a long text; None: layers keep more than keys and values, or memory is short."""
    kinds = (DynamicLayer, DynamicSlidingWindowLayer, _Places)
    with contextlib.suppress(torch.OutOfMemoryError):
        if all(type(layer) in kinds or layer.keys is None for layer in layers):
            return FixedPasses(forward, layers, known, -(-min(most, max(2 * known, 1024)) // 64) * 64)
    return None


def decode(
    model: Any,
    input_ids: Any,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    heads: Any = None,
    streamer: Any = None,
    graphs: bool = False,
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
        raise ValueError(f"These heads do not support {', '.join(asked) or 'beam search'}")
    if any(hasattr(layer, "recurrent_states") for layer in getattr(cache, "layers", [])):
        raise ValueError("These heads need layers that can go back to an earlier token; this model's cannot")
    if not config.use_cache or (cache is not None and cache.is_compileable):
        raise ValueError("These heads need use_cache=True and a dynamic cache (no cache_implementation)")
    if cache is None:
        raise ValueError("These heads need a cache that can go back to an earlier token; this model's code keeps none")
    if (limit := turns_beyond(model.config)) is not None and config.max_length > limit:
        raise ValueError(
            f"These heads need at most {limit} tokens, prompt and new ones: then this model's positions turn"
        )
    if "prepare_inputs_for_generation" in vars(model):
        raise ValueError("These heads do not support inputs that another makes for the model, as PEFT's prompt tuning")
    keeps_past = hasattr(cache, "activate_past_recording")  # sliding windows keep what a crop may need
    if keeps_past:
        cache.activate_past_recording()
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    fills = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)  # else rows that end go on
    filler = config.pad_token_id if config.pad_token_id is not None else (ends[0] or 0)
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    finished = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    graphs = graphs and not (config.return_dict_in_generate or heads.waits) and _captured(model)
    hides = not (graphs and mask is not None and mask.all())
    guesses, pace = input_ids[:, :0], heads.pace(len(input_ids), graphs)
    fixed: FixedPasses | None = None
    forward = _Forward(model, heads.lm_head, cache_name)
    pace.begin()
    try:
        while not finished.all():
            started, size = time.perf_counter(), pace.choose()
            length, width = input_ids.shape[1], guesses.shape[1] + 1
            tokens = torch.cat([input_ids, guesses], 1)
            known = cache.get_seq_length() if fixed is None else length - 1
            passed: dict[str, Any] = {"input_ids": tokens[:, known:]}
            if positions is not None:
                ahead = torch.arange(1, tokens.shape[1] - positions.shape[1] + 1, device=positions.device)
                passed["position_ids"] = torch.cat([positions, positions[:, -1:] + ahead], 1)[:, known:]
            if "logits_to_keep" in inputs:
                passed["logits_to_keep"] = width
            seen = pad(mask, (0, tokens.shape[1] - mask.shape[1]), value=1) if mask is not None and hides else None
            if fixed is not None:
                timed = width in fixed.passes
                try:
                    logits, hidden = fixed.read(known, seen, passed)
                except Exception:  # as at the first pass: no memory for a graph of as many tokens
                    fixed = None
                    continue
            else:
                timed, trial = not graphs, None
                if graphs and known:
                    trial, graphs = _fixed_passes(forward, cache.layers, known, config.max_length), False
                logits, hidden = forward(cache, **passed, **({} if seen is None else {"attention_mask": seen}))
                if trial is not None:
                    fixed, heads.waits = trial if trial.agrees(hidden, known, seen, passed) else None, trial.waits
            logits = logits[:, -width:].to(input_ids.device, torch.float32, copy=True)
            hidden = hidden[:, -width:].to(heads.lm_head.weight.device)
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
            beyond = cache.get_seq_length() + 1 - input_ids.shape[1]  # guesses that are not in the text
            if beyond > 0 or (keeps_past and not beyond):
                cache.crop(-beyond)
            room = max(config.max_length - input_ids.shape[1] - 1, 0)
            guesses = heads.guess(hidden[:, accepted], chosen[-1], min(size, room)).to(input_ids.device)
            if known:  # not the prompt's own pass
                same = timed and width - 1 == guesses.shape[1]
                pace.saw(width - 1, range(accepted), time.perf_counter() - started if same else None)
            if fixed is not None and input_ids.shape[1] + guesses.shape[1] > fixed.slots:
                trial = _fixed_passes(forward, fixed.cache.layers, known, config.max_length)
                # asked anew, as a window may have been as long as the places
                fixed = trial if trial is not None and trial.agrees(hidden, known, seen, passed) else None
    finally:
        forward.remove()
    if streamer is not None:
        streamer.end()
    if config.return_dict_in_generate:
        return generation.GenerateDecoderOnlyOutput(sequences=input_ids, **{cache_name: cache})
    return input_ids
