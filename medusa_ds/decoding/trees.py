"""Candidate trees: which of the heads' guesses one forward pass verifies, and the search for the best such set.

A tree is a set of paths, as in Medusa's `medusa_choices` (arXiv 2401.10774, section 2.1.2): path `(2, 0)` is the third
guess of head 1 followed by the first guess of head 2. The root, the LM head's own token, is node 0 and has no path.

The search is greedy, as in the paper (section 2.3.3), but its probabilities come from joint counts of the ranks that
the heads gave to the true tokens, not from products of single accuracies: heads err together. A path is never more
probable than its beginning, so taking the most probable paths one by one gives the best tree of every size. Decoding
does not begin a step at every position: where guessing is easy it skips many. So `RankCounts.find_tree` counts once
more, at the positions where steps with the first tree begin.

Shape suffixes: N nodes, D depth of the deepest node + 1, M measured positions.
"""

import heapq
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from medusa_ds.errors import UserError

Path = tuple[int, ...]
PRIOR = 32.0  # positions' worth of belief in independence, which orders the paths that were never counted


class Level(NamedTuple):
    """The nodes of one depth, by what hangs above them; each tensor has an entry a node, or one a parent (P).

    `parents_P`: nodes of the depth above that have children, by their place in it. `grandparents_P`: their own parents,
    by their place in the depth above's `parents_P`. `parent`, `rank`: of each node, into `parents_P`, and among its
    parent's guesses. `width`: guesses that a parent is asked for.
    """

    parents_P: Tensor
    grandparents_P: Tensor
    parent: Tensor
    rank: Tensor
    width: int


class Tree:
    """A candidate tree with the index tensors that the tree step needs.

    Args:
        paths: the nodes but the root; every path's beginnings must be among them.
        device: where the tensors live.

    Attributes:
        paths: sorted by depth, then rank; node n is `paths[n - 1]`.
        depth_N: edges from the root.
        parent_N: the node above; 0 for the root.
        slot_N: place of the node's token among the candidates `[root, head 1 top-W, head 2 top-W, ...]`, W = `width`.
        levels: the nodes of depth 1, 2, ...
        mask_NN: true where column is an ancestor of row, or row itself.
        ancestors_ND: the nodes from the root to the node, then the node itself again ("retrieve indices").
    """

    def __init__(self, paths: Iterable[Path], device: torch.device | str = "cpu") -> None:
        self.paths = sorted(set(paths), key=lambda path: (len(path), path))
        self.nodes, self.depth = len(self.paths) + 1, max(map(len, self.paths), default=0)
        self.width = max((rank + 1 for path in self.paths for rank in path), default=0)
        number = {(): 0} | {path: n for n, path in enumerate(self.paths, 1)}
        chains = [[number[path[:length]] for length in range(len(path) + 1)] for path in number]
        slots = [0] + [1 + (len(path) - 1) * self.width + path[-1] for path in self.paths]
        self.depth_N = torch.tensor([len(chain) - 1 for chain in chains], device=device)
        self.parent_N = torch.tensor([chain[-2] if len(chain) > 1 else 0 for chain in chains], device=device)
        self.slot_N = torch.tensor(slots, device=device)
        self.ancestors_ND = torch.tensor([c + [c[-1]] * (self.depth + 1 - len(c)) for c in chains], device=device)
        self.mask_NN = torch.zeros(self.nodes, self.nodes, dtype=torch.bool)
        for row, chain in enumerate(chains):
            self.mask_NN[row, chain] = True
        self.mask_NN = self.mask_NN.to(device)
        self.levels = self._levels(device)

    def _levels(self, device: torch.device | str) -> list[Level]:
        levels: list[Level] = []
        above: list[Path] = [()]
        parents_above: list[Path] = [()]
        for depth in range(1, self.depth + 1):
            nodes = [path for path in self.paths if len(path) == depth]
            parents = sorted({path[:-1] for path in nodes})
            columns = (
                [above.index(path) for path in parents],
                [parents_above.index(path[:-1]) for path in parents],
                [parents.index(path[:-1]) for path in nodes],
                [path[-1] for path in nodes],
            )
            parents_P, grandparents_P, parent, rank = (torch.tensor(column, device=device) for column in columns)
            levels.append(Level(parents_P, grandparents_P, parent, rank, max(columns[3]) + 1))
            above, parents_above = nodes, parents
        return levels

    @classmethod
    def parse(cls, raw: Any, num: int, where: str) -> "Tree":
        """A tree from JSON: a list of paths, each a list of ranks from 0, no longer than there are heads (`num`).

        Raises:
            UserError: not such a list, deeper than the heads, a rank out of 0..63, or a path without its beginning.
        """
        if not isinstance(raw, list) or not all(isinstance(path, list) and path for path in raw):
            raise UserError(f"{where}: a tree is a list of paths such as [[0], [1], [0, 0]]")
        for path in raw:
            if not all(type(rank) is int and 0 <= rank < 64 for rank in path) or len(path) > num:
                raise UserError(f"{where}: found path {path}; allowed are at most {num} ranks (one a head) of 0..63")
            if len(path) > 1 and path[:-1] not in raw:
                raise UserError(f"{where}: path {path} hangs in the air; add {path[:-1]}")
        return cls(map(tuple, raw))


