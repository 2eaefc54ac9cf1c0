"""The `medusa-ds` command as a user meets it."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from support import cli, files_of_at_most

from medusa_ds.cli import COMMANDS, main
from medusa_ds.config.deepspeed import Zero
from medusa_ds.config.recipe import Recipe, shipped
from medusa_ds.training import memory

pytestmark = pytest.mark.usefixtures("place")

TINY = (
    "model.config={model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, vocab_size: 300, "
    "num_attention_heads: 4, num_key_value_heads: 2, max_position_embeddings: 256}"
)

PARTS = memory.Parameters(backbone=7_000_000, lm_head=500_000, blocks=50_000, projections=1_500_000, largest=500_000)


@pytest.mark.parametrize(
    ("argv", "fragment"),
    [
        (["validat"], "medusa-ds validat: no such command; did you mean validate?"),
        (["xyzzy"], "allowed are list, validate"),
        (["--version"], "no such command"),
        (["validate"], "the following arguments are required: recipe"),
        (["validate", "r.yaml", "--world-sise", "2"], "unrecognized arguments: --world-sise 2"),
        (["validate", "r.yaml", "--world-size"], "--world-size: expected one argument"),
        (["validate", "r.yaml", "--world-size", "two"], "--world-size: found 'two'; allowed is a whole number"),
        (["validate", "r.yaml", "--world-size", "0"], "found '0'; allowed is a whole number of at least 1"),
        (["show", "r.yaml", "--data", "-1"], "--data: found '-1'"),
        (["estimate", "r.yaml", "--tokens-per-second", "nan"], "found 'nan'; allowed is a number above 0"),
        (["list", "--copy"], "--copy: expected one argument"),
        (["list", "--copy", "lama3_8b_stage1"], "did you mean the shipped llama3_8b_stage1?"),
    ],
)
def test_misuse_is_one_line(argv, fragment, refused):
    assert fragment in refused(*argv)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name, capsys, said):
    assert name in said("--help") == said()
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert f"usage: medusa-ds {name}" in shown and f"\n    medusa-ds {name}" in shown.partition("Example:")[2]


def test_help_says_defaults_choices_and_bounds(capsys):
    """Mutation: leave the default out of an option's help."""
    for command, options in (
        ("evaluate", ("--max-new-tokens N", "(default: 256)", "{greedy,typical,exact}", "(default: greedy)")),
        ("bench", ("(default: 3,5)", "--timeout S", "(default: 1800)")),
        ("distill", ("--openings [FILE]", "(default: 5)")),
    ):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        shown = " ".join(capsys.readouterr().out.split())
        assert [option for option in options if option not in shown] == []


def test_list_names_every_recipe(said):
    rows = {line.split()[0]: line.split() for line in said("list").splitlines()}
    assert {file.stem for file in shipped("recipes").glob("*.yaml")} == rows.keys() - {"recipe"}
    assert rows["vicuna_7b_v15_stage2"][1:] == ["lmsys/vicuna-7b-v1.5", "2", "5", "x", "1", "auto"]


def test_copied_recipe_works_where_it_is_and_is_never_overwritten(place, said, refused):
    assert "deepspeed smollm2_135m_stage1.yaml" in said("list", "--copy", "smollm2_135m_stage1")
    copy = place / "smollm2_135m_stage1.yaml"
    assert said("validate", copy.name).endswith("\nok\n")
    assert Path(Recipe.load(copy.name).deepspeed).parent == shipped("ds_configs")
    copy.write_text("mine")
    assert "exists already" in refused("list", "--copy", "smollm2_135m_stage1")
    assert copy.read_text() == "mine"


def test_shown_recipe_is_a_recipe(place, said, refused):
    changed = ["train.lr=3e-5", "deepspeed=ds_configs/zero3.json"]
    out = said("show", "llama3_8b_stage2", "--world-size", "4", *changed)
    (place / "shown.yaml").write_text(out)
    assert Recipe.load("shown.yaml", planning=True) == Recipe.load("llama3_8b_stage2", changed, planning=True)
    lines = [line.removeprefix("# ") for line in out.splitlines() if line.startswith("#")]
    settings = json.loads("\n".join(lines[lines.index("{") :]))
    assert settings["gradient_accumulation_steps"] == 2
    assert settings["zero_optimization"]["stage"] == 3
    assert "which 5 ranks" in refused("show", "llama3_8b_stage2", "--world-size", "5")


def test_prepare_and_show_data_tell_rows_and_mark_supervised_tokens(tiny_recipe, said, monkeypatch):
    out = said("prepare", tiny_recipe)
    assert "60 rows: 48 conversations to train on, 12 held out, 0 left out" in out
    assert "fingerprint" in out
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    plain = said("show", tiny_recipe, "--data", "2")
    assert plain.count("--- example ") == 2
    marked = plain[plain.index("[[") + 2 : plain.index("]]")]
    assert marked.endswith("<|im_end|>")
    assert "user" not in marked
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert f"\x1b[32m{marked}\x1b[0m" in said("show", tiny_recipe, "--data", "1")


