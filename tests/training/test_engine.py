from pathlib import Path

import pytest
import reference
import torch
from conftest import FAILURES, Runs, numbers, run_ranks
from safetensors.torch import load_file
from worker import ZEROS

CASES = [(zero, stage) for stage in (1, 2) for zero in ZEROS]


def weights(folder: Path, when: str) -> dict[str, torch.Tensor]:
    return load_file(folder / f"{when}.safetensors")


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def assert_moved_alike(
    before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]
):
    for name, weight in wanted.items():
        moved = relative(after[name].double() - before[name], weight - before[name])
        assert moved < 5e-3, name  # Adam turns rounding of tiny gradients into whole steps


@pytest.fixture(scope="module")
def expected(one_rank: Runs):
    return {
        stage: reference.train(one_rank.folder / f"zero0-{stage}" / "before.safetensors", stage) for stage in (1, 2)
    }


@pytest.mark.parametrize(("zero", "stage"), CASES)
def test_two_ranks_and_one_train_as_plain_pytorch_does(zero, stage, two_ranks, one_rank, expected):
    """Mutations: without the all-reduce of the counts, losses are off by a third; with a doubled loss, clipping hides
    it from losses and weights, but the gradient norms double."""
    name, folder = f"{zero}-{stage}", two_ranks.folder / f"{zero}-{stage}"
    two, one = two_ranks[name], one_rank[f"zero0-{stage}"]
    losses, norms, final = expected[stage]
    for run in (two, one):
        assert numbers(run["loss"]) == pytest.approx(losses, rel=2e-6)
        assert numbers(run["grad_norm"]) == pytest.approx(norms, rel=2e-5)
    assert_moved_alike(weights(folder, "before"), weights(folder, "after"), final)
    counts = [[[row[1] for row in step] for step in run["counters"]] for run in (one, two)]
    assert counts[0] == counts[1]
    assert two["loss"] == two_ranks.ranks[1][name]["loss"]


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("size", [2, 4])
def test_loss_does_not_depend_on_the_micro_batch_size(stage, size, one_rank):
    """Mutation: letting DeepSpeed divide by the accumulation steps changes the gradient norm."""
    cut, whole = one_rank[f"micro{size}-{stage}"], one_rank[f"zero0-{stage}"]
    assert numbers(cut["loss"]) == pytest.approx(numbers(whole["loss"]), rel=1e-6)
    assert numbers(cut["grad_norm"]) == pytest.approx(numbers(whole["grad_norm"]), rel=1e-5)


@pytest.mark.parametrize("zero", ["zero1", "zero2", "zero3"])
def test_bf16_trains_alike_under_every_zero_stage(zero, two_ranks):
    """Mutation: leave DeepSpeed's mean over ranks beside the losses' global counts."""
    wanted, found = two_ranks["zero0-bf16"], two_ranks[f"{zero}-bf16"]
    assert numbers(found["loss"]) == pytest.approx(numbers(wanted["loss"]), rel=5e-3)
    assert numbers(found["grad_norm"]) == pytest.approx(numbers(wanted["grad_norm"]), rel=3e-2)


@pytest.mark.parametrize(("zero", "stage"), CASES)
def test_what_should_learn_moves_and_nothing_else(zero, stage, two_ranks):
    """Mutation: handing the optimizer the backbone in stage 1 moves it."""
    folder = two_ranks.folder / f"{zero}-{stage}"
    before, after = weights(folder, "before"), weights(folder, "after")
    for name, weight in before.items():
        trained = stage == 2 or name.startswith("heads.")
        assert torch.equal(weight, after[name]) != trained, name


def test_all_zero_stages_start_from_the_same_weights(two_ranks):
    first = weights(two_ranks.folder / "zero0-1", "before")
    for zero in ZEROS[1:]:
        other = weights(two_ranks.folder / f"{zero}-1", "before")
        assert all(torch.equal(first[name], other[name]) for name in first), zero


def test_heads_of_stage_2_learn_at_the_multiplied_rate(two_ranks):
    rates = two_ranks["zero2-2"]["rates"]
    assert [step["backbone"] for step in rates] == pytest.approx([1e-2 * factor for factor in reference.RATES])
    for step in rates:
        assert step["heads"] == step["heads_no_decay"] == 4 * step["backbone"] == 4 * step["backbone_no_decay"]


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("zero", ["zero2_offload", "zero3"])
def test_heads_that_see_tokens_train_as_plain_pytorch_does(zero, stage, two_ranks, one_rank):
    """Mutations: a step's weight read outside of its module; learn the embeddings through the heads."""
    name = f"{zero}-{stage}-hydra"
    folder = two_ranks.folder / name
    losses, norms, final = reference.train(folder / "before.safetensors", stage, layers=2, kind="hydra")
    for run in (two_ranks[name], one_rank[f"zero3-{stage}-hydra"]):
        assert numbers(run["loss"]) == pytest.approx(losses, rel=2e-6)
        assert numbers(run["grad_norm"]) == pytest.approx(norms, rel=2e-5)
    assert_moved_alike(weights(folder, "before"), weights(folder, "after"), final)


@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_heads_without_layers_learn(zero, two_ranks):
    folder = two_ranks.folder / f"{zero}-layers0"
    losses, _, final = reference.train(folder / "before.safetensors", 1, layers=0)
    assert numbers(two_ranks[f"{zero}-layers0"]["loss"]) == pytest.approx(losses, rel=2e-6)
    before, after = weights(folder, "before"), weights(folder, "after")
    assert len(final) == 3
    assert not any(torch.equal(before[name], after[name]) for name in final)


