"""Heads at the start, after a step, and in their files."""

import json

import pytest
import torch
from safetensors.torch import load_file
from support import heads_meta
from torch import nn

from medusa_ds.errors import UserError
from medusa_ds.files import digest
from medusa_ds.heads.files import load_heads, save_heads
from medusa_ds.heads.medusa import MedusaHeads
from medusa_ds.model.projection import VocabularyProjection, project

H, V = 8, 23


def make(layers=2, own=True, num=3):
    heads = MedusaHeads(num, layers, H, V, own_projection=own)
    heads.initialize(torch.randn(V, H, generator=torch.Generator().manual_seed(1)))
    return heads


def cross_entropy(targets, impl="torch"):
    return lambda projection, rows: projection.cross_entropy(rows, targets, impl, 1)


@pytest.mark.parametrize("layers", [0, 1, 3])
def test_a_new_head_gives_the_lm_heads_logits(layers):
    lm_head = VocabularyProjection(H, V)
    torch.nn.init.normal_(lm_head.weight)
    heads = MedusaHeads(2, layers, H, V)
    heads.initialize(lm_head.weight)
    hidden = torch.randn(2, 5, H)
    for head in heads:
        assert torch.equal(head.logits(hidden), hidden @ lm_head.weight.T)
        assert head.projection.weight.data_ptr() != lm_head.weight.data_ptr()
    shared = MedusaHeads(2, layers, H, V, own_projection=False)
    assert torch.equal(shared[1].logits(hidden, lm_head), hidden @ lm_head.weight.T)
    assert not [name for name in shared.state_dict() if "projection" in name]


@pytest.mark.parametrize("layers", [0, 1, 2])
@pytest.mark.parametrize("impl", ["torch", "eager"])
def test_every_parameter_learns_from_hidden_states_without_graph(layers, impl):
    """Mutation: share the residual blocks between heads or layers (the parameters become fewer)."""
    heads = make(layers)
    hidden, targets = torch.randn(6, H), torch.randint(0, V, (6,))
    sum(head(hidden, None, cross_entropy(targets, impl))[0] for head in heads).backward()
    assert len(list(heads.parameters())) == 3 * (2 * layers + 1)
    assert all(parameter.grad.norm() > 0 for parameter in heads.parameters())


META = heads_meta(3, 2, H, V)


@pytest.fixture
def saved(tmp_path):
    save_heads(tmp_path / "run" / "heads", make().state_dict(), META)
    return tmp_path / "run" / "heads"


@pytest.mark.parametrize("own", [True, False])
def test_saved_heads_come_back(tmp_path, own):
    heads = make(own=own).to(torch.bfloat16)
    save_heads(tmp_path, heads.state_dict(), {**META, "lm_head": "own" if own else "shared"})
    config, tensors = load_heads(tmp_path)
    assert {key: config[key] for key in META} == {**META, "lm_head": "own" if own else "shared"}
    assert (config["format_version"], config["dtype"]) == (1, "bfloat16")
    assert tensors.keys() == heads.state_dict().keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in heads.state_dict().items())
    assert sorted(file.name for file in tmp_path.iterdir()) == ["heads.json", "heads.safetensors"]


def test_the_output_directory_of_a_run_names_its_heads(saved):
    assert load_heads(saved.parent)[0]["num"] == 3
    with pytest.raises(UserError, match=r"heads\.json: no such file"):
        load_heads(saved.parent.parent)


def edit(folder, **changes):
    config = {**json.loads((folder / "heads.json").read_text()), **changes}
    (folder / "heads.json").write_text(json.dumps(config))


def rewrite(folder, change):
    """Save other tensors with a checksum that fits them."""
    tensors = load_file(folder / "heads.safetensors")
    change(tensors)
    save_heads(folder, tensors, META)


