"""Prompts answered by two decoders, so that their clocks compare."""

from types import SimpleNamespace

import pytest

from medusa_ds.decoding.answers import answer_prompts
from medusa_ds.decoding.decoder import Generation
from medusa_ds.errors import UserError
from medusa_ds.programs.evaluate import _decoding_rate, _end_to_end_rate


class Fake:
    """A decoder whose first answer to a length of a prompt, and in a session of a size, takes 100 s longer."""

    limit = 40

    def __init__(self, name, calls, step_s):
        self.name, self.calls, self.step_s, self.met = name, calls, step_s, set()

    def prepare(self, batch, tokens):
        self.session = SimpleNamespace(slots=-(-tokens // 16) * 16)
        return self.session

    def generate(self, prompts, max_new_tokens):
        (prompt,) = prompts
        cold = {len(prompt), -self.session.slots} - self.met
        self.met |= cold
        self.calls.append((self.name, len(prompt), max_new_tokens))
        decode_s = self.step_s * (max_new_tokens - 1)
        row = Generation([7] * max_new_tokens, finish="length", prefill_s=2.0 + 100 * len(cold), decode_s=decode_s)
        return [row]


def answer(texts, medusa=True, max_new_tokens=9):
    calls = []
    decoders = Fake("plain", calls, 1.0), Fake("medusa", calls, 0.5) if medusa else None
    prompts = [([{"role": "user", "content": text}], "") for text in texts]
    found, left_out = answer_prompts(
        prompts, lambda messages: list(messages[-1]["content"]), str, *decoders, max_new_tokens
    )
    return found, left_out, calls


def test_what_is_new_to_a_decoder_runs_before_its_clock():
    """Mutation: warm up on the first prompt alone, or at most once a length whatever the session."""
    answers, _, calls = answer(["abc", "abcde", "xyz", "abcdefghijkl"])
    assert {a.plain.prefill_s for a in answers} == {a.medusa.prefill_s for a in answers} == {2.0}
    warm = [("plain", 3), ("medusa", 3), ("medusa", 5), ("plain", 5), ("medusa", 12), ("plain", 12)]
    assert [call for call in calls if call[2] != 9] == [(*call, 3) for call in warm]
    assert _decoding_rate([a.medusa for a in answers]) == 2 * _decoding_rate([a.plain for a in answers]) == 2.0
    assert _end_to_end_rate([a.plain for a in answers]) == 9 / (2 + 8)


def test_decoders_take_turns_in_going_first():
    """Mutation: plain decoding always first, which then pays for what both need."""
    _, _, calls = answer(["abc"] * 4)
    assert [name for name, _, new in calls if new == 9] == ["plain", "medusa", "medusa", "plain"] * 2
    assert {name for name, *_ in answer(["abc"] * 4, medusa=False)[2]} == {"plain"}


def test_prompts_over_the_limit_are_counted():
    answers, left_out, _ = answer(["abc", "a" * 32, "abcd"])
    assert (len(answers), left_out) == (2, 1)
    with pytest.raises(UserError, match=r"none leaves room for .* --max-new-tokens"):
        answer(["a" * 32])
