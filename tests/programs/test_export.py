"""Exported directories, as each engine reads them."""

import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import engines
import pytest
import torch
from exporting import assert_same, export_, tensors_of
from huggingface_hub import ModelCard
from huggingface_hub import errors as hub_errors
from safetensors.torch import load_file
from support import SIZES, files_of_at_most, tiny_tokenizer, train
from transformers import AutoModelForCausalLM, AutoTokenizer, MiniMaxConfig, MptConfig, PhiConfig, PretrainedConfig

from medusa_ds import runs
from medusa_ds.cli import main
from medusa_ds.exporting import tgi, vllm
from medusa_ds.exporting.card import is_hub_id, license_of
from medusa_ds.exporting.source import Source
from medusa_ds.exporting.targets import TARGETS
from medusa_ds.heads.files import META, load_heads, save_heads
from medusa_ds.programs import evaluate, export
from medusa_ds.runs import load_run, save_tree

ENGINES = {
    "fasterdecoding": engines.fasterdecoding,
    "tgi": engines.tgi,
    "tensorrt-llm": engines.tensorrt_llm,
    "vllm": engines.vllm,
}
SHAPES = [
    ("own", 1, torch.float32),
    ("own", 2, torch.bfloat16),
    ("own", 0, torch.float32),
    ("shared", 1, torch.bfloat16),
    ("shared", 2, torch.float32),
]


