"""DeepSpeed JSON: read strictly, merged with what the recipe owns.

The recipe owns batch sizes, accumulation, precision, clipping, optimizer, schedule, seed and monitors; the JSON owns
ZeRO, offload, buckets and the rest. `"auto"` in the JSON is filled from the recipe, so that a config written for
another trainer works as it is; a value set in both that differs is an error that names both files. DeepSpeed 0.19.8
takes unknown keys, `stage: "2"` and a clipping of -1 without a word, so they are refused here.
"""

import difflib
from pathlib import Path
from typing import Any

from medusa_ds.config_files import read_json
from medusa_ds.errors import UserError

# deepspeed/runtime/config.py and constants.py of 0.19.8
TOP_LEVEL = set(
    "activation_checkpointing aio amp autotuning bf16 bfloat16 checkpoint comms_logger communication_data_type "
    "compression_training csv_monitor curriculum_learning data_efficiency data_types dataloader_drop_last "
    "disable_allgather dump_state eigenvalue elasticity flops_profiler fp16 gradient_accumulation_steps "
    "gradient_clipping gradient_predivide_factor graph_harvesting hybrid_engine load_universal_checkpoint "
    "memory_breakdown nebula optimizer pipeline prescale_gradients progressive_layer_drop quantize_training "
    "scheduler seed seq_parallel_communication_data_type sequence_parallel_size sparse_attention sparse_gradients "
    "steps_per_print tensorboard tensor_parallel timers torch_autocast train_batch_size "
    "train_micro_batch_size_per_gpu use_data_before_expert_parallelism wall_clock_breakdown wandb weight_quantization "
    "zero_allow_comm_data_type_override zero_allow_untested_optimizer zero_force_ds_cpu_optimizer zero_optimization"
    .split()
)  # fmt: skip
# deepspeed/runtime/zero/config.py: DeepSpeedZeroConfig
ZERO = set(
    "allgather_bucket_size allgather_partitions allgather_sequential contiguous_gradients cpu_offload "
    "cpu_offload_param cpu_offload_use_pin_memory elastic_checkpoint enable_sanity_checks gather_16bit_weights_on_model_save "
    "ignore_unused_parameters leaf_module legacy_stage1 load_from_fp32_weights log_trace_cache_warnings "
    "max_live_parameters max_reuse_distance memory_efficient_linear mics_hierarchical_params_gather mics_shard_size "
    "model_persistence_threshold module_granularity_threshold offload_optimizer offload_param override_module_apply "
    "overlap_comm param_persistence_threshold pipeline_loading_checkpoint prefetch_bucket_size reduce_bucket_size "
    "reduce_scatter round_robin_gradients stage stage3_gather_16bit_weights_on_model_save "
    "stage3_gather_fp16_weights_on_model_save stage3_allgather_sequential stage3_max_live_parameters "
    "stage3_max_reuse_distance stage3_model_persistence_threshold stage3_module_granularity_threshold "
    "stage3_param_persistence_threshold stage3_prefetch_bucket_size stage3_use_all_reduce_for_fetch_params "
    "sub_group_size use_all_reduce_for_fetch_params use_multi_rank_bucket_allreduce zero_hpz_partition_size "
    "zero_quantized_gradients zero_quantized_nontrainable_weights zero_quantized_weights zeropp_loco_param".split()
)
_NUMBERS = {"gradient_clipping": "a number of at least 0", "train_batch_size": "a whole number of at least 1",
            "train_micro_batch_size_per_gpu": "a whole number of at least 1",
            "gradient_accumulation_steps": "a whole number of at least 1"}  # fmt: skip


