"""Prefill, tree step: the runtime that turns weights into text, for trees and for plain decoding alike.

Every shape of a step is static: the tree's size, the cache's slots, the batch. A step verifies the whole tree in one
forward under a 4D mask, keeps the accepted path's keys and values and lets the heads guess the next tree. Plain
autoregressive decoding is the tree of one node through the same code, so a speed-up compares like with like. On a CPU,
where every node costs time, a step may verify a part of the tree alone (`pace`).

On a GPU the step, acceptance and guesses included, is one CUDA graph, and the host reads one small tensor a step.
So is the prefill of up to `CAPTURED_TOKENS` tokens, padded to one of a few lengths: launched kernel by kernel, a small
model's prefill takes as long as fifty steps. Prompts come as lists of tokens, so there is no side of padding to agree
about.

Shape suffixes: B rows, P longest prompt, N tree nodes, D tree depth + 1, H hidden size, V vocabulary, K heads.
"""

import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from medusa_ds.decoding.acceptance import Acceptance
from medusa_ds.decoding.capture import capture
from medusa_ds.decoding.kernels import enabled
from medusa_ds.decoding.kernels.compiled import CompiledBackbone, compile_part
from medusa_ds.decoding.kernels.packed import pack_projections
from medusa_ds.decoding.kernels.top_tokens import top_tokens
from medusa_ds.decoding.pace import Pace
from medusa_ds.decoding.session import Session, position_limit, static_attention
from medusa_ds.decoding.trees import Tree, assumed_probability, most_promising
from medusa_ds.errors import UserError
from medusa_ds.heads.base import Head, Heads
from medusa_ds.model.attention import base_model
from medusa_ds.model.backbone import vocabulary_projection
from medusa_ds.model.projection import VocabularyProjection

SLOTS_MULTIPLE = 256  # sessions of about the same length share a CUDA graph
CAPTURED_TOKENS = 8192  # of a prefill, padding included; with more of them the GPU is the one that takes the time


@dataclass
class Generation:
    """One row's text.

    Attributes:
        tokens: new tokens, the end token included.
        accepted: tokens that each step added, the LM head's own counted. The first token comes from the prefill and
            belongs to no step.
        nodes: of the tree that each step verified.
        finish: what ended it; "" while it goes on.
        prefill_s, decode_s: wall seconds of the batch, up to this row's end.
    """

    tokens: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    nodes: list[int] = field(default_factory=list)
    finish: Literal["", "end", "length", "stop"] = ""
    prefill_s: float = 0.0
    decode_s: float = 0.0