@pytest.mark.parametrize(("lm_head", "layers", "dtype"), SHAPES)
def test_every_engine_gets_the_heads_bit_for_bit(make_run, lm_head, layers, dtype, monkeypatch):
    """Turns red when biases are left out, heads are numbered from 1, or shared heads get no projection in the .pt; or
    when the file that TGI and TensorRT-LLM read is written for each of them."""
    monkeypatch.setattr(tgi, "save_file", Mock(wraps=tgi.save_file))
    run = make_run("run", f"heads.lm_head={lm_head}", f"heads.layers={layers}", dtype=dtype)
    loaded = load_run(run, torch.device("cpu"), dtype)
    lm_head_module = loaded.backbone.get_output_embeddings()
    hidden = torch.randn(7, 32, generator=torch.Generator().manual_seed(2)).to(dtype)
    with torch.no_grad():
        expected = torch.stack([head.logits(hidden, lm_head_module) for head in loaded.heads])
        both = export_(run, "all")
        assert tgi.save_file.call_count == 1
        for name, load in ENGINES.items():
            alone = export_(run, name, "--for", name)
            for path in (both, alone):
                found = load(path, hidden, lm_head_module.weight)
                lossy = name == "fasterdecoding" and layers > 1  # see the next test
                assert found.equal(expected) != lossy, (name, path)
        assert engines.vllm(both, hidden, lm_head_module.weight, remaps=False).equal(expected)
    index = json.loads((both / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index.values()) == {"model.safetensors"}  # or vLLM reads the other layouts too
    assert sum(name.startswith("lm_heads.") for name in index) == (1 if lm_head == "shared" else 3)
    if layers == 1:  # TensorRT-LLM reads TGI's file and needs projections; TGI alone needs none of shared heads
        assert "0.1.weight" in load_file(both / "medusa_lm_head.safetensors")
        alone = load_file(run.parent / "tgi" / "medusa_lm_head.safetensors")
        assert ("0.1.weight" in alone) == (lm_head == "own")
    assert AutoTokenizer.from_pretrained(both).chat_template == loaded.tokenizer.chat_template


@pytest.mark.parametrize(("layers", "dtype"), [(1, torch.float32), (2, torch.bfloat16)])
def test_engines_without_token_maps_get_rows_whose_guesses_are_those_of_the_mapped_ones(make_run, layers, dtype):
    """Turns red with zeros in place of the mean: they win where all mapped logits are negative."""
    tokens = torch.arange(299, 40, -3)
    run = make_run("run", f"heads.layers={layers}", dtype=dtype, tokens=tokens)
    config, saved = load_heads(run)
    saved |= {name: weight - 4 for name, weight in saved.items() if "projection" in name}  # negative logits too
    save_heads(run / "heads", saved, {key: config[key] for key in META if key in config})
    loaded = load_run(run, torch.device("cpu"), dtype)
    path = export_(run, "all")
    hidden = torch.randn(64, 32, generator=torch.Generator().manual_seed(2)).to(dtype)
    with torch.no_grad():
        logits = torch.stack([head.logits(hidden) for head in loaded.heads])
        for name, load in ENGINES.items():
            whole = load(path, hidden, loaded.backbone.get_output_embeddings().weight)
            assert whole[..., tokens].equal(logits) or (name, layers) == ("fasterdecoding", 2), name
            assert whole[..., tokens].topk(3).values.equal(whole.topk(3).values), name
            assert torch.isin(whole.topk(3).indices, tokens).all(), name
    assert (logits.amax(-1) < 0).any()
    assert "truncated_vocab_size" not in json.loads((path / "config.json").read_text())
    again = load_run(path, torch.device("cpu"), dtype)
    assert again.heads.token_map.equal(tokens)
    main(["import", str(path), str(run.parent / "back")])
    assert {k: v.tolist() for k, v in load_heads(run.parent / "back")[1].items()} == {
        k: v.tolist() for k, v in load_heads(run)[1].items()
    }


def test_export_cuts_heads_trained_in_full_to_the_most_frequent_tokens(make_run, refused):
    run = make_run()
    path = export_(run, "out", "--vocab", "120")
    (_, whole), (config, cut) = load_heads(run), load_heads(path)
    tokens = cut["token_map"]
    assert config["vocab_size"] == 300 and len(tokens) == 120 and {0, 1, 2} <= set(tokens.tolist())
    assert cut["2.projection.weight"].equal(whole["2.projection.weight"][tokens])
    assert cut["2.blocks.0.bias"].equal(whole["2.blocks.0.bias"])
    assert "guesses among the 120 most frequent of 300 tokens" in (path / "README.md").read_text()
    says = "--vocab: found 100, but the heads have 120 tokens already"
    assert says in refused("export", path, run.parent / "again", "--vocab", "100")
    untrained = run.parent / "untrained"
    recipe = str(run.parent / "tiny.yaml")
    text = Path(recipe).read_text().replace("num: 3", "num: 3\n  vocab: 120")
    Path(recipe).write_text(text)
    main(["export", str(untrained), "--untrained", recipe])
    assert load_heads(untrained)[1]["token_map"].equal(tokens)


def test_vllm_reads_a_token_map_beside_a_shared_projection(make_run):
    run = make_run("run", "heads.lm_head=shared")
    path = export_(run, "out", "--for", "vllm", "--vocab", "120")
    loaded = load_run(path, torch.device("cpu"), torch.float32)
    lm_head, hidden = loaded.backbone.get_output_embeddings(), torch.randn(7, 32)
    tokens = load_file(path / "model.safetensors")["token_map"]
    assert json.loads((path / "config.json").read_text())["truncated_vocab_size"] == len(tokens) == 120
    with torch.no_grad():
        logits = torch.stack([head.logits(hidden, lm_head) for head in loaded.heads])
        found = engines.vllm(path, hidden, lm_head.weight)
    assert torch.allclose(found[..., tokens], logits[..., tokens], rtol=1e-5, atol=1e-5)
    assert found.isinf().sum() == 3 * 7 * 180
    assert set(load_heads(path)[1]) == set(load_heads(run)[1])
    main(["import", str(path), str(run.parent / "back")])
    assert load_heads(run.parent / "back")[0]["vocab_size"] == 300


def test_config_says_what_engines_ask_for_and_nothing_of_the_base_models_counts(make_run):
    path = export_(make_run("run", "heads.num=2", "heads.layers=2"), "out")
    config = json.loads((path / "config.json").read_text())
    assert config == {
        "model_type": "medusa",
        "base_model_name_or_path": config["base_model_name_or_path"],
        "hidden_size": 32,
        "vocab_size": 300,
        "medusa_num_heads": 2,
        "num_medusa_heads": 2,
        "medusa_num_layers": 2,
        "medusa_fc_bias": True,
        "dtype": "float32",
        "torch_dtype": "float32",
    }
    assert (engines.vllm_config(path)["num_heads"], engines.vllm_config(path)["num_hidden_layers"]) == (2, 2)


def test_checkpoints_of_two_zero_3_ranks_export_like_the_finished_run(tiny_recipe, tmp_path):
    """Both training stages. Turns red when a checkpoint's Adam moments are taken for its weights."""
    first, second = tmp_path / "first", tmp_path / "second"
    zero3 = "deepspeed=ds_configs/zero3.json"
    train(tiny_recipe, zero3, f"output={first}", "train.steps=2", ranks=2, log_dir=tmp_path)
    finished = export_(first, "finished")
    assert_same(finished, export_(first / "checkpoints" / "step-000002", "checkpoint"))
    assert_same(finished, export_(first / "checkpoints" / "best", "of-best"))
    measured = {result.metric_name for result in ModelCard.load(finished / "README.md").data.eval_results}
    assert {"acceptance_length", "head1_acc"} <= measured
    stage2 = ("stage=2", f"heads.init_from={finished}", f"output={second}", "train.lr=1e-3", "train.steps=2", zero3)
    train(tiny_recipe, *stage2, ranks=2, log_dir=tmp_path)
    whole, early = export_(second, "whole"), export_(second / "checkpoints" / "best", "early")
    assert_same(whole, early)
    tuned = [AutoModelForCausalLM.from_pretrained(path / "backbone").state_dict() for path in (second, whole, early)]
    assert all(tuned[0][name].equal(other[name]) for other in tuned[1:] for name in tuned[0])


def test_stage_2_backbone_lies_beside_the_heads(make_run, tiny_model):
    first = make_run("first")
    run = make_run("run", "stage=2", f"heads.init_from={first}", "train.lr=1e-3")
    path = export_(run, "out")
    config = json.loads((path / "config.json").read_text())
    assert config["base_model_name_or_path"] == str(path / "backbone")
    tuned = AutoModelForCausalLM.from_pretrained(path / "backbone")
    start = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert tuned.lm_head.weight.equal(start.lm_head.weight * 1.25)
    assert AutoTokenizer.from_pretrained(path / "backbone").chat_template
    assert load_run(path, torch.device("cpu"), torch.float32).backbone.lm_head.weight.equal(tuned.lm_head.weight)


@pytest.mark.usefixtures("steady_clock")
def test_evaluate_on_the_exported_directory_equals_that_on_the_run(make_run, tmp_path):
    run = make_run()
    save_tree(run / "heads" / "heads.json", [(0,), (1,), (0, 0), (0, 0, 0)])
    (tmp_path / "prompts.jsonl").write_text('{"turns": ["from red"]}\n{"turns": ["from sun", "and tree"]}\n')

    def report(path: Path) -> dict[str, Any]:
        asked = {"prompts": str(tmp_path / "prompts.jsonl"), "max_new_tokens": 24, "device": "cpu", "dtype": "fp32"}
        found = evaluate.run(evaluate.Settings(run=str(path), **asked))
        return {key: found[key] for key in ("heads", "accepted", "tree", "prompts", "texts")}

    assert report(export_(run, "out")) == report(run)


def test_untrained_heads_of_a_recipe_say_what_the_lm_head_says(tiny_recipe, tiny_model):
    out = tiny_recipe.parent / "untrained"
    main(["export", "--untrained", str(tiny_recipe), str(out), "--dtype", "bfloat16", "--for", "vllm"])
    weight = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).lm_head.weight
    hidden = torch.randn(3, 32).bfloat16()
    assert engines.vllm(out, hidden, weight).equal((hidden @ weight.T).expand(3, -1, -1))
    assert load_run(out, torch.device("cpu"), torch.bfloat16).tokenizer.chat_template


