"""Learning from the LM head's predictions: however ranks and ZeRO cut the work, the same training."""

import json

import pytest
import torch
from conftest import numbers
from safetensors.torch import load_file


def figures(run):
    return numbers(run["loss"] + run["grad_norm"])


def weights(two_ranks, two, one_rank, one):
    """Of two ranks before and after, and of one after, in runs whose figures agree."""
    assert figures(two_ranks[two]) == pytest.approx(figures(one_rank[one]), rel=1e-5)
    files = [two_ranks.folder / two / "before", two_ranks.folder / two / "after", one_rank.folder / one / "after"]
    return [load_file(file.with_suffix(".safetensors")) for file in files]


@pytest.mark.parametrize("lm_head", ["own", "shared"])
@pytest.mark.parametrize("target", ["argmax", "distribution"])
def test_two_ranks_train_as_one_does(target, lm_head, two_ranks, one_rank) -> None:
    """Mutation: call the teacher once a chunk instead of once a head; ranks with other numbers of rows then hang."""
    before, after, wanted = weights(two_ranks, f"zero3-{target}-{lm_head}", one_rank, f"zero0-{target}-{lm_head}")
    for name, weight in wanted.items():
        if name.startswith("backbone."):
            assert torch.equal(after[name], before[name]), name
        assert (after[name] - weight).norm() <= 1e-4 * weight.norm(), name


@pytest.mark.parametrize("zero", ["zero2_offload", "zero3"])
@pytest.mark.parametrize("target", ["argmax", "distribution"])
def test_the_frozen_start_teaches_two_ranks_as_one(zero, target, two_ranks, one_rank) -> None:
    """Mutation: teach by the model in training, whose divergence from itself is zero."""
    two = f"{zero}-{target}-stage2"
    before, after, wanted = weights(two_ranks, two, one_rank, f"zero0-{target}-stage2")
    assert {name.split(".")[0] for name in wanted} == {"backbone", "heads", "start"}
    for name, weight in wanted.items():
        if name.startswith("start."):
            assert torch.equal(before[name], before[name.replace("start.", "backbone.", 1)]), name
            assert torch.equal(after[name], before[name]), name
        else:
            assert not torch.equal(after[name], before[name]), name
            assert (after[name] - weight).norm() <= 1e-4 * weight.norm(), name
    lm_losses = [step[0][0] / step[0][1] for step in two_ranks[two]["counters"]]
    assert (abs(lm_losses[0]) < 1e-6) == (target == "distribution")
    assert lm_losses[-1] > 1e-4


def test_the_frozen_start_is_in_no_checkpoint_and_comes_from_the_recipes_model(two_ranks, one_rank) -> None:
    """Mutation: build the start from the backbone when the checkpoint has been read."""
    source = "zero3-distribution-stage2"
    plain, saved = (two_ranks.folder / name / "checkpoints" / "step-000002" for name in ("zero3-2", source))
    names = [{name for file in folder.glob("*.safetensors") for name in load_file(file)} for folder in (plain, saved)]
    assert names[0] == names[1]
    assert not any("start." in name for name in names[1])
    whole, resumed = two_ranks[source], one_rank["start-elsewhere"]
    assert figures(resumed) == pytest.approx(figures({key: whole[key][2:] for key in ("loss", "grad_norm")}), rel=1e-5)
    first = load_file(two_ranks.folder / source / "before.safetensors")
    after = load_file(one_rank.folder / "start-elsewhere" / "after.safetensors")
    assert all(torch.equal(after[name], first[name]) for name in after if name.startswith("start."))


def test_the_frozen_start_is_not_exported(two_ranks) -> None:
    folder = two_ranks.folder / "zero3-start-export"
    saved, trained = load_file(folder / "backbone" / "model.safetensors"), load_file(folder / "after.safetensors")
    assert all(torch.equal(weight, trained[f"backbone.{name}"]) for name, weight in saved.items())
    moved = [name for name, weight in saved.items() if not torch.equal(weight, trained[f"start.{name}"])]
    assert moved == list(saved)
    assert {name.split(".")[0] for name in load_file(folder / "heads" / "heads.safetensors")} == {"0", "1", "2"}
    recipe = json.loads((folder / "heads" / "heads.json").read_text())["recipe"]
    assert '"distribution"' in recipe
