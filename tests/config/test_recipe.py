"""Recipes: what is refused and in which words, overrides and paths."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bad_recipes import FILES, GOOD, JSONS, OVERRIDES, SECRET, edit

from medusa_ds.config.loading import STUB_FIRST, STUB_LAST
from medusa_ds.config.recipe import Recipe, find_recipe, manual, shipped
from medusa_ds.errors import UserError

SHIPPED = sorted(shipped("recipes").glob("*.yaml"))


@pytest.fixture
def place(place: Path) -> Path:
    """A directory with a good recipe and the files that it names, as working directory."""
    (place / "r.yaml").write_text(GOOD)
    (place / "chat.jsonl").write_text("{}\n")
    (place / "zero.json").write_text('{"zero_optimization": {"stage": 2}}')
    (place / "empty").mkdir()
    heads = place / "old" / "heads"
    heads.mkdir(parents=True)
    saved = {"num": 5, "layers": 1, "lm_head": "own", "hidden_size": 32, "vocab_size": 99, "base_model": "owner/model"}
    (heads / "heads.json").write_text(json.dumps(saved))
    return place


@pytest.mark.parametrize("name", [*FILES, *OVERRIDES, *JSONS])
def test_bad_input_is_named_with_its_mend(name, place, refused):
    wrong: Any
    wrong, fragments = {**FILES, **OVERRIDES, **JSONS}[name]
    if name in FILES:
        (place / "r.yaml").write_text(wrong)
    elif name in JSONS:
        (place / "zero.json").write_text(wrong)
    err = refused("validate", "r.yaml", *(wrong if name in OVERRIDES else ()), lines=None)
    for fragment in fragments:
        assert fragment in err
    assert not any(secret in err for secret in (SECRET, "abcd1234", "pa55word", "0123456789abcdef"))


def test_frozen_layers_in_fp8_are_not_partitioned(place, refused):
    (place / "zero.json").write_text('{"zero_optimization": {"stage": 3}}')
    err = refused("validate", "r.yaml", "model.frozen_precision=fp8")
    assert "model.frozen_precision" in err and "found fp8 with ZeRO-3" in err and "zero.json), which" in err


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (None, "no such recipe file"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"#" * (2 << 20), "more than 1048576 bytes"),
        (b"\x00", "not valid YAML"),
    ],
)
def test_unreadable_file_is_named(content, fragment, place, refused):
    if content is not None:
        (place / "x.yaml").write_bytes(content)
    err = refused("validate", "x.yaml")
    assert "x.yaml" in err
    assert fragment in err


def test_directory_and_device_are_no_recipes(place, refused):
    assert "no such recipe file" in refused("validate", place)
    assert "no such recipe file" in refused("validate", "/dev/zero")
    assert "did you mean the shipped smollm2_135m_stage1?" in refused("validate", "smollm_135m_stage1")
    assert "not a plain file" in refused("validate", "r.yaml", f"deepspeed={place}")


def test_all_mistakes_are_reported_at_once(place, refused):
    """Types, ranges, contradictions, paths and the DeepSpeed file in one report.

    Mutation: raise at the first ValidationError without looking at contradictions and the DeepSpeed file.
    """
    text = (
        edit("num: 3", "num: 99\n  layer: 2")
        .replace("1e-3", "fast")
        .replace("micro_batch_size: 2", "micro_batch_size: 3")
    )
    (place / "r.yaml").write_text(text.replace("chat.jsonl", "none.jsonl") + "loss: {coefficient: 0.1}\n")
    (place / "zero.json").write_text('{"zero_optimization": {"stage": 7}, "nonsense": 1}')
    err = refused("validate", "r.yaml", "model.frozen=false", lines=None)
    keys = "heads.num heads.layer: train.lr train.global_batch_size data.path loss.coefficient model.frozen".split()
    keys += ["zero_optimization.stage", "nonsense"]
    for key in keys:
        assert err.count(key) == 1, key
    assert len(err.splitlines()) == len(keys)


def test_real_command_exits_with_2_and_no_traceback(place):
    command = [sys.executable, "-m", "medusa_ds.cli", "validate", "r.yaml", "heads.num=99", "stage=9"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_good_recipe_is_ok_with_ranks_that_divide_its_batch(place, said, refused):
    assert said("validate", "r.yaml", "--world-size", "4", "train.steps=3").endswith("\nok\n")
    assert "which 3 ranks" in refused("validate", "r.yaml", "--world-size", "3")


def test_numbers_are_read_as_yaml_1_2(place):
    recipe = Recipe.load("r.yaml", ["heads.num=010", "train.lr=2e-05", "train.eps=.5", "model.name=no", "train.steps="])
    assert (recipe.heads.num, recipe.train.lr, recipe.train.eps) == (10, 2e-5, 0.5)
    assert recipe.model.name == "no"
    assert recipe.train.steps is None


def test_overrides_replace_nested_and_listed_values(place):
    """A plain path in a list of sources is one of weight 1."""
    sources = "data.path=[chat.jsonl, {path: sample, weight: 2}, {path: owner/chat, split: 'test[:5%]'}]"
    recipe = Recipe.load("r.yaml", [sources, "data.path.2.weight=0.5", "loss.decay=0.7", "model.revision=" + "a" * 40])
    assert [(source.path, source.weight) for source in recipe.data.path if not isinstance(source, str)] == [
        (str(place / "chat.jsonl"), 1.0),
        ("sample", 2.0),
        ("owner/chat", 0.5),
    ]
    assert recipe.loss.decay == 0.7


def test_a_package_stands_for_the_name_that_its_file_has(place):
    """Mutation: take the name after the overrides."""
    package = "{requirement: a==1, file: b, sha256: '" + "0" * 64 + "'}"
    (place / "r.yaml").write_text(edit("owner/model", f"owner/model\n  package: {package}"))
    found = [Recipe.load("r.yaml", overrides).model.package for overrides in ([], ["model.name=other/model"])]
    assert [package.stands_for for package in found if package] == ["owner/model"] * 2


def test_a_directory_says_its_positions_and_sizes(place):
    """Mutation: look into the outer config of a model of several parts alone."""
    (place / "model").mkdir()
    config = {"hidden_size": 1, "text_config": {"hidden_size": 64, "vocab_size": 99, "max_position_embeddings": 100}}
    (place / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="found 101; the model has 100 positions"):
        Recipe.load("r.yaml", ["model.name=model", "data.max_length=101"])
    Recipe.load("r.yaml", ["model.name=model", "data.max_length=100"])
    with pytest.raises(UserError, match=r"heads of owner/model for model.name .*model \(hidden_size 32 and 64\)"):
        Recipe.load("r.yaml", ["model.name=model", "data.max_length=100", "heads.init_from=old", "heads.num=5"])


def test_heads_of_a_directory_that_is_not_here_may_be_those_of_a_hub_model(place):
    """They were trained where the model lay in a directory. Mutation: compare the names of both."""
    file = place / "old" / "heads" / "heads.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model": "/elsewhere/llama"}))
    Recipe.load("r.yaml", ["heads.init_from=old", "heads.num=5"])


def test_heads_of_stage_2_go_on_with_the_model_that_it_tuned(place):
    """Fails where the recipe may start from the model as it was before stage 2."""
    (place / "old" / "backbone").mkdir()
    asked = ["heads.init_from=old", "heads.num=5"]
    with pytest.raises(UserError, match=rf"heads.init_from.* set model.name to {place / 'old' / 'backbone'}$"):
        Recipe.load("r.yaml", asked)
    Recipe.load("r.yaml", [*asked, "model.name=old/backbone"])


def test_defaults_follow_the_stage(place):
    first = Recipe.load("r.yaml")
    assert (first.model.frozen, first.loss.coefficient, first.train.lr_multiplier) == (True, None, None)
    second = Recipe.load("r.yaml", ["stage=2", "heads.init_from=old", "heads.num=5"])
    assert (second.model.frozen, second.loss.coefficient, second.train.lr_multiplier) == (False, 0.2, 4.0)


def test_works_from_any_directory(place, tmp_path_factory, monkeypatch):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    monkeypatch.chdir(elsewhere)
    (elsewhere / "mine.json").write_text("{}")
    recipe = Recipe.load(place / "r.yaml", ["deepspeed=mine.json"])
    assert recipe.data.path == str(place / "chat.jsonl")
    assert recipe.deepspeed == str(elsewhere / "mine.json")
    assert recipe.output == str(elsewhere / "out")
    (elsewhere / "runs" / "one").mkdir(parents=True)
    (elsewhere / "runs" / "one" / "heads.json").write_text('{"num": 3, "layers": 1, "lm_head": "own"}')
    second = Recipe.load(place / "r.yaml", ["stage=2", "heads.init_from=runs/one", "deepspeed=ds_configs/zero3.json"])
    assert second.heads.init_from == str(elsewhere / "runs" / "one")
    assert Path(second.deepspeed) == shipped("ds_configs") / "zero3.json"


def test_resolved_recipe_loads_to_the_same(place):
    recipe = Recipe.load("r.yaml", ["data.template_args={note: 'é 😀 \"q\": #x'}", "data.path=[{path: chat.jsonl}]"])
    (place / "resolved.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    assert Recipe.load("resolved.yaml") == recipe


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_shipped_recipe_has_the_stub_and_validates(file, tmp_path, monkeypatch):
    rows = file.read_text().splitlines()
    assert rows[0] == (
        '_: r"""  # this line and the last one let the launcher run this file: deepspeed recipes/' + file.name
    )
    assert rows[0].startswith(STUB_FIRST)
    assert rows[-1] == STUB_LAST == '# """; from medusa_ds.train import main; main(__file__)'
    compile(file.read_text(), str(file), "exec")
    assert "Expect: " in file.read_text()
    monkeypatch.chdir(tmp_path)
    file = Path(shutil.copy(file, tmp_path))  # away from the runs that a user has beside the recipes
    recipe = Recipe.load(file, planning=True)
    if recipe.heads.init_from is not None:
        with pytest.raises(UserError, match="run stage 1 first"):
            Recipe.load(file)
        first = Recipe.load(file.stem.replace("stage2", "stage1"))
        assert recipe.heads.init_from == first.output
        assert recipe.model == first.model.model_copy(update={"frozen": False})
        heads = Path(first.output) / "heads"
        heads.mkdir(parents=True)
        (heads / "heads.json").write_text(first.heads.model_dump_json())
    assert Recipe.load(file) == recipe
    large = not file.name.startswith("smollm2")
    assert recipe.deepspeed == "auto" if large else Path(recipe.deepspeed).name == f"zero{recipe.stage + 1}.json"
    assert Path(recipe.output).name == file.stem
    for ranks in (1, 2, 4, 8) if recipe.train.global_batch_size >= 8 else (1,):
        recipe.ds_config(ranks, on_gpu=True)


