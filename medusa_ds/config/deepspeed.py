"""DeepSpeed JSON: read strictly, merged with what the recipe owns.

The recipe owns batch sizes, accumulation, precision, clipping, optimizer, schedule, seed and monitors; the JSON owns
ZeRO, offload, buckets and the rest. `"auto"` in the JSON is filled from the recipe, so that a config written for
another trainer works as it is; a value set in both that differs is an error that names both files. DeepSpeed 0.19.8
takes unknown keys, `stage: "2"` and a clipping of -1 without a word, so they are refused here, as are features that
would change what a step computes.
"""

import ast
import difflib
import functools
import importlib.util
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from medusa_ds.config.parsing import read_object, redact, secret_keys
from medusa_ds.errors import UserError

# by hand: DeepSpeed has no model of the top level (runtime/config.py and constants.py of 0.19.8)
TOP_LEVEL = set(
    "activation_checkpointing aio bf16 bfloat16 checkpoint comet comms_logger communication_data_type compile "
    "csv_monitor data_types dataloader_drop_last disable_allgather disable_python_gc dump_state flops_profiler fp16 "
    "gradient_accumulation_steps gradient_allreduce_op gradient_clipping gradient_predivide_factor graph_harvesting "
    "log_level memory_breakdown nebula optimizer prescale_gradients scheduler seed "
    "steps_per_print tensorboard timers train_batch_size "
    "train_micro_batch_size_per_gpu wall_clock_breakdown wandb zero_allow_comm_data_type_override "
    "zero_allow_untested_optimizer zero_force_ds_cpu_optimizer zero_optimization".split()
)
# Change what a step computes, or belong to another way of training; harmless when switched off.
_REFUSED = set(
    "amp autotuning compression_training curriculum_learning data_efficiency eigenvalue elasticity expert_parallel "
    "hybrid_engine load_universal_checkpoint managed_gradient_accumulation pipeline progressive_layer_drop "
    "quantize_training sequence_parallel_size seq_parallel_communication_data_type sparse_attention sparse_gradients "
    "tensor_parallel torch_autocast use_data_before_expert_parallelism "
    "weight_quantization".split()
)
_MODELS = {
    "zero_optimization": ("zero/config.py", "DeepSpeedZeroConfig"),
    "zero_optimization.offload_param": ("zero/offload_config.py", "DeepSpeedZeroOffloadParamConfig"),
    "zero_optimization.offload_optimizer": ("zero/offload_config.py", "DeepSpeedZeroOffloadOptimizerConfig"),
    "zero_optimization.zenflow": ("zenflow/zenflow_config.py", "ZenFlowConfig"),
    "bf16": ("precision_config.py", "DeepSpeedBF16Config"),
    "fp16": ("precision_config.py", "DeepSpeedFP16Config"),
}
_OTHERS = {
    "bfloat16": {"enabled": "bool"},
    "optimizer": {"type": "str", "params": "dict", "legacy_fusion": "bool"},
    "scheduler": {"type": "str", "params": "dict"},
    "tensorboard": {"enabled": "bool", "output_path": "str", "job_name": "str"},
    "csv_monitor": {"enabled": "bool", "output_path": "str", "job_name": "str"},
    "wandb": {"enabled": "bool", "group": "str", "team": "str", "project": "str"},
}
_HOLDERS = {name.rpartition(".")[2] for name in (*_MODELS, *_OTHERS)} | {"params", "device"}
"""Keys where `"auto"` is as good as nothing; elsewhere it is a value that follows from the recipe or the model."""


def load(path: Path) -> dict[str, Any]:
    """Read a DeepSpeed JSON file, without whole sections that are `"auto"`, and refuse what DeepSpeed would misread.

    Raises:
        UserError: all problems of the file.
    """
    settings = read_object(path)
    problems = [
        f"{path}: {key}: looks like a secret (not shown); secrets come from the environment, as in WANDB_API_KEY"
        for key in secret_keys(settings)
    ]
    problems += [redact(f"{path}: {text}") for text in _problems(settings)]
    if problems:
        raise UserError(*problems)
    settings = _without_auto(settings)
    zero = settings.get("zero_optimization", {})
    for old, key in (("cpu_offload", "offload_optimizer"), ("cpu_offload_param", "offload_param")):
        if zero.pop(old, None) is True:  # names of DeepSpeed's first versions
            zero[key] = zero.get(key) or {"device": "cpu"}
    return settings


