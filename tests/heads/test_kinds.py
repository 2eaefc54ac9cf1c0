"""A third kind of heads: the class below, its name in `KINDS` and in `heads.kind` are all that it takes."""

import math
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from medusa_ds.config.recipe import Recipe
from medusa_ds.decoding.decoder import Decoder
from medusa_ds.decoding.measure import head_ranks
from medusa_ds.decoding.trees import default_tree
from medusa_ds.heads.base import Head, Heads
from medusa_ds.heads.files import load_heads, save_heads
from medusa_ds.heads.kinds import KINDS, make_heads
from medusa_ds.model.projection import ZeroLinear
from medusa_ds.training.build import build_model, heads_meta


class Gate(ZeroLinear):
    """`s * sigmoid(w e + c)`, the state halved at the start."""

    def forward(self, states, tokens):
        return states * super().forward(tokens).sigmoid()


class GatedHeads(Heads):
    """A token closes parts of the state."""

    kind, sees_tokens = "gated", True

    @staticmethod
    def make_head(layers, hidden_size, projection, dtype):
        head = Head(nn.Identity(), projection)
        head.gate = Gate(hidden_size, hidden_size, dtype=dtype)
        return head

    @staticmethod
    def kept(layers):
        return 4

    def advance(self, k, states, tokens):
        return self[k - 1].gate(states, tokens)


@pytest.fixture
def recipe(tiny_recipe, monkeypatch):
    monkeypatch.setitem(KINDS, "gated", GatedHeads)
    recipe = Recipe.load(tiny_recipe)
    return recipe.model_copy(update={"heads": recipe.heads.model_copy(update={"kind": "gated"})})


def test_a_third_kind_trains_is_saved_and_decodes(recipe, tiny_model, tmp_path):
    model = build_model(recipe, torch.float32, torch.device("cpu"), None, lambda _: nullcontext()).train()
    optimizer, losses = torch.optim.AdamW(model.heads.parameters(), lr=1e-2), []
    ids = (torch.arange(24) * 7 % 50 + 5).expand(2, -1)
    for _ in range(2):
        output = model(ids, ids, torch.arange(24).expand(2, -1))
        losses.append(sum(loss.loss_sum for loss in output.losses[1:]))
        losses[-1].backward()
        assert all(parameter.grad.norm() > 0 for parameter in model.heads.parameters())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[1] < losses[0]
    assert model.heads.count_parameters()[0] == 3 * (32 * 32 + 32)

    save_heads(tmp_path / "heads", model.heads.state_dict(), heads_meta(recipe))
    config, tensors = load_heads(tmp_path)
    heads = make_heads(config)
    heads.load_state_dict(tensors)
    assert type(heads) is GatedHeads

    backbone = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    prompt = torch.tensor([[7, 30, 12]])
    wanted = backbone.generate(prompt, max_new_tokens=20, do_sample=False, pad_token_id=0)[0, 3:].tolist()
    row = Decoder(backbone, heads, default_tree(3, 24)).generate([[7, 30, 12]], 20)[0]
    assert row.tokens == wanted
    assert head_ranks(backbone, heads, [7, 30, 12], wanted).shape == (len(wanted) - 3, 3)


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_a_kind_says_what_it_keeps_for_its_backward_pass(layers):
    """Against autograd's own saved tensors. Mutation: count Hydra's as Medusa's."""
    kept = {}
    for kind in ("medusa", "hydra"):
        shape = {"kind": kind, "num": 3, "layers": layers, "lm_head": "own", "hidden_size": 64, "vocab_size": 300}
        heads, seen, outputs = make_heads(shape), {}, []
        states, tokens = torch.randn(2, 128, 64)
        own = {parameter.untyped_storage().data_ptr() for parameter in heads.parameters()}

        def note(tensor, own=own, seen=seen):
            if (place := tensor.untyped_storage()).data_ptr() not in own:
                seen[place.data_ptr()] = place.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            for k, head in enumerate(heads, 1):
                states = heads.advance(k, states, tokens) if heads.sees_tokens else states
                outputs.append(head.blocks(states))
        for rows in outputs:  # the loss keeps them and their gradients
            note(rows)
            seen[f"gradient of {id(rows)}"] = rows.nbytes
        kept[kind] = sum(seen.values()) / (3 * 128 * 64 * 4)
        assert kept[kind] <= KINDS[kind].kept(layers)
    assert KINDS["hydra"].kept(layers) - KINDS["medusa"].kept(layers) == math.ceil(kept["hydra"] - kept["medusa"])
