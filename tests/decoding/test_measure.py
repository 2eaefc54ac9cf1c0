import pytest
import torch
from decoding_models import NUM, random_heads, reference
from support import SIZES
from transformers import AutoModelForCausalLM, Gemma3Config

from medusa_ds.decoding.decoder import Decoder
from medusa_ds.decoding.measure import Difference, first_difference, head_ranks, plain_step_bytes, step_ms
from medusa_ds.decoding.session import position_limit
from medusa_ds.decoding.trees import RankCounts, Tree, default_tree


@pytest.mark.parametrize(
    ("logits", "length"), [*(("apart", length) for length in (0, 3, 4, 80)), ("equal", 40), ("some", 40)]
)
def test_ranks_are_those_of_sorted_logits(llama, logits, length):
    """Of equal logits, as many are in bf16, the lowest token comes first; tokens without one are misses of every rank.

    Mutations: score head k on the token after the one it predicts; count the larger logits alone; leave out the fill.
    """
    prompt, known = [9, 40, 77, 12], torch.arange(1, 120, 2) if logits == "some" else torch.arange(120)
    heads = random_heads(token_map=known if logits == "some" else None)
    if logits == "equal":
        for head in heads:
            head.projection.weight.data[1::2] = head.projection.weight.data[::2]
    answer = reference(llama, prompt, length, eos_token_id=120) if length else []
    ranks, text = head_ranks(llama, heads, prompt, answer), prompt + answer
    assert ranks.shape == (max(length - NUM, 0), NUM)
    hidden = llama.base_model(input_ids=torch.tensor([text])).last_hidden_state[0]
    for row, place in zip(ranks.tolist(), range(3, len(text)), strict=False):
        for k, rank in enumerate(row, 1):
            order = known[heads[k - 1].logits(hidden[place]).sort(descending=True, stable=True).indices].tolist()
            token = text[place + k + 1]
            assert rank == (order.index(token) if token in order else 120)
    assert bool((ranks == 120).any()) == (logits == "some") and (logits != "equal" or (ranks % 2 == 1).any())


def test_a_model_of_several_parts_is_measured_like_one_of_text():
    """The config of such a model names no vocabulary. Mutation: read `config.vocab_size`."""
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**SIZES, "vocab_size": 120, "head_dim": 8, "max_position_embeddings": 64}
    config = Gemma3Config(text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14})
    model = AutoModelForCausalLM.from_config(config).eval()
    ranks = head_ranks(model, random_heads(token_map=torch.arange(1, 120, 2)), [9, 40], [1, 2, 3, 4, 5, 6, 8])
    unknown = [[True, False, True], [False, True, False], [True, False, True], [False, True, True]]
    assert (ranks == 120).tolist() == unknown
    assert position_limit(config)[0] == 64


def test_a_walk_over_ranks_begins_steps_where_decoding_does(llama):
    """What `medusa-ds tree` promises is what decoding takes. Mutation: begin the next step one position late."""
    heads, tree = (random_heads(), Tree([*((r,) for r in range(50)), *((r, s) for r in range(9) for s in range(50))]))
    decoder = Decoder(llama, heads, tree)
    decoder.ends = set()
    lengths = set()
    for prompt in ([9, 40, 77, 12], [7], [30, 2, 60]):
        answer = reference(llama, prompt, 80, eos_token_id=120)
        ranks = head_ranks(llama, heads, prompt, answer)
        counts = RankCounts([ranks], 50)
        steps = torch.cat(counts.at_steps(tree).ranks).tolist()
        walked = [1 + sum(tuple(row[:k]) in tree.paths for k in (1, 2)) for row in steps]
        decoded = decoder.generate([prompt], 80)[0].accepted
        whole = len(walked) - 1  # the last one may go over the end of the answer
        assert walked[:whole] == decoded[:whole] and sum(decoded) == 79
        assert counts.tokens_per_step(tree) == pytest.approx(sum(walked) / len(walked))
        lengths |= set(walked)
    assert lengths == {1, 2, 3}


def test_first_difference_tells_a_tie_from_a_mistake(llama):
    prompt, text = [9, 40, 77], reference(llama, [9, 40, 77], 12, eos_token_id=120)
    assert first_difference(llama, prompt, text, list(text)) is None
    logits = llama(input_ids=torch.tensor([prompt + text[:5]])).logits[0, -1].detach()
    other = int(logits.argsort()[0])
    found = first_difference(llama, prompt, text, [*text[:5], other, 7])
    assert found.position == 5
    assert found.gap == pytest.approx(float(logits.max() - logits.min()), rel=1e-4)
    assert not found.is_tie
    assert Difference(0, 0.0625, 0.125).is_tie


def test_step_times_leave_the_decoder_usable(llama):
    decoder = Decoder(llama, random_heads(), default_tree(3, 8))
    assert step_ms(decoder, 50, repeats=3) > 0
    assert decoder.generate([[9, 40, 77]], 12)[0].tokens == reference(llama, [9, 40, 77], 12)


def test_a_plain_step_reads_all_weights_but_the_input_embeddings(llama):
    total = sum(parameter.nbytes for parameter in llama.parameters())
    assert plain_step_bytes(llama) == total - 120 * 32 * 4
