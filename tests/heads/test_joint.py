"""JointModel on tiny random models: losses and counters against transformers' own outputs and plain loops."""

import copy
import math

import pytest
import support
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from medusa_ds.config.recipe import LossSpec
from medusa_ds.heads.joint import Counters, JointModel, metrics
from medusa_ds.heads.kinds import make_heads
from medusa_ds.model.rows import count_targets

H, V, NUM = 32, 101, 3
SIZES = support.SIZES | {"hidden_size": H, "intermediate_size": 48, "vocab_size": V, "max_position_embeddings": 128}
FAMILIES = {"llama": {}, "qwen3": {"head_dim": 8}, "qwen2": {}, "mistral": {"sliding_window": None}}


def build(
    family="llama",
    stage=1,
    own=True,
    layers=1,
    impl="torch",
    trained=True,
    tied=False,
    dtype=torch.float32,
    tokens=None,
    kind="medusa",
    vocab=V,
    target="label",
    temperature=1.0,
):
    torch.manual_seed(0)
    sizes = SIZES | {"vocab_size": vocab, "tie_word_embeddings": tied, "initializer_range": 0.3} | FAMILIES[family]
    config = AutoConfig.for_model(family, **sizes)
    backbone = AutoModelForCausalLM.from_config(config, dtype=dtype)
    shape = {"kind": kind, "num": NUM, "layers": layers, "lm_head": "own" if own else "shared"}
    shape |= {"hidden_size": H, "vocab_size": vocab}
    heads = make_heads(shape, dtype=dtype, token_map=tokens)
    heads.initialize(backbone.get_output_embeddings().weight)
    if trained:
        with torch.no_grad():
            for parameter in heads.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    start = copy.deepcopy(backbone) if stage == 2 and target != "label" else None
    loss = LossSpec(impl=impl, chunk_mib=1, target=target, temperature=temperature)
    return JointModel(backbone, heads, stage, loss, start)


