from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from decoding_models import (
    LIMIT,
    NUM,
    VOCAB,
    assert_samples,
    build,
    build_permutation,
    oracles,
    random_heads,
    reference,
)
from transformers import DynamicCache

from medusa_ds.decoding import session as cache
from medusa_ds.decoding.acceptance import Acceptance
from medusa_ds.decoding.capture import capture
from medusa_ds.decoding.decoder import Decoder, begin, end_at, end_tokens, padded_length, stop_at
from medusa_ds.decoding.trees import Tree, chain, default_tree
from medusa_ds.errors import UserError
from medusa_ds.heads.medusa import MedusaHeads

TREES = {
    "chain": chain(3),
    "wide": Tree([(rank,) for rank in range(12)]),
    "bushy": default_tree(3, 40),
    "full": Tree([path for i in range(3) for path in ((i,), *(((i, j)) for j in range(3)))]),
    "lopsided": Tree([(7,), (7, 0), (7, 0, 5), (0,)]),
}


def test_greedy_with_random_heads_equals_transformers(case):
    """Mutation: positions without the node's depth."""
    decoder = Decoder(case.model, random_heads(), TREES["bushy"])
    for prompt, text in zip(case.prompts, case.texts, strict=True):
        assert decoder.generate([prompt], 20)[0].tokens == text


def test_perfect_heads_are_accepted_whole_at_every_step(case):
    """Mutation: copy the tree's first slots instead of the accepted path's."""
    for prompt, text, longer in zip(case.prompts, case.texts, case.longer, strict=True):
        row = Decoder(case.model, oracles(case.model, prompt + longer), TREES["bushy"]).generate([prompt], 20)[0]
        assert row.tokens == text
        assert row.accepted[:-1] == [NUM + 1] * (len(row.accepted) - 1)
        assert sum(row.accepted) == len(text) - 1


def test_trained_like_heads_of_a_permutation_model_are_perfect():
    """Real `MedusaHeads`: in a model that maps token i to f(i), head k's projection is the LM head's, permuted."""
    (model, before), heads = build_permutation(), MedusaHeads(NUM, 1, 32, 32)
    rows = model.lm_head.weight.detach()
    for head in heads:
        rows = rows[before]
        head.projection.weight.data.copy_(rows)
    row = Decoder(model, heads, chain(3)).generate([[7]], 21)[0]
    assert row.tokens == reference(model, [7], 21, eos_token_id=33)
    assert row.accepted == [4, 4, 4, 4, 4]


@pytest.mark.parametrize("name", TREES)
def test_trees_of_every_shape_give_the_same_text(case, name):
    """Mutation: a mask that lets nodes see their siblings."""
    tree = TREES[name]
    for prompt, text, longer in list(zip(case.prompts, case.texts, case.longer, strict=True))[:8]:
        some_right = oracles(case.model, prompt + longer, lambda k, position: (position * 7 + k) % 4)
        assert Decoder(case.model, some_right, tree).generate([prompt], 20)[0].tokens == text


