"""Learning from the LM head's predictions: however ranks and ZeRO cut the work, the same training."""

import pytest
import torch
from safetensors.torch import load_file


@pytest.mark.parametrize("zero", ["zero0", "zero3"])
@pytest.mark.parametrize("lm_head", ["own", "shared"])
@pytest.mark.parametrize("target", ["argmax", "distribution"])
def test_two_ranks_train_as_one_does(zero, target, lm_head, two_ranks, one_rank) -> None:
    """Mutation: call the teacher once a chunk instead of once a head; ranks with other numbers of rows then hang."""
    two, one = f"{zero}-{target}-{lm_head}", f"zero0-{target}-{lm_head}"
    for key in ("loss", "grad_norm"):
        numbers = [[float.fromhex(text) for text in values] for values in (two_ranks[two][key], one_rank[one][key])]
        assert numbers[0] == pytest.approx(numbers[1], rel=1e-5)
    before, after, wanted = (
        load_file(folder / file)
        for folder, file in (
            (two_ranks.folder / two, "before.safetensors"),
            (two_ranks.folder / two, "after.safetensors"),
            (one_rank.folder / one, "after.safetensors"),
        )
    )
    for name, weight in wanted.items():
        if name.startswith("backbone."):
            assert torch.equal(after[name], before[name]), name
        assert (after[name] - weight).norm() <= 1e-4 * weight.norm(), name
