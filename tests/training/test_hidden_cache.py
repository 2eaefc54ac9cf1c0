"""The hidden cache against the backbone itself: rows of any packing, what is refused, what is computed again."""

import gc
import json
import os
import shutil
import weakref

import pytest
import torch
from safetensors.torch import load_file
from support import SIZES
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from medusa_ds import files
from medusa_ds.config.recipe import ModelSpec, Recipe
from medusa_ds.data.packing import load_data
from medusa_ds.errors import UserError
from medusa_ds.model import backbone as backbones
from medusa_ds.model import lm_head as lm_heads
from medusa_ds.model.backbone import load_tokenizer
from medusa_ds.model.lm_head import read_ends
from medusa_ds.model.rows import head_rows
from medusa_ds.training import hidden_cache as hidden

pytestmark = pytest.mark.usefixtures("group_of_one")

CPU = torch.device("cpu")


@pytest.fixture
def load(tiny_recipe, tmp_path):
    """Opens the cache of the tiny recipe with some keys changed; returns its data."""

    def load(*overrides):
        recipe = Recipe.load(tiny_recipe, [f"data.hidden_cache={tmp_path / 'hidden'}", *overrides])
        data = load_data(recipe, load_tokenizer(recipe.model))
        hidden.open_hidden_cache(recipe, data, CPU)
        return data

    return load


def by_rows(batch, num):
    """Hidden state of every row of every head, as a model takes it from the cache."""
    states, row, scales = batch.hidden
    states = states.float() if scales is None else states.float() * scales[:, None]
    return [states[row[head_rows(batch.labels, batch.position_ids, k)[0]]] for k in range(1, num + 1)]


def computed(model, batch, num):
    with torch.no_grad():
        found = model.base_model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)
    flat = found.last_hidden_state.flatten(0, 1)
    return [flat[head_rows(batch.labels, batch.position_ids, k)[0]] for k in range(1, num + 1)]


@pytest.mark.parametrize("packing", ["true", "false"])
@pytest.mark.parametrize("num", [1, 3])
def test_every_packing_finds_the_states_that_the_backbone_gives(load, tiny_model, packing, num):
    """Mutations: begin the rows of a shard at its first conversation's number; pack by the order of a dictionary."""
    data = load(f"data.packing={packing}", f"heads.num={num}")
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    for split in (data.train, data.validation):
        for step in (0, 1, 5):
            for micro, rank, ranks in ((1, 0, 1), (2, 1, 2), (4, 0, 1)):
                for batch in split.micro_batches(step, 4, micro, rank, ranks):
                    for found, wanted in zip(by_rows(batch, num), computed(model, batch, num), strict=True):
                        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("stored", "tolerance"), [("bf16", 2**-8), ("fp8", 2**-4)])
def test_stored_precision_bounds_the_error(load, tiny_model, stored, tolerance):
    """Half a unit in the last place of bf16 and of e4m3. Mutation: leave out the scale."""
    data = load(f"data.hidden_cache_dtype={stored}")
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    (batch,) = data.train.micro_batches(0, 4, 4, 0, 1)
    for found, wanted in zip(by_rows(batch, 3), computed(model, batch, 3), strict=True):
        large = wanted.abs() > wanted.abs().amax(-1, keepdim=True) / 64  # smaller ones are subnormal in e4m3
        assert ((found - wanted).abs()[large] <= 1.01 * tolerance * wanted.abs()[large]).all()


def shards(tmp_path):
    return sorted((tmp_path / "hidden").glob("shard-*.safetensors"))


@pytest.fixture
def filled(monkeypatch):
    """Numbers of the shards that are computed."""
    numbers, fill = [], hidden.HiddenCache.fill
    monkeypatch.setattr(
        hidden.HiddenCache, "fill", lambda self, shard, *a: numbers.append(shard) or fill(self, shard, *a)
    )
    return numbers