def test_a_full_disk_and_a_cache_that_cannot_be_made_are_a_line(tiny_recipe, tmp_path, refused, monkeypatch):
    """Mutation: let the command's errors of the system pass, or those of making the cache."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    with files_of_at_most(1000):
        assert "cannot be written (File too large); make room" in refused("prepare", tiny_recipe)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tiny_recipe / "cache")
    assert f"{tiny_recipe}/cache: cannot be made (Not a dir" in refused("prepare", tiny_recipe)


def test_estimate_counts_the_real_model(tiny_recipe, said):
    """Parts add up to what a built model and its heads hold, tied and untied, own projections and shared."""
    from transformers import AutoModelForCausalLM

    from medusa_ds.heads.medusa import MedusaHeads
    from medusa_ds.model.backbone import load_config

    for overrides in ([], ["model.init=random", TINY], ["heads.lm_head=shared", "heads.layers=2", "heads.num=4"]):
        recipe = Recipe.load(tiny_recipe, overrides)
        config = load_config(recipe.model)
        parts = memory.count_parameters(recipe, config)
        model = AutoModelForCausalLM.from_config(config)
        spec = recipe.heads
        heads = MedusaHeads(spec.num, spec.layers, 32, 300, own_projection=spec.lm_head == "own")
        count = sum(parameter.numel() for parameter in heads.parameters())
        assert parts.backbone + parts.lm_head == sum(parameter.numel() for parameter in model.parameters())
        assert parts.blocks + parts.projections == count == parts.trainable(stage=1)
        assert (parts.lm_head == 0) == config.tie_word_embeddings
    out = said("estimate", tiny_recipe, "--world-size", "1", "--world-size", "2", "--tokens-per-second", "9")
    assert "0.05 hours for 6 steps of at most 256 tokens at 9 tokens/s (stated)" in out
    assert "zero3_offload" in out


def test_prepare_says_what_a_truncated_vocabulary_covers(tiny_recipe, said):
    assert "heads.vocab" not in said("prepare", tiny_recipe)  # all usual sizes are above the model's
    out = said("prepare", tiny_recipe, "heads.vocab=64")
    shares = re.search(r"heads.vocab: 64 of 300 tokens cover ([\d.]+)% of training labels, ([\d.]+)% of held-out", out)
    assert shares is not None and all(50 < float(share) <= 100 for share in shares.groups())


def test_prepare_counts_the_tokens_that_heads_of_a_finished_run_keep(tiny_recipe, tmp_path, make_run, said, refused):
    """Mutations: count the most frequent ones; refuse where that run has not ended, whose data can be prepared; take
    heads of another number of tokens, which training refuses."""
    import torch

    stage2 = ("stage=2", "heads.vocab=64", f"heads.init_from={tmp_path / 'first'}")
    assert f"known once the heads of {tmp_path / 'first'} are there" in said("prepare", tiny_recipe, *stage2)
    make_run("first", "heads.vocab=64", tokens=torch.arange(3, 67))
    assert "heads.vocab: 64 of 300 tokens cover 0.00% of training labels" in said("prepare", tiny_recipe, *stage2)
    for asked, vocab in (("heads.vocab=65", "65"), ("heads.vocab=full", "full")):
        err = refused("prepare", tiny_recipe, *stage2, asked)
        assert f"found vocab 64; this recipe has vocab {vocab}" in err


def test_estimate_of_a_hidden_cache_is_what_filling_writes(tiny_recipe, tmp_path, said, refused):
    """Rows that `prepare --hidden` writes; without the cache's backbone in the memory of a step."""
    cache = f"data.hidden_cache={tmp_path / 'hidden'}"
    plain, cached = (said("estimate", tiny_recipe, *more) for more in ([], [cache, "--data"]))
    found = re.search(r"hidden cache in bf16: ([\d.]+) GiB for ([\d,]+) positions", cached)
    assert found is not None and "hidden cache" not in plain
    cli("prepare", tiny_recipe, cache, "--hidden", log_dir=tmp_path)
    size = sum(file.stat().st_size - 88 for file in (tmp_path / "hidden").glob("*.safetensors"))
    assert int(found[2].replace(",", "")) * 32 * 4 == pytest.approx(size, rel=0.02)
    assert "heads.vocab" not in plain
    assert "--hidden: found data.hidden_cache: off" in refused("prepare", tiny_recipe, "--hidden")


