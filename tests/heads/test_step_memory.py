"""A whole training step, forward and backward: what it may allocate, and that ignored rows cost nothing."""

import pytest
import torch
from test_joint import NUM, SIZES, H, batch, build, documents
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModel
from watch import Watch

from medusa_ds.config.recipe import Recipe
from medusa_ds.training.flops import active_parameters, step_flops

VOCAB, CHUNK_MIB = 4099, 1
PACKED = batch([documents([40, 60, 20]), documents([90, 30], seed=1)], 128)


class Allocations(TorchDispatchMode):
    """Notes the largest storage, in bytes, that any operation returns, apart from the given tensors' own."""

    def __init__(self, known):
        super().__init__()
        self.known, self.largest = {tensor.untyped_storage().data_ptr() for tensor in known}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return result


def step(model, inputs):
    output = model(*inputs)
    torch.stack([0.1 * loss.loss_sum for loss in output.losses if loss is not None]).sum().backward()
    return output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stage", [1, 2])
def test_nothing_beyond_the_chunk_budget_is_allocated(stage, dtype):
    """Mutations: ignore `chunk_mib`; keep all chunks' logits for the backward pass (`eager` is the control)."""
    assert VOCAB * H * 4 < CHUNK_MIB << 20, "a weight's gradient is no logits"
    largest = {}
    for impl in ("torch", "eager"):
        model = build(stage=stage, impl=impl, dtype=dtype, vocab=VOCAB).train()
        with Allocations(model.parameters()) as watch:
            step(model, PACKED)
        largest[impl] = watch.largest
    assert largest["torch"] <= CHUNK_MIB << 20 < largest["eager"]


def counted(model, inputs):
    """FLOPs of all matrix products of a step, the in-place one among them."""
    in_place = {torch.ops.aten.addmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        output = step(model, inputs)
    return counter.get_total_flops(), [len(loss.predicted) if loss is not None else 0 for loss in output.losses]


@pytest.mark.parametrize(
    ("stage", "target"), [(1, "label"), (1, "distribution"), (2, "label"), (2, "argmax"), (2, "distribution")]
)
def test_ignored_rows_cost_no_product_in_any_pass(stage, target):
    """Mutation: send every position through a head, forward or backward, and mask the loss afterwards."""
    ids, labels, positions = PACKED
    model = build(stage=stage, target=target, vocab=VOCAB).train()
    flops, rows = counted(model, PACKED)
    with Watch(VOCAB) as watch:
        without, none = counted(model, (ids, torch.full_like(labels, -100), positions))
    assert watch.projected == 0 and not any(none)
    assert 0 < sum(rows[1:]) < NUM * ids.numel()
    known = step_flops(recipe(stage, target, num=NUM), model.backbone.config, 0)
    assert flops - without == sum(rows[1:]) * known.head_row + rows[0] * known.lm_row


def recipe(stage, target="label", **heads):
    data, train = {"path": "sample"}, {"global_batch_size": 1, "lr": 1e-3}
    parts = {"model": {"name": "any/model"}, "data": data, "train": train, "output": "out"}
    return Recipe.model_validate({"heads": heads, "stage": stage, "loss": {"target": target}, **parts})


@pytest.mark.parametrize("stage", [1, 2])
def test_flops_of_a_hydra_heads_row_are_those_counted_by_hand(stage):
    """Mutation: take a frozen input's gradient off every head, as Medusa's, and not off the first alone."""
    config = AutoConfig.for_model("llama", **SIZES | {"vocab_size": VOCAB})
    found = step_flops(recipe(stage, kind="hydra", num=3, layers=2, lm_head="shared"), config, 0).head_row
    step, block, lm_head = 2 * 2 * H * H, 2 * H * H, 2 * H * VOCAB  # forward: [2H] -> [H], [H] -> [H], [H] -> [V]
    inputs = (2 if stage == 1 else 3) * step  # of the first head's step nobody learns from in stage 1
    assert found == pytest.approx((3 * (2 * step + 3 * block + 2 * lm_head) + inputs) / 3, rel=1e-12)


EXPERTS = {"num_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 8}


@pytest.mark.parametrize(
    ("kind", "more"), [("llama", {}), ("qwen3_moe", EXPERTS), ("gpt2", {"n_embd": H, "n_layer": 2, "n_head": 4})]
)
def test_a_token_pays_for_what_it_is_multiplied_by(kind, more):
    """Mutations: count all experts; know embeddings by the word `embed` in a name."""
    config = AutoConfig.for_model(kind, **SIZES | {"vocab_size": VOCAB} | more)
    options = {"attn_implementation": "eager"} | ({"experts_implementation": "eager"} if more is EXPERTS else {})
    model = AutoModel.from_config(config, **options).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=torch.ones(1, 1, dtype=torch.long))
    known = step_flops(recipe(1), config, active_parameters(model, config))
    assert counter.get_total_flops() == pytest.approx(known.total(1, 1, 0, 0), rel=0.05)  # norms and biases are few


class Weights(TorchDispatchMode):
    """Counts results of a projection weight's shape."""

    made = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.made += isinstance(result, torch.Tensor) and result.shape == (VOCAB, H)
        return result


def test_gradients_can_be_made_one_by_one():
    """As an offloaded optimizer takes them. Mutation: make them in the forward pass, or leave a head out."""
    made, grads = {}, {}
    for alone in (False, True):
        model = build(vocab=VOCAB).train()
        model.one_gradient = alone
        with Weights() as watch:
            counts = []
            for head in model.heads:
                head.projection.weight.register_post_accumulate_grad_hook(lambda _, w=watch, c=counts: c.append(w.made))
            output = step(model, PACKED)
        made[alone] = [count / counts[-1] for count in counts]
        grads[alone] = [parameter.grad for parameter in model.heads.parameters()]
        assert [len(loss.predicted) for loss in output.losses if loss is not None] == output.counters[1:, 1].tolist()
    assert made[True] == pytest.approx([1 / NUM * n for n in range(1, NUM + 1)])
    assert made[False][0] > 1 / NUM + 0.1
    for found, expected in zip(grads[True], grads[False], strict=True):
        torch.testing.assert_close(found, expected)
