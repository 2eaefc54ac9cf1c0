"""Exported directories, as each engine reads them, as transformers alone decodes with them, and back again."""

import json
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import engines
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from support import train
from transformers import AutoModelForCausalLM, AutoTokenizer

from medusa_ds import export, import_heads
from medusa_ds.cli import main
from medusa_ds.decoding.answers import Settings
from medusa_ds.decoding.runs import load_run, save_tree
from medusa_ds.errors import UserError
from medusa_ds.evaluate import evaluate
from medusa_ds.model.heads import MedusaHeads, load_heads, save_heads
from medusa_ds.recipe import Recipe
from medusa_ds.training.build import heads_meta

MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(tiny_recipe: Path, tiny_model: Path, tmp_path: Path) -> MakeRun:
    """Writes what a finished run leaves, with heads that differ from their start."""

    def make(
        name: str = "run", *overrides: str, dtype: torch.dtype = torch.float32, tokens: torch.Tensor | None = None
    ) -> Path:
        recipe = Recipe.load(tiny_recipe, [*overrides, f"output={tmp_path / name}"])
        model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=dtype)
        spec, (vocab, size) = recipe.heads, model.lm_head.weight.shape
        heads = MedusaHeads(spec.num, spec.layers, size, vocab, spec.lm_head == "own", dtype, tokens)
        heads.initialize(model.lm_head.weight)
        torch.manual_seed(1)
        with torch.no_grad():
            for tensor in heads.parameters():
                tensor += 0.3 * torch.randn_like(tensor)
            if recipe.stage == 2:
                model.lm_head.weight.mul_(1.25)
                model.save_pretrained(tmp_path / name / "backbone")
        save_heads(tmp_path / name / "heads", heads.state_dict(), heads_meta(recipe))
        AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / name / "heads")
        return tmp_path / name

    return make