def test_a_flipped_bit_is_named_and_its_shard_computed_again(load, tmp_path, filled, capsys):
    """Mutation: compare sizes alone."""
    load()
    before = [file.read_bytes() for file in shards(tmp_path)]
    damaged = bytearray(before[3])
    damaged[-5] ^= 4
    shards(tmp_path)[3].write_bytes(damaged)
    shards(tmp_path)[7].with_suffix(".json").write_text("{")
    filled.clear()
    load()
    assert filled == [3, 7]
    assert (
        "shard-00003.safetensors: its checksum differs from the manifest: damaged; computed again"
        in capsys.readouterr().out
    )
    assert [file.read_bytes() for file in shards(tmp_path)] == before


def test_an_interrupted_filling_goes_on(load, tmp_path, filled, monkeypatch):
    """Mutation: name a shard finished before it is renamed."""
    written, replace = [], os.replace

    def stop(source, target):
        written.append(target)
        if len(written) == 12:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        load()
    monkeypatch.setattr(os, "replace", replace)
    assert filled == [0, 1, 2, 3, 4, 5]
    filled.clear()
    load()
    assert filled == list(range(5, hidden.MIN_SHARDS))
    filled.clear()
    monkeypatch.setattr(hidden, "load_frozen", None)  # a whole cache needs no backbone
    load()
    assert filled == []
    assert not list((tmp_path / "hidden").glob(".tmp*"))


OTHER = {
    "heads.num=2": "heads: made with 3, the recipe has 2",
    "data.hidden_cache_dtype=bf16": "stored: made with 'fp32', the recipe has 'bf16'",
    "train.precision=bf16": "precision: made with 'fp32', the recipe has 'bf16'",
    "data.template_args={enable_thinking: false}": "template: made with",
    "data.max_length=24": "training data: made with",
    "data.seed=3": "held-out data: made with",
}


def test_the_backbone_is_gone_when_the_cache_is_full(load, monkeypatch):
    """A GPU trains without its memory. Mutation: leave the garbage collection out."""
    seen, load_frozen = [], hidden.load_frozen

    def watched(*args):
        backbone = load_frozen(*args)
        backbone.itself = lambda: backbone  # as layers that are patched or compiled
        seen.append(weakref.ref(backbone))
        return backbone

    monkeypatch.setattr(hidden, "load_frozen", watched)
    gc.disable()
    try:
        load()
    finally:
        gc.enable()
    assert seen and seen[0]() is None


def test_another_recipes_cache_is_refused_with_the_difference(load, monkeypatch):
    """Mutation: leave the key out of `key_of`."""
    load()
    monkeypatch.setattr(hidden, "load_frozen", None)
    for override, says in OTHER.items():
        with pytest.raises(UserError, match=r"data\.hidden_cache") as error:
            load(override)
        assert says in str(error.value) and "name another directory, or auto" in str(error.value)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_retrained_model_of_the_same_name_is_refused(load, tiny_model, tmp_path, name):
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    tuned = AutoModelForCausalLM.from_pretrained(model)

    def save():
        tuned.save_pretrained(model)
        if name.endswith(".bin"):
            (model / "model.safetensors").unlink()
            torch.save(tuned.state_dict(), model / name)

    save()
    load(f"model.name={model}")
    with torch.no_grad():
        tuned.model.norm.weight.add_(1)
    save()
    with pytest.raises(UserError, match="weights: made with"):
        load(f"model.name={model}")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_model_that_differs_in_its_middle_or_its_config_is_refused(load, tiny_model, tmp_path, monkeypatch, name):
    """Mutation: look at the first and the last bytes of weights alone."""
    monkeypatch.setattr(hidden, "_SAMPLE_BYTES", 1 << 10)
    file = shutil.copytree(tiny_model, tmp_path / "model") / name
    load(f"model.name={file.parent}")
    content = file.read_bytes().replace(b'"rope_theta": 10000.0', b'"rope_theta": 10.0')
    file.write_bytes(content[:60_000] + bytes(8) + content[60_008:] if name == "model.safetensors" else content)
    with pytest.raises(UserError, match="weights: made with"):
        load(f"model.name={file.parent}")