def chain(length: int) -> Tree:
    """Every head's first guess, one after the other; length 0 is plain autoregressive decoding."""
    return Tree((0,) * depth for depth in range(1, length + 1))


def default_tree(num: int, nodes: int) -> Tree:
    """A tree for heads that were not measured."""
    return best_tree(assumed_probability, num, 10, nodes)


def assumed_probability(path: Path) -> float:
    """Of heads that were not measured: as if head k were right with its rank r at 0.6 x 0.85^(k-1) x 0.3^r."""
    return math.prod(0.6 * 0.85**k * 0.3**r for k, r in enumerate(path))


def most_promising(tree: Tree) -> list[Path]:
    """A tree's paths, those first that such heads would get right most often; each comes behind its beginning."""
    return sorted(tree.paths, key=lambda path: (-assumed_probability(path), path))


def best_tree(probability: Callable[[Path], float], num: int, width: int, nodes: int) -> Tree:
    """The tree of the most probable paths: so many nodes with the root, or all of `num` heads of `width` guesses.

    `probability`: that all guesses of a path are right; not larger than that of the path's beginning.
    """
    chosen: list[Path] = []
    frontier: list[tuple[float, int, Path]] = [(-probability((rank,)), 1, (rank,)) for rank in range(width)]
    heapq.heapify(frontier)
    while frontier and len(chosen) < nodes - 1:
        _, length, path = heapq.heappop(frontier)
        chosen.append(path)
        if length < num:
            for rank in range(width):
                longer = (*path, rank)
                heapq.heappush(frontier, (-probability(longer), length + 1, longer))
    return Tree(chosen)


class RankCounts:
    """How often each combination of heads' ranks was right, over the measured positions of some answers.

    Args:
        ranks: [positions, heads] of each answer, as from `head_ranks`: the rank that head k gave to the true token.
        width: guesses of each head that are counted; ranks from there on count as misses.
    """

    def __init__(self, ranks: Sequence[Tensor], width: int) -> None:
        self.ranks, self.width = ranks, width
        self.ranks_Mk = torch.cat(list(ranks)).clamp(max=width)
        self.total, self.num = self.ranks_Mk.shape

    @cached_property
    def marginal(self) -> list[list[float]]:
        """[heads][ranks]: share of positions where head k's guess of that rank was right, whatever the others did."""
        return [
            (torch.bincount(column, minlength=self.width + 1)[: self.width] / max(self.total, 1)).tolist()
            for column in self.ranks_Mk.T
        ]

    @cached_property
    def joint(self) -> Counter[Path]:
        """Positions on which all guesses of a path were right, by path."""
        counts: Counter[Path] = Counter()
        for row in self.ranks_Mk.tolist():
            for length in range(1, self.num + 1):
                if row[length - 1] >= self.width:
                    break
                counts[tuple(row[:length])] += 1
        return counts

    def independent_probability(self, path: Path) -> float:
        """The paper's estimate: the product of the heads' accuracies."""
        return math.prod(self.marginal[k][rank] for k, rank in enumerate(path))

    def joint_probability(self, path: Path) -> float:
        """The counted share, leaning on independence where little was counted."""
        return (self.joint[path] + PRIOR * self.independent_probability(path)) / (self.total + PRIOR)

    def expected_acceptance(self, tree: Tree) -> float:
        """Mean tokens of a step, the LM head's own counted, if one with the tree began at every position."""
        return 1 + sum(self.joint[path] for path in tree.paths) / max(self.total, 1)

    def at_steps(self, tree: Tree) -> "RankCounts":
        """The counts over those positions at which greedy decoding of the answers with a tree begins a step."""
        paths, begins = set(tree.paths), []
        for ranks_Mk in self.ranks:
            rows, position, chosen = ranks_Mk.tolist(), 0, []
            while position < len(rows):
                chosen.append(position)
                length = 0
                while length < tree.depth and tuple(rows[position][: length + 1]) in paths:
                    length += 1
                position += length + 1
            begins.append(ranks_Mk[chosen])
        return RankCounts(begins, self.width)

    def tokens_per_step(self, tree: Tree) -> float:
        """Mean tokens of a step of greedy decoding of the answers, the LM head's own counted."""
        return self.at_steps(tree).expected_acceptance(tree)

    def find_tree(self, nodes: int) -> Tree:
        """The tree of a size for greedy decoding of texts like these answers."""
        first = best_tree(self.joint_probability, self.num, self.width, nodes)
        return best_tree(self.at_steps(first).joint_probability, self.num, self.width, nodes)
