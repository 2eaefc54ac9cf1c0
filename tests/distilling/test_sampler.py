"""The built-in engine against transformers' own greedy decoding, and its draws against their law."""

from collections import deque
from types import SimpleNamespace

import pytest
import torch
from decoding_models import VOCAB, build, reference

from medusa_ds.decoding.acceptance import Acceptance
from medusa_ds.distilling.requests import Reply, Request, Sampling
from medusa_ds.distilling.sampler import Sampler, uniforms


class Letters:
    """A tokenizer whose texts are lists of token ids."""

    def __call__(self, text, **_):
        return {"input_ids": [int(part) for part in text.split()]}

    def decode(self, tokens, **_):
        return " ".join(map(str, tokens))


@pytest.fixture(scope="module")
def model():
    return build("llama")


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(6, VOCAB, (1 + i % 30,), generator=generator).tolist() for i in range(40)]


def answers(model, prompts, sampling, batch, order=None, follow=None):
    found = {}

    def handle(request, reply):
        found[request.row, request.turn] = reply
        return follow(request, reply) if follow else None

    rows = order or range(len(prompts))
    requests = deque(Request(row, 0, " ".join(map(str, prompts[row])), []) for row in rows)
    Sampler(model, SimpleNamespace(tokenizer=Letters()), sampling, batch).run(requests, handle)
    return found


@pytest.mark.parametrize("batch", [1, 5, 64])
def test_greedy_answers_are_transformers_own(model, prompts, batch):
    """Mutations: prefill into other rows than those freed; let ended rows go on growing."""
    found = answers(model, prompts, Sampling(0.0, 1.0, 20, 30, 0), batch)
    assert len(found) == len(prompts)
    for row, prompt in enumerate(prompts):
        wanted = reference(model, prompt, 20)
        finish = "end" if wanted[-1] in (3, 5) else "cut off"
        assert found[row, 0] == Reply(" ".join(map(str, wanted)), len(wanted), finish)


def test_draws_depend_on_seed_and_row_alone(model, prompts):
    """Mutation: draw with `torch.rand`."""
    sampling = Sampling(1.0, 0.9, 20, 30, seed=4)
    one = answers(model, prompts, sampling, 40)
    other = answers(model, prompts, sampling, 3, order=range(39, -1, -1))
    assert one == other
    assert one != answers(model, prompts, Sampling(1.0, 0.9, 20, 30, seed=5), 40)


def test_a_reply_may_ask_for_more_and_long_prompts_are_left_out(model, prompts):
    def follow(request, reply):
        return request._replace(turn=1) if request.turn == 0 and reply.finish != "prompt too long" else None

    found = answers(model, prompts, Sampling(0.0, 1.0, 20, 20, 0), 4, follow=follow)
    short = {row for row, prompt in enumerate(prompts) if len(prompt) <= 20}
    assert {row for row, turn in found if turn == 1} == short
    assert all(found[row, 0] == found[row, 1] for row in short)
    assert all(found[row, 0].finish == "prompt too long" for row in set(range(40)) - short)


def test_uniforms_are_uniform():
    draws = uniforms(torch.arange(200)[:, None] * 7919, torch.arange(500)).flatten()
    assert draws.unique().numel() == draws.numel()
    assert draws.min() >= 0 and draws.max() < 1
    counts = torch.histc(draws.float(), 50, 0, 1)
    assert ((counts - 2000) ** 2 / 2000).sum() < 90  # chi-squared with 49 degrees of freedom: one in 3,000
    columns = draws.reshape(200, 500)
    assert abs(torch.corrcoef(columns)[0, 1:].mean()) < 0.02


@pytest.mark.parametrize("top_p", [0.3, 0.8, 1.0])
def test_top_p_draws_from_the_most_probable_tokens(top_p):
    """Mutation: compare the sum that includes a token with top_p, which drops the token that reaches it."""
    logits = torch.tensor([0.4, 0.1, 0.3, 0.2]).log()
    uniform = (torch.arange(10_000) + 0.5) / 10_000
    drawn = Acceptance("exact", top_p=top_p).choose(logits.expand(10_000, 4), uniform)
    kept = {0.3: [0.4, 0, 0, 0], 0.8: [0.4, 0, 0.3, 0.2], 1.0: [0.4, 0.1, 0.3, 0.2]}[top_p]
    wanted = torch.tensor(kept) / sum(kept)
    torch.testing.assert_close(drawn.bincount(minlength=4) / 10_000, wanted, atol=2e-4, rtol=0)
