"""Tiny random models, heads that know a text, and the reference: transformers' own greedy decoding."""

from typing import Any, NamedTuple

import torch
from support import SIZES
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from medusa_ds.heads.base import Head, Heads
from medusa_ds.heads.kinds import KINDS
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


def build(family: str, **changes: object) -> PreTrainedModel:
    torch.manual_seed(0)
    fields = SIZES | {"vocab_size": VOCAB, "max_position_embeddings": LIMIT, "initializer_range": 0.3}
    fields |= {"eos_token_id": [3, 5], "bos_token_id": 1, "pad_token_id": 0} | FAMILIES.get(family, {}) | changes
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family.removesuffix("_mixed"), **fields)).eval()


@torch.no_grad()
def build_permutation() -> tuple[PreTrainedModel, torch.Tensor]:
    """A model of 32 tokens in which a token alone says which one follows, and for each the token that it follows."""
    model, before = build("llama", vocab_size=32), torch.randperm(32, generator=torch.Generator().manual_seed(3))
    model.generation_config.eos_token_id = 33
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    model.model.embed_tokens.weight.copy_(torch.eye(32))
    model.lm_head.weight.copy_(torch.eye(32)[before])
    return model, before


def reference(model: PreTrainedModel, prompt: list[int], max_new_tokens: int, **options: object) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False, **options
    )
    return out[0, len(prompt) :].tolist()


def random_heads(kind: str = "medusa", layers: int = 1, vocab: int = VOCAB, **options: Any) -> Heads:
    torch.manual_seed(1)
    heads = KINDS[kind](NUM, layers, 32, vocab, **options)
    for parameter in heads.parameters():
        nn.init.normal_(parameter, std=0.3)
    return heads


@torch.no_grad()
def assert_samples(texts: torch.Tensor, model: PreTrainedModel, prompt: list[int], temperature: float = 1.0) -> None:
    """Pearson's chi-square of texts [draws, length] against the model's exact distribution over all of that length."""
    (draws, length), vocab = texts.shape, model.config.vocab_size
    every = torch.cartesian_prod(*[torch.arange(vocab)] * length)
    with torch.no_grad():
        logits = model(input_ids=torch.cat([torch.tensor(prompt).expand(len(every), -1), every], 1)).logits
    steps = (logits[:, -length - 1 : -1] / temperature).log_softmax(-1).gather(-1, every[..., None])[..., 0]
    wanted = draws * steps.sum(-1).exp()
    seen = torch.bincount(texts @ vocab ** torch.arange(length - 1, -1, -1), minlength=len(every))
    assert float(((seen - wanted) ** 2 / wanted).sum()) < len(every) + 4 * (2 * len(every)) ** 0.5


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
