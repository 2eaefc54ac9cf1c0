"""Whom the exported code serves is asked of a twin."""

import pytest

from medusa_ds.config.recipe import ModelSpec
from medusa_ds.exporting.transformers import decodes

FAMILIES = {"llama": True, "bloom": True, "mpt": True, "gemma3n_text": True}
FAMILIES |= {"minimax": False, "deepseek_v4": False, "mamba": False}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_twin_tells_whether_guesses_can_be_taken_back(family):
    """MiniMax and Mamba keep a state, DeepSeek V4 sums of tokens; layers of Gemma 3n read keys of others. Mutation: ask
    whether there is a cache alone, or whether any layer is as static as those of Gemma 3n that keep nothing."""
    assert decodes(ModelSpec(name=family, init="random", config={"model_type": family})) is FAMILIES[family]


def test_a_model_that_is_not_here_is_not_refused():
    """Mutation: let its error through; heads are exported where their base model is not."""
    assert decodes(ModelSpec(name="/nowhere"))