def test_cache_is_that_of_a_fresh_forward_after_every_acceptance_length(case):
    """Mutation: forget the last accepted node when the path is copied."""
    prompt = case.prompts[17]
    text = prompt + reference(case.model, prompt, 60, eos_token_id=VOCAB)
    case.model.generation_config.eos_token_id, before = VOCAB, case.model.generation_config.eos_token_id
    decoder = Decoder(case.model, oracles(case.model, text, lambda k, t: 0 if k <= t // 4 % 4 else 30), TREES["bushy"])
    case.model.generation_config.eos_token_id = before
    seen = set()
    for (row,) in decoder.stream([prompt], 40):
        session = decoder._session
        length = int(session.length_B)
        assert length == len(prompt) + len(row.tokens) - 1 or row.finish
        fresh, cache_name = DynamicCache(), next(iter(session.cache_arguments))
        with torch.no_grad():
            case.model(input_ids=torch.tensor([text[:length]]), **{**session.cache_arguments, cache_name: fresh})
        begin = decoder.tree.nodes
        for index, layer in enumerate(fresh.layers):
            kept = layer.keys.shape[2]  # a sliding layer keeps its window only
            ours = session.kv[0][2 * index : 2 * index + 2, 0, :, begin + length - kept : begin + length]
            torch.testing.assert_close(ours, torch.stack([layer.keys[0], layer.values[0]]), rtol=1e-4, atol=1e-5)
        seen |= set(row.accepted)
    assert seen == {1, 2, 3, 4}


@pytest.mark.filterwarnings("error::FutureWarning")
def test_transformers_announces_no_end_of_what_decoding_calls(llama):
    """Mutation: hand the cache over as `past_key_values`, whatever it is called."""
    for heads, tree in ((random_heads(), TREES["bushy"]), ([], chain(0))):
        assert len(Decoder(llama, heads, tree).generate([[5, 9, 12]], 8)[0].tokens) > 1


@pytest.mark.parametrize("short", [0, 1, 2, 5])
def test_prompts_up_to_the_models_limit(llama, short):
    prompt = [6 + i % 90 for i in range(LIMIT - short)]
    row = Decoder(llama, random_heads(), TREES["bushy"]).generate([prompt], 50)[0]
    assert row.tokens == reference(llama, prompt, short + 1)[: len(row.tokens)]
    assert len(row.tokens) == short + 1 or row.finish == "end"


def test_a_prompt_over_the_limit_or_empty_is_refused(llama):
    for prompt in ([], [7] * (LIMIT + 1)):
        with pytest.raises(UserError, match=f"1 to {LIMIT}"):
            Decoder(llama, [], chain(0)).generate([prompt], 5)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_text_ends_where_all_its_positions_would_turn(kind):
    """Mutations: go on to the model's last position; ask for positions beyond, of guesses that are dropped."""
    rope = {"rope_type": kind, "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 40}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
    positions = 40 if kind == "dynamic" else 160
    model = build("llama", max_position_embeddings=positions, rope_parameters=rope, eos_token_id=None)
    prompt = [6 + i % 90 for i in range(30)]
    for heads, tree in ((random_heads(), TREES["bushy"]), ([], chain(0))):
        row = Decoder(model, heads, tree).generate([prompt], 20)[0]
        assert row.tokens == reference(model, prompt, 20, pad_token_id=0)[:11] and row.finish == "length"
    with pytest.raises(UserError, match="1 to 40"):
        Decoder(model, [], chain(0)).generate([prompt + prompt], 5)


def test_ends_inside_an_accepted_path_end_the_text_there(llama):
    """Mutation: look for the end token among the last emitted token only."""
    prompt = [9, 40, 77]
    longer = reference(llama, prompt, 40, eos_token_id=VOCAB)
    places = set()
    for end in dict.fromkeys(longer[1:13]):
        decoder = Decoder(llama, oracles(llama, prompt + longer), chain(3))
        decoder.ends = {end}
        row = decoder.generate([prompt], 30)[0]
        assert row.tokens == longer[: longer.index(end) + 1]
        assert row.finish == "end"
        places.add(row.accepted[-1] if row.accepted else 0)
    assert len(places) > 2
    decoder = Decoder(llama, oracles(llama, prompt + longer), chain(3))
    for budget in range(1, 10):
        row = decoder.generate([prompt], budget)[0]
        assert row.tokens == reference(llama, prompt, budget)


def test_ends_of_the_template_are_joined_to_the_models_and_told_once(capsys):
    """Mutations: put them in the place of the model's; leave transformers' own decoding without them."""
    model, prompt = build("llama"), [9, 40, 77]
    longer = reference(model, prompt, 40, eos_token_id=VOCAB)
    end_at(model, {3})
    assert capsys.readouterr().err == ""
    end_at(model, {longer[5], 5})
    end_at(model, {longer[5]})
    says = f"answers end at token {longer[5]} too, as by the chat template; generation_config.json ends none there\n"
    assert capsys.readouterr() == ("", says)  # a text that goes to a file has no such line in it
    assert end_tokens(model) == [3, 5, longer[5]]
    text = Decoder(model, [], chain(0)).generate([prompt], 40)[0].tokens
    assert text == longer[: longer.index(longer[5]) + 1] == reference(model, prompt, 40)


def test_stop_strings_end_the_text_with_the_token_that_completes_one(llama):
    class Letters:
        def decode(self, tokens):
            return "".join(chr(1000 + token) for token in tokens)

    prompt = [9, 40, 77]
    longer = reference(llama, prompt, 40, eos_token_id=VOCAB)
    text = Letters().decode(longer)
    decoder = Decoder(llama, oracles(llama, prompt + longer), chain(3))
    for start in range(1, 9):
        string = text[start : start + 3]
        row = decoder.generate([prompt], 30, stop_at(Letters(), ["", string]))[0]
        assert Letters().decode(row.tokens) == text[: text.index(string) + 3]
        assert row.finish == "stop"


def test_batches_of_unequal_prompts_equal_single_rows(case):
    """Mutation: let all rows grow by what the first row accepted."""
    prompts = case.prompts[1:13]
    for decoder in (Decoder(case.model, random_heads(), TREES["bushy"]), Decoder(case.model, [], chain(0))):
        rows = decoder.generate(prompts, 20)
        assert [row.tokens for row in rows] == case.texts[1:13]
        for prompt, row in zip(prompts, rows, strict=True):
            assert decoder.generate([prompt], 20)[0].accepted == row.accepted


def test_prompts_padded_to_a_captured_length_begin_texts_as_they_are(case):
    """Mutation: the hidden state of the last column in `prefill`."""
    decoder = Decoder(case.model, random_heads(), TREES["bushy"])
    for prompt in case.prompts[::5]:
        started = []
        for width in {len(prompt), min(padded_length(len(prompt)), LIMIT)}:
            session = decoder.prepare(1, LIMIT + 1)
            with torch.no_grad(), cache.static_attention(case.model):
                decoder._read(session, begin(session, [prompt], width))
            started.append((session.tokens_BN.tolist(), session.length_B.tolist()))
            decoder.step(session)
            started[-1] += (session.out_BD.tolist(),)
        assert started[0] == started[-1]


def test_lengths_of_captured_prefills_are_few_and_near():
    lengths = [padded_length(tokens) for tokens in range(1, 4097)]
    assert all(tokens <= length <= max(16, 1.25 * tokens + 12) for tokens, length in enumerate(lengths, 1))
    assert sorted(lengths) == lengths
    assert len(set(lengths)) < 32


def test_a_step_that_cannot_be_captured_is_waited_for(monkeypatch):
    """What it has begun on a stream beside must not write into the buffers later.

    Mutations: return before; wait on that stream itself.
    """
    waits, beside = [], SimpleNamespace(name="beside")
    streams = [SimpleNamespace(name="main")]  # the last one is current
    for stream in (*streams, beside):
        stream.wait_stream = lambda other, name=stream.name: waits.append((name, other.name))

    @contextmanager
    def enter(stream):
        streams.append(stream)
        yield
        streams.pop()

    monkeypatch.setattr(torch.cuda, "Stream", lambda: beside)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: streams[-1])
    monkeypatch.setattr(torch.cuda, "stream", enter)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda _: None)

    def step():
        raise RuntimeError("called a synchronizing CUDA operation")

    assert capture(step, warm_ups=1) is None
    assert waits == [("beside", "main"), ("main", "beside")]


def test_blocks_of_slots_are_skipped_only_where_no_node_looks(llama, monkeypatch):
    """What batches on a GPU attend through, compiled for a CPU; red when the tree's own slots do not count as used."""
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(6, VOCAB, (length,), generator=generator).tolist() for length in (1, 15, 16, 40)]
    trees = [(random_heads(), default_tree(3, 24)), ([], chain(0))]
    wanted = [Decoder(llama, heads, tree).generate(prompts, 30) for heads, tree in trees]
    monkeypatch.setattr(cache, "_BLOCK", 16)
    monkeypatch.setattr(cache, "_flex_attention", torch.compile(cache.flex_attention, dynamic=False))
    monkeypatch.setattr(cache.Session, "masks", lambda session, _: {"attention_mask": session.block_mask()})
    found = [Decoder(llama, heads, tree).generate(prompts, 30) for heads, tree in trees]
    for rows, others in zip(found, wanted, strict=True):
        assert [(row.tokens, row.accepted) for row in rows] == [(row.tokens, row.accepted) for row in others]


