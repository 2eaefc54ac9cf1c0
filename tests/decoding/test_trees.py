import itertools

import pytest
import torch

from medusa_ds.decoding.trees import RankCounts, Tree, best_tree, chain, default_tree
from medusa_ds.errors import UserError


def test_buffers_of_a_small_tree_are_those_worked_out_by_hand():
    """Mutation: let a node see its siblings."""
    tree = Tree([(0, 1), (1,), (0,), (0, 0)])
    assert tree.paths == [(0,), (1,), (0, 0), (0, 1)]
    assert (tree.nodes, tree.depth, tree.width) == (5, 2, 2)
    assert tree.depth_N.tolist() == [0, 1, 1, 2, 2]
    assert tree.parent_N.tolist() == [0, 0, 0, 1, 1]
    assert tree.slot_N.tolist() == [0, 1, 2, 3, 4]
    assert tree.ancestors_ND.tolist() == [[0, 0, 0], [0, 1, 1], [0, 2, 2], [0, 1, 3], [0, 1, 4]]
    expected = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [1, 1, 0, 1, 0], [1, 1, 0, 0, 1]]
    assert tree.mask_NN.int().tolist() == expected


def test_chain_of_length_zero_is_the_root_alone():
    assert (chain(0).nodes, chain(0).depth, chain(3).paths) == (1, 0, [(0,), (0, 0), (0, 0, 0)])


@pytest.mark.parametrize("num", [1, 2, 5])
@pytest.mark.parametrize("nodes", [1, 2, 11, 64])
def test_default_tree_has_the_asked_size_and_holds_every_beginning(num, nodes):
    tree = default_tree(num, nodes)
    assert tree.nodes == min(nodes, 11 if num == 1 else nodes)
    assert all(path[:-1] in tree.paths for path in tree.paths if len(path) > 1)
    assert tree.depth <= num


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({}, "list of paths"),
        ([[]], "list of paths"),
        ([3], "list of paths"),
        ([[0], ["x"]], "found path"),
        ([[True]], "found path"),
        ([[64]], "found path"),
        ([[-1]], "found path"),
        ([[0], [0, 0], [0, 0, 0]], "at most 2 ranks"),
        ([[0], [1, 0]], r"add \[1\]"),
    ],
)
def test_a_bad_tree_is_refused_with_its_place(raw, message):
    with pytest.raises(UserError, match=f"heads.json: .*{message}"):
        Tree.parse(raw, 2, "heads.json")


def _ranks(positions: int = 400) -> torch.Tensor:
    """Ranks of two heads that are right together: the second is where the first is."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(0, 4, (positions,), generator=generator)
    second = torch.where(torch.rand(positions, generator=generator) < 0.8, first, torch.randint(0, 4, (positions,)))
    return torch.stack([first, second], 1)


def test_best_tree_is_the_best_of_all_trees_of_its_size():
    """Mutation: end the search one head early."""
    counts = RankCounts([_ranks()], 2)
    paths = [path for length in (1, 2) for path in itertools.product(range(2), repeat=length)]
    for nodes in range(1, 8):
        trees = [
            Tree(chosen)
            for chosen in itertools.combinations(paths, nodes - 1)
            if all(path[:-1] in chosen for path in chosen if len(path) > 1)
        ]
        best = max(sum(map(counts.joint_probability, tree.paths)) for tree in trees)
        found = best_tree(counts.joint_probability, 2, 2, nodes)
        assert sum(map(counts.joint_probability, found.paths)) == pytest.approx(best)


def test_tokens_per_step_are_those_of_a_walk_from_one_accepted_end_to_the_next():
    """By hand. Mutations: begin a step at every position; walk from one answer into the next."""
    right, wrong = [0, 0], [9, 0]
    answers = [torch.tensor(rows) for rows in ([right, right, right, wrong, wrong], [wrong, right], [[0, 9], right])]
    # steps of 3, 1, 1 and 1, 3 and 2 tokens, where by position it were 3, 3, 3, 1, 1 and 1, 3 and 2, 3
    counts = RankCounts(answers, 4)
    assert counts.tokens_per_step(chain(2)) == pytest.approx((3 + 1 + 1 + 1 + 3 + 2) / 6)
    assert torch.cat(counts.at_steps(chain(2)).ranks).tolist() == [right, wrong, wrong, wrong, right, [0, 9]]


def test_a_tree_is_found_for_the_positions_where_steps_begin():
    """Long easy stretches, which a step or two cover, hide that head 1's second guess is worth more elsewhere.
    Mutation: count every position alike."""
    answer = torch.tensor(([[0, 0]] * 30 + [[1, 9]] * 14) * 20)
    counts = RankCounts([answer], 4)
    everywhere, found = best_tree(counts.joint_probability, 2, 4, 3), counts.find_tree(3)
    assert (everywhere.paths, found.paths) == ([(0,), (0, 0)], [(0,), (1,)])
    assert counts.tokens_per_step(found) > counts.tokens_per_step(everywhere)


def test_joint_counts_find_a_better_tree_than_independence_where_heads_err_together():
    counts = RankCounts([_ranks(4000)], 4)
    joint = best_tree(counts.joint_probability, 2, 4, 9)
    independent = best_tree(counts.independent_probability, 2, 4, 9)
    assert counts.expected_acceptance(joint) > counts.expected_acceptance(independent) + 0.1


def test_no_positions_give_no_acceptance_beyond_the_root():
    counts = RankCounts([torch.zeros(0, 2, dtype=torch.long)], 4)
    assert counts.expected_acceptance(chain(2)) == 1
    assert best_tree(counts.joint_probability, 2, 4, 5).nodes == 5