def load(path: Path) -> dict[str, Any]:
    """Read a DeepSpeed JSON file and refuse what DeepSpeed would ignore or misread.

    Raises:
        UserError: all problems of the file.
    """
    settings = read_json(path)
    if not isinstance(settings, dict):
        raise UserError(f"{path}: found {type(settings).__name__}; a DeepSpeed config is a JSON object")
    problems = [_unknown(path, key, TOP_LEVEL) for key in settings if key not in TOP_LEVEL]
    zero = settings.get("zero_optimization", {})
    if not isinstance(zero, dict):
        problems.append(f"{path}: zero_optimization: found {zero!r}; allowed is an object")
        zero = {}
    problems += [_unknown(path, key, ZERO, "zero_optimization.") for key in zero if key not in ZERO]
    stage = zero.get("stage", 0)
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3) or not isinstance(stage, int):
        problems.append(f"{path}: zero_optimization.stage: found {stage!r}; allowed is 0, 1, 2 or 3")
    for key, allowed in _NUMBERS.items():
        value, low = settings.get(key, "auto"), 0 if key == "gradient_clipping" else 1
        kinds = (int, float) if key == "gradient_clipping" else (int,)
        if value != "auto" and (isinstance(value, bool) or not isinstance(value, kinds) or value < low):
            problems.append(f'{path}: {key}: found {value!r}; allowed is {allowed}, or "auto"')
    for key in ("bf16", "fp16", "optimizer", "scheduler", "tensorboard", "wandb"):
        if not isinstance(settings.get(key, {}), dict):
            problems.append(f"{path}: {key}: found {settings[key]!r}; allowed is an object")
    if isinstance(settings.get("wandb"), dict) and "api_key" in settings["wandb"]:
        problems.append(f"{path}: wandb.api_key: secrets come from the environment; set WANDB_API_KEY instead")
    if problems:
        raise UserError(*problems)
    return settings


def resolve(
    settings: dict[str, Any], path: Path, owned: dict[str, Any], recipe_file: Path | None
) -> dict[str, Any]:
    """Merge a DeepSpeed JSON with the recipe's values.

    Args:
        settings: what `load` returned.
        path: its file, for messages.
        owned: the recipe's values by dotted DeepSpeed key.
        recipe_file: the recipe, for messages.

    Returns:
        The config for `deepspeed.initialize`, free of `"auto"` where the recipe owns the value; sizes that follow
        from the model (`"auto"` in `zero_optimization`) stay for `fill_sizes`.

    Raises:
        UserError: all keys set in both that differ.
    """
    merged = {key: dict(value) if isinstance(value, dict) else value for key, value in settings.items()}
    problems = []
    for key, value in owned.items():
        *parents, last = key.split(".")
        target = merged
        for part in parents:
            target = target.setdefault(part, {})
        found = target.get(last, "auto")
        if found != "auto" and found != value:
            owner = f"{recipe_file or 'the recipe'} says {value!r} ({_RECIPE_KEYS.get(key, key)})"
            problems.append(f'{path}: {key}: found {found!r}, but {owner}; make them equal or write "auto"')
        target[last] = value
    schedule = settings.get("scheduler", {})
    given = {k: v for k, v in schedule.get("params", {}).items() if v != "auto"}
    if given:
        names = ", ".join(f"scheduler.params.{name}" for name in given)
        problems.append(f'{path}: {names}: the recipe owns the schedule (train.schedule, train.warmup_ratio); '
                        'write "auto" or remove the scheduler')  # fmt: skip
    if problems:
        raise UserError(*problems)
    merged.pop("scheduler", None)
    merged.pop("optimizer", None)
    return merged


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
    return _without_auto(config, sizes)


def _without_auto(node: Any, sizes: dict[str, int]) -> Any:
    if not isinstance(node, dict):
        return node
    filled = {key: sizes[key] if value == "auto" and key in sizes else value for key, value in node.items()}
    return {key: _without_auto(value, sizes) for key, value in filled.items() if value != "auto"}


def _unknown(path: Path, key: str, known: set[str], prefix: str = "") -> str:
    near = difflib.get_close_matches(key, known, 1)
    return f"{path}: {prefix}{key}: unknown key" + (f"; did you mean {near[0]}?" if near else "; remove it")


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
    "optimizer.params.lr": "train.lr",
    "optimizer.params.betas": "train.betas",
    "optimizer.params.eps": "train.eps",
    "optimizer.params.weight_decay": "train.weight_decay",
}
