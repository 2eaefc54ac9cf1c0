"""Every shipped recipe trains: its tiny random-weight twin takes two steps, so that a new model is a new file."""

import json
from pathlib import Path

import pytest
from support import SIZES, metrics_of, tiny_tokenizer, train

from medusa_ds.config.recipe import Recipe, shipped

RECIPES = sorted(shipped("recipes").glob("*.yaml"))  # stage 1 of a model before its stage 2
MODEL_TYPES = {
    "meta-llama": "llama",
    "lmsys": "llama",
    "HuggingFaceTB": "llama",
    "mistralai": "mistral",
    "Qwen": "qwen3",
}
ENDS = {"max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2}
TINY = SIZES | ENDS | {"vocab_size": 300, "head_dim": 8}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, conversations: Path) -> Path:
    """Directory that holds the output of every recipe's twin, by the recipe's name."""
    place = tmp_path_factory.mktemp("twins")
    tiny_tokenizer().save_pretrained(place / "model")
    for file in RECIPES:
        recipe = Recipe.load(file, planning=True)
        config = {"model_type": MODEL_TYPES[recipe.model.name.split("/")[0]], **TINY}
        overrides = [
            f"model.name={place / 'model'}",
            "model.package=null",
            "model.init=random",
            f"model.config={json.dumps(config)}",
            f"data.path={conversations}",
            "data.split=train",
            "data.max_length=64",
            "data.validation_max=4",
            "train.steps=2",
            "train.precision=fp32",
            f"output={place / file.stem}",
            "train.lr=1e-2",
        ]
        if recipe.stage == 2:
            overrides.append(f"heads.init_from={place / file.stem.replace('stage2', 'stage1')}")
        train(file, *overrides, log_dir=place)
    return place


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_twin_of_shipped_recipe_trains_two_steps(file, runs):
    recipe = Recipe.load(file, planning=True)
    output = runs / file.stem
    lines = metrics_of(output)
    assert [line["step"] for line in lines] == [1, 2]
    for k in range(1, recipe.heads.num + 1):
        assert lines[0][f"head{k}_loss"] > 0
    before, after = metrics_of(output, "validation")
    assert before["head1_loss"] != after["head1_loss"]
    assert ("lm_loss" in before) == (recipe.stage == 2)
    assert json.loads((output / "heads" / "heads.json").read_text())["num"] == recipe.heads.num
    assert (output / "backbone").is_dir() == (recipe.stage == 2)