def overwrite(folder, place, content):
    """Write bytes over a place of the tensors' file; its checksum."""
    file = folder / "heads.safetensors"
    data = bytearray(file.read_bytes())
    data[place : place % len(data) + len(content)] = content
    file.write_bytes(data)
    return digest(file)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "heads.safetensors").unlink(), r"heads.safetensors: cannot be read \(No such file"),
        (lambda f: (f / "heads.safetensors").write_bytes((f / "heads.safetensors").read_bytes()[:-1]), "damaged"),
        (lambda f: overwrite(f, -3, b"\xff\xff"), "damaged, its SHA-256"),
        (lambda f: edit(f, sha256=overwrite(f, 0, b"PK")), "not a safetensors file"),
        (lambda f: (f / "heads.json").write_text("{"), "heads.json:1: not valid JSON"),
        (lambda f: (f / "heads.json").write_text("[]"), "found format_version None; this version reads 1"),
        (lambda f: edit(f, format_version=2), "found format_version 2; this version reads 1"),
        (lambda f: edit(f, num=0), "num: found 0; save"),
        (lambda f: edit(f, layers=True), "layers: found True"),
        (lambda f: edit(f, vocab_size="many"), "vocab_size: found 'many'"),
        (lambda f: edit(f, lm_head="borrowed"), "lm_head: found 'borrowed'; save"),
        (lambda f: edit(f, num=4), r"3.blocks.0.bias: found None, heads.json says \[8\]"),
        (lambda f: edit(f, layers=1), r"0.blocks.1.bias: found .*, heads.json says None"),
        (lambda f: edit(f, hidden_size=9), r"0.blocks.0.bias: found \[8\] of torch.float32, .* says \[9\]"),
        (lambda f: edit(f, dtype="bfloat16"), "says .* of torch.bfloat16"),
        (lambda f: rewrite(f, lambda t: t.pop("1.projection.weight")), "1.projection.weight: found None"),
        (lambda f: rewrite(f, lambda t: t.update(extra=torch.ones(2))), "extra: found"),
    ],
)
def test_damaged_heads_are_refused_by_name(saved, damage, message):
    damage(saved)
    with pytest.raises(UserError, match=message):
        load_heads(saved)


def test_a_write_that_dies_leaves_the_old_heads(saved, monkeypatch):
    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", die)
    with pytest.raises(KeyboardInterrupt):
        save_heads(saved, make(layers=1).state_dict(), {**META, "layers": 1})
    assert load_heads(saved)[0]["layers"] == 2


def truncated(tokens):
    heads = MedusaHeads(2, 1, H, V, token_map=torch.tensor(tokens))
    lm_head = torch.randn(V, H)
    heads.initialize(lm_head)
    assert torch.equal(heads[1].projection.weight, lm_head[tokens])
    return heads


def test_token_map_is_saved_beside_the_heads(tmp_path):
    heads = truncated([2, 3, 11, 22])
    save_heads(tmp_path, heads.state_dict(), META | {"num": 2, "layers": 1})
    config, tensors = load_heads(tmp_path)
    assert config["vocab_size"] == V and config["dtype"] == "float32"
    assert tensors["token_map"].tolist() == [2, 3, 11, 22]
    again = MedusaHeads(2, 1, H, V, token_map=tensors["token_map"])
    again.load_state_dict(tensors)
    hidden = torch.randn(3, H)
    assert torch.equal(again[0].logits(hidden), heads[0].logits(hidden))
    assert again.tokens(torch.tensor([3])).tolist() == [22]
    assert again.rows(torch.tensor([11, 4])).tolist() == [2, -1]


NO_TOKENS = [[2, 3, 11, V], [-1, 3, 11, 4], [2, 3, 11, 3], [2.0, 3.0, 11.0, 4.0], [], [[2, 3, 11, 4]]]


@pytest.mark.parametrize(
    ("tokens", "says"),
    [
        (torch.tensor([2, 3, 11]), "projection.weight: found"),
        *((torch.tensor(tokens), "allowed are different tokens below 23") for tokens in NO_TOKENS),
    ],
)
def test_bad_token_maps_are_refused(tokens, says, tmp_path):
    state = truncated([2, 3, 11, 22]).state_dict() | {"token_map": tokens}
    save_heads(tmp_path, state, META | {"num": 2, "layers": 1})
    with pytest.raises(UserError, match=says):
        load_heads(tmp_path)


def test_token_map_beside_a_shared_projection_is_refused(tmp_path):
    state = make(1, own=False).state_dict() | {"token_map": torch.tensor([1, 2])}
    save_heads(tmp_path, state, META | {"num": 3, "layers": 1, "lm_head": "shared"})
    with pytest.raises(UserError, match="shared, which has no rows"):
        load_heads(tmp_path)


@pytest.mark.parametrize("shape", [(16,), (1, 16), (2, 7, 16)])
def test_products_without_gradients_are_those_with_them(shape):
    """They are another library's on a CPU. Mutation: leave the bias out."""
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(shape), torch.randn(40, 32)[:, :16].requires_grad_(), torch.randn(40)
    with torch.no_grad():
        without = project(hidden, weight, bias)
    torch.testing.assert_close(without, nn.functional.linear(hidden, weight, bias).detach())
    project(hidden, weight, bias).sum().backward()
    assert weight.grad is not None
