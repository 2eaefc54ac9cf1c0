"""Which path of the tree is kept: greedy, typical or exact sampling. No branches on data, so a CUDA graph holds it.

Every rule comes down to two things for each node: the token that the base model chooses after it (`choice`), and
whether the node itself may follow its parent (`fits`). A node is accepted when it and all nodes above it fit; the step
keeps the path to the deepest accepted node and ends with the choice made there, the next step's root.

| rule | choice after node n | node c fits under n when |
| --- | --- | --- |
| greedy | argmax p(. given n) | c's token is the choice |
| exact | drawn from p(. given n) | c's token is the choice |
| typical | argmax p(. given n) | p(c given n) > min(epsilon, delta exp(-entropy of p(. given n))) |

Exact sampling needs no rejection correction, because the candidates are chosen deterministically (top-k): draw the
token from p first, and *then* look whether the tree happens to contain it. If it does, its own distribution is known
already and the walk goes on; if not, the drawn token itself is the end. Either way every emitted token was drawn from
p given the tokens before it, so the text has the base model's distribution whatever the heads guess. No exact rule
accepts more: a text that follows p lies outside the candidate set C with probability 1 - p(C).

Typical acceptance is arXiv 2401.10774, section 2.3.1: the LM head's own token is greedy and always accepted; of
several deepest paths the most probable is kept.

Shape suffixes: B rows, N nodes, D depth + 1, V vocabulary.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from medusa_ds.config.settings import ProgramSettings
from medusa_ds.config.types import Positive
from medusa_ds.decoding.trees import Tree
from medusa_ds.errors import UserError


class Verdict(NamedTuple):
    """What a step keeps.

    Attributes:
        path_BD: nodes from the root to the last accepted one, which is repeated to the end.
        count_B: accepted nodes with the root, 1..D; equals the tokens that the step emits.
        emitted_BD: the step's tokens: accepted guesses, then the base model's own; the rest repeats the latter.
        last_B: the last accepted node.
        next_B: the base model's own token after it, the next root.
    """

    path_BD: Tensor
    count_B: Tensor
    emitted_BD: Tensor
    last_B: Tensor
    next_B: Tensor


@dataclass(frozen=True)
class Acceptance:
    """An acceptance rule; see the module's table and `AcceptanceSettings`.

    `top_p`: exact acceptance draws from the most probable tokens that together have this share; below 1 a step sorts.
    """

    rule: Literal["greedy", "typical", "exact"] = "greedy"
    temperature: float = 1.0
    epsilon: float = 0.09
    delta: float = 0.3
    top_p: float = 1.0

    def choose(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """The base model's tokens [...] for logits [..., V] and, of exact sampling, draws [...] from [0, 1)."""
        if self.rule != "exact":
            return logits.argmax(-1)
        # inverse of the cumulative distribution, in float64 so that 128k small terms do not drift
        p = (logits.float() / self.temperature).softmax(-1)
        if self.top_p < 1:
            sorted_p, token = p.sort(-1, descending=True)
            before = sorted_p.cumsum(-1) - sorted_p
            p = torch.zeros_like(p).scatter_(-1, token, sorted_p.where(before < self.top_p, 0.0))
        cumulative = p.double().cumsum(-1)
        threshold = uniform.double()[..., None] * cumulative[..., -1:]
        return torch.searchsorted(cumulative, threshold, right=True)[..., 0].clamp(max=logits.shape[-1] - 1)

    def judge(self, logits_BNV: Tensor, tokens_BN: Tensor, tree: Tree, uniform_BN: Tensor) -> Verdict:
        """Decide a step, by the base model's logits after every node and independent draws from [0, 1)."""
        choice_BN = self.choose(logits_BNV, uniform_BN)
        if self.rule == "typical":
            log_p_BNV = (logits_BNV.float() / self.temperature).log_softmax(-1)
            entropy_BN = -(log_p_BNV.exp() * log_p_BNV).nan_to_num(0.0).sum(-1)
            threshold_BN = (self.delta * (-entropy_BN).exp()).clamp(max=self.epsilon)
            row_B1 = torch.arange(tokens_BN.shape[0], device=tokens_BN.device)[:, None]
            own_BN = log_p_BNV[row_B1, tree.parent_N, tokens_BN]
            fits_BN = own_BN.exp() > threshold_BN[:, tree.parent_N]
            own_BN = torch.where(tree.depth_N > 0, own_BN, 0.0)
            score_BN = torch.where(tree.mask_NN, own_BN[:, None, :], 0.0).sum(-1)
        else:
            fits_BN = tokens_BN == choice_BN[:, tree.parent_N]
            score_BN = torch.zeros(tokens_BN.shape, device=tokens_BN.device)
        fits_BN = fits_BN | (tree.depth_N == 0)
        accepted_BN = ~(tree.mask_NN & ~fits_BN[:, None, :]).any(-1)
        depth_BN = torch.where(accepted_BN, tree.depth_N, -1)
        deepest_BN = depth_BN == depth_BN.amax(-1, keepdim=True)
        last_B = torch.where(deepest_BN, score_BN, -torch.inf).argmax(-1)
        path_BD, count_B = tree.ancestors_ND[last_B], tree.depth_N[last_B] + 1
        next_B = choice_BN.gather(1, last_B[:, None])[:, 0]
        guesses_BD = tokens_BN.gather(1, path_BD.roll(-1, 1))
        step_D = torch.arange(path_BD.shape[1], device=path_BD.device)
        emitted_BD = torch.where(step_D < count_B[:, None] - 1, guesses_BD, next_B[:, None])
        return Verdict(path_BD, count_B, emitted_BD, last_B, next_B)


class AcceptanceSettings(ProgramSettings):
    """Of programs that decode by one of the rules."""

    rule: Literal["greedy", "typical", "exact"] = Field(Acceptance.rule, alias="acceptance")
    """Greedy: the base model's own text; exact: samples of its distribution; typical: the Medusa paper's."""
    temperature: Positive = Acceptance.temperature
    """Of exact and typical acceptance."""
    epsilon: Positive = Acceptance.epsilon
    """Typical: hard threshold."""
    delta: Positive = Acceptance.delta
    """Typical: entropy-dependent threshold."""

    @property
    def acceptance(self) -> Acceptance:
        """The rule that was chosen.

        Raises:
            UserError: an option is given that it does not read.
        """
        unread = {"greedy": ("temperature", "epsilon", "delta"), "exact": ("epsilon", "delta"), "typical": ()}
        if given := [name for name in unread[self.rule] if name in self.model_fields_set]:
            raise UserError(
                f"--{given[0]}: found it with --acceptance {self.rule}, which has none; choose another rule"
            )
        return Acceptance(self.rule, self.temperature, self.epsilon, self.delta)