def test_large_files_are_split_and_no_storage_is_shared(make_run, monkeypatch):
    monkeypatch.setattr(vllm, "MAX_SHARD_SIZE", 50_000)
    run = make_run("run", "heads.lm_head=shared", "heads.layers=2")
    path = export_(run, "out", "--for", "vllm,tgi,fasterdecoding")
    assert len(list(path.glob("model-*-of-*.safetensors"))) > 1 and not (path / "model.safetensors").exists()
    weight = load_run(run, torch.device("cpu"), torch.float32).backbone.lm_head.weight
    hidden = torch.randn(3, 32)
    assert engines.vllm(path, hidden, weight).equal(engines.tgi(path, hidden, weight))
    kept = list(torch.load(path / "medusa_lm_head.pt").values())
    assert len({tensor.untyped_storage().data_ptr() for tensor in kept}) == len(kept)
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in kept)


def test_what_is_there_is_only_replaced_with_force_and_only_when_all_went_well(make_run, refused, monkeypatch):
    run = make_run("run", "heads.num=2")
    path = export_(run, "out")
    before = sorted(file.name for file in path.parent.iterdir())
    for target, options, text in ((path, [], "give --force"), (run, ["--force"], "no earlier export")):
        assert text in refused("export", run, target, *options)
    kept = tensors_of(path)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(vllm, "save_torch_state_dict", fail)
        assert "No space left on device" in refused("export", run, path, "--for", "vllm", "--force")
    assert sorted(file.name for file in path.parent.iterdir()) == before and tensors_of(path).keys() == kept.keys()
    export_(run, "out", "--force", "--for", "vllm")
    assert (path / "model.safetensors").exists() and not (path / "medusa_lm_head.pt").exists()
    assert sorted(file.name for file in path.parent.iterdir()) == before
    assert (path / "model.safetensors").stat().st_mode == (path / "config.json").stat().st_mode


