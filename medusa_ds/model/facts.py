"""What a model can do, found by asking it and not by its name, before its weights are loaded.

How logits come from hidden states is asked of the whole config on the meta device: all that stands before the LM head
is replaced by hidden states of our choice, so that the answer holds for the model's own sizes and costs little. The
rest is asked of a twin: the same config with fewer layers (of every kind that it has), narrower ones and a small
vocabulary, random weights everywhere, and windows that a dozen tokens cross.

Shapes: S tokens, H hidden size, V rows of the LM head.
"""

import functools
import itertools
import json
import re
import sys
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.integrations import deepspeed
from transformers.modeling_outputs import BaseModelOutputWithPast

from medusa_ds.errors import UserError, one_line
from medusa_ds.model.attention import hidden_states
from medusa_ds.model.projection import Logits
from medusa_ds.model.rope import turns_beyond

_VOCAB, _WINDOW, _HEAD_SIZE, _EXPERTS, _MOST_PARAMETERS = 160, 6, 8, 16, 200_000_000  # of a twin
_WIDTH = re.compile(r"(size|dim|rank|width|channels|_embd|inner|d_ff|dff|d_model|d_state|d_head|d_ssm|d_rel)$|^dim_")
_NO_WIDTH = re.compile(r"vocab|kernel|chunk|window|block|conv|group|patch|batch|ngram|multiple|base|position")
_PERIOD = re.compile(r"period|interval|pattern|every|step|first_k|num_dense|group_size|offset")
_SAYS_NOTHING = ("dtype", "architectures", "transformers_version", "_name_or_path", "use_cache")  # of the computation


class Facts(NamedTuple):
    """What was found.

    Attributes:
        logits: how they come from hidden states.
        attention: the implementation that the model attends with.
        packing: why documents that share a sequence are not kept apart; None: their position ids keep them apart.
        limit: the first position that the model has no place for, or that turns all others; None: there is none.
    """

    logits: Logits
    attention: str
    packing: str | None
    limit: int | None


class Asked(NamedTuple):
    """Whom to ask: a causal language model's config.

    `attention`: None for what transformers chooses. `remote_code`: whether code that lies with the config may run.
    """

    config: PretrainedConfig
    attention: str | None = None
    remote_code: bool = False

    def __hash__(self) -> int:
        return hash(self._key())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Asked) and self._key() == other._key()

    def _key(self) -> str:
        fields = {name: value for name, value in self.config.to_dict().items() if name not in _SAYS_NOTHING}
        return json.dumps([fields, self.attention], default=str, sort_keys=True)

    def build(self, config: PretrainedConfig) -> PreTrainedModel:
        """A model of this or a smaller config, on the default device, in fp32."""
        options = {"attn_implementation": self.attention, "trust_remote_code": self.remote_code}
        zero3 = deepspeed._hf_deepspeed_config_weak_ref  # under which transformers would partition this one too
        deepspeed.unset_hf_deepspeed_config()
        try:
            # of a copy, since some families write the attention into the config that they are given
            model: PreTrainedModel = AutoModelForCausalLM.from_config(deepcopy(config), dtype=torch.float32, **options)
        finally:
            deepspeed._hf_deepspeed_config_weak_ref = zero3
        return model.eval()


@functools.cache
def find_facts(asked: Asked) -> Facts:
    """Ask a model, which takes a second or a few.

    Raises:
        UserError: heads cannot be trained on it: its logits are no product of hidden states and a matrix, an earlier
            token sees a later one, or no small model can be made of the config.
    """
    logits = find_logits(asked._replace(attention=None))  # they do not depend on attention
    if asked.attention is None:  # one answer for both ways to ask
        with torch.device("meta"):
            chosen = asked.build(asked.config).config._attn_implementation
        return find_facts(asked._replace(attention=chosen))
    twin = build_twin(asked)
    with torch.no_grad():
        _check_hidden_states(asked, twin)
        return Facts(logits, asked.attention, _why_not_packed(twin), _find_limit(twin))


