"""What models answer when they are asked, against what is known of their families."""

import pytest
import torch
from support import SIZES
from transformers import AutoConfig, Gemma2ForCausalLM

from medusa_ds.errors import UserError
from medusa_ds.model.facts import Asked, build_twin, find_facts, find_logits

TINY = SIZES | {"head_dim": 8, "vocab_size": 101}


def asked(family, **fields):
    known = AutoConfig.for_model(family)
    fields = {name: value for name, value in {**TINY, **fields}.items() if hasattr(known, name)}
    return Asked(AutoConfig.for_model(family, **fields, pad_token_id=0, bos_token_id=1, eos_token_id=2))


@pytest.mark.parametrize(
    ("family", "fields", "logits"),
    [
        ("llama", {}, (1.0, None, False)),
        ("gemma2", {"final_logit_softcapping": 30.0}, (1.0, 30.0, False)),
        ("cohere", {"logit_scale": 0.0625}, (0.0625, None, False)),
        ("granite", {"logits_scaling": 8.0}, (0.125, None, False)),
        ("phi", {}, (1.0, None, True)),
        ("falcon_h1", {"lm_head_multiplier": 0.5}, (0.5, None, False)),
    ],
)
def test_factor_cap_and_bias_are_the_models_own(family, fields, logits):
    """Mutations: take the cap from the config's name for it; measure the factor without taking the cap off."""
    found = find_logits(asked(family, **fields))
    assert found == (pytest.approx(logits[0], rel=1e-6), logits[1] and pytest.approx(logits[1], rel=1e-6), logits[2])


def test_the_factor_is_that_of_the_models_own_width_not_the_twins():
    found = find_logits(asked("minicpm3", hidden_size=512, dim_model_base=64, num_key_value_heads=4))
    assert found.factor == pytest.approx(0.125, rel=1e-6)


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("modernbert-decoder", {}, "logits of modernbert-decoder are not its hidden states times a matrix"),
        ("bert", {}, "logits of bert are not"),
        ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 16}, "LM head of opt reads rows of 16; .* its hidden_size, 32"),
    ],
)
def test_what_stands_before_the_matrix_is_refused(family, fields, message):
    with pytest.raises(UserError, match=message):
        find_logits(asked(family, **fields))


def test_attention_is_what_the_model_has():
    gemma2 = "sdpa" if Gemma2ForCausalLM._supports_sdpa else "eager"  # which differs between versions of transformers
    found = [find_facts(asked(family)).attention for family in ("llama", "gemma2", "bloom")]
    assert found == ["sdpa", gemma2, "eager"]


def test_positions_without_a_place_and_those_that_turn_others_are_found():
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "rope_theta": 10000.0}
    rope["original_max_position_embeddings"] = 40
    assert find_facts(asked("llama")).limit is None
    assert find_facts(asked("gpt2", n_embd=32, n_head=4, n_positions=64)).limit == 64
    assert find_facts(asked("llama", rope_parameters=rope, max_position_embeddings=80)).limit == 40


def test_a_twin_has_every_kind_of_layer_and_little_else():
    kinds = ["linear_attention"] * 3 + ["full_attention"]
    twin = build_twin(asked("qwen3_next", num_hidden_layers=12, layer_types=kinds * 3, hidden_size=512, head_dim=128))
    assert twin.config.layer_types == kinds
    assert sum(parameter.numel() for parameter in twin.parameters()) < 3_000_000
    state = torch.get_rng_state()
    build_twin(asked("llama", vocab_size=102))
    assert torch.equal(torch.get_rng_state(), state), "asking must not move the run's generator"


def test_asking_leaves_the_config_of_a_loaded_model_as_it_is():
    """Mutation: build of the config itself, into which Pegasus' decoder writes that it attends by no implementation."""
    model = build_twin(asked("pegasus"))
    find_logits(Asked(model.config))
    assert model.config._attn_implementation == "sdpa"