@pytest.mark.parametrize(("full", "target"), [("model.safetensors", "vllm"), ("medusa_lm_head.pt", "fasterdecoding")])
def test_a_full_disk_is_one_line(full, target, make_run, tmp_path, refused):
    """Every file is written by another library, which says so in its own way; see `tests/test_files.py` for others."""
    run = make_run()
    size = (export_(run, "whole", "--for", target) / full).stat().st_size
    with files_of_at_most(size - 1):
        err = refused("export", run, tmp_path / "out", "--for", target)
    assert err == f"error: {tmp_path / 'out'}: cannot be written (File too large); name a writable directory\n"
    assert sorted(file.name for file in tmp_path.iterdir() if "out" in file.name) == []


@pytest.mark.parametrize("target", TARGETS)
def test_a_kind_that_a_target_does_not_name_is_not_exported_for_it(target):
    """Mutation: take transformers for one that runs every kind."""
    source = Source({}, {"kind": "another", "layers": 1}, None, None)
    assert TARGETS[target].refuses(source, False) == "found heads.kind another, which it does not run"


def test_mistakes_are_named_in_a_line(make_run, capsys, refused, tmp_path):
    for argv, text in (
        (["export", tmp_path / "nothing", tmp_path / "out"], "found no run"),
        (["export", tmp_path / "out"], "--untrained RECIPE"),
    ):
        assert text in refused(*argv)
    (tmp_path / "running" / "checkpoints" / "step-000004").mkdir(parents=True)
    assert "not finished; name one of its checkpoints, as in" in refused(
        "export", tmp_path / "running", tmp_path / "out"
    )
    assert "builds 5 heads" in (export_(make_run(), "three", "--for", "fasterdecoding"), capsys.readouterr().out)[1]