def documents(lengths, seed=0):
    """Documents of tokens with a run of ignored labels each."""
    gen = torch.Generator().manual_seed(seed)
    result = []
    for i, length in enumerate(lengths):
        tokens = torch.randint(0, V, (length,), generator=gen)
        labels = tokens.clone()
        labels[: length // 3] = -100
        labels[length // 2 : length // 2 + i % 3] = -100
        result.append((tokens, labels))
    return result


def batch(rows, length):
    """Rows of documents -> input_ids, labels, position_ids, the rest of a row being one padding document."""
    ids, labels = torch.zeros(len(rows), length, dtype=torch.long), torch.full((len(rows), length), -100)
    positions = torch.zeros(len(rows), length, dtype=torch.long)
    for row, parts in enumerate(rows):
        start = 0
        for tokens, marks in parts:
            stop = start + len(tokens)
            ids[row, start:stop], labels[row, start:stop] = tokens, marks
            positions[row, start:stop] = torch.arange(len(tokens))
            start = stop
        positions[row, start:] = torch.arange(length - start)
    return ids, labels, positions


def gradients(model, inputs):
    model.zero_grad()
    output = model(*inputs)
    weights = (0.7, 1.0, 0.8, 0.5)
    sum(w * loss.loss_sum for w, loss in zip(weights, output.losses, strict=True) if loss is not None).backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def relative(found, reference):
    return float((found.double() - reference.double()).norm() / reference.double().norm())


DOCS = documents([9, 2, 14, 1, 11, 7])
PACKED = batch([DOCS[:3], DOCS[3:]], 28)
UNPACKED = batch([[document] for document in DOCS], 16)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_loss_and_gradients_equal_unpacked(family, stage):
    """Mutation: compare no positions in `rows._learnable` (labels cross the borders of documents)."""
    model = build(family, stage)
    (packed, packed_grads), (unpacked, unpacked_grads) = gradients(model, PACKED), gradients(model, UNPACKED)
    torch.testing.assert_close(packed.counters, unpacked.counters, rtol=1e-5, atol=0)
    assert packed_grads.keys() == unpacked_grads.keys()
    for name, gradient in packed_grads.items():
        assert relative(gradient, unpacked_grads[name]) < 2e-5, name


@pytest.mark.parametrize("family", FAMILIES)
def test_lm_loss_and_its_gradients_are_transformers_own(family):
    model, inputs = build(family, stage=2), batch([[DOCS[2]], [DOCS[2]]], 14)
    output = model(*inputs)
    output.losses[0].loss_sum.backward()
    ours = {name: p.grad.clone() for name, p in model.backbone.named_parameters()}
    model.zero_grad()
    reference = model.backbone(input_ids=inputs[0], labels=inputs[1])
    count = int((inputs[1][:, 1:] != -100).sum())
    (reference.loss * count).backward()
    assert len(output.losses[0].predicted) == count
    torch.testing.assert_close(output.losses[0].loss_sum, reference.loss * count, rtol=1e-5, atol=0)
    for name, parameter in model.backbone.named_parameters():
        assert relative(ours[name], parameter.grad) < 1e-5, name


def float64_head_losses(model, inputs):
    """Eager float64 losses of every head by loops over positions, from transformers' own hidden states."""
    ids, labels, positions = inputs
    hidden = model.backbone(input_ids=ids, position_ids=positions, output_hidden_states=True, use_cache=False)
    hidden = hidden.hidden_states[-1].double()
    sums, right = [], {}
    for k in range(NUM + 1):
        module = model.heads[k - 1] if k else None
        x = hidden
        if module is not None:
            for block in module.blocks:
                x = x + nn.functional.silu(x @ block.weight.double().T + block.bias.double())
        owner = module.projection if module is not None and module.projection is not None else model.backbone.lm_head
        logits, total = x @ owner.weight.double().T, torch.zeros((), dtype=torch.float64)
        tokens = model.heads.token_map.tolist() if k and model.heads.token_map is not None else list(range(V))
        for b in range(ids.shape[0]):
            for t in range(ids.shape[1] - k - 1):
                target = int(labels[b, t + k + 1])
                if target != -100 and int(positions[b, t + k + 1]) == int(positions[b, t]) + k + 1:
                    right[k, b, t] = tokens[int(logits[b, t].argmax())] == target
                    if target in tokens:
                        total = total + logits[b, t].logsumexp(-1) - logits[b, t, tokens.index(target)]
        sums.append(total)
    return sums, right


TOKENS = torch.arange(V).roll(7)[: V // 2]  # not ascending: a map that another program wrote


@pytest.mark.parametrize("impl", ["torch", "eager"])
@pytest.mark.parametrize("stage", [1, 2])
def test_truncated_vocabulary_drops_targets_outside_and_counts_them_as_misses(stage, impl):
    """Against float64 sums over known targets alone. Mutations: keep the unknown rows with row 0 as target; leave
    `missed` out of the accuracy; leave `target.missed` out of `full_count`; zero the weight gradient's other rows."""
    model = build(stage=stage, impl=impl, tokens=TOKENS)
    output, found = gradients(model, PACKED)
    model.zero_grad()
    sums, right = float64_head_losses(model, PACKED)
    first = 0 if stage == 2 else 1
    sum(w * s for w, s in list(zip((0.7, 1.0, 0.8, 0.5), sums, strict=True))[first:]).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert relative(found[name], parameter.grad) < 1e-5, name
    figures = metrics(output.counters)
    counts = count_targets(*PACKED[1:], NUM, model.heads.known_V)
    for k in range(1, NUM + 1):
        assert model.heads[k - 1].projection.weight.shape == (len(TOKENS), H)
        torch.testing.assert_close(output.losses[k].loss_sum.double(), sums[k], rtol=1e-5, atol=0)
        mine = [place for place in right if place[0] == k]
        missed = int(output.counters[k, 6])
        assert counts[k] == len(output.losses[k].predicted) == output.counters[k, 1] == len(mine) - missed
        assert 0 < missed < len(mine)
        assert figures[f"head{k}_acc"] == sum(right[place] for place in mine) / len(mine)
        full = [place for place in mine if all((j, *place[1:]) in right for j in range(1, k + 1))]
        assert output.counters[k, 4] == len(full)
        assert output.counters[k, 3] == sum(all(right[(j, *place[1:])] for j in range(1, k + 1)) for place in full)
    assert counts[0] == count_targets(*PACKED[1:], NUM)[0]


def test_counters_match_loops_over_positions():
    model, inputs = build(), batch([documents([40, 30]), documents([60], seed=3)], 72)
    ids, labels, positions = inputs
    hidden = model.backbone.model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
    for k, head in enumerate(model.heads, 1):  # labels that the heads guess at every fourth position, but not all
        guessed = head.logits(hidden).argmax(-1)
        for t in range(0, labels.shape[1] - k - 1, 4):
            if t % 16 != 4 * k:
                labels[:, t + k + 1] = torch.where(labels[:, t + k + 1] == -100, -100, guessed[:, t])
    counters = model(*inputs).counters
    _, right = float64_head_losses(model, inputs)
    assert counters.dtype == torch.float64
    assert counters.shape == (NUM + 1, len(Counters._fields))
    acceptance = 1.0
    for k in range(1, NUM + 1):
        places = [(b, t) for head, b, t in right if head == k]
        full = [p for p in places if all((j, *p) in right for j in range(1, k + 1))]
        before = [p for p in full if all(right[(j, *p)] for j in range(1, k))]
        both = [p for p in before if right[(k, *p)]]
        correct = sum(right[(k, *p)] for p in places)
        expected = [len(places), correct, len(both), len(full), len(before), 0, 0]
        assert counters[k, 1:].tolist() == expected
        acceptance += len(both) / len(full)
    assert counters[1, 3] > 5
    assert counters[2, 3] > 0
    assert counters[2, 4] < counters[2, 1], "some position must miss an earlier head's target"
    assert math.isclose(metrics(counters)["acceptance_length"], acceptance)


def test_metrics_are_shares_of_summed_counters():
    rows = [[8.0, 4, 1, 0, 0, 0, 0, 0], [6, 4, 2, 2, 4, 4, 0, 0], [9, 3, 2, 1, 2, 1, 1, 0]]
    counters = torch.tensor(rows)
    assert metrics(counters) == {
        "lm_loss": 2.0,
        "lm_acc": 0.25,
        "head1_loss": 1.5,
        "head1_acc": 0.5,
        "full_acc_1": 0.5,
        "cond_acc_1": 0.5,
        "head2_loss": 3.0,
        "head2_acc": 2 / 4,
        "full_acc_2": 0.5,
        "cond_acc_2": 1.0,
        "acceptance_length": 2.0,
    }
    nothing = metrics(torch.zeros(2, len(Counters._fields)))
    assert nothing["acceptance_length"] == 1.0
    assert math.isnan(nothing["head1_loss"])
    assert "lm_loss" not in nothing


@pytest.mark.parametrize("own", [True, False])
def test_stage_1_keeps_the_backbone(own):
    """Mutation: leave the backbone's parameters trainable, or run it with a graph."""
    model = build(own=own, tied=True)
    before = {name: p.clone() for name, p in model.named_parameters()}
    model.backbone.model.layers[0].register_forward_hook(lambda *_: graphs.append(torch.is_grad_enabled()))
    graphs = []
    _, grads = gradients(model.train(), PACKED)
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    assert grads.keys() == {name for name in before if name.startswith("heads.")}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == name.startswith("backbone."), name
    assert graphs == [False]
    assert not model.backbone.training
    assert model.heads.training


def test_stage_2_moves_everything_with_activation_checkpointing_too():
    model = build(stage=2, tied=True).train()
    _, plain = gradients(model, PACKED)
    model.backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    _, recomputed = gradients(model, PACKED)
    assert plain.keys() == {name for name, _ in model.named_parameters()} == recomputed.keys()
    for name, gradient in plain.items():
        assert gradient.norm() > 0, name
        assert relative(recomputed[name], gradient) < 1e-6, name


@pytest.mark.parametrize("stage", [1, 2])
def test_no_supervised_token_gives_zero_gradients_everywhere(stage):
    model = build(stage=stage)
    ids, labels, positions = PACKED
    output, grads = gradients(model, (ids, torch.full_like(labels, -100), positions))
    assert not output.counters.any()
    assert grads.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert not any(gradient.any() for gradient in grads.values())
