"""Tiny random models, heads that know a text, and the reference: transformers' own greedy decoding."""

from typing import NamedTuple

import torch
from support import SIZES
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from medusa_ds.heads.base import Head, Heads
from medusa_ds.heads.medusa import MedusaHeads
from medusa_ds.model.projection import VocabularyProjection

VOCAB, LIMIT, NUM = 120, 96, 3
FAMILIES = {
    "llama": {},
    "qwen3": {"head_dim": 16},
    "mistral": {"sliding_window": 10},
    "qwen3_mixed": {"head_dim": 16, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
}


class Case(NamedTuple):
    """A tiny model, prompts, the texts of transformers' own greedy decoding, and those that go on behind their end."""

    model: PreTrainedModel
    prompts: list[list[int]]
    texts: list[list[int]]
    longer: list[list[int]]


def build(family: str, vocab: int = VOCAB, limit: int = LIMIT) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family.removesuffix("_mixed"),
        **SIZES,
        vocab_size=vocab,
        max_position_embeddings=limit,
        initializer_range=0.3,
        eos_token_id=[3, 5],
        bos_token_id=1,
        pad_token_id=0,
        **FAMILIES.get(family, {}),
    )
    return AutoModelForCausalLM.from_config(config).eval()


def reference(model: PreTrainedModel, prompt: list[int], max_new_tokens: int, **options: object) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False, **options
    )
    return out[0, len(prompt) :].tolist()


def random_heads(vocab: int = VOCAB, token_map: torch.Tensor | None = None) -> MedusaHeads:
    torch.manual_seed(1)
    heads = MedusaHeads(NUM, 1, 32, vocab, token_map=token_map)
    for parameter in heads.parameters():
        nn.init.normal_(parameter, std=0.3)
    return heads


class Oracle(Head):
    """A head that knows a text: it finds the position whose hidden state it is given and reads what comes later.

    `rank(position)` says where among its guesses the right token stands; others, close to it, stand before.
    """

    def __init__(self, k, known_TH, text, rank):
        super().__init__(nn.Identity(), VocabularyProjection(1, 1))
        self.k, self.known_TH, self.text, self.rank = k, known_TH, text, rank

    def logits(self, hidden, lm_head=None):
        logits = torch.zeros(*hidden.shape[:-1], VOCAB)
        for row, state in enumerate(hidden):
            position = int((self.known_TH - state).norm(dim=-1).argmin())
            if position + self.k + 1 < len(self.text):
                for place in range(self.rank(position) + 1):
                    logits[row, (self.text[position + self.k + 1] + place) % VOCAB] = 1.0 + place
        return logits


def oracles(model: PreTrainedModel, text: list[int], rank=lambda k, position: 0) -> Heads:
    with torch.no_grad():
        known_TH = model.base_model(input_ids=torch.tensor([text])).last_hidden_state[0]
    heads = MedusaHeads(NUM, 0, 1, VOCAB)
    for k in range(1, NUM + 1):
        heads[k - 1] = Oracle(k, known_TH, text, lambda position, k=k: rank(k, position))
    return heads