def export_(run: Path, out: str, *options: str) -> Path:
    with warnings.catch_warnings():
        main(["export", str(run), str(run.parent / out), *options])
    return run.parent / out


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of an export, by file and name."""
    files = [*path.glob("*.safetensors"), path / "heads" / "heads.safetensors"]
    found = {f"{file.name}:{name}": tensor for file in files for name, tensor in load_file(file).items()}
    if (path / "medusa_lm_head.pt").exists():
        found |= {f"pt:{name}": tensor for name, tensor in torch.load(path / "medusa_lm_head.pt").items()}
    return found


def assert_same(left: Path, right: Path) -> None:
    one, other = tensors_of(left), tensors_of(right)
    assert one.keys() == other.keys()
    assert [name for name in one if one[name].dtype != other[name].dtype or not one[name].equal(other[name])] == []


ENGINES = {"fasterdecoding": engines.fasterdecoding, "tgi": engines.tgi, "tensorrt-llm": engines.tensorrt_llm,
           "vllm": engines.vllm}  # fmt: skip
SHAPES = [("own", 1, torch.float32), ("own", 2, torch.bfloat16), ("own", 0, torch.float32),
          ("shared", 1, torch.bfloat16), ("shared", 2, torch.float32)]  # fmt: skip


@pytest.mark.parametrize(("lm_head", "layers", "dtype"), SHAPES)
def test_every_engine_gets_the_heads_bit_for_bit(
    make_run: MakeRun, tiny_model: Path, lm_head: str, layers: int, dtype: torch.dtype
) -> None:
    """Turns red when biases are left out, heads are numbered from 1, or shared heads get no projection in the .pt."""
    run = make_run("run", f"heads.lm_head={lm_head}", f"heads.layers={layers}", dtype=dtype)
    loaded = load_run(run, torch.device("cpu"), dtype)
    lm_head_module = loaded.backbone.get_output_embeddings()
    hidden = torch.randn(7, 32, generator=torch.Generator().manual_seed(2)).to(dtype)
    with torch.no_grad():
        expected = torch.stack([head.logits(hidden, lm_head_module) for head in loaded.heads])
        both = export_(run, "all")
        for name, load in ENGINES.items():
            alone = export_(run, name, "--for", name)
            for path in (both, alone):
                assert load(path, hidden, lm_head_module.weight).equal(expected), (name, path)
        assert engines.vllm(both, hidden, lm_head_module.weight, remaps=False).equal(expected)
    index = json.loads((both / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index.values()) == {"model.safetensors"}  # or vLLM reads the other layouts too
    assert sum(name.startswith("lm_heads.") for name in index) == (1 if lm_head == "shared" else 3)
    second_layout = lm_head == "shared" and layers == 1
    assert ("0.1.weight" in load_file(both / "medusa_lm_head.safetensors")) == (layers == 1 and not second_layout)
    assert AutoTokenizer.from_pretrained(both).chat_template == loaded.tokenizer.chat_template


@pytest.mark.parametrize(("layers", "dtype"), [(1, torch.float32), (2, torch.bfloat16)])
def test_engines_without_token_maps_get_rows_whose_guesses_are_those_of_the_mapped_ones(
    make_run: MakeRun, layers: int, dtype: torch.dtype
) -> None:
    """Turns red with zeros in place of the mean: they win where all mapped logits are negative."""
    tokens = torch.arange(299, 40, -3)
    run = make_run("run", f"heads.layers={layers}", dtype=dtype, tokens=tokens)
    config, saved = load_heads(run)
    saved |= {name: weight - 4 for name, weight in saved.items() if "projection" in name}  # negative logits too
    save_heads(run / "heads", saved, {key: config[key] for key in export.META})
    loaded, path = load_run(run, torch.device("cpu"), dtype), export_(run, "all")
    hidden = torch.randn(64, 32, generator=torch.Generator().manual_seed(2)).to(dtype)
    with torch.no_grad():
        logits = torch.stack([head.logits(hidden) for head in loaded.heads])
        for name, load in ENGINES.items():
            whole = load(path, hidden, loaded.backbone.get_output_embeddings().weight)
            assert whole[..., tokens].equal(logits), name
            assert whole.topk(3).values.equal(logits.topk(3).values), name
            assert torch.isin(whole.topk(3).indices, tokens).all(), name
    assert (logits.amax(-1) < 0).any()
    assert "truncated_vocab_size" not in json.loads((path / "config.json").read_text())
    again = load_run(path, torch.device("cpu"), dtype)
    assert again.heads[0].token_map.equal(tokens)
    main(["import", str(path), str(run.parent / "back")])
    assert {k: v.tolist() for k, v in load_heads(run.parent / "back")[1].items()} == {
        k: v.tolist() for k, v in load_heads(run)[1].items()
    }


def test_transformers_alone_maps_the_guesses(make_run: MakeRun, tmp_path: Path, monkeypatch: Any) -> None:
    """Turns red when rows are taken for tokens."""
    tokens = torch.arange(299, 40, -3)
    path = export_(make_run("run", tokens=tokens), "out", "--for", "transformers")
    model = AutoModelForCausalLM.from_pretrained(
        json.loads((path / "config.json").read_text())["base_model_name_or_path"]
    )
    heads, hidden = export.custom_generate.Heads(model, str(path), {}), torch.randn(5, 32)
    loaded = load_run(path, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        wanted = torch.stack([tokens[head.logits(hidden).argmax(-1)] for head in loaded.heads], 1)
        assert heads.guess(hidden).equal(wanted)


def test_export_cuts_heads_trained_in_full_to_the_most_frequent_tokens(
    make_run: MakeRun, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run()
    path = export_(run, "out", "--vocab", "120")
    (_, whole), (config, cut) = load_heads(run), load_heads(path)
    tokens = cut["token_map"]
    assert config["vocab_size"] == 300 and len(tokens) == 120 and {0, 1, 2} <= set(tokens.tolist())
    assert cut["2.projection.weight"].equal(whole["2.projection.weight"][tokens])
    assert cut["2.blocks.0.bias"].equal(whole["2.blocks.0.bias"])
    assert "guesses among the 120 most frequent of 300 tokens" in (path / "README.md").read_text()
    with pytest.raises(SystemExit):
        main(["export", str(path), str(run.parent / "again"), "--vocab", "100"])
    assert "--vocab: found 100, but the heads have 120 tokens already" in capsys.readouterr().err
    untrained = run.parent / "untrained"
    recipe = str(run.parent / "tiny.yaml")
    text = Path(recipe).read_text().replace("num: 3", "num: 3\n  vocab: 120")
    Path(recipe).write_text(text)
    main(["export", str(untrained), "--untrained", recipe])
    assert load_heads(untrained)[1]["token_map"].equal(tokens)


def test_vllm_reads_a_token_map_beside_a_shared_projection(make_run: MakeRun) -> None:
    run = make_run("run", "heads.lm_head=shared")
    path = export_(run, "out", "--vocab", "120")
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


def test_config_says_what_engines_ask_for_and_nothing_of_the_base_models_counts(make_run: MakeRun) -> None:
    path = export_(make_run("run", "heads.num=2", "heads.layers=2"), "out")
    config = json.loads((path / "config.json").read_text())
    assert config == {
        "model_type": "medusa", "base_model_name_or_path": config["base_model_name_or_path"], "hidden_size": 32,
        "vocab_size": 300, "medusa_num_heads": 2, "num_medusa_heads": 2, "medusa_num_layers": 2,
        "medusa_fc_bias": True, "dtype": "float32", "torch_dtype": "float32",
    }  # fmt: skip
    assert (engines.vllm_config(path)["num_heads"], engines.vllm_config(path)["num_hidden_layers"]) == (2, 2)


ALONE = """
import json, sys
class Refuse:
    def find_spec(self, name, *_):
        if name.split(".")[0] == "medusa_ds":
            raise ImportError("refused")
