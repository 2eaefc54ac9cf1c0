import json
import shutil

import pytest
import torch
from conftest import Runs, numbers, run_ranks
from safetensors.torch import load_file
from worker import ZEROS

CASES = [(zero, stage) for stage in (1, 2) for zero in ZEROS]


def assert_same_end(straight: Runs, name: str) -> None:
    through, resumed = straight[name], straight[f"{name}-resumed"]
    assert resumed["loss"] == through["loss"][2:]
    assert resumed["grad_norm"] == through["grad_norm"][2:]
    ends = [load_file(straight.folder / folder / "after.safetensors") for folder in (name, f"{name}-resumed")]
    assert all(torch.equal(weight, ends[1][key]) for key, weight in ends[0].items())


@pytest.mark.parametrize(("zero", "stage"), CASES)
def test_resumed_run_equals_an_uninterrupted_one_bit_for_bit(zero, stage, two_ranks):
    """Mutations: leaving Adam's step at 0, or not replaying DeepSpeedCPUAdam's powers of beta (offload)."""
    assert_same_end(two_ranks, f"{zero}-{stage}")


@pytest.mark.parametrize("zero", ["zero0", "zero1", "zero2", "zero3"])
def test_resumed_run_in_bf16_equals_an_uninterrupted_one(zero, two_ranks):
    """Mutation: leaving the count of the step that ZeRO 0 takes while it is made."""
    assert_same_end(two_ranks, f"{zero}-bf16")


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("origin", ZEROS)
def test_checkpoint_of_two_ranks_resumes_on_one_under_another_zero_config(origin, stage, two_ranks, one_rank):
    found, wanted = one_rank[f"{origin}-{stage}-elsewhere"], two_ranks[f"{origin}-{stage}"]
    assert numbers(found["loss"]) == pytest.approx(numbers(wanted["loss"][2:]), rel=1e-6)
    assert numbers(found["grad_norm"]) == pytest.approx(numbers(wanted["grad_norm"][2:]), rel=1e-5)


def test_state_of_the_loop_comes_back(two_ranks):
    assert two_ranks["zero1-2-resumed"]["state"] == {"data": "fingerprint", "note": "zero1"}


def test_frozen_weights_are_not_in_checkpoints(two_ranks):
    directory = two_ranks.folder / "zero2-1" / "checkpoints" / "step-000002"
    names = {name for file in directory.glob("*.safetensors") for name in load_file(file)}
    assert {name.split(".")[0] for name in names} == {"heads"}
    assert {name.rsplit("/", 1)[1] for name in names} == {"master", "exp_avg", "exp_avg_sq"}
    manifest = json.loads((directory / "manifest.json").read_bytes())
    assert set(manifest["files"]) == {file.name for file in directory.iterdir()} - {"manifest.json"}


def test_other_data_and_other_models_are_refused(two_ranks, tmp_path):
    shutil.copytree(two_ranks.folder / "zero2-1" / "checkpoints", tmp_path / "refusals" / "checkpoints")
    found = run_ranks(1, tmp_path, [("refusals", "refusals", {})])[0]["refusals"]
    assert "other training data (fingerprint fingerprint, now changed)" in found["data"]
    assert "heads.0.blocks.1.bias/exp_avg" in found["model"]
    assert "resume with the recipe of that run" in found["model"]
