"""Heads onto some tokens only, under DeepSpeed: as many ranks and stages as you like, and no other map on the way."""

import pytest
from conftest import numbers, run_ranks

TOKENS = list(range(40))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    jobs = [
        (zero, "trajectory", {"zero": zero, "stage": 1, "tokens": TOKENS, "save": True})
        for zero in ("zero3", "zero2", "zero0")
    ]
    jobs.append(("stage2", "trajectory", {"zero": "zero2", "stage": 2, "tokens": TOKENS}))
    folders = [tmp_path_factory.mktemp(name) for name in ("two", "one")]
    two = run_ranks(2, folders[0], jobs)[0]
    source = str(folders[0] / "zero2")
    more = [
        ("resumed", "resumed", {"zero": "zero3", "stage": 1, "tokens": TOKENS, "source": source}),
        ("other", "other_maps", {"source": source}),
    ]
    return two, run_ranks(1, folders[1], [*jobs[2:], *more])[0]


@pytest.mark.parametrize("name", ["zero0", "zero2", "zero3", "stage2"])
def test_losses_depend_on_no_rank_and_no_zero_stage(name, runs):
    """Mutation: count labels outside the map too, which makes the loss smaller by their share."""
    two = numbers(runs[0][name]["loss"])
    one = numbers(runs[1]["stage2" if name == "stage2" else "zero0"]["loss"])
    assert two == pytest.approx(one, rel=1e-6)
    if name != "stage2":
        for counters in runs[0][name]["counters"]:
            mean = sum(0.8**k * counters[k][0] / counters[k][1] for k in (1, 2, 3))
            assert mean == pytest.approx(two[runs[0][name]["counters"].index(counters)], rel=1e-6)
            assert all(counters[k][6] > 0 for k in (1, 2, 3))


def test_checkpoint_with_a_map_resumes_elsewhere_and_no_other_map_does(runs):
    assert numbers(runs[1]["resumed"]["loss"]) == pytest.approx(numbers(runs[0]["zero2"]["loss"])[2:], rel=1e-6)
    found = runs[1]["other"]
    assert "heads.vocab: found projections onto 40 tokens; this recipe has all tokens" in found["full"]
    assert "heads.vocab: found projections onto 40 tokens; this recipe has 10 tokens" in found["fewer"]
    assert "step-000002: heads.vocab: found 1 other tokens among its 40, as 0" in found["other"]


def test_heads_of_a_finished_run_keep_their_tokens_on_other_data(runs):
    """Mutation: heads onto the tokens that the data at hand counts."""
    found = runs[1]["other"]
    assert "found vocab 40; this recipe has vocab full: make them equal" in found["start"]
    assert found["kept"] == TOKENS