def test_shared_projection_and_own_copies_of_it_guess_the_same(llama):
    shared, own = MedusaHeads(NUM, 1, 32, VOCAB, own_projection=False), MedusaHeads(NUM, 1, 32, VOCAB)
    own.initialize(llama.lm_head.weight)
    for a, b in zip(shared, own, strict=True):
        torch.nn.init.normal_(a.blocks[0].weight, std=0.2)
        b.blocks.load_state_dict(a.blocks.state_dict())
    rows = [Decoder(llama, heads, TREES["bushy"]).generate([[9, 40, 77]], 20)[0] for heads in (shared, own)]
    assert (rows[0].tokens, rows[0].accepted) == (rows[1].tokens, rows[1].accepted)


def test_a_session_serves_longer_and_shorter_texts_one_after_the_other(llama):
    """What an earlier text left in the cache must not show."""
    decoder = Decoder(llama, random_heads(), TREES["bushy"])
    for prompt in ([9] * 60, [8], [70, 9, 11] * 9):
        assert decoder.generate([prompt], 12)[0].tokens == reference(llama, prompt, 12)
    assert decoder._session is decoder.prepare(1, 90)
    assert llama.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_exact_sampling_has_the_base_models_distribution(temperature):
    """All texts of four tokens over a vocabulary of four. Mutations: argmax in place of the draw at the path's end;
    accept a node whose probability is above the draw; one draw for all nodes of a step."""
    model = build("llama", vocab_size=4, eos_token_id=None)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.25)  # distributions that are neither flat nor one-sided
    tree = Tree([(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0)])
    decoder = Decoder(model, random_heads(vocab=4), tree, Acceptance("exact", temperature))
    rows = decoder.generate([[2, 0, 1]] * 6000, 4, seed=5)
    assert sum(sum(row.accepted) for row in rows) > 1.15 * sum(len(row.accepted) for row in rows)  # guesses matter
    assert_samples(torch.tensor([row.tokens for row in rows]), model, [2, 0, 1], temperature)


def test_sampling_repeats_with_its_seed(llama):
    decoder = Decoder(llama, random_heads(), TREES["bushy"], Acceptance("exact", 3.0))
    texts = [decoder.generate([[9, 40, 77]], 20, seed=seed)[0].tokens for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(("family", "blocks"), [("llama", True), ("gpt2", False)])
def test_masks_of_blocks_are_for_models_that_hand_them_on(family, blocks):
    """GPT-2 asks a mask for its number of dimensions, which FlexAttention's has not (transformers 5.17 to 5.24)."""
    model = build(family)
    assert cache.takes_blocks(model) is blocks
    row = Decoder(model, random_heads(), TREES["bushy"]).generate([[9, 30, 12]], 12)[0]
    assert row.tokens == reference(model, [9, 30, 12], 12)