@functools.cache
@torch.no_grad()
def find_logits(asked: Asked) -> Logits:
    """How a model's logits come from its hidden states.

    Raises:
        UserError: not as `Logits` says, to rounding, or from rows of another size than the config's `hidden_size`.
    """
    kind = asked.config.model_type
    problem = UserError(f"model.name: logits of {kind} are not its hidden states times a matrix; heads need that")
    try:
        with torch.device("meta"):
            model = asked.build(asked.config)
    except Exception as error:
        raise UserError(f"model.name: {kind} cannot be made of its config ({one_line(error, 150)})") from None
    lm_head: Any = model.get_output_embeddings()
    if not isinstance(lm_head, nn.Linear):
        raise problem
    generator, width = torch.Generator().manual_seed(0), lm_head.in_features
    size = getattr(asked.config.get_text_config(), "hidden_size", width)
    if width != size:
        raise UserError(f"model.name: the LM head of {kind} reads rows of {width}; heads need its hidden_size, {size}")
    hidden_SH = torch.randn(4, width, generator=generator, dtype=torch.float64) * width**-0.5
    biased, rows = lm_head.bias is not None, lm_head.out_features

    def logits_of(hidden_SH: Tensor) -> Tensor:
        for module in model.modules():
            if isinstance(module, PreTrainedModel) and module is not model:
                module.forward = lambda *_, **__: _Output(last_hidden_state=hidden_SH[None])
        try:
            return model(input_ids=torch.zeros(1, len(hidden_SH), dtype=torch.long)).logits[0].to(hidden_SH.dtype)
        except Exception:  # whatever a model may raise whose parts do not fit together otherwise
            raise problem from None

    if logits_of(hidden_SH.to("meta")).shape != (4, rows):
        raise problem
    lm_head.weight = nn.Parameter(torch.randn(8, width, generator=generator, dtype=torch.float64))
    if biased:
        lm_head.bias = nn.Parameter(torch.randn(8, generator=generator, dtype=torch.float64))
    found_S8, far_S8, zero_8 = (logits_of(scale * hidden_SH) for scale in (1.0, 1e6, 0.0))
    if found_S8.is_meta:
        raise problem
    cap = float(far_S8.abs().max())
    capped = cap < 1e4
    product_S8 = hidden_SH @ lm_head.weight.T
    if capped:
        found_S8, zero_8 = cap * (found_S8 / cap).atanh(), cap * (zero_8 / cap).atanh()
    factor = float(((found_S8 - zero_8) * product_S8).sum() / product_S8.square().sum())
    found = Logits(1.0 if abs(factor - 1) < 1e-5 else factor, cap if capped else None, biased)
    if differ(found.of(hidden_SH, lm_head.weight, lm_head.bias), logits_of(hidden_SH)) or factor <= 0:
        raise problem
    return found


class _Output(BaseModelOutputWithPast):
    """A base model's output, with nothing in what else its causal language model may read."""

    def __getattr__(self, _: str) -> None:
        return None


@torch.no_grad()
def build_twin(asked: Asked) -> PreTrainedModel:
    """A small model of the same kind: few layers, as narrow as it runs; where it has to have all layers, all.

    Raises:
        UserError: none can be made.
    """
    text, divides = asked.config.get_text_config(), [1]
    size = _head_size(text)
    while size % (2 * divides[0]) == 0 and size // (2 * divides[0]) >= _HEAD_SIZE:
        divides.insert(0, 2 * divides[0])
    problem = ""
    with torch.random.fork_rng([]):
        for few, divide in itertools.product((True, False), divides):
            try:
                small = _shrunk(asked.config, divide, few)
                with torch.device("meta"):
                    if sum(p.numel() for p in asked.build(small).parameters()) > _MOST_PARAMETERS:
                        problem = problem or "a narrower one does not run, and this one is too large"
                        break
                torch.manual_seed(0)
                twin = asked.build(small)
                for parameter in twin.parameters():
                    width = 0.1 if parameter.dim() < 2 else 0.5 * parameter.shape[-1] ** -0.5
                    parameter.add_(torch.randn_like(parameter) * width)
                hidden_states(twin, *tokens_of_documents(3))
                return twin
            except Exception as error:  # whatever a model may raise whose sizes do not fit together
                problem = problem or one_line(error, 150)
    raise UserError(f"model.name: no small {asked.config.model_type} can be made of its config to be asked ({problem})")


def _head_size(text: Any) -> int:
    try:
        return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    except (AttributeError, RuntimeError):  # none, or one for each layer
        return 64


