"""Heads whose guesses depend on the path above them: against a walk along every path of the tree."""

from functools import partial

import pytest
import torch
from decoding_models import NUM, VOCAB, build, build_permutation, random_heads, reference

from medusa_ds.decoding.decoder import Decoder
from medusa_ds.decoding.measure import head_ranks
from medusa_ds.decoding.trees import Tree, chain, default_tree
from medusa_ds.heads.hydra import HydraHeads

hydra_heads = partial(random_heads, "hydra", 2)


def best(model, heads, hidden, path_tokens, width):
    """The best tokens of head `len(path_tokens)` after these tokens, the root first."""
    state, k = hidden, len(path_tokens)
    for head, token in zip(heads, path_tokens, strict=False):
        embedded = model.get_input_embeddings().weight[token]
        state = head.step(torch.cat([state, embedded / embedded.square().mean().add(1e-6).sqrt()]))
    logits = heads[k - 1].logits(state, model.lm_head)
    return heads.tokens(logits.argsort(descending=True)[:width]).tolist()


TREES = {
    "chain": chain(3),
    "bushy": default_tree(3, 40),
    "lopsided": Tree([(7,), (7, 0), (7, 0, 5), (0,), (2,), (2, 3), (2, 3, 0), (7, 4)]),
}


@torch.no_grad()
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("name", TREES)
def test_a_nodes_guesses_depend_on_its_path(name, own):
    """Mutations: give a node its neighbour's state, or the root's; leave out the step's token."""
    model, tree, tokens = build("llama"), TREES[name], torch.arange(119, 20, -1) if own else None
    heads = hydra_heads(own_projection=own, token_map=tokens)
    hidden_BH, root_B = torch.randn(2, 32), torch.tensor([9, 40])
    proposed = Decoder(model, heads, tree)._propose(hidden_BH, root_B)
    for hidden, tokens in zip(hidden_BH, proposed.tolist(), strict=True):
        token_of = dict(zip([(), *tree.paths], tokens, strict=True))
        for path in tree.paths:
            above = [token_of[path[:length]] for length in range(len(path))]
            assert token_of[path] == best(model, heads, hidden, above, path[-1] + 1)[-1]


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("name", TREES)
def test_greedy_text_is_the_models_own(name, own):
    model = build("qwen3")
    prompts = [[9, 40, 77], [7], [30, 2, 60, 11]]
    texts = [reference(model, prompt, 20) for prompt in prompts]
    rows = Decoder(model, hydra_heads(own_projection=own), TREES[name]).generate(prompts, 20)
    assert [row.tokens for row in rows] == texts


def test_heads_that_learned_a_text_are_accepted_along_the_path():
    """Heads whose guess is a function of the last token alone, as the model's own is."""
    (model, _), heads = build_permutation(), HydraHeads(NUM, 1, 32, 32)
    heads.initialize(model.lm_head.weight)
    with torch.no_grad():
        for k, head in enumerate(heads, 1):  # a step of 100 E(token) and more, larger than all that was there before
            head.step.weight[:, 32:].copy_(100.0**k * torch.eye(32))
    row = Decoder(model, heads, chain(3)).generate([[7]], 21)[0]
    assert row.tokens == reference(model, [7], 21, eos_token_id=33)
    assert row.accepted == [4, 4, 4, 4, 4]


@torch.no_grad()
def test_ranks_are_those_along_the_answer():
    """Mutation: the states of the tokens one place on."""
    model, heads, prompt = build("llama"), hydra_heads(), [9, 40, 77, 12]
    text = prompt + reference(model, prompt, 40, eos_token_id=VOCAB)
    hidden_TH = model.base_model(input_ids=torch.tensor([text])).last_hidden_state[0]
    ranks = head_ranks(model, heads, prompt, text[4:]).tolist()
    assert len(ranks) == 40 - NUM
    for t, row in enumerate(ranks, 3):
        for k, rank in enumerate(row, 1):
            order = best(model, heads, hidden_TH[t], text[t + 1 : t + k + 1], VOCAB)
            assert order.index(text[t + k + 1]) == rank