def test_card_says_how_every_program_uses_the_heads_and_what_was_measured(make_run, tiny_model, tmp_path):
    run = make_run()
    heads = {"head1": {"top1": 0.5}, "full_acc_1": 0.5, "positions": 9, "chain_acceptance_teacher_forced": 1.5}
    report = {"heads": heads, "accepted": {"mean_tokens_per_step": 1.75}, "speed": {"speed_up_decoding": 1.25}}
    (run / "evaluation.json").write_text(json.dumps(report | {"prompts": {"file": str(tmp_path / "asked.jsonl")}}))
    card = ModelCard.load(export_(run, "out") / "README.md")
    found = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert found == {
        "head1_acc": 0.5,
        "full_acc_1": 0.5,
        "chain_acceptance_teacher_forced": 1.5,
        "mean_tokens_per_step": 1.75,
        "speed_up_decoding": 1.25,
    }
    for program in "custom_generate= text-generation-launcher convert_checkpoint.py medusa.inference".split():
        assert program in card.text
    assert "vllm serve" in card.text
    assert "max_length: 64" in card.text and "medusa-ds 0" in card.text
    assert "mean_tokens_per_step 1.75: tokens that a step added" in card.text and "On asked.jsonl" in card.text
    assert str(tmp_path) not in str(card) and str(tiny_model) not in str(card)
    assert card.data.datasets is None and card.data.base_model is None
    assert f"Write the path of the base model in place of `{tiny_model.name}`" in card.text
    alone = tmp_path / "alone"
    main(["export", str(run), str(alone)])
    names = " ".join(sorted(file.name for file in alone.iterdir() if "token" not in file.name))
    assert names == "README.md chat_template.jinja config.json custom_generate heads"
    assert "Files for vllm, tgi, tensorrt-llm, fasterdecoding: `medusa-ds export" in (alone / "README.md").read_text()


def test_card_names_the_license_of_the_base_and_only_real_data_sets(place):
    (place / "base").mkdir()
    (place / "base" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    assert license_of(str(place / "base")) == "apache-2.0"
    (place / "data" / "own").mkdir(parents=True)
    names = ["sample", "answers", "/home/me/a.jsonl", "data/own", "data/more.jsonl", "org/chat", "org/chat-v1.5"]
    assert [name for name in names if is_hub_id(name)] == ["org/chat", "org/chat-v1.5"]


def test_fasterdecoding_is_refused_heads_of_which_it_would_lose_blocks(make_run, capsys, refused):
    run = make_run("run", "heads.layers=2")
    error = refused("export", run, run.parent / "out", "--for", "fasterdecoding")
    assert "keeps one of each head's 2 residual blocks" in error and "--allow-loss" in error
    main(["export", str(run), str(run.parent / "out"), "--for", "all"])
    assert "left out fasterdecoding: it keeps one" in capsys.readouterr().out
    assert not (run.parent / "out" / "medusa_lm_head.pt").exists()
    assert "Not for these heads" in (export_(run, "told") / "README.md").read_text()


def test_shipped_heads_export_by_name_with_their_figures(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "load_tokenizer", lambda *_: tiny_tokenizer())
    main(["export", "smollm2_135m", str(tmp_path / "out")])
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert "# Hydra heads for" in card.text and "hydra" in card.data.tags
    assert "\nFiles for vllm: `medusa-ds export . OTHER --for vllm`." in card.text  # mutation: those that refuse too
    kinds = {result.metric_name: result.metric_type for result in card.data.eval_results}
    assert kinds["head1_acc"] == "accuracy" and kinds["mean_tokens_per_step"] == "mean_tokens_per_step"


class FakeHub:
    calls: list[tuple[str, dict[str, Any]]] = []

    def create_repo(self, name: str, **_: Any) -> Any:
        self.calls.append(("create", {"name": name}))
        return type("Url", (), {"repo_id": f"owner/{name.split('/')[-1]}"})

    def upload_folder(self, **options: Any) -> None:
        self.calls.append(("folder", options))

    def upload_file(self, **options: Any) -> None:
        self.calls.append(("file", options))


def test_push_sends_the_backbone_to_a_repository_of_its_own(make_run, monkeypatch, capsys):
    run = make_run("run", "stage=2", f"heads.init_from={make_run('first')}", "train.lr=1e-3")
    monkeypatch.setattr(export, "HfApi", FakeHub)
    path = export_(run, "out", "--push-to-hub", "heads")
    sent = {(kind, options.get("repo_id"), options.get("path_in_repo")): options for kind, options in FakeHub.calls}
    config = json.loads(sent["file", "owner/heads", "config.json"]["path_or_fileobj"])
    assert config["base_model_name_or_path"] == "owner/heads-backbone"
    assert sent["folder", "owner/heads-backbone", None]["folder_path"] == path / "backbone"
    card = sent["file", "owner/heads", "README.md"]["path_or_fileobj"].decode()
    assert 'custom_generate="owner/heads"' in card and "vllm serve owner/heads-backbone" in card
    monkeypatch.undo()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit):
        export_(run, "again", "--push-to-hub", "owner/heads")
    assert "is complete: upload it later" in capsys.readouterr().err and (path.parent / "again").is_dir()


