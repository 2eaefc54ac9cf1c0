"""`medusa-ds init`: a recipe for any model, that trains as it is written."""

import json

import pytest

from medusa_ds.cli import main
from medusa_ds.config.recipe import Recipe

pytestmark = pytest.mark.usefixtures("place")


def test_a_recipe_for_a_model_and_data_of_ones_own(tiny_model, place, capsys):
    """Mutation: leave the model's positions aside, or the launch stub out."""
    (place / "mine.jsonl").write_text(json.dumps({"messages": []}) + "\n")
    main(["init", str(tiny_model), "--data", "mine.jsonl", "--out", "mine.yaml"])
    assert "wrote mine.yaml; next: medusa-ds show mine.yaml" in capsys.readouterr().out
    text = (place / "mine.yaml").read_text()
    recipe = Recipe.load("mine.yaml")
    assert recipe.model.name == str(tiny_model) and recipe.data.path == str(place / "mine.jsonl")
    positions = json.loads((tiny_model / "config.json").read_text())["max_position_embeddings"]
    assert recipe.data.max_length == min(512, positions)
    assert "# Its chat template tells the assistant's turns exactly." in text
    assert "GiB on each of" in text and recipe.deepspeed.endswith("zero2.json")
    compile(text, "mine.yaml", "exec")
    main(["validate", "mine.yaml", "--world-size", "2"])


def test_the_commands_to_go_on_with_can_be_pasted(tiny_model, capsys):
    main(["init", str(tiny_model), "--out", "my own.yaml"])
    assert "deepspeed 'my own.yaml'" in capsys.readouterr().out


def test_nothing_is_overwritten_and_nothing_wrong_is_left(tiny_model, place, refused):
    (place / "mine.yaml").write_text("mine")
    assert "mine.yaml: exists already" in refused("init", tiny_model, "--out", "mine.yaml")
    assert (place / "mine.yaml").read_text() == "mine"
    assert "data.path" in refused("init", tiny_model, "--data", "none.jsonl", "--out", "other.yaml")
    assert not (place / "other.yaml").exists()
