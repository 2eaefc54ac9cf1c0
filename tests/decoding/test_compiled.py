"""A step compiled in parts."""

import os

import pytest
import torch
from decoding_models import build, random_heads
from torch._inductor.runtime.cache_dir_utils import cache_dir, default_cache_dir

from medusa_ds.decoding.decoder import Decoder
from medusa_ds.decoding.kernels.compiled import keep_compiled_code
from medusa_ds.decoding.kernels.packed import pack_projections
from medusa_ds.decoding.trees import chain, default_tree
from medusa_ds.errors import UserError


@pytest.mark.parametrize(("family", "parts"), [("llama", 5), ("qwen3_mixed", 6)])
def test_layers_share_one_compilation_and_the_text_is_the_same(family, parts, monkeypatch):
    """Both kinds of layers of a mixed model are compiled. Mutation: leave out `cache.current = slots`."""
    model = build(family, num_hidden_layers=5)
    pack_projections(model)
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda part, dynamic, options: compile_(part, dynamic=dynamic, backend=count))
    torch._dynamo.reset()
    plain, compiled = (Decoder(model, random_heads(), default_tree(3, 24), compile_step=fuse) for fuse in (False, True))
    for prompt in ([5, 9, 12], [7] * 20):
        assert compiled.generate([prompt], 30)[0].tokens == plain.generate([prompt], 30)[0].tokens
    assert len(graphs) == parts


@pytest.mark.parametrize("patched", ["forward", "class"])
def test_a_patched_model_is_refused(patched):
    """Liger replaces modules' `forward`, and classes for models built later. Mutation: ask for one of them only."""
    model = build("llama")
    norm = model.model.layers[0].input_layernorm
    if patched == "forward":
        norm.forward = norm.forward
    else:
        norm.__class__ = type("LigerRMSNorm", (type(norm),), {"__module__": "liger_kernel.transformers.rms_norm"})
    with pytest.raises(AssertionError, match="patched"):
        Decoder(model, [], chain(0), compile_step=True)


def test_a_model_without_a_list_of_layers_is_a_users_mistake():
    """GPT-2 names it otherwise. Mutation: take `base.layers` as it comes."""
    with pytest.raises(UserError, match=r"^--compile: gpt2 does not run a list of layers"):
        Decoder(build("gpt2"), [], chain(0), compile_step=True)


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("writable", [True, False])
def test_compiled_code_is_kept_where_it_can_be_written(writable, named, tmp_path, monkeypatch):
    """If nobody names a place. Mutations: heed the one that PyTorch names for itself, once imported; name a directory
    that is there and cannot be written, as of a read-only file system."""
    monkeypatch.setenv("MEDUSA_DS_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "named"))
    if not named:
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
        cache_dir()
    (kept := tmp_path / "compiled").mkdir()
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: access(path, mode) and (writable or path != kept))
    keep_compiled_code()
    assert cache_dir() == str(tmp_path / "named" if named else kept if writable else default_cache_dir())