def test_both_stages_of_six_models_are_shipped():
    models = "llama3_8b llama31_8b qwen3_8b mistral_7b_v03 vicuna_7b_v15 smollm2_135m".split()
    assert {file.stem for file in SHIPPED} == {f"{model}_stage{stage}" for model in models for stage in (1, 2)}
    assert find_recipe("smollm2_135m_stage1") in SHIPPED


def test_unstubbed_recipe_equals_stubbed(place):
    (place / "s.yaml").write_text('_: r"""  # any "comment"\n' + GOOD + STUB_LAST + "\n")
    assert Recipe.load("s.yaml") == Recipe.load("r.yaml")
    (place / "s.yaml").write_bytes(b"\xef\xbb\xbf" + (place / "s.yaml").read_bytes().replace(b"\n", b"\r\n"))
    assert Recipe.load("s.yaml") == Recipe.load("r.yaml")


def test_a_section_with_every_key_commented_out_is_an_empty_one(place):
    """Mutation: leave null in place of a section."""
    (place / "e.yaml").write_text(GOOD.replace("  num: 3", "  # num: 3") + "loss:\n  # target: argmax\n")
    found = Recipe.load("e.yaml", ["model.config=null", "data.template_args="])
    assert found == Recipe.load("r.yaml", ["heads.num=3"])


