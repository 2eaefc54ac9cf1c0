"""What a recipe's model can do is told before anything is trained, wherever its config comes from."""

import pytest
import torch

from medusa_ds.cli import main
from medusa_ds.config.recipe import shipped
from medusa_ds.model import backbone

LLAMA = [
    "logits: hidden states times the LM head",
    "packing: conversations share sequences",
    "attention: sdpa",
    "decoding: with heads and without",
]
SIZES = """hidden_size: 32, intermediate_size: 64, num_hidden_layers: 4, num_attention_heads: 4,
  num_key_value_heads: 2, vocab_size: 99"""
HYBRID = f"{{model_type: lfm2, {SIZES}, layer_types: [conv, full_attention, conv, full_attention]}}"


@pytest.fixture
def said(said, place):
    return lambda command, *overrides: said(command, "smollm2_135m_stage1", *overrides).splitlines()


def test_a_shipped_models_facts_need_no_hub(said, monkeypatch):
    """Mutation: ask for the config where the model is known."""
    monkeypatch.setattr(backbone, "model_path", lambda spec: pytest.fail(f"asked for {spec.name}"))
    assert said("validate") == [*LLAMA, "ok"]
    assert said("estimate")[:4] == LLAMA


def test_a_directory_and_a_package_are_asked(said, monkeypatch, tiny_model):
    """Mutation: ask directories alone."""
    place = [f"model.name={tiny_model}", "model.package=", "data.max_length=64"]
    assert said("validate", *place) == [*LLAMA, "ok"]
    monkeypatch.setattr(backbone, "_from_package", lambda *_: tiny_model)
    backbone._remote_path.cache_clear()
    assert said("validate", "model.name=o/m", "model.package.stands_for=o/m", "data.max_length=64") == [*LLAMA, "ok"]
    backbone._remote_path.cache_clear()


def test_a_recipe_without_the_launch_stub_is_told_how_it_starts(said, tmp_path):
    """Mutation: `ok` alone, and `deepspeed FILE` ends in a SyntaxError."""
    stub_first, *rows, stub_last = shipped("recipes").joinpath("smollm2_135m_stage1.yaml").read_text().splitlines()
    (tmp_path / "smollm2_135m_stage1").write_text("\n".join(rows))
    assert said("validate")[-2].endswith("started by: deepspeed --module medusa_ds smollm2_135m_stage1")
    (tmp_path / "smollm2_135m_stage1").write_text("\n".join([stub_first, *rows, stub_last]))
    assert said("validate") == [*LLAMA, "ok"]


def test_where_no_config_can_be_had_the_recipe_alone_is_checked(said):
    first, last = said("validate", "model.name=o/m", "model.package=")
    assert first.startswith("the model was not asked what it can do: model.name: o/m is neither") and last == "ok"


def test_a_model_with_a_state_is_told_in_four_lines(said):
    """Mutation: print nothing of packing or decoding."""
    packing, decoding = said("validate", "model.init=random", f"model.config={HYBRID}")[1:4:2]
    assert packing == (
        "packing: one conversation a sequence, since lfm2 does not keep documents of one sequence apart by their "
        "position ids"
    )
    assert decoding == (
        "decoding: none: layers of lfm2 carry a state that cannot go back to an earlier token; heads can be trained "
        "and exported"
    )


def test_packing_that_a_model_cannot_do_is_an_error(refused):
    """Mutation: pack what comes."""
    err = refused("validate", "smollm2_135m_stage1", "model.init=random", f"model.config={HYBRID}", "data.packing=true")
    assert "data.packing: found true, but lfm2 does not keep documents" in err


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("model_type: mistral, sliding_window: 1", "mistral attends otherwise through transformers' cache than"),
        ("model_type: phimoe, sliding_window: 8, num_local_experts: 4", "phimoe gives other hidden states in steps"),
    ],
)
def test_what_is_not_decoded_is_told_why_and_what_it_can_do(family, why, said):
    """Within a window of one token no position matters. Mutation: ask first whether positions count."""
    decoding = said("validate", "model.init=random", f"model.config={{{family}, {SIZES}}}")[3]
    assert decoding.startswith(f"decoding: none: {why}") and decoding.endswith("; heads can be trained and exported")


def test_heads_to_start_from_are_compared_as_training_does(refused, make_run, tiny_recipe, monkeypatch, capsys):
    """Their tokens too, and without the model. Mutation: compare what `heads.json` says alone."""
    start, says = make_run("start", "heads.vocab=64", tokens=torch.arange(64)), "found vocab 64; this recipe has vocab "
    with monkeypatch.context() as without:
        without.setattr(backbone, "load_config", lambda spec: pytest.fail(f"asked for {spec.name}"))
        for asked, vocab in (((), "full"), (("heads.vocab=65",), "65")):
            assert says + vocab in refused("validate", tiny_recipe, f"heads.init_from={start}", *asked)
    main(["validate", str(tiny_recipe), f"heads.init_from={start}", "heads.vocab=64"])
    assert capsys.readouterr().out.endswith("ok\n")