def _without_auto(node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    return {key: _without_auto(value) for key, value in node.items() if value != "auto" or key not in _HOLDERS}


def _problems(settings: dict[str, Any]) -> Iterator[str]:
    for key, value in settings.items():
        if key not in _REFUSED:
            yield from _unknown(key, TOP_LEVEL)
        elif not _is_off(value) and (key, value) != ("sequence_parallel_size", 1):
            yield f"{key}: is not supported here; remove it"
    if settings.get("gradient_allreduce_op", "mean") != "mean":
        yield f"gradient_allreduce_op: found {settings['gradient_allreduce_op']!r}; allowed is mean"
    every = settings.get("steps_per_print", "auto")
    if every != "auto" and not (type(every) in (int, float) and every >= 1):  # 1e5 is usual in published configs
        yield f'steps_per_print: found {every!r}; allowed is a number of at least 1, or "auto"'
    for name in (*_MODELS, *_OTHERS):
        holder: Any = settings
        for part in name.split("."):
            holder = holder.get(part, {}) if isinstance(holder, dict) else {}
        if holder == "auto" or (holder is None and "." in name):
            continue
        if not isinstance(holder, dict):
            yield f"{name}: found {holder!r}; allowed is an object"
            continue
        known = section_keys(name)
        for key, value in holder.items():
            yield from _unknown(key, known, f"{name}.")
            allowed = _refusal(name, key, value, known.get(key, ""))
            if allowed:
                yield f"{name}.{key}: found {value!r}; {allowed}"
        if holder.get("device") == "nvme":
            if settings["zero_optimization"].get("stage") != 3:  # ZeRO 1 and 2 would take the CPU's memory
                yield f"{name}.device: found 'nvme' without stage 3; allowed is none or cpu, or set stage to 3"
            if not isinstance(holder.get("nvme_path"), str):
                yield f"{name}.nvme_path: found no directory; name one on the NVMe disk"


@functools.cache
def section_keys(name: str) -> dict[str, str]:
    """The keys of a section and their types, as the installed DeepSpeed's own pydantic model says.

    They are read from its source: importing DeepSpeed takes seconds and imports torch. Of strings for numbers, which
    these models take, `load` makes mistakes.
    """
    if name in _OTHERS:
        return _OTHERS[name]
    file, model = _MODELS[name]
    package = importlib.util.find_spec("deepspeed")
    assert package is not None and package.origin is not None
    source = (Path(package.origin).parent / "runtime" / file).read_text(encoding="utf-8")
    body = next(item.body for item in ast.parse(source).body if isinstance(item, ast.ClassDef) and item.name == model)
    keys: dict[str, str] = {}
    for field in body:
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            options = field.value.keywords if isinstance(field.value, ast.Call) else []
            aliases = [option.value.value for option in options if option.arg == "alias"]  # type: ignore[attr-defined]
            keys |= dict.fromkeys([field.target.id, *aliases], ast.unparse(field.annotation))
    return keys


def _refusal(section: str, key: str, value: Any, kind: str) -> str | None:
    """What is allowed in place of a value that DeepSpeed would ignore or misread."""
    kind = kind.removeprefix("Optional[").removesuffix("]")
    if (section, key) == ("zero_optimization", "stage"):
        return None if type(value) is int and value in range(4) else "allowed is 0, 1, 2 or 3"
    if key == "zero_hpz_partition_size" and value not in (1, "auto"):
        return (
            "allowed is 1: DeepSpeed makes the groups for more in one of a model's parts and refuses them in the next"
        )
    if key == "compute_grad_norm" and value is False:
        return "clipping and the reported gradient norm need it: remove it"
    if key == "device":
        return None if value in ("none", "cpu", "nvme", "auto") else "allowed is none, cpu or nvme"
    if value == "auto":
        return None
    if kind == "bool" and not isinstance(value, bool):
        return 'allowed is true, false or "auto"'
    is_size = type(value) in (int, float) and value >= 0 and value == int(value)  # 5e8 is usual in published configs
    if kind == "int" and not is_size:
        return 'allowed is a whole number of at least 0, or "auto"'
    if kind == "float" and type(value) not in (int, float):
        return 'allowed is a number, or "auto"'
    return "allowed is an object" if kind == "dict" and not isinstance(value, dict) else None


def _is_off(value: Any) -> bool:
    if isinstance(value, dict):
        return not value or value.get("enabled") in (False, "auto")
    return value in (None, "auto") or value is False  # 0 is a size that DeepSpeed divides by


def resolve(settings: dict[str, Any], path: Path, owned: dict[str, Any], recipe_file: Path | None) -> dict[str, Any]:
    """Merge the values that the recipe owns, by dotted DeepSpeed key, into a DeepSpeed JSON, as `load` returned it.

    Returns:
        The config for `deepspeed.initialize`, free of `"auto"` where the recipe owns the value; sizes that follow
        from the model (`"auto"` in `zero_optimization`) stay for `fill_sizes`. It holds no optimizer and no scheduler:
        the engine builds them from the recipe.

    Raises:
        UserError: all keys set in both that differ, with the two files.
    """
    if "bfloat16" in settings:  # DeepSpeed's old name of the section
        settings.setdefault("bf16", settings.pop("bfloat16"))
    owner = str(recipe_file or "the recipe")
    problems = []
    for key, value in owned.items():
        *parents, last = key.split(".")
        target = settings
        for part in parents:
            target = target.setdefault(part, {})
        found = target.get(last, "auto")
        if found != "auto" and (found != value or isinstance(found, bool) != isinstance(value, bool)):  # true is 1
            problems.append(
                f"{path}: {key}: found {found!r}, but {owner} has {value!r} ({_RECIPE_KEYS.get(key, 'fixed')}); "
                'make them equal or write "auto"'
            )
        target[last] = value
    known = {key.rpartition(".")[2] for key in owned if key.startswith("optimizer.params.")}
    for name, setting in (("optimizer", "train.lr, train.betas, ..."), ("scheduler", "train.schedule, ...")):
        params = settings.get(name, {}).get("params", {})
        given = [f"{name}.params.{key}" for key, value in params.items() if value != "auto" and key not in known]
        if given:
            problems.append(
                f'{path}: {", ".join(given)}: the {name} is {owner}\'s ({setting}); remove the key or write "auto"'
            )
    steps, batch = settings.get("gradient_accumulation_steps", "auto"), owned["train_batch_size"]
    micro = owned["train_micro_batch_size_per_gpu"]  # as long as the ranks are not known, some number has to fit
    if steps != "auto" and not (type(steps) is int and steps >= 1 and batch % (micro * steps) == 0):
        problems.append(
            f"{path}: gradient_accumulation_steps: found {steps!r}, with which train.global_batch_size {batch} and "
            f'train.micro_batch_size {micro} of {owner} fit no number of ranks; write "auto"'
        )
    if problems:
        raise UserError(*problems)
    settings.pop("scheduler", None)
    settings.pop("optimizer", None)
    return settings


def fill_sizes(config: dict[str, Any], hidden_size: int) -> dict[str, Any]:
    """Replace `"auto"` bucket sizes by what follows from the hidden size, as transformers does.

    `reduce_bucket_size` = H^2, `stage3_prefetch_bucket_size` = 0.9 H^2, `stage3_param_persistence_threshold` = 10 H;
    any other `"auto"` is dropped, so that DeepSpeed's default holds.
    """
    sizes = {
        "reduce_bucket_size": hidden_size * hidden_size,
        "allgather_bucket_size": 5 * 10**8,
        "stage3_prefetch_bucket_size": int(0.9 * hidden_size * hidden_size),
        "stage3_param_persistence_threshold": 10 * hidden_size,
    }

    def filled(node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        known = {key: sizes.get(key, value) if value == "auto" else value for key, value in node.items()}
        return {key: filled(value) for key, value in known.items() if value != "auto"}

    return filled(config)


def clips_in_adam(config: dict[str, Any]) -> bool:
    """Whether PyTorch's fused AdamW clips: under ZeRO 2, whose reduced gradients are on the device before the step."""
    zero = zero_settings(config)
    return zero.stage == 2 and not zero.offloads_optimizer


class Zero(NamedTuple):
    """The ZeRO stage, and what lives in CPU memory or on a disk."""

    stage: int
    offloads_optimizer: bool = False
    offloads_parameters: bool = False


def zero_settings(config: dict[str, Any]) -> Zero:
    """What a DeepSpeed config says of ZeRO."""
    offloads = (device != "none" for device in offload_devices(config).values())
    return Zero((config.get("zero_optimization") or {}).get("stage", 0), *offloads)


def offload_devices(config: dict[str, Any]) -> dict[str, str]:
    """Where a DeepSpeed config puts the optimizer and the parameters, by its key: none, cpu or nvme."""
    zero = config.get("zero_optimization") or {}
    return {key: (zero.get(key) or {}).get("device", "none") for key in ("offload_optimizer", "offload_param")}


def _unknown(key: str, known: Collection[str], prefix: str = "") -> Iterator[str]:
    if key not in known:
        near = difflib.get_close_matches(key, known, 1)
        yield f"{prefix}{key}: unknown key; " + (f"did you mean {near[0]}?" if near else "remove it")


_RECIPE_KEYS = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size / (train.micro_batch_size x ranks)",
    "gradient_clipping": "train.max_grad_norm",
    "bf16.enabled": "train.precision",
    "fp16.enabled": "train.precision",
    "seed": "train.seed",
    "tensorboard.enabled": "train.tensorboard",
    "wandb.enabled": "train.wandb",
    "wandb.project": "train.wandb.project",
    "wandb.group": "train.wandb.group",
    "optimizer.type": "AdamW is the only optimizer",
    "optimizer.params.lr": "train.lr",
    "optimizer.params.betas": "train.betas",
    "optimizer.params.eps": "train.eps",
    "optimizer.params.weight_decay": "train.weight_decay",
}
