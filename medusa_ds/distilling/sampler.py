"""The built-in engine: large static batches on a GPU, ended rows refilled.

A step feeds every row's last token and draws the next one; on a GPU it is one CUDA graph, which also notices ended
rows, so that the host reads once in `STEPS` steps. While the GPU runs these, the host writes what has ended before.
Freed rows are filled by prefilling new prompts apart and copying their keys and values in.

A token's draw depends on seed, row, turn and position alone, whatever else is in the batch. The texts agree as far as
the logits do: in bf16, prompts prefilled in other company round differently.

Shape suffixes: B rows, E steps between two looks, H hidden size, V vocabulary.
"""

from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from medusa_ds.data.dialogues import Chat
from medusa_ds.data.layouts import UnusableRow
from medusa_ds.decoding.acceptance import Acceptance
from medusa_ds.decoding.capture import capture
from medusa_ds.decoding.decoder import begin, end_tokens, prefill
from medusa_ds.decoding.session import Session, static_attention
from medusa_ds.decoding.trees import Tree
from medusa_ds.distilling.requests import Handle, Reply, Request, Sampling
from medusa_ds.distilling.texts import loops
from medusa_ds.model.attention import base_model
from medusa_ds.model.backbone import vocabulary_projection

PREFILL_TOKENS = 32768  # padding included, of one prefill
SLOTS_MULTIPLE = 64
_MASK = [(1 << (64 - bits)) - 1 for bits in range(64)]


def uniforms(key_B: Tensor, position_B: Tensor) -> Tensor:
    """Draws from [0, 1) as float64 that depend on key and position alone: the finaliser of SplitMix64."""
    z = key_B + position_B * -0x61C8864680B583EB  # 0x9E3779B97F4A7C15, 2^64 over the golden ratio
    z = (z ^ ((z >> 30) & _MASK[30])) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
    z = (z ^ ((z >> 27) & _MASK[27])) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
    return (((z ^ ((z >> 31) & _MASK[31])) >> 11) & _MASK[11]).double() * 2.0**-53


@dataclass
class _Row:
    request: Request
    tokens: list[int] = field(default_factory=list)


