"""What the engine adds to a DeepSpeed config, and where its heads begin."""

from contextlib import nullcontext

import pytest
import torch
from worker import GLOBAL_BATCH, make_recipe

from medusa_ds.config.deepspeed import clips_in_adam
from medusa_ds.config.recipe import Recipe
from medusa_ds.heads.files import load_heads
from medusa_ds.training.build import build_model, complete_config


@pytest.mark.parametrize(
    ("zero", "micro_batch", "found"),
    [("zero2", 1, "fp32"), ("zero2", GLOBAL_BATCH, None), ("zero3", 1, "fp32"), ("zero0", 1, None)],
)
def test_only_several_micro_batches_are_added_up_in_fp32(tmp_path, zero, micro_batch, found):
    """Mutation: leave DeepSpeed's default, bf16, or copy the gradients of a single micro-batch to fp32."""
    recipe = make_recipe(tmp_path, zero, train={"precision": "bf16", "micro_batch_size": micro_batch})
    config = complete_config(recipe.ds_config(1, on_gpu=True), recipe)
    assert config.get("data_types", {}).get("grad_accum_dtype") == found


@pytest.mark.parametrize("zero", ["zero0", "zero1", "zero2", "zero3", "zero2_offload"])
def test_clipping_is_either_deepspeeds_or_adams(tmp_path, zero):
    """Mutation: switch DeepSpeed's norm off where `MedusaEngine` does not ask for its own."""
    recipe = make_recipe(tmp_path, zero, train={"precision": "bf16"})
    config = complete_config(recipe.ds_config(1, on_gpu=True), recipe)
    by_adam = zero == "zero2"
    assert clips_in_adam(config) == by_adam
    assert config["gradient_clipping"] == (0.0 if by_adam else 1.0)
    assert config["zero_optimization"].get("compute_grad_norm", True) != by_adam
    assert config["bf16"].get("check_grad_overflow", True) != by_adam


def test_events_for_tensorboard_lie_in_a_folder_of_that_name(tmp_path):
    recipe = make_recipe(tmp_path, train={"tensorboard": True})
    found = complete_config(recipe.ds_config(1, on_gpu=False), recipe)["tensorboard"]
    assert found == {"enabled": True, "output_path": str(tmp_path), "job_name": "tensorboard"}


def test_stage_1_begins_with_the_heads_of_a_finished_run(tiny_recipe, make_run):
    """Mutation: take them in stage 2 alone."""
    run = make_run()
    recipe, cpu = Recipe.load(tiny_recipe, [f"heads.init_from={run}"]), torch.device("cpu")
    found = build_model(recipe, torch.float32, cpu, None, lambda _: nullcontext()).heads.state_dict()
    assert all(found[name].equal(tensor) for name, tensor in load_heads(run / "heads")[1].items())