class Decoder:
    """Decodes with a tree of the heads' guesses, or plainly.

    Args:
        backbone: a causal language model of transformers. Its attention implementation is set to ours while the
            decoder runs, so the same model can serve `generate` of transformers in between. Its projections are
            packed in place.
        heads: of any kind; more than the tree is deep are not run. None for the tree of one node.
        tree: the candidates; `chain(0)` decodes plainly.
        acceptance: the rule.
        graph: capture steps as CUDA graphs, where the model lets them; None: on a GPU.
        compile_step: fuse the step with torch.compile first (about a minute once, for a faster step). The backbone must
            be free of Liger's kernels: compiled, they gave wrong text.
        adapt: let a single greedy text verify as much of the tree as pays; not where steps are captured or compiled.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        heads: Heads | None,
        tree: Tree,
        acceptance: Acceptance | None = None,
        *,
        graph: bool | None = None,
        compile_step: bool = False,
        adapt: bool = False,
    ) -> None:
        self.limit, self.clamp = position_limit(backbone.config)  # refuses before anything is changed
        assert tree.depth <= len(heads or ())
        self.backbone, self.tree = backbone.eval(), Tree(tree.paths, backbone.device)
        self.heads: Any = heads
        self.acceptance = acceptance or Acceptance()
        self.use_graph = backbone.device.type == "cuda" if graph is None else graph
        self.lm_head = vocabulary_projection(backbone)
        self.next_tree = self.tree  # which the next step verifies
        self._order = most_promising(self.tree)
        self.pace: Pace | None = None
        if adapt and heads and self.acceptance.rule == "greedy" and not (self.use_graph or compile_step):
            sizes = [size for size in {0, 1, 2, 3, 7, 15, 31, len(self._order)} if size <= len(self._order)]
            self._parts_of_tree = {size + 1: Tree(self._order[:size], backbone.device) for size in sizes}
            self.pace = Pace(sizes, [assumed_probability(path) for path in self._order])
        pack_projections(backbone)
        self._parts: CompiledBackbone | None = None
        if compile_step:
            one_row = tree.nodes == 1
            self._parts = CompiledBackbone(backbone, one_row)
            self._begin = compile_part(self._begin, one_row)  # type: ignore[method-assign]
            self._finish = compile_part(self._finish, one_row)  # type: ignore[method-assign]
        self._session: Session | None = None
        self.ends = set(end_tokens(backbone))

    def part(self, nodes: int) -> Tree:
        """The most promising nodes of the tree."""
        return self.tree if self.pace is None else self._parts_of_tree[nodes]

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        stop: Callable[[list[int]], bool] | None = None,
        seed: int = 0,
    ) -> list[Generation]:
        """Decode a batch to its end; arguments, results and errors as those of `stream`."""
        *_, rows = self.stream(prompts, max_new_tokens, stop, seed)
        return rows

    @torch.no_grad()
    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        stop: Callable[[list[int]], bool] | None = None,
        seed: int = 0,
    ) -> Iterator[list[Generation]]:
        """Decode a batch, yielding the rows as they stand after the prefill and after every step.

        Args:
            prompts: token ids of each row; lengths may differ.
            max_new_tokens: most new tokens; fewer where the model's position limit comes first.
            stop: asked after every new token with the row's new tokens; true ends the row.
            seed: of exact sampling.

        Yields:
            The same list of rows each time.

        Raises:
            UserError: an empty prompt or one over the model's limit.
        """
        lengths = [len(prompt) for prompt in prompts]
        if min(lengths) < 1 or max(lengths) > self.limit:
            raise UserError(f"prompt: found {lengths} tokens; allowed are 1 to {self.limit}, the model's limit")
        budgets = [min(max_new_tokens, self.limit + 1 - length) for length in lengths]
        session = self.prepare(len(prompts), max(map(sum, zip(lengths, budgets, strict=True))))
        generator = torch.Generator(self.backbone.device).manual_seed(seed)
        rows = [Generation() for _ in prompts]
        pace = self.pace if len(prompts) == 1 else None
        if pace is not None:
            pace.begin()
            self.next_tree = self.part(pace.choose() + 1)
        started = time.perf_counter()
        self._prefill(session, prompts, generator)
        first = session.tokens_BN[:, 0].tolist()
        prefill_s = time.perf_counter() - started
        for row, token, budget in zip(rows, first, budgets, strict=True):
            row.prefill_s = prefill_s
            self._extend(row, [token], budget, stop)
        yield rows
        decode_s = 0.0
        while not all(row.finish for row in rows):
            started = time.perf_counter()
            if len(rows) > 1:
                session.active_B.copy_(torch.tensor([int(not row.finish) for row in rows]))
            if pace is not None:
                self.next_tree = self.part(pace.choose() + 1)
            verified = session.tree
            self.step(session, generator)
            out = session.out_BD.tolist()  # the step's one synchronisation
            seconds = time.perf_counter() - started
            decode_s += seconds
            if pace is not None:
                path = {verified.paths[node - 1] for node in session.path_BD[0, 1 : out[0][0]].tolist()}
                held = [guess for guess, other in enumerate(self._order) if other in path]
                pace.saw(verified.nodes - 1, held, seconds if verified is session.tree else None)
            for row, (count, *tokens), budget in zip(rows, out, budgets, strict=True):
                if not row.finish:
                    row.nodes.append(verified.nodes)
                    row.accepted.append(self._extend(row, tokens[:count], budget, stop))
                    row.decode_s = decode_s
            yield rows

    def _extend(self, row: Generation, tokens: list[int], budget: int, stop: Callable[[list[int]], bool] | None) -> int:
        """Append tokens up to the first that ends the row; how many were kept."""
        for kept, token in enumerate(tokens, 1):
            row.tokens.append(token)
            if token in self.ends:
                row.finish = "end"
            elif stop is not None and stop(row.tokens):
                row.finish = "stop"
            elif len(row.tokens) >= budget:
                row.finish = "length"
            if row.finish:
                return kept
        return len(tokens)

    @torch.no_grad()
    def prepare(self, batch: int, tokens: int) -> Session:
        """A session with room for so many tokens a row, captured and empty; the last one is reused if it fits."""
        slots = self.tree.nodes + tokens + self.tree.depth + 1  # the last step may run over the end
        session = self._session
        if session is None or session.batch != batch or session.slots < slots:
            self._session = None  # frees the old one first
            slots = -(-slots // SLOTS_MULTIPLE) * SLOTS_MULTIPLE
            session = self._session = Session(self.backbone, self.tree, batch, slots)
            if self.use_graph:
                with self._installed(session):
                    session.graph = capture(lambda: self._step(session), session.pool)
                if session.graph is None:
                    print("this model waits for the GPU within a step: decoded without CUDA graphs", file=sys.stderr)
        session.length_B.zero_()
        session.active_B.fill_(1)
        session.tree = self.next_tree = self.tree
        return session

    @contextmanager
    def _installed(self, session: Session) -> Iterator[None]:
        with static_attention(self.backbone), self._parts.installed(session) if self._parts else nullcontext():
            yield

    @torch.no_grad()
    def step(self, session: Session, generator: torch.Generator | None = None) -> None:
        """Verify one tree in every row and put the next one in its place, by graph replay or eagerly."""
        if self.acceptance.rule == "exact":
            session.uniform_BN.uniform_(generator=generator)
        if session.graph is not None:
            session.graph.replay()
        else:
            with self._installed(session):
                self._step(session)

    def _prefill(self, session: Session, prompts: Sequence[Sequence[int]], generator: torch.Generator) -> None:
        """Read prompts from a graph if there is one for their length, or else kernel by kernel."""
        session.uniform_BN.uniform_(generator=generator)
        width = max(map(len, prompts))
        captured = session.graph is not None and width * len(prompts) <= CAPTURED_TOKENS
        if captured:
            width = min(padded_length(width), session.slots - session.reserved, self.limit)
        tokens_BP = begin(session, prompts, width)
        graph = self._prefill_graph(session, tokens_BP) if captured else None
        if graph is not None:
            graph.replay()
        else:
            with static_attention(self.backbone):
                self._read(session, tokens_BP)
        session.tree = self.next_tree

    def _prefill_graph(self, session: Session, tokens_BP: Tensor) -> torch.cuda.CUDAGraph | None:
        """The graph that reads prompts of this length, made for the first of them, with these in its place for them."""
        width = tokens_BP.shape[1]
        if width not in session.prefills:
            with static_attention(self.backbone):
                graph = capture(lambda: self._read(session, tokens_BP), session.pool, warm_ups=1)
            session.prefills[width] = tokens_BP, graph
        static_BP, graph = session.prefills[width]
        static_BP.copy_(tokens_BP)
        return graph

    def _read(self, session: Session, tokens_BP: Tensor) -> None:
        """Read prompts, choose the token after each and guess on from there."""
        hidden_BH = prefill(self.backbone, session, tokens_BP)
        root_B = self.acceptance.choose(self.lm_head(hidden_BH), session.uniform_BN[:, 0])
        self._put(session, self._propose(hidden_BH, root_B))

    def _step(self, session: Session) -> None:
        hidden_BNH = base_model(self.backbone)(**self._begin(session), **session.cache_arguments).last_hidden_state
        session.path_BD, count_B = self._finish(session, hidden_BNH)
        # not compiled: Inductor would copy all keys and values there and back to move a path of them
        session.keep(session.path_BD, count_B)
        session.tree = self.next_tree

    def _begin(self, session: Session) -> dict[str, Any]:
        """The tree's tokens, their positions and what they see."""
        position_BN = session.length_B[:, None] + session.tree.depth_N
        masks = session.masks(position_BN)
        if self.clamp:
            position_BN = position_BN.clamp(max=self.limit - 1)  # no token beyond is ever emitted
        tokens_BN = session.tokens_BN[:, : session.tree.nodes]
        return {"input_ids": tokens_BN, "position_ids": position_BN, **masks}

    def _finish(self, session: Session, hidden_BNH: Tensor) -> tuple[Tensor, Tensor]:
        """Accept a path and guess on from its end; the path and the count of its accepted nodes."""
        tokens_BN = session.tokens_BN[:, : session.tree.nodes]
        every_node = self._reads_lm_head_once(hidden_BNH)
        if every_node:
            parts = [hidden_BNH, *(head.blocks(hidden_BNH) for head in self._asked)]
            logits_GBNV = self.lm_head(torch.stack(parts))
        else:
            logits_GBNV = self.lm_head(hidden_BNH)[None]
        verdict = self.acceptance.judge(logits_GBNV[0], tokens_BN, session.tree, session.uniform_BN)
        row_B = torch.arange(len(tokens_BN), device=tokens_BN.device)
        out_BD = torch.cat([verdict.count_B[:, None], verdict.emitted_BD], 1)
        session.out_BD[:, : out_BD.shape[1]].copy_(out_BD)
        if every_node:
            next_BN = self._fill(logits_GBNV[1:, row_B, verdict.last_B], verdict.next_B)
        else:
            next_BN = self._propose(hidden_BNH[row_B, verdict.last_B], verdict.next_B)
        self._put(session, next_BN)
        return verdict.path_BD, verdict.count_B

    def _put(self, session: Session, tokens_BN: Tensor) -> None:
        """Write the next tree's tokens."""
        session.tokens_BN[:, : tokens_BN.shape[1]].copy_(tokens_BN)

    @property
    def _asked(self) -> list[Head]:
        """The heads that the next tree asks."""
        return [*(self.heads or ())][: self.next_tree.depth]

    def _reads_lm_head_once(self, hidden_BNH: Tensor) -> bool:
        """Whether to ask the heads at every node, before the last accepted one is known.

        That reads the LM head's weight once instead of twice, which pays while reading takes longer than multiplying.
        """
        if not self._asked or self.heads.sees_tokens or any(head.projection is not None for head in self._asked):
            return False
        rows = (1 + len(self._asked)) * hidden_BNH.shape[0] * hidden_BNH.shape[1]
        return rows <= (256 if hidden_BNH.is_cuda else 16)

    def _propose(self, hidden_BH: Tensor, root_B: Tensor) -> Tensor:
        """The next tree's tokens [B, N]: the root, and what the heads guess to come after it."""
        if not self._asked:
            return root_B[:, None]
        if not self.heads.sees_tokens:
            return self._fill(head_logits(self._asked, [hidden_BH] * self.next_tree.depth, self.lm_head), root_B)
        embed, states_BPH, levels = self.backbone.get_input_embeddings(), hidden_BH[:, None], [root_B[:, None]]
        for k, (head, level) in enumerate(zip(self._asked, self.next_tree.levels, strict=True), 1):
            tokens_BP = levels[-1][:, level.parents_P]
            states_BPH = self.heads.advance(k, states_BPH[:, level.grandparents_P], embed(tokens_BP))
            guesses_BPW = self._best(head_logits([head], [states_BPH], self.lm_head)[0], level.width)
            levels.append(guesses_BPW[:, level.parent, level.rank])
        return torch.cat(levels, 1)

    def _fill(self, logits_KBV: Tensor, root_B: Tensor) -> Tensor:
        """The tree of guesses that do not depend on each other."""
        guesses_KBW = self._best(logits_KBV, self.next_tree.width)
        return torch.cat([root_B[:, None], guesses_KBW.transpose(0, 1).flatten(1)], 1)[:, self.next_tree.slot_N]

    def _best(self, logits: Tensor, width: int) -> Tensor:
        """The most probable tokens [..., width]."""
        best = top_tokens(logits, width) if enabled(logits) else logits.topk(width, dim=-1).indices
        return self.heads.tokens(best)


