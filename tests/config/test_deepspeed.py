"""DeepSpeed JSON: configs of other trainers, what the recipe fills in, and agreement with DeepSpeed's own schema."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from medusa_ds.config import deepspeed as ds_config
from medusa_ds.config.recipe import Recipe, shipped
from medusa_ds.errors import UserError

# transformers' documentation, deepspeed.md: ZeRO-3 with offload, everything left to the trainer
TRANSFORMERS_EXAMPLE = json.loads("""{
  "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2,
    "min_loss_scale": 1},
  "bf16": {"enabled": "auto"},
  "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
  "scheduler": {"type": "WarmupLR",
    "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"}},
  "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "pin_memory": true},
    "offload_param": {"device": "cpu", "pin_memory": true}, "overlap_comm": true, "contiguous_gradients": true,
    "sub_group_size": 1e9, "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto",
    "stage3_param_persistence_threshold": "auto", "stage3_max_live_parameters": 1e9, "stage3_max_reuse_distance": 1e9,
    "stage3_gather_16bit_weights_on_model_save": true},
  "gradient_accumulation_steps": "auto", "gradient_clipping": "auto", "steps_per_print": 2000,
  "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "wall_clock_breakdown": false
}""")


def load(place: Path, settings: Any, *overrides: str) -> Recipe:
    (place / "ds.json").write_text(json.dumps(settings))
    return Recipe.load("smollm2_135m_stage1", ["deepspeed=ds.json", "train.global_batch_size=8", *overrides])


def test_config_of_another_trainer_works_as_it_is(place):
    config = load(place, TRANSFORMERS_EXAMPLE).ds_config(world_size=2, on_gpu=True)
    assert config["train_batch_size"] == 8
    assert config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"] * 2 == 8
    assert config["gradient_clipping"] == 1.0
    assert config["bf16"]["enabled"] is True
    assert config["fp16"]["enabled"] is False
    assert "optimizer" not in config and "scheduler" not in config
    filled = ds_config.fill_sizes(config, hidden_size=64)
    assert "auto" not in json.dumps(filled)
    assert filled["zero_optimization"]["reduce_bucket_size"] == 64 * 64
    assert filled["zero_optimization"]["stage3_param_persistence_threshold"] == 640


@pytest.mark.parametrize(
    "section", ["optimizer", "scheduler", "bf16", "fp16", "tensorboard", "wandb", "zero_optimization"]
)
def test_auto_stands_for_a_whole_section(section, place):
    config = load(place, {section: "auto"}).ds_config(world_size=1, on_gpu=False)
    assert "auto" not in json.dumps(config)
    config = load(place, {"optimizer": {"params": "auto"}, "scheduler": {"params": "auto"}}).ds_config(1, False)
    assert "auto" not in json.dumps(config)
    for offload in ("auto", {"device": "auto"}, None):
        load(place, {"zero_optimization": {"stage": 1, "offload_optimizer": offload}})
        assert ds_config.zero_settings(ds_config.load(place / "ds.json")) == (1, False, False)


def test_what_is_switched_off_or_left_to_the_trainer_is_not_refused(place):
    """`amp` as transformers' documentation has it. Mutation: take `auto` for switched on."""
    off = {"amp": {"enabled": "auto", "opt_level": "auto"}, "sequence_parallel_size": 1}
    assert ds_config.fill_sizes(load(place, off).ds_config(1, on_gpu=True), hidden_size=64)["amp"] == {}


def test_offload_under_its_first_name_is_offload(place):
    """Mutation: hand it to DeepSpeed, which then refuses the optimizer that is not made for it."""
    config = load(place, {"zero_optimization": {"stage": 2, "cpu_offload": True}}).ds_config(1, on_gpu=True)
    assert ds_config.zero_settings(config) == (2, True, False)
    config = load(
        place, {"zero_optimization": {"stage": 3, "cpu_offload_param": True, "offload_param": None}}
    ).ds_config(1, on_gpu=True)
    assert ds_config.zero_settings(config) == (3, False, True)
    for off in (False, "auto"):
        config = load(place, {"zero_optimization": {"stage": 2, "cpu_offload": off}}).ds_config(1, on_gpu=True)
        assert ds_config.zero_settings(config) == (2, False, False)


def test_precision_follows_the_device(place):
    recipe = load(place, {"bfloat16": {"enabled": "auto"}})
    assert recipe.ds_config(1, on_gpu=True)["bf16"]["enabled"] is True
    assert recipe.ds_config(1, on_gpu=False)["bf16"]["enabled"] is False
    assert load(place, {}, "train.precision=fp32").ds_config(1, on_gpu=True)["bf16"]["enabled"] is False


def test_clipping_is_always_written(place):
    """DeepSpeed clips at 1.0 when the key is missing. Mutation: leave `gradient_clipping` out of `ds_values`."""
    assert load(place, {}, "train.max_grad_norm=0").ds_config(1, True)["gradient_clipping"] == 0.0


def test_equal_values_in_both_are_no_conflict(place):
    settings = {"train_batch_size": 8, "gradient_clipping": 1, "optimizer": {"params": {"lr": 0.002}}}
    load(place, settings, "train.lr=2e-3")


def test_ranks_that_do_not_divide_are_refused(place):
    with pytest.raises(UserError, match=r"found 8, which 3 ranks x train.micro_batch_size 2 do not divide"):
        load(place, {}).ds_config(world_size=3, on_gpu=True)
    with pytest.raises(UserError, match="gradient_accumulation_steps: found 4, but"):
        load(place, {"gradient_accumulation_steps": 4}).ds_config(world_size=2, on_gpu=True)


@pytest.mark.parametrize("file", sorted(shipped("ds_configs").glob("*.json")), ids=lambda file: file.stem)
def test_shipped_config_is_accepted_by_deepspeed(file):
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    config = Recipe.load("smollm2_135m_stage1", [f"deepspeed={file}"]).ds_config(1, True)
    zero = DeepSpeedZeroConfig(**ds_config.fill_sizes(config, 64)["zero_optimization"])
    assert f"zero{zero.stage}" in file.stem
    assert (zero.offload_optimizer is not None) == ("offload" in file.stem)


def test_known_keys_are_those_of_deepspeeds_models():
    """Read from source and imported. Mutation: leave out aliases, or a base class."""
    for name, (file, model) in ds_config._MODELS.items():
        module = importlib.import_module(f"deepspeed.runtime.{file.removesuffix('.py').replace('/', '.')}")
        fields = getattr(module, model).model_fields
        found = ds_config.section_keys(name)
        assert found.keys() == {name for key, field in fields.items() for name in (key, field.alias) if name}
        for key, field in fields.items():
            for kind in (bool, int, float):
                assert (found[key] in (kind.__name__, f"Optional[{kind.__name__}]")) == (
                    field.annotation in (kind, kind | None)
                )