def test_switches_and_nulls_are_read_in_every_spelling_of_yaml(place):
    """In a section of no known types nothing else would tell `False` from a text, which a template takes for true."""
    found = Recipe.load("r.yaml", ["data.template_args={a: False, b: TRUE, c: Null, d: 'no', e: nothing}"])
    assert found.data.template_args == {"a": False, "b": True, "c": None, "d": "no", "e": "nothing"}
    assert Recipe.load("r.yaml", ["train.tensorboard=True", "train.steps=NULL"]).train.tensorboard


def test_names_of_directories_that_only_look_like_something_else(place):
    for name in ("runs/sk-SK-conversations-2024", "sk-learn_baseline_run_number_1", "'my #2'", "a#b"):
        assert Recipe.load("r.yaml", [f"output={name}"]).output == str(place / name.strip("'"))


def test_positions_of_stretched_rotary_embeddings_count(place):
    """Mutation: take `max_position_embeddings` alone, which older configs have from before they were stretched."""
    (place / "model").mkdir()
    for rope, positions in (
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, 400),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 50}}, 200),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 1.5, "original_max_position_embeddings": 50}}, 100),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, 100),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 50}}, 100),
        ({"rope_scaling": None}, 100),
        ({"rope_scaling": {"type": "linear", "factor": 4}, "rope_parameters": {"rope_type": "default"}}, 400),
        ({"rope_scaling": {"type": "linear", "factor": "4"}}, 100),
        ({"rope_scaling": {"type": "linear", "factor": [4]}}, 100),
        ({"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 4.0}}}, 100),
    ):
        (place / "model" / "config.json").write_text(json.dumps({"max_position_embeddings": 100, **rope}))
        Recipe.load("r.yaml", ["model.name=model", f"data.max_length={positions}"])
        with pytest.raises(UserError, match=f"found {positions + 1}; the model has {positions} positions"):
            Recipe.load("r.yaml", ["model.name=model", f"data.max_length={positions + 1}"])


def test_the_manual_of_keys_is_made_from_the_sections():
    """Every key once, with its docstring. Mutation: change a docstring and leave the page."""
    page = shipped("recipes").parent / "docs" / "recipe.md"
    assert page.read_text() == manual() + "\n", "run medusa-ds show --keys > docs/recipe.md"
    keys = re.findall(r"^- `([\w.]+)` \((.+?); (needed|default)", manual(), re.M | re.S)
    assert len({key for key, _, _ in keys}) == len(keys) > 60
    assert {"train.lr", "data.path.N.weight", "model.package.file", "stage"} <= {key for key, _, _ in keys}
    assert [line.split("`")[1] for line in manual("lr_mul").splitlines() if line.startswith("- ")] == [
        "train.lr_multiplier"
    ]