def test_estimate_takes_the_measured_speed_and_counts_data(tiny_recipe, place, said):
    """Mutation: take the speed of a run of another recipe."""
    assert "run the recipe for some steps first" in said("estimate", tiny_recipe)
    assert "or --data" in said("estimate", tiny_recipe, "train.steps=null")
    (place / "out").mkdir()
    speeds = [{"kind": "train", "step": i, "tokens_per_s": speed} for i, speed in enumerate((1.0, 500.0, 700.0))]
    lines = [json.dumps(line) for line in (*speeds, {"kind": "validation", "step": 3})]
    (place / "out" / "metrics.jsonl").write_text("\n".join(lines))
    assert "run the recipe for some steps first" in said("estimate", tiny_recipe)
    (place / "out" / "recipe.yaml").write_text(Recipe.load(tiny_recipe, ["data.packing=true"]).to_yaml())
    assert "at 500 tokens/s (measured" in said("estimate", tiny_recipe, "train.lr=1e-3")
    for other in (
        "heads.num=2",
        "heads.kind=hydra",
        "data.max_length=32",
        "train.micro_batch_size=1",
        "data.hidden_cache=auto",
    ):
        assert "run the recipe for some steps first" in said("estimate", tiny_recipe, other)
    assert "on 8 x H200" in said("estimate", tiny_recipe, "--gpu", "h200")  # and not what this machine measured
    steps = said("estimate", tiny_recipe, "train.steps=null", "--data").split(" steps of at most")[0].split()
    report = said("prepare", tiny_recipe)
    assert f": {steps[-1]} steps an epoch" in report
    (place / "out" / "metrics.jsonl").write_text('{"kind": "train"}\n[1]\n')
    assert "state a speed" in said("estimate", tiny_recipe)


def test_states_are_deepspeeds_own_estimate_where_all_is_trained():
    """Mutation: count 12 bytes instead of 16 for a trained parameter."""
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs as zero3
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs as zero2

    total = PARTS.trainable(stage=2)
    assert PARTS.frozen(stage=2) == 0
    for ranks in (1, 2, 8):
        for optimizer in (False, True):
            cpu, gpu = zero2(total, ranks, 1, cpu_offload=optimizer)
            found = memory.states_bytes(PARTS, 2, Zero(2, optimizer), ranks, 2)
            assert found == pytest.approx((gpu, cpu if optimizer else 0), rel=1e-6)
            for parameters in (False, True) if optimizer else (False,):
                cpu, gpu, _ = zero3(total, PARTS.largest, ranks, 1, optimizer, parameters)
                found = memory.states_bytes(PARTS, 2, Zero(3, optimizer, parameters), ranks, 2)
                assert found == pytest.approx((gpu, cpu if optimizer else 0), rel=1e-6)


def test_frozen_backbone_costs_its_weights_alone():
    heads = replace(PARTS, backbone=0, lm_head=0)
    for zero, share in ((0, 1), (1, 1), (2, 1), (3, 4)):
        whole = memory.states_bytes(PARTS, 1, Zero(zero), 4, 2)[0]
        alone = memory.states_bytes(heads, 1, Zero(zero), 4, 2)[0]
        assert whole - alone == 2 * 7_500_000 // share


def test_frozen_start_costs_its_weights_alone(tiny_recipe, said):
    """Mutation: count it as trained, or in stage 1, where the backbone itself does not move."""
    from medusa_ds.model.backbone import load_config

    stage2 = ["stage=2", "heads.init_from=later", "loss.target=distribution"]
    found = []
    for overrides in (stage2[:2], stage2, stage2[2:]):
        recipe = Recipe.load(tiny_recipe, overrides, planning=True)
        parts = memory.count_parameters(recipe, load_config(recipe.model))
        found.append([memory.states_bytes(parts, recipe.stage, Zero(zero), 4, 2)[0] for zero in (0, 2, 3)])
        assert parts.start == (parts.backbone + parts.lm_head if overrides == stage2 else 0)
    size = parts.backbone + parts.lm_head
    assert [int(a) - b for a, b in zip(found[1], found[0], strict=True)] == [2 * size, 2 * size, 2 * size // 4]
    assert "frozen start" in said("estimate", tiny_recipe, *stage2)
    assert "frozen start" not in said("estimate", tiny_recipe, *stage2[:2])


def test_smallest_gpu_leaves_room():
    assert memory.smallest_gpu(10 * memory.GIB) == "RTX 3060"
    assert memory.smallest_gpu(76 * memory.GIB) == "H200"
    assert memory.smallest_gpu(1e15) == "none"


def test_output_into_a_closed_pipe_is_quiet():
    command = f"{sys.executable} -m medusa_ds.cli show llama3_8b_stage1 | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "model:\n", "")


def test_commands_tell_a_missing_model(refused, monkeypatch, place):
    bare = place / "bare"
    bare.mkdir()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "model.name" in refused("estimate", "smollm2_135m_stage1", f"model.name={bare}")