class Sampler:
    """Answers requests with a model on its device, `batch` rows at once, each with room for what `sampling` asks."""

    def __init__(self, backbone: PreTrainedModel, chat: Chat, sampling: Sampling, batch: int) -> None:
        self.backbone, self.chat, self.sampling = backbone.eval(), chat, sampling
        device, self.lm_head = backbone.device, vocabulary_projection(backbone)
        room = sampling.max_prompt_tokens + sampling.max_new_tokens
        self.acceptance = Acceptance(
            "exact" if sampling.temperature else "greedy", sampling.temperature or 1.0, top_p=sampling.top_p
        )
        self.ends = torch.tensor(end_tokens(backbone), dtype=torch.long, device=device)
        self.steps = 32 if device.type == "cuda" else 4
        self.tree = Tree([], device)  # its root alone
        self.session = Session(backbone, self.tree, batch, -(-(room + 2) // SLOTS_MULTIPLE) * SLOTS_MULTIPLE)
        self.key_B = torch.zeros(batch, dtype=torch.long, device=device)
        self.limit_B = torch.zeros(batch, dtype=torch.long, device=device)
        self.out_EB = torch.zeros(self.steps, batch, dtype=torch.long, device=device)
        self.at_1 = torch.zeros(1, dtype=torch.long, device=device)
        self.path_B1 = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.count_B = torch.ones(batch, dtype=torch.long, device=device)
        self.session.active_B.zero_()

    @torch.no_grad()
    def run(self, requests: deque[Request], handle: Handle) -> None:
        """See `Engine`."""
        rows: list[_Row | None] = [None] * self.session.batch
        ended: list[tuple[Request, Reply]] = []
        ready: deque[tuple[Request, list[int]]] = deque()

        def settle() -> None:
            for request, reply in ended:
                following = handle(request, reply)
                if following is not None:
                    requests.appendleft(following)
            ended.clear()
            while requests and len(ready) < len(rows):
                request = requests.popleft()
                try:
                    ids = self._read(request)
                except UnusableRow as error:
                    ended.append((request, Reply("", 0, str(error))))
                    continue
                if len(ids) <= self.sampling.max_prompt_tokens:
                    ready.append((request, ids))
                else:
                    ended.append((request, Reply("", 0, "prompt too long")))

        with static_attention(self.backbone):
            graph = capture(self._step) if self.backbone.device.type == "cuda" else None
            step = self._step if graph is None else graph.replay
            while requests or ready or ended or any(rows):
                self._admit(rows, ready)
                if any(rows):
                    self.at_1.zero_()
                    for _ in range(self.steps):
                        step()
                settle()  # while the GPU runs
                if any(rows):
                    self._collect(rows, ended)

    def _read(self, request: Request) -> list[int]:
        if request.messages:
            return self.chat.prompt(request.messages)
        return self.chat.tokenizer(request.text, add_special_tokens=False, verbose=False)["input_ids"]

    def _step(self) -> None:
        """Hand out every row's last token, and draw the next one in rows that it did not end."""
        session = self.session
        root_B, length_B = session.tokens_BN[:, 0], session.length_B
        self.out_EB.index_copy_(0, self.at_1, torch.where(session.active_B > 0, root_B, -1)[None])
        self.at_1.add_(1)
        ended_B = (root_B[:, None] == self.ends).any(1) | (length_B + 1 >= self.limit_B)
        session.active_B.mul_(~ended_B)
        position_B1 = length_B[:, None].clone()  # `keep` moves the length
        hidden_B1H = base_model(self.backbone)(
            input_ids=root_B[:, None], position_ids=position_B1, **session.cache_arguments, **session.masks(position_B1)
        ).last_hidden_state
        session.keep(self.path_B1, self.count_B)
        session.tokens_BN.copy_(self._draw(hidden_B1H[:, 0], self.key_B, position_B1[:, 0] + 1)[:, None])

    def _draw(self, hidden_BH: Tensor, key_B: Tensor, position_B: Tensor) -> Tensor:
        return self.acceptance.choose(self.lm_head(hidden_BH), uniforms(key_B, position_B))

    def _admit(self, rows: list[_Row | None], ready: deque[tuple[Request, list[int]]]) -> None:
        """Fill free rows, as many at a time as `PREFILL_TOKENS` allow."""
        free = [place for place, row in enumerate(rows) if row is None]
        while free and ready:
            part: list[tuple[int, Request, list[int]]] = []
            longest = 0
            while free and ready and (not part or (len(part) + 1) * max(longest, len(ready[0][1])) <= PREFILL_TOKENS):
                request, ids = ready.popleft()
                longest = max(longest, len(ids))
                part.append((free.pop(), request, ids))
            self._prefill(part, longest)
            for place, request, _ in part:
                rows[place] = _Row(request)

    def _prefill(self, part: list[tuple[int, Request, list[int]]], longest: int) -> None:
        session, device = self.session, self.backbone.device
        own = Session(self.backbone, self.tree, len(part), longest + 1)
        hidden_BH = prefill(self.backbone, own, begin(own, [ids for _, _, ids in part], longest))
        place_B, length_B = torch.tensor([place for place, _, _ in part], device=device), own.length_B
        for kept, prefilled in zip(session.kv, own.kv, strict=True):
            kept[:, place_B, :, : longest + 1] = prefilled
        session.length_B[place_B], session.active_B[place_B] = length_B, 1
        self.limit_B[place_B] = length_B + self.sampling.max_new_tokens
        self.key_B[place_B] = torch.tensor([r.key(self.sampling.seed) for _, r, _ in part], device=device)
        session.tokens_BN[place_B, 0] = self._draw(hidden_BH, self.key_B[place_B], length_B)

    def _collect(self, rows: list[_Row | None], ended: list[tuple[Request, Reply]]) -> None:
        """Read what the steps have handed out, and free the rows that have ended."""
        active, ends = self.session.active_B.tolist(), set(self.ends.tolist())  # waits for the steps
        looping = []
        for place, (row, column) in enumerate(zip(rows, self.out_EB.T.tolist(), strict=True)):
            if row is None:
                continue
            row.tokens += [token for token in column if token >= 0]
            repeated = loops(row.tokens)
            if active[place] and not repeated:
                continue
            finish = "end" if row.tokens[-1] in ends else "repetition" if repeated else "cut off"
            text = str(self.chat.tokenizer.decode(row.tokens, skip_special_tokens=True))
            ended.append((row.request, Reply(text, len(row.tokens), finish)))
            rows[place] = None
            looping.append(place)
        self.session.active_B[torch.tensor(looping, dtype=torch.long, device=self.backbone.device)] = 0
