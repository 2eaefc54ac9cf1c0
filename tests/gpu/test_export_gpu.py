"""The exported file for plain transformers on a GPU: passes replayed as CUDA graphs."""

from functools import partial

import pytest
import torch
from support import SIZES, heads_meta
from transformers import AutoConfig, AutoModelForCausalLM

from medusa_ds.exporting import custom_generate
from medusa_ds.heads.files import save_heads
from medusa_ds.heads.kinds import KINDS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

REPLAYED = dict.fromkeys(("llama", "gemma2", "mistral", "gpt2", "qwen3", "phi", "cohere2"), True) | {"gpt_neo": False}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", REPLAYED)
def test_replayed_passes_write_the_models_own_text(family, kind, tmp_path, monkeypatch):
    """One so long that graphs are made anew; twice, and with memory that others have used in between."""
    torch.manual_seed(0)
    sizes = {**SIZES, "hidden_size": 64, "num_hidden_layers": 3, "vocab_size": 500, "max_position_embeddings": 4096}
    special = {"sliding_window": 16} if family in ("gemma2", "mistral", "cohere2") else {}
    if family == "gpt_neo":
        special = {"attention_types": [[["global", "local", "global"], 1]], "window_size": 16}
    config = AutoConfig.for_model(
        family, **sizes, **special, initializer_range=0.2, eos_token_id=None, bos_token_id=None
    )
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    vocab, size = model.get_output_embeddings().weight.shape
    heads = KINDS[kind](2, 1, size, vocab)
    heads.initialize(model.get_output_embeddings().weight.cpu())
    save_heads(tmp_path / "heads", heads.state_dict(), heads_meta(2, 1, size, vocab, kind=kind))
    replay, replays = torch.cuda.CUDAGraph.replay, []
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: replays.append(graph) or replay(graph))
    own = partial(custom_generate.decode, heads=custom_generate.Heads(model, str(tmp_path), {}), graphs=True)
    for length, new in ((40, 60), (500, 560)):
        ids = torch.randint(5, 500, (2, length), generator=torch.Generator().manual_seed(new)).cuda()
        settings = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0, "use_cache": True}
        settings["attention_mask"] = torch.ones_like(ids)
        plain = model.generate(ids, **settings)
        junk = torch.full((1 << 26,), torch.nan, device="cuda")  # what a graph reads after it was freed
        del junk
        assert model.generate(ids, custom_generate=own, **settings).equal(plain)
    assert bool(replays) is REPLAYED[family]


def test_sampled_texts_are_those_of_a_cache_that_grows(tmp_path):
    """The same seed draws the same text, replayed or launched."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **SIZES, vocab_size=500, initializer_range=0.2, eos_token_id=None)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    vocab, size = model.get_output_embeddings().weight.shape
    heads = KINDS["medusa"](2, 1, size, vocab)
    heads.initialize(model.get_output_embeddings().weight.cpu())
    save_heads(tmp_path / "heads", heads.state_dict(), heads_meta(2, 1, size, vocab))
    ids, texts = torch.randint(5, 500, (1, 9)).cuda(), []
    for graphs in (False, True):
        own = partial(custom_generate.decode, heads=custom_generate.Heads(model, str(tmp_path), {}), graphs=graphs)
        torch.manual_seed(1)
        settings = {"max_new_tokens": 60, "do_sample": True, "pad_token_id": 0, "use_cache": True}
        texts.append(model.generate(ids, attention_mask=torch.ones_like(ids), custom_generate=own, **settings))
    assert texts[0].equal(texts[1])