@pytest.mark.parametrize(("zero", "where", "precision"), FAILURES)
def test_nan_on_one_rank_stops_all_before_a_weight_changes(zero, where, precision, two_ranks):
    """Mutation: without the check before the step, ZeRO 0 writes NaN into the weights."""
    name = f"{zero}-nan-{where}-{precision}"
    for rank in two_ranks.ranks:
        message = rank[name]["message"]
        assert message.startswith(f"step 2: the {where} is not finite, no weight was changed")
        assert "rank 1: data.jsonl:12" in message
        assert rank[name]["steps_taken"] == 1
        if where == "loss":
            assert "rank 0" not in message
            assert "data.jsonl:13" not in message
    before, after = (weights(two_ranks.folder / name, when) for when in ("before", "after"))
    assert all(torch.equal(before[key], after[key]) for key in before if key.startswith("heads."))


def test_every_rank_learns_that_one_was_asked_to_stop(two_ranks):
    assert [rank["stop"]["stop"] for rank in two_ranks.ranks] == [[True, True, False]] * 2


@pytest.mark.parametrize("zero", ["zero0", "zero2", "zero3"])
def test_a_step_left_in_the_middle_leaves_the_state_of_the_one_before(zero, two_ranks):
    """Mutations: without the call among the ranks between micro-batches, the other one waits for good; without the
    look at `short_of_time`, the step ends and losses are those of three steps."""
    for rank in two_ranks.ranks:
        assert rank[f"{zero}-left"]["loss"] == rank[f"{zero}-1"]["loss"]


@pytest.mark.parametrize("stage", [1, 2])
def test_layers_gathered_whole_give_the_same_losses_and_gradients(stage, two_ranks):
    """Mutation: flag the attention alone, or leave the loop out; then `leaves` differs."""
    whole, plain = two_ranks[f"zero3-{stage}-whole-layers"], two_ranks[f"zero3-{stage}"]
    assert whole["leaves"] == ["LlamaDecoderLayer"] * 2
    assert numbers(whole["loss"]) == pytest.approx(numbers(plain["loss"]), rel=1e-6)
    assert numbers(whole["grad_norm"]) == pytest.approx(numbers(plain["grad_norm"]), rel=1e-6)
    folders = [two_ranks.folder / f"zero3-{stage}{more}" for more in ("", "-whole-layers")]
    before, after = weights(folders[0], "before"), [weights(folder, "after") for folder in folders]
    for name, wanted in after[0].items():
        moved = relative(after[1][name] - before[name], wanted - before[name]) if (wanted != before[name]).any() else 0
        assert moved < 5e-3, name  # as for other reorderings: Adam turns rounding of tiny gradients into whole steps


def test_evaluation_is_summed_over_ranks_and_counts_as_training_does(two_ranks):
    evaluated = [torch.tensor(rank["stop"]["eval"]) for rank in two_ranks.ranks]
    assert torch.equal(*evaluated)
    trained = torch.tensor(two_ranks["zero0-1"]["counters"][0])
    assert torch.equal(evaluated[0][:, 1], trained[:, 1])


@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_export_writes_an_ordinary_backbone_and_loadable_heads(zero, two_ranks):
    from transformers import AutoModelForCausalLM

    from medusa_ds.heads.files import load_heads

    folder = two_ranks.folder / f"{zero}-export"
    trained = weights(folder, "after")
    backbone = AutoModelForCausalLM.from_pretrained(folder / "backbone").state_dict()
    for name, weight in backbone.items():
        assert torch.equal(weight, trained[f"backbone.{name}"]), name
    config, heads = load_heads(folder)
    assert (config["num"], config["lm_head"], config["base_model"]) == (3, "own", "tiny")
    assert set(heads) == {name.removeprefix("heads.") for name in trained if name.startswith("heads.")}
    assert all(torch.equal(weight, trained[f"heads.{name}"]) for name, weight in heads.items())
    assert not list(folder.glob(".tmp-*"))


def test_launch_errors_name_the_settings(tmp_path, two_ranks):
    """Batch sizes, heads of another shape, what DeepSpeed refuses, no libaio, and out-of-memory, on one rank."""
    source = str(two_ranks.folder / "zero2-export")
    jobs = [("errors", "launch_errors", {"source": source})]
    found = run_ranks(1, tmp_path, jobs)[0]["errors"]
    assert "heads.init_from" in found["shapes"]
    assert "num 3" in found["shapes"]
    assert "num 2" in found["shapes"]
    assert found["loaded"] == []
    for name, key in (("early", "reduce_bucket_size"), ("late", "gradient_predivide_factor")):
        assert f"{name}.json: DeepSpeed refuses it" in found[name] and key in found[name]
    nvme = "nvme.json: zero_optimization.offload_optimizer.device: found nvme, but"
    assert nvme in found["nvme"] and "install libaio-dev" in found["nvme"]
    assert found["warm_start"] is True
    for key in ("train.micro_batch_size (now 1)", "loss.chunk_mib (now 1024)", "data.max_length (now 1024)"):
        assert key in found["memory"]
    assert "train.activation_checkpointing" not in found["memory"]
    assert "2 ranks" not in found["batch"]
    assert "train.global_batch_size: found 4" in found["batch"]