def test_a_disk_without_room_is_an_error_before_the_model_loads(load, tmp_path, monkeypatch):
    monkeypatch.setattr(hidden, "load_frozen", None)
    monkeypatch.setattr(hidden.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 5))
    with pytest.raises(UserError, match=r"cannot be written \(5 bytes are free\); it needs \d+ bytes"):
        load()


def test_foreign_directories_and_other_runs_are_left_alone(load, tmp_path):
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="holds other files"):
        load()
    (tmp_path / "hidden" / "thesis.txt").unlink()
    load()
    shards(tmp_path)[0].unlink()
    with open(tmp_path / "hidden" / "lock", "a+") as lock:
        files.take(lock)
        with pytest.raises(UserError, match="another run is filling"):
            load()
    load()
    (tmp_path / "hidden" / "manifest.json").write_text("[")
    with pytest.raises(UserError, match="damaged"):
        load()


def test_auto_is_a_directory_for_every_key(tiny_recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("MEDUSA_DS_CACHE", str(tmp_path / "cache"))
    for overrides in ([], ["heads.num=2"], ["heads.layers=2", "train.lr=1"]):
        recipe = Recipe.load(tiny_recipe, ["data.hidden_cache=auto", *overrides])
        hidden.open_hidden_cache(recipe, load_data(recipe, load_tokenizer(recipe.model)), CPU)
    assert len(list((tmp_path / "cache" / "hidden").iterdir())) == 2


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("size", ["5GB", "20KB"])
def test_lm_head_is_read_without_the_model(tied, size, tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=300, tie_word_embeddings=tied))
    model.save_pretrained(tmp_path, max_shard_size=size)
    if (index := tmp_path / "model.safetensors.index.json").exists():  # as large as of a model with many experts
        index.write_text(json.dumps(json.loads(index.read_text()) | {"metadata": {"of": "x" * (1 << 20)}}))
    monkeypatch.setattr(lm_heads, "load_backbone", None)
    found = read_ends(ModelSpec(name=str(tmp_path)), torch.bfloat16, CPU, False).lm_head
    assert found.equal(model.lm_head.weight.to(torch.bfloat16))


@pytest.mark.parametrize("text", ['{"metadata"', "[]", '{"metadata": {}, "weight_map": ["a"]}'])
def test_a_damaged_index_is_told_as_when_the_model_is_loaded(text, tmp_path):
    """Mutation: let what reads its JSON raise."""
    LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=300)).save_pretrained(tmp_path, max_shard_size="20KB")
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match=r"^model\.name: .* cannot be loaded"):
        read_ends(ModelSpec(name=str(tmp_path)), torch.float32, CPU, False)


def test_lm_head_of_a_random_model_is_that_of_the_run():
    spec = ModelSpec(name="tiny", init="random", config=SIZES | {"model_type": "llama", "vocab_size": 90})
    wanted = backbones.load_backbone(spec, torch.float32, device="cpu").lm_head.weight
    assert read_ends(spec, torch.float32, CPU, False).lm_head.equal(wanted)


def test_a_cache_holds_every_row_once_and_what_rows_follow_from(load, tmp_path, tiny_model):
    data = load()
    rows = sum(hidden.count_rows(split, 3).sum() for split in (data.train, data.validation))
    assert sum(len(load_file(file)["states"]) for file in shards(tmp_path)) == rows
    assert len(shards(tmp_path)) == hidden.MIN_SHARDS
    manifest = json.loads((tmp_path / "hidden" / "manifest.json").read_text())
    assert manifest["model"] == str(tiny_model) and manifest["heads"] == 3 and len(manifest) == 13
    assert manifest["frozen precision"] == "bf16"


def test_a_directory_that_nodes_do_not_share_is_refused(load, monkeypatch):
    monkeypatch.setattr(hidden, "_fill", lambda cache, shards, *_: None)
    with pytest.raises(UserError, match="rank 0 does not see what other ranks wrote"):
        load()