def test_an_export_is_complete_where_the_hub_cannot_be_reached(make_run, monkeypatch, capsys):
    """Mutation: count on what the hub answers alone, and a stack trace ends the command."""
    unreachable = Mock(side_effect=hub_errors.HTTPError("[Errno -2] Name or service not known"))
    monkeypatch.setattr(export.HfApi, "create_repo", unreachable)
    with pytest.raises(SystemExit):
        export_(make_run(), "out", "--push-to-hub", "owner/heads")
    err = capsys.readouterr().err
    assert "error: --push-to-hub owner/heads: [Errno -2] Name" in err and "out is complete: upload it later" in err


def untrained(tiny_recipe: Path, config: PretrainedConfig, heads: str = "") -> Path:
    """The tiny recipe with a small model of another family."""
    base = tiny_recipe.parent / config.model_type
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    name = next(line for line in tiny_recipe.read_text().splitlines() if line.startswith("  name:"))
    text = tiny_recipe.read_text().replace(name, f"  name: {base}").replace("heads:\n", f"heads:\n{heads}")
    recipe = tiny_recipe.with_stem(config.model_type)
    recipe.write_text(text)
    return recipe


@pytest.mark.parametrize("lm_head", ["own", "shared"])
def test_heads_with_a_bias_are_for_transformers_alone(tiny_recipe, tmp_path, refused, lm_head):
    """No engine's file has a place for it. Mutation: export them all the same, and guesses are others there."""
    config = PhiConfig(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    recipe = untrained(tiny_recipe, config, f"  lm_head: {lm_head}\n")
    out = tmp_path / "exported"
    err = refused("export", out, "--untrained", recipe, "--for", "vllm")
    assert "--for vllm: found heads whose projections have a bias" in err and not out.exists()
    assert "allowed is transformers\n" in err
    main(["export", str(out), "--untrained", str(recipe), "--for", "all"])
    assert not (out / "model.safetensors.index.json").exists()


def test_the_cards_code_runs_where_the_config_says_no_cache(tiny_recipe, tmp_path, monkeypatch):
    """Mutation: leave the choice of a cache to the model, of which MPT makes none."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    config = MptConfig(d_model=32, n_heads=2, n_layers=1, vocab_size=300, max_seq_len=512)
    main(["export", str(tmp_path / "out"), "--untrained", str(untrained(tiny_recipe, config))])
    monkeypatch.chdir(tmp_path / "out")
    code = Path("README.md").read_text().split("```python\n")[1].split("```")[0]
    exec(code.replace('"mpt"', f'"{tmp_path / "mpt"}"'), {})


def test_a_base_model_that_cannot_take_guesses_back_is_refused(tiny_recipe, tmp_path, refused, capsys):
    """Mutation: write the file, which then refuses every prompt."""
    config = MiniMaxConfig(**SIZES, vocab_size=300, num_local_experts=2, block_size=16)
    recipe, out = untrained(tiny_recipe, config), tmp_path / "out"
    err, why = refused("export", out, "--untrained", recipe), "found a base model whose `generate` cannot take guesses"
    assert f"--for transformers: {why} back, which it does not run; allowed is vllm, tgi" in err and not out.exists()
    main(["export", str(out), "--untrained", str(recipe), "--for", "all"])
    assert f"warning: left out transformers: {why}" in capsys.readouterr().out
    assert not (out / "custom_generate").exists()