def end_tokens(backbone: PreTrainedModel) -> list[int]:
    """The tokens that end a text.

    Raises:
        UserError: they are no numbers.
    """
    ends = backbone.generation_config.eos_token_id if backbone.generation_config else backbone.config.eos_token_id
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not all(isinstance(token, int) for token in ends):
        raise UserError(f"generation_config.json: eos_token_id: found {ends}; allowed is a token's number or a list")
    return ends


def end_at(backbone: PreTrainedModel, ends: Collection[int]) -> None:
    """Have more tokens end a text: those that the chat template writes after an answer; says so where they are more."""
    known = end_tokens(backbone)
    if more := sorted(set(ends) - set(known)):
        config = backbone.generation_config or GenerationConfig.from_model_config(backbone.config)
        config.eos_token_id = [*known, *more]
        backbone.generation_config = config
        text = f"answers end at token {more[0]} too, as by the chat template; generation_config.json ends none there"
        print(text, file=sys.stderr)


def padded_length(tokens: int) -> int:
    """The next of the lengths to which prompts are padded: multiples of 16, at most a fourth apart from 64 on."""
    apart = max(16, 1 << (tokens - 1).bit_length() >> 3)
    return -(-tokens // apart) * apart


def begin(session: Session, prompts: Sequence[Sequence[int]], width: int) -> Tensor:
    """Set a session's lengths to those of prompts; their tokens [B, width], padded on the right."""
    session.length_B.copy_(torch.tensor([len(prompt) for prompt in prompts]))
    padded = [[*prompt, *[0] * (width - len(prompt))] for prompt in prompts]
    return torch.tensor(padded, device=session.length_B.device)


def prefill(backbone: PreTrainedModel, session: Session, tokens_BP: Tensor) -> Tensor:
    """Read what `begin` gave, under `static_attention`; the hidden states [B, H] after the prompts' last tokens."""
    batch, width = tokens_BP.shape
    with session.prefilling():
        hidden_BPH = base_model(backbone)(
            input_ids=tokens_BP,
            position_ids=torch.arange(width, device=tokens_BP.device).expand(batch, -1),
            **session.prompt_mask(width),
            **session.cache_arguments,
        ).last_hidden_state
    return hidden_BPH[torch.arange(batch, device=tokens_BP.device), session.length_B - 1]


def head_logits(heads: Sequence[Head], states: Sequence[Tensor], lm_head: VocabularyProjection) -> Tensor:
    """Logits [heads, ..., V or N] of each head's states [..., H]; a shared LM head's weight is read once."""
    if all(head.projection is None for head in heads):
        rows = [head.blocks(state) for head, state in zip(heads, states, strict=True)]
        return lm_head(torch.stack(rows))
    return torch.stack([head.logits(state, lm_head) for head, state in zip(heads, states, strict=True)])


def stop_at(tokenizer: PreTrainedTokenizerBase, strings: Sequence[str]) -> Callable[[list[int]], bool]:
    """A `stop` for `Decoder.generate`: true once the decoded text holds one of the strings that are not empty."""
    tail = 4 * max(map(len, strings)) + 8  # a character has at most four byte tokens

    def stop(tokens: list[int]) -> bool:
        text = tokenizer.decode(tokens[-tail:])
        return any(string in text for string in strings if string)

    return stop
