"""How many guesses a step verifies, with times that are made up."""

from collections import Counter

import pytest
import torch
from decoding_models import build, oracles, random_heads, reference

from medusa_ds.decoding import decoder as decoding
from medusa_ds.decoding.acceptance import Acceptance
from medusa_ds.decoding.decoder import Decoder
from medusa_ds.decoding.pace import Pace
from medusa_ds.decoding.trees import default_tree


def run(pace, steps, seconds, holds):
    """Sizes of so many steps; the first `holds(step)` guesses are right."""
    sizes = []
    for step in range(steps):
        size = pace.choose()
        pace.saw(size, range(min(size, holds(step))), seconds[size])
        sizes.append(size)
    return sizes


def new_pace():
    return Pace([0, 1, 2, 3], [0.6, 0.3, 0.15])


def test_every_size_is_timed_first_and_then_the_fastest_is_taken():
    sizes = run(new_pace(), 200, {0: 1.0, 1: 1.1, 2: 1.2, 3: 1.3}, lambda step: 3)
    assert sizes[:8] == [3, 3, 2, 2, 1, 1, 0, 0]
    assert set(sizes[8:]) == {3}
    dear = run(new_pace(), 200, {0: 1.0, 1: 1.1, 2: 4.0, 3: 5.0}, lambda step: 3)
    assert Counter(dear[8:])[1] > 180 and set(dear[8:]) == {1, 2}


def test_guesses_that_do_not_hold_are_left_out_but_tried_again():
    """Mutation: forget nothing, and plain steps go on for ever."""
    pace = new_pace()
    sizes = run(pace, 400, {0: 1.0, 1: 1.1, 2: 1.2, 3: 1.3}, lambda step: 0)
    seconds = sum({0: 1.0, 1: 1.1, 2: 1.2, 3: 1.3}[size] for size in sizes[100:])
    assert seconds < 1.04 * 300 and Counter(sizes[100:])[0] > 250 and set(sizes[100:]) != {0}
    assert run(pace, 200, {0: 1.0, 1: 1.1, 2: 1.2, 3: 1.3}, lambda step: 3)[-5:] == [3] * 5


def test_a_text_begins_with_what_all_texts_have_shown():
    """Mutation: with what was assumed, and every text tries guesses again that have never held."""
    seconds, pace = {0: 1.0, 1: 1.1, 2: 1.2, 3: 1.3}, new_pace()
    texts = []
    for _ in range(40):
        pace.begin()
        texts.append(sum(seconds[size] for size in run(pace, 40, seconds, lambda step: 0)))
    assert sum(texts[10:]) < 1.01 * 40 * 30
    pace.begin()
    assert run(pace, 150, seconds, lambda step: 3)[-5:] == [3] * 5


def test_a_step_that_ends_as_another_size_gives_no_time():
    pace = new_pace()
    pace.saw(3, [0], None)
    assert pace.choose() == 3 and not pace.seconds[3]


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("heads_hold", [True, False])
def test_steps_of_any_size_give_the_models_own_text(monkeypatch, family, heads_hold):
    """A clock by which every node costs a tenth of a plain step. Mutation: begin the text behind the smaller tree."""
    model = build(family)
    prompt = list(range(6, 20))
    text = reference(model, prompt, 60, eos_token_id=119)
    longer = reference(model, prompt, 66, eos_token_id=119)
    heads = oracles(model, prompt + longer) if heads_hold else random_heads()
    decoder = Decoder(model, heads, default_tree(3, 8), adapt=True)
    decoder.ends, now, plain_step = {119}, [0.0], decoder.step
    monkeypatch.setattr(decoding.time, "perf_counter", lambda: now[0])

    def step(session, generator=None):
        now[0] += 1 + 0.1 * (session.tree.nodes - 1)
        plain_step(session, generator)

    monkeypatch.setattr(decoder, "step", step)
    rows = [decoder.generate([prompt], 60)[0] for _ in range(3)]
    assert all(row.tokens == text for row in rows)
    assert {8, 4, 3, 2, 1} <= set(rows[0].nodes)
    last = Counter(rows[2].nodes)
    if heads_hold:
        assert last.most_common(1)[0][0] > 2 and sum(rows[2].accepted) / len(rows[2].accepted) > 2
    else:
        assert last[1] > 40
    assert decoder.generate([prompt, prompt], 60)[1].tokens == text  # batches verify the whole tree


def test_only_greedy_steps_that_run_eagerly_adapt():
    model, heads = build("llama"), random_heads()
    for rule in ("typical", "exact"):
        assert Decoder(model, heads, default_tree(3, 8), Acceptance(rule), adapt=True).pace is None
    assert Decoder(model, heads, default_tree(3, 8)).pace is None
    assert torch.equal(*(Decoder(model, heads, default_tree(3, 8), adapt=on).tree.depth_N for on in (True, False)))
