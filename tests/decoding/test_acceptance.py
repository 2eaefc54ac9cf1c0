import itertools
import math

import pytest
import torch

from medusa_ds.decoding.acceptance import Acceptance
from medusa_ds.decoding.trees import Tree, chain, default_tree

TREES = [chain(0), chain(3), Tree([(0,), (1,), (2,)]), Tree([(0,), (1,), (0, 0), (0, 1), (1, 0)]), default_tree(3, 30)]


def _inputs(tree: Tree, rows: int = 60, vocab: int = 12):
    """Logits and tokens such that paths of every length fit: siblings have different tokens."""
    generator = torch.Generator().manual_seed(tree.nodes)
    logits = 3 * torch.randn(rows, tree.nodes, vocab, generator=generator, dtype=torch.float64)
    guesses = torch.rand(rows, max(tree.depth, 1), vocab, generator=generator).argsort(-1)
    candidates = torch.cat([torch.zeros(rows, 1, dtype=torch.long), guesses[..., : tree.width].flatten(1)], 1)
    tokens = candidates[:, tree.slot_N]
    for node in range(1, tree.nodes):  # let about half of the nodes be right
        right = torch.rand(rows, generator=generator) < 0.5
        logits[torch.arange(rows), tree.parent_N[node], tokens[:, node]] += 9.0 * right
    return logits, tokens, torch.rand(rows, tree.nodes, generator=generator)


def _walk(tree, logits_NV, tokens_N, choose):
    """The rule in words: choose, look for a child with that token, go on."""
    node, emitted = 0, []
    while True:
        token = choose(node, logits_NV[node])
        emitted.append(token)
        children = [n for n in range(1, tree.nodes) if tree.parent_N[n] == node and tokens_N[n] == token]
        if not children:
            return node, emitted
        node = children[0]


def _draw(uniform_N):
    def choose(node, logits_V):
        total, weights = 0.0, logits_V.softmax(-1).tolist()
        for token, weight in enumerate(weights):
            total += weight
            if total > uniform_N[node]:
                return token
        raise AssertionError

    return choose


@pytest.mark.parametrize("tree", TREES, ids=lambda tree: f"{tree.nodes}n{tree.depth}d")
@pytest.mark.parametrize("rule", ["greedy", "exact"])
def test_verdict_is_that_of_a_walk_from_the_root(tree, rule):
    """Mutation: accept a node that fits although its parent does not."""
    logits, tokens, uniform = _inputs(tree)
    verdict = Acceptance(rule).judge(logits, tokens, tree, uniform)
    for row in range(len(tokens)):
        choose = _draw(uniform[row]) if rule == "exact" else lambda node, logits_V: int(logits_V.argmax())
        node, emitted = _walk(tree, logits[row], tokens[row], choose)
        count = int(verdict.count_B[row])
        assert (int(verdict.last_B[row]), int(verdict.next_B[row])) == (node, emitted[-1])
        assert verdict.emitted_BD[row, :count].tolist() == emitted
        assert verdict.path_BD[row].tolist() == tree.ancestors_ND[node].tolist()
    assert len(set(verdict.count_B.tolist())) == tree.depth + 1  # every length occurs


@pytest.mark.parametrize("tree", TREES, ids=lambda tree: f"{tree.nodes}n{tree.depth}d")
def test_typical_acceptance_is_the_rule_of_the_paper(tree):
    """Mutations: max for min of the two thresholds; entropy of the node itself instead of its parent's."""
    rule = Acceptance("typical", temperature=0.7, epsilon=0.3, delta=0.8)
    (logits, tokens, uniform), nodes = _inputs(tree), [(), *tree.paths]
    verdict = rule.judge(logits, tokens, tree, uniform)
    for row in range(len(tokens)):
        p_NV = (logits[row] / 0.7).softmax(-1)
        best = (0, 0.0, 0)
        for node, path in enumerate(nodes):
            chain_of = [nodes.index(path[:length]) for length in range(len(path) + 1)]
            logs = []
            for parent, child in itertools.pairwise(chain_of):
                p_V = p_NV[parent]
                entropy = -sum(p * math.log(p) for p in p_V.tolist() if p > 0)
                p = float(p_V[tokens[row, child]])
                logs.append(math.log(p) if p > min(0.3, 0.8 * math.exp(-entropy)) else -math.inf)
            if sum(logs) > -math.inf:
                best = max(best, (len(path), sum(logs), node))
        assert int(verdict.last_B[row]) == best[2]
        assert int(verdict.next_B[row]) == int(logits[row, best[2]].argmax())


def test_a_draw_never_has_probability_zero():
    logits = torch.tensor([[0.0, -torch.inf, 0.0, -torch.inf]])
    for uniform in (0.0, 0.49999, 0.5, 1 - 2**-24):
        assert int(Acceptance("exact").choose(logits, torch.tensor([uniform]))) in (0, 2)