sys.meta_path.insert(0, Refuse())
import torch, transformers
try:
    import medusa_ds
    raise SystemExit("medusa_ds could be imported")
except ImportError:
    pass
base, path = sys.argv[1:]
model = transformers.AutoModelForCausalLM.from_pretrained(base)
passes, same = {"plain": 0, "heads": 0}, 0
current = None
def count(*_):
    passes[current] += 1
model.register_forward_hook(count)
draw = torch.Generator().manual_seed(5)
for i in range(50):
    ids = torch.randint(3, 300, (1, 2 + i % 9), generator=draw)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}
    current = "plain"
    plain = model.generate(**inputs, max_new_tokens=40)
    current = "heads"
    same += model.generate(**inputs, max_new_tokens=40, custom_generate=path, trust_remote_code=True).equal(plain)
print(json.dumps({"same": same, **passes}))
"""


def distil(run: Path) -> None:
    """Teach a run's heads the greedy text of its backbone."""
    loaded = load_run(run, torch.device("cpu"), torch.float32)
    draw = torch.Generator().manual_seed(4)
    texts = loaded.backbone.generate(
        torch.randint(3, 300, (96, 4), generator=draw), max_new_tokens=40, min_new_tokens=40, do_sample=False,
        pad_token_id=0,
    )  # fmt: skip
    with torch.no_grad():
        hidden = loaded.backbone.base_model(input_ids=texts).last_hidden_state
    heads = torch.nn.ModuleList(loaded.heads)
    optimizer = torch.optim.Adam(heads.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss = torch.zeros(())
        for k, head in enumerate(heads, 1):
            logits = head.logits(hidden[:, 3 : -k - 1])
            loss = loss + torch.nn.functional.cross_entropy(logits.flatten(0, 1), texts[:, 4 + k :].flatten())
        loss.backward()
        optimizer.step()
    config, _ = load_heads(run)
    save_heads(run / "heads", heads.state_dict(), {key: config[key] for key in export.META})


def test_transformers_alone_decodes_greedily_with_fewer_passes(make_run: MakeRun, tmp_path: Path) -> None:
    """Turns red when `decode` accepts one guess more than agrees, or leaves the cache uncropped."""
    run = make_run()
    distil(run)
    path = export_(run, "out", "--for", "transformers")
    base = json.loads((path / "config.json").read_text())["base_model_name_or_path"]
    env = {**os.environ, "PYTHONPATH": "", "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", ALONE, base, str(path)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["same"] == 50
    assert counts["heads"] < 0.8 * counts["plain"], counts


def decode_with(path: Path, model: Any, ids: torch.Tensor, **options: Any) -> Any:
    mask = options.pop("attention_mask", torch.ones_like(ids))
    settings = {"attention_mask": mask, "pad_token_id": 0, "trust_remote_code": True, **options}
    return model.generate(ids, custom_generate=str(path), **settings)


def test_custom_generate_handles_batches_processors_streams_and_refusals(
    make_run: MakeRun, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    run = make_run()
    distil(run)
    path = export_(run, "out", "--for", "transformers")
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    ids = torch.randint(3, 300, (4, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 30, "do_sample": False}
    plain = model.generate(ids, pad_token_id=0, **settings)
    ends = [int(plain[0, 13]), int(plain[1, 25])]  # rows end at different steps
    for options in ({}, {"repetition_penalty": 1.3}, {"eos_token_id": ends}):
        plain = model.generate(ids, pad_token_id=0, **settings, **options)
        assert decode_with(path, model, ids, **settings, **options).equal(plain), options

    class Stream:
        tokens: list[int] = []
        ended = False

        def put(self, tokens: torch.Tensor) -> None:
            self.tokens += tokens.flatten().tolist()

        def end(self) -> None:
            self.ended = True

    stream = Stream()
    out = decode_with(path, model, ids[:1], max_new_tokens=9, do_sample=False, streamer=stream,
                      return_dict_in_generate=True)  # fmt: skip
    assert stream.ended and stream.tokens == out.sequences[0].tolist()
    for options in ({"num_beams": 2}, {"cache_implementation": "static"}, {"use_cache": False},
                    {"output_scores": True, "return_dict_in_generate": True}):  # fmt: skip
        with pytest.raises(ValueError, match="Medusa heads"):
            decode_with(path, model, ids[:1], max_new_tokens=4, do_sample=False, **options)


def test_sampling_with_heads_has_the_models_distribution(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chi-square over all texts of three tokens. Turns red when a wrong guess, not the drawn token, is kept."""
    from transformers import LlamaConfig, LlamaForCausalLM

    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=32, initializer_range=0.4, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    heads = MedusaHeads(2, 1, 16, 4)
    heads.initialize(model.lm_head.weight)
    meta = {"base_model": "x", "revision": None, "num": 2, "layers": 1, "lm_head": "own", "hidden_size": 16,
            "vocab_size": 4, "recipe": ""}  # fmt: skip
    save_heads(tmp_path / "out" / "heads", heads.state_dict(), meta)
    (tmp_path / "out" / "custom_generate").mkdir()
    source = Path(export.custom_generate.__file__).read_text()
    (tmp_path / "out" / "custom_generate" / "generate.py").write_text(source)

    prompt = torch.tensor([[1, 3]])
    texts = torch.cartesian_prod(*[torch.arange(4)] * 3)
    with torch.no_grad():
        logits = model(torch.cat([prompt.expand(64, -1), texts], 1)).logits[:, 1:-1]
    expected = logits.log_softmax(-1).gather(-1, texts[..., None])[..., 0].sum(-1).exp()
    passes = []
    hook = model.register_forward_hook(lambda *_: passes.append(1))
    torch.manual_seed(0)
    draws, rows = 500, 2
    seen = torch.zeros(64)
    for _ in range(draws):
        out = decode_with(tmp_path / "out", model, prompt.expand(rows, -1), max_new_tokens=3, do_sample=True, top_k=0)
        seen += torch.bincount((out[:, 2:] * torch.tensor([16, 4, 1])).sum(-1), minlength=64)
    hook.remove()
    assert len(passes) < 2.97 * draws  # guesses were kept
    wanted = expected * draws * rows
    assert float(((seen - wanted) ** 2 / wanted).sum()) < 63 + 4 * (2 * 63) ** 0.5


@pytest.mark.parametrize("engine", ["vllm", "tgi", "fasterdecoding", "all"])
@pytest.mark.parametrize("lm_head", ["own", "shared"])
def test_export_import_export_gives_identical_tensors(make_run: MakeRun, engine: str, lm_head: str) -> None:
    """Turns red when the import counts heads from the config, or drops a head's last block."""
    run = make_run("run", f"heads.lm_head={lm_head}", "heads.num=2", "heads.layers=1", dtype=torch.bfloat16)
    first = export_(run, "first", "--for", engine)
    if lm_head == "shared" and engine == "fasterdecoding":  # there every head has a copy: it comes back as its own
        return
    main(["import", str(first), str(run.parent / "back")])
    assert_same(first, export_(run.parent / "back", "second", "--for", engine))
    assert load_run(run.parent / "back", torch.device("cpu"), torch.bfloat16).tokenizer.chat_template


def test_published_heads_are_imported_without_biases_and_with_a_wrong_config(tiny_model: Path, tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    old = {f"medusa_head.{h}.0.linear.weight": torch.randn(32, 32, generator=draw) for h in range(5)}
    old |= {f"medusa_head.{h}.1.weight": torch.randn(300, 32, generator=draw) for h in range(5)}
    (tmp_path / "old").mkdir()
    torch.save(old, tmp_path / "old" / "medusa_lm_head.pt")
    (tmp_path / "old" / "config.json").write_text(json.dumps({"medusa_num_heads": 2, "medusa_num_layers": 1}))
    with pytest.raises(SystemExit):
        main(["import", str(tmp_path / "old"), str(tmp_path / "new")])
    main(["import", str(tmp_path / "old"), str(tmp_path / "new"), "--base-model", str(tiny_model)])
    config, heads = load_heads(tmp_path / "new")
    assert (config["num"], config["layers"]) == (5, 1)
    assert heads["4.projection.weight"].equal(old["medusa_head.4.1.weight"])
    assert not heads["0.blocks.0.bias"].any()
    assert (
        load_run(tmp_path / "new", torch.device("cpu"), torch.float32)
        .heads[4]
        .blocks[0]
        .weight.equal(old["medusa_head.4.0.linear.weight"])
    )


class Hostile:
    def __reduce__(self) -> Any:
        return (os.mkdir, (os.environ["HOSTILE"],))


def test_hostile_damaged_and_foreign_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Turns red when the pickle is read with `weights_only=False`."""
    monkeypatch.setenv("HOSTILE", str(tmp_path / "done"))
    (tmp_path / "config.json").write_text(json.dumps({"base_model_name_or_path": "owner/model", "vocab_size": 300}))
    file = tmp_path / "medusa_lm_head.pt"

    def refusal() -> str:
        with pytest.raises(UserError) as error:
            import_heads.main(str(tmp_path), str(tmp_path / "out"))
        assert not (tmp_path / "out").exists()
        return str(error.value)

    assert "holds no heads" in refusal()
    file.write_bytes(pickle.dumps(Hostile()))
    assert "cannot be read" in refusal() and not (tmp_path / "done").exists()
    good = {"0.0.linear.weight": torch.zeros(4, 4), "0.1.weight": torch.zeros(9, 4), "1.1.weight": torch.zeros(9, 4)}
    torch.save(good, file)
    assert "1.blocks.0.weight is None, not (4, 4)" in refusal()
    torch.save({"token_map": torch.zeros(3), **good}, file)
    assert "token_map" in refusal()
    torch.save({**good, "0.0.linear.bias": torch.zeros(5)}, file)
    assert "0.blocks.0.bias is (5,), not (4,)" in refusal()
    save_file({"model.embed_tokens.weight": torch.zeros(3)}, tmp_path / "model.safetensors")
    assert "model.embed_tokens.weight; not heads" in refusal()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the outputs of launches lie."""
    return tmp_path_factory.mktemp("trained")


def test_checkpoints_of_two_zero_3_ranks_export_like_the_finished_run(tiny_recipe: Path, trained: Path) -> None:
    """Both training stages. Turns red when a checkpoint's Adam moments are taken for its weights."""
    first, second = trained / "first", trained / "second"
    zero3 = "deepspeed=ds_configs/zero3.json"
    train(tiny_recipe, zero3, f"output={first}", "train.steps=2", ranks=2, log_dir=trained)
    finished = export_(first, "finished")
    assert_same(finished, export_(first / "checkpoints" / "step-000002", "checkpoint"))
    assert_same(finished, export_(first / "checkpoints" / "best", "of-best"))
    measured = {result.metric_name for result in ModelCard.load(finished / "README.md").data.eval_results}
    assert {"acceptance_length", "head1_acc"} <= measured
    train(tiny_recipe, "stage=2", f"heads.init_from={finished}", f"output={second}", "train.lr=1e-3", "train.steps=2",
          zero3, ranks=2, log_dir=trained)  # fmt: skip
    whole, early = export_(second, "whole"), export_(second / "checkpoints" / "best", "early")
    assert_same(whole, early)
    tuned = [AutoModelForCausalLM.from_pretrained(path / "backbone").state_dict() for path in (second, whole, early)]
    assert all(tuned[0][name].equal(other[name]) for other in tuned[1:] for name in tuned[0])


AGAIN = """
import json, sys
from pathlib import Path
from medusa_ds.recipe import Recipe
from medusa_ds.training.engine import MedusaEngine
recipe_file, zero, output, target = sys.argv[-4:]
recipe = Recipe.load(recipe_file, [f"deepspeed=ds_configs/{zero}.json", f"output={output}"])
engine = MedusaEngine(recipe, 2)
fingerprint = json.loads((Path(output) / "checkpoints/step-000002/state.json").read_text())["loop"]["data"]
state = engine.resume_newest(fingerprint)
engine.recipe = recipe.model_copy(update={"output": target})
engine.save(state)
engine.close()
"""


@pytest.mark.long
@pytest.mark.parametrize("zero", ["zero0", "zero1", "zero2", "zero3"])
def test_the_same_weights_saved_under_every_zero_stage_export_alike(
    tiny_recipe: Path, trained: Path, zero: str
) -> None:
    """A checkpoint is resumed by two ranks of each stage and saved again: what is in it has no stage."""
    source, target = trained / "first", trained / zero
    if not source.exists():
        train(tiny_recipe, f"output={source}", "train.steps=2", ranks=2, log_dir=trained)
    script = trained / "again.py"
    script.write_text(AGAIN)
    train(script, str(tiny_recipe), zero, str(source), str(target), ranks=2, log_dir=trained)
    (target / "recipe.yaml").write_text((source / "recipe.yaml").read_text())
    state = json.loads((target / "checkpoints" / "step-000002" / "state.json").read_text())["engine"]
    assert (state["zero_stage"], state["world_size"]) == (int(zero[-1]), 2)
    assert_same(export_(target / "checkpoints" / "step-000002", "again"), export_(source, f"source-{zero}"))


def test_stage_2_backbone_lies_beside_the_heads(make_run: MakeRun, tiny_model: Path, tmp_path: Path) -> None:
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


def test_evaluate_on_the_exported_directory_equals_that_on_the_run(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run()
    save_tree(run / "heads" / "heads.json", [(0,), (1,), (0, 0), (0, 0, 0)])
    (tmp_path / "prompts.jsonl").write_text('{"turns": ["from red"]}\n{"turns": ["from sun", "and tree"]}\n')

    def report(path: Path) -> dict[str, Any]:
        found = evaluate(Settings(str(path), str(tmp_path / "prompts.jsonl"), 24, device="cpu", dtype="fp32"))
        return {key: found[key] for key in ("heads", "accepted", "tree", "prompts", "texts")}

    assert report(export_(run, "out")) == report(run)


def test_untrained_heads_of_a_recipe_say_what_the_lm_head_says(tiny_recipe: Path, tiny_model: Path) -> None:
    out = tiny_recipe.parent / "untrained"
    main(["export", "--untrained", str(tiny_recipe), str(out), "--dtype", "bfloat16"])
    weight = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).lm_head.weight
    hidden = torch.randn(3, 32).bfloat16()
    assert engines.vllm(out, hidden, weight).equal((hidden @ weight.T).expand(3, -1, -1))
    assert load_run(out, torch.device("cpu"), torch.bfloat16).tokenizer.chat_template


def test_large_files_are_split_and_no_storage_is_shared(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "MAX_SHARD_SIZE", 50_000)
    run = make_run("run", "heads.lm_head=shared", "heads.layers=2")
    path = export_(run, "out")
    assert len(list(path.glob("model-*-of-*.safetensors"))) > 1 and not (path / "model.safetensors").exists()
    weight = load_run(run, torch.device("cpu"), torch.float32).backbone.lm_head.weight
    hidden = torch.randn(3, 32)
    assert engines.vllm(path, hidden, weight).equal(engines.tgi(path, hidden, weight))
    kept = list(torch.load(path / "medusa_lm_head.pt").values())
    assert len({tensor.untyped_storage().data_ptr() for tensor in kept}) == len(kept)
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in kept)


def test_what_is_there_is_only_replaced_with_force_and_only_when_all_went_well(
    make_run: MakeRun, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run("run", "heads.num=2")
    path = export_(run, "out")
    before = sorted(file.name for file in path.parent.iterdir())
    for target, options, text in ((path, [], "give --force"), (run, ["--force"], "no earlier export")):
        with pytest.raises(SystemExit):
            main(["export", str(run), str(target), *options])
        assert text in capsys.readouterr().err
    kept = tensors_of(path)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(export, "save_torch_state_dict", fail)
        with pytest.raises(SystemExit):
            main(["export", str(run), str(path), "--force"])
    assert "No space left on device" in capsys.readouterr().err
    assert sorted(file.name for file in path.parent.iterdir()) == before and tensors_of(path).keys() == kept.keys()
    export_(run, "out", "--force", "--for", "vllm")
    assert (path / "model.safetensors").exists() and not (path / "medusa_lm_head.pt").exists()
    assert sorted(file.name for file in path.parent.iterdir()) == before
    assert (path / "model.safetensors").stat().st_mode == (path / "config.json").stat().st_mode


def test_mistakes_are_named_in_a_line(make_run: MakeRun, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for argv, text in (
        (["export", str(tmp_path / "nothing"), str(tmp_path / "out")], "found no run"),
        (["export", str(tmp_path / "out")], "--untrained RECIPE"),
        (["import", str(tmp_path), str(tmp_path / "out")], "give --base-model"),
    ):
        with pytest.raises(SystemExit):
            main(argv)
        error = capsys.readouterr().err
        assert text in error and len(error.splitlines()) == 1
    (tmp_path / "running" / "checkpoints" / "step-000004").mkdir(parents=True)
    with pytest.raises(SystemExit):
        main(["export", str(tmp_path / "running"), str(tmp_path / "out")])
    assert "not finished; name one of its checkpoints, as in" in capsys.readouterr().err
    assert "builds 5 heads" in (export_(make_run(), "three"), capsys.readouterr().out)[1]


def test_card_has_what_evaluate_measured_and_a_launch_line_for_each_engine(make_run: MakeRun) -> None:
    run = make_run()
    heads = {"head1": {"top1": 0.5}, "full_acc_1": 0.5, "positions": 9, "chain_acceptance_teacher_forced": 1.5}
    report = {"heads": heads, "accepted": {"mean_tokens_per_step": 1.75}, "speed": {"speed_up": 1.25}}
    (run / "evaluation.json").write_text(json.dumps(report))
    card = ModelCard.load(export_(run, "out") / "README.md")
    found = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert found == {"head1_acc": 0.5, "full_acc_1": 0.5, "chain_acceptance_teacher_forced": 1.5,
                     "mean_tokens_per_step": 1.75, "speed_up": 1.25}  # fmt: skip
    for text in (
        "custom_generate=",
        "vllm serve",
        "text-generation-launcher",
        "convert_checkpoint.py",
        "medusa.inference",
    ):
        assert text in card.text
    assert "max_length: 64" in card.text and "medusa-ds 0" in card.text


class FakeHub:
    calls: list[tuple[str, dict[str, Any]]] = []

    def create_repo(self, name: str, **_: Any) -> Any:
        self.calls.append(("create", {"name": name}))
        return type("Url", (), {"repo_id": f"owner/{name.split('/')[-1]}"})

    def upload_folder(self, **options: Any) -> None:
        self.calls.append(("folder", options))

    def upload_file(self, **options: Any) -> None:
        self.calls.append(("file", options))


def test_push_sends_the_backbone_to_a_repository_of_its_own(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
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
