"""Heads that the package ships."""

import json
import shutil

import pytest
import torch
from support import tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from medusa_ds import runs
from medusa_ds.config.loading import SHAPES
from medusa_ds.decoding.decoder import Decoder
from medusa_ds.errors import UserError
from medusa_ds.exporting.card import read_figures
from medusa_ds.programs import tree

NAMES = sorted(folder.name for folder in runs.PRETRAINED.iterdir())


def base(spec, dtype, device, liger):
    """A model of the shapes of the one that the heads belong to, without its weights."""
    torch.manual_seed(0)
    less = {"intermediate_size": 64, "num_hidden_layers": 1, "max_position_embeddings": 128, "eos_token_id": 2}
    return LlamaForCausalLM(LlamaConfig(**SHAPES["HuggingFaceTB/SmolLM2-135M-Instruct"] | less)).to(dtype)


@pytest.fixture(params=NAMES)
def run(request, monkeypatch):
    monkeypatch.setattr(runs, "load_backbone", base)
    monkeypatch.setattr(runs, "load_tokenizer", lambda *_: tiny_tokenizer())
    return request.param, runs.load_run(request.param, torch.device("cpu"), torch.float32)


def test_they_are_found_by_name_and_decode_with_their_tree(run):
    """Mutations: look for the name in the working directory alone; give a CPU the first paths of the file."""
    name, loaded = run
    assert loaded.measured
    assert loaded.tree.paths == [(0,), (1,), (0, 0)]
    assert len(json.loads((runs.PRETRAINED / name / "heads.json").read_text())["tree"]) == 63
    assert runs.open_run(name).config_file is None
    assert 0 < sum(file.stat().st_size for file in (runs.PRETRAINED / name).iterdir()) < 8 << 20
    assert all(block.weight.abs().sum() > 0 for head in loaded.heads for block in head.blocks)
    texts = [
        Decoder(loaded.backbone, heads, tree).generate([[5, 6, 7]], 12)[0].tokens
        for heads, tree in ((loaded.heads, loaded.tree), ([], runs.Tree([])))
    ]
    assert texts[0] == texts[1]


def test_a_tree_is_not_written_into_the_package(run, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"turns": ["Hello"]}\n')
    with pytest.raises(UserError, match="sealed"):
        tree.run(tree.Settings(run=run[0], prompts=str(tmp_path / "prompts.jsonl")))


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_for_a_tree_of_ones_own_keeps_its_figures(name, tmp_path):
    """Mutation: look beside the copy, as beside the `heads` of a run, where another's may be."""
    copy = shutil.copytree(runs.PRETRAINED / name, tmp_path / "copy")
    (tmp_path / "evaluation.json").write_text(json.dumps({"heads": {"full_acc_1": 0.0}, "speed": {}}))
    saved = runs.open_run(copy)
    assert saved.config_file == copy / "heads.json"
    assert read_figures(saved.output, None) == read_figures(runs.PRETRAINED / name, None) != ({}, "")
    assert runs.open_run(shutil.copytree(copy, tmp_path / "run" / "heads")).output == tmp_path / "run"


def test_a_directory_of_that_name_comes_first(run, place):
    (place / run[0]).mkdir()
    with pytest.raises(UserError, match="found no run"):
        runs.load_run(run[0], torch.device("cpu"), torch.float32)