def _shrunk(config: PretrainedConfig, divide: int, few: bool) -> PretrainedConfig:
    """The config with every kind of its layers, but few of them, and with widths divided."""
    layers, fields = getattr(config, "num_hidden_layers", 0), config.to_dict()
    fewest, positions = 2, fields.get("max_position_embeddings") or sys.maxsize
    for name, value in fields.items():
        if isinstance(value, list) and len(value) == layers and value != list(range(layers)):
            fewest = max(fewest, max(map(value.index, value)) + 1)
        elif type(value) is int and "layers_per_stack" in name:  # which is run layers // value times
            fewest = max(fewest, layers // value)
        elif type(value) is int and _PERIOD.search(name) and fewest <= value < layers:
            fewest = value + 1
    fewest = min(fewest, layers) if few else layers

    def small(name: str, value: Any) -> Any:
        if name in config.sub_configs and value is not None:
            return _shrunk(getattr(config, name), divide, few).to_dict()
        if isinstance(value, dict):
            kept = {key: part for key, part in value.items() if not str(key).isdigit() or int(key) < fewest}
            return {key: small(str(key), part) for key, part in kept.items()}
        if name.endswith("token_id"):
            return None if value is None else 0
        if isinstance(value, list):
            return value[:fewest] if len(value) == layers else value[:: divide if name.endswith("_factor") else 1]
        if type(value) is not int:
            return value
        if "vocab" in name:
            return _VOCAB if name == "vocab_size" else min(value, _VOCAB)
        if name in ("attention_chunk_size", "index_topk") or ("window" in name and "layer" not in name):
            return value if value >= positions else min(value, _WINDOW)
        if "expert" in name and not _WIDTH.search(name):
            return _EXPERTS if value > _EXPERTS and value % _EXPERTS == 0 else value
        if "layers_per_stack" in name:
            return value * fewest // layers
        if "layer" in name and value > fewest:
            return fewest if value == layers else fewest // 2
        wide = _WIDTH.search(name) and not _NO_WIDTH.search(name) and value > 2 * divide and value % divide == 0
        return value // divide if wide else value

    fields = {name: small(name, value) for name, value in fields.items() if name not in ("dtype", "model_type")}
    name = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    return type(config).from_dict({**fields, name: fewest} if name in fields else fields)


def tokens_of_documents(*lengths: int) -> tuple[Tensor, Tensor]:
    """Random tokens [1, S] and positions [1, S] of documents that share a sequence."""
    ids = torch.randint(1, _VOCAB // 2, (1, sum(lengths)), generator=torch.Generator().manual_seed(0))
    return ids, torch.cat([torch.arange(length) for length in lengths])[None]


def differ(found: Tensor, wanted: Tensor) -> bool:
    """Whether numbers differ by more than rounding in fp32."""
    return not torch.allclose(found, wanted, rtol=0, atol=2e-4 * float(wanted.abs().max()))


def _check_hidden_states(asked: Asked, twin: PreTrainedModel) -> None:
    """See that no token sees a later one, and that the model's own logits come from the base model's hidden states."""
    kind, (ids, positions) = asked.config.model_type, tokens_of_documents(12)
    hidden_SH, later = hidden_states(twin, ids, positions), ids.clone()
    later[0, -1] += 1
    if differ(hidden_states(twin, later, positions)[:-1], hidden_SH[:-1]):
        raise UserError(f"model.name: in {kind} tokens see later ones; heads need a causal language model")
    lm_head: Any = twin.get_output_embeddings()
    small = find_logits(asked._replace(config=twin.config))  # a factor may depend on sizes
    if differ(twin(input_ids=ids, use_cache=False).logits[0], small.of(hidden_SH, lm_head.weight, lm_head.bias)):
        raise UserError(f"model.name: logits of {kind} do not come from its base model's hidden states alone")


def _why_not_packed(twin: PreTrainedModel) -> str | None:
    lengths = (13, 9, 14)
    ids, packed = tokens_of_documents(*lengths)
    parts = zip(ids.split(lengths, 1), packed.split(lengths, 1), strict=True)
    if not differ(hidden_states(twin, ids, packed), torch.cat([hidden_states(twin, *part) for part in parts])):
        return None
    return f"{twin.config.model_type} does not keep documents of one sequence apart by their position ids"


def _find_limit(twin: PreTrainedModel) -> int | None:
    """See `Facts`; positions beyond a table of them raise an error on the CPU."""
    limit, most = turns_beyond(twin.config), getattr(twin.config.get_text_config(), "max_position_embeddings", None)
    if most and limit is None:
        try:
            hidden_states(twin, *(part + at for part, at in zip(tokens_of_documents(3), (0, most), strict=True)))
        except (IndexError, RuntimeError):
            return most
    return limit


def describe(facts: Facts) -> list[str]:
    """Lines on a model for people."""
    logits, (first, then) = facts.logits, ("one conversation a sequence", "conversations share sequences")
    parts = [f"times {logits.factor:g}" if logits.factor != 1 else "", "with a bias" if logits.bias else ""]
    parts += [f"capped at {logits.cap:g}" if logits.cap else ""]
    return [
        "logits: hidden states times the LM head" + "".join(f", {part}" for part in parts if part),
        f"packing: {first}, since {facts.packing}" if facts.packing else f"packing: {then}",
        f"attention: {facts.attention}" + (f"; texts of up to {facts.limit} tokens" if facts.limit else ""),
    ]
