"""Decoding on a GPU. The figures are printed: pytest -m gpu tests/gpu/test_decoding_gpu.py -s"""

import os

import pytest
import torch
import torch.nn.functional as F
from support import SIZES
from transformers import AutoConfig, AutoModelForCausalLM

from medusa_ds.benchmarks.worker import measure_machine
from medusa_ds.config import loading
from medusa_ds.decoding.acceptance import Acceptance
from medusa_ds.decoding.decoder import Decoder
from medusa_ds.decoding.kernels.few_rows import applies, gated_linear, gates, linear
from medusa_ds.decoding.kernels.top_tokens import top_tokens
from medusa_ds.decoding.kernels.tree_attention import tree_attention
from medusa_ds.decoding.measure import copy_bandwidth, first_difference, plain_step_bytes, step_ms
from medusa_ds.decoding.trees import chain, default_tree
from medusa_ds.heads.kinds import KINDS
from medusa_ds.model.backbone import use_liger_layers

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

SMALL = SIZES | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
SMALL |= {"vocab_size": 500, "initializer_range": 0.2}
SHAPES = {
    "smollm2_135m": loading.SHAPES["HuggingFaceTB/SmolLM2-135M-Instruct"],
    "llama3_8b": loading.SHAPES["meta-llama/Meta-Llama-3-8B-Instruct"],
    "vicuna_7b": loading.SHAPES["lmsys/vicuna-7b-v1.5"],
}


def _model(model_type="llama", dtype=torch.float32, liger=False, **config):
    torch.manual_seed(0)
    ends = {"eos_token_id": 3, "pad_token_id": 0, "max_position_embeddings": 4096}
    settings = AutoConfig.for_model(model_type, **ends | config)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(settings, dtype=dtype, attn_implementation="sdpa").eval()
    if liger:
        use_liger_layers(model)
    return model


def _heads(model, num=3, own=True, kind="medusa"):
    vocab, hidden = model.get_output_embeddings().weight.shape
    heads = KINDS[kind](num, 1, hidden, vocab, own_projection=own, dtype=model.dtype).cuda()
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    if own:
        heads.initialize(model.get_output_embeddings().weight)
    return heads


@pytest.mark.parametrize("rule", ["greedy", "typical", "exact"])
@pytest.mark.parametrize(
    ("family", "kind"), [("llama", "medusa"), ("qwen3", "medusa"), ("mistral", "medusa"), ("llama", "hydra")]
)
def test_graph_step_equals_eager_step(family, kind, rule):
    """Batches of unequal prompts, fp32."""
    model = _model(family, **SMALL, **({"head_dim": 16} if family == "qwen3" else {}))
    heads, tree = _heads(model, kind=kind), default_tree(3, 24)
    prompts = [[5, 9, 12], [7], list(range(10, 60))]
    graph, eager = (
        Decoder(model, heads, tree, Acceptance(rule), graph=graph).generate(prompts, 60, seed=4)
        for graph in (True, False)
    )
    assert [row.tokens for row in graph] == [row.tokens for row in eager]
    assert [row.accepted for row in graph] == [row.accepted for row in eager]


def test_greedy_text_equals_transformers_in_float32():
    model = _model(**SMALL)
    decoders = Decoder(model, _heads(model), default_tree(3, 40)), Decoder(model, [], chain(0))
    for prompt in ([5], [8, 30, 99], list(range(10, 200))):
        ids = torch.tensor([prompt], device="cuda")
        wanted = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=80, do_sample=False)
        for decoder in decoders:
            assert decoder.generate([prompt], 80)[0].tokens == wanted[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon"])  # the last reads under a mask
def test_captured_prefills_of_all_lengths_read_what_eager_ones_do(family):
    """Around the lengths to which prompts are padded, one row and several, and each length twice."""
    model = _model(family, **SMALL)
    heads, tree = _heads(model), default_tree(3, 24)
    captured, eager = (Decoder(model, heads, tree, graph=graph) for graph in (True, False))
    for length in (1, 15, 16, 17, 129, 16, 160, 161, 7):
        prompts = [[(5 + 7 * i + length) % 400 + 10 for i in range(length)]]
        for batch in (prompts, [*prompts, [9, 30, 12], prompts[0][:5]]):
            found, wanted = (decoder.generate(batch, 12) for decoder in (captured, eager))
            assert [row.tokens for row in found] == [row.tokens for row in wanted], length


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_step_gives_the_same_text(kind):
    model = _model(**SMALL)
    texts = [
        Decoder(model, _heads(model, kind=kind), default_tree(3, 24), compile_step=fuse)
        .generate([[5, 9, 12]], 60)[0]
        .tokens
        for fuse in (False, True)
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("rows", [2, 17, 64])
@pytest.mark.parametrize(("columns", "depth"), [(40, 200), (960, 576), (576, 1536), (6144, 4096), (4096, 14336)])
def test_few_rows_are_multiplied_as_exactly_as_by_cublas(rows, columns, depth):
    torch.manual_seed(0)
    hidden = torch.randn(1, rows, depth, device="cuda", dtype=torch.bfloat16)
    weight, bias = (torch.randn(columns, n, device="cuda", dtype=torch.bfloat16) for n in (depth, 1))
    exact = F.linear(hidden.double(), weight.double(), bias[:, 0].double())
    ours = linear(hidden, weight, bias[:, 0], weight).double() - exact
    theirs = F.linear(hidden, weight, bias[:, 0]).double() - exact
    assert applies(hidden, weight)
    assert ours.norm() < 1.6 * theirs.norm()  # the bias is rounded in twice where the depth is in one part


@pytest.mark.parametrize("rows", [2, 64])
@pytest.mark.parametrize(("columns", "depth"), [(8704, 200), (28672, 4096)])
def test_gated_products_are_as_exact_as_cublas_and_silu(columns, depth, rows):
    torch.manual_seed(0)
    hidden = torch.randn(1, rows, depth, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(columns, depth, device="cuda", dtype=torch.bfloat16) / depth**0.5

    def plain(hidden, weight):
        gate, up = F.linear(hidden, weight).chunk(2, -1)
        return F.silu(gate) * up

    exact = plain(hidden.double(), weight.double())
    ours, theirs = (way - exact for way in (gated_linear(hidden, weight, weight), plain(hidden, weight)))
    assert gates(hidden, weight)
    assert ours.norm() < theirs.norm()  # rounded once, not three times


@pytest.mark.parametrize(("heads", "groups", "size"), [(9, 3, 64), (32, 8, 128), (4, 4, 16)])
@pytest.mark.parametrize("nodes", [2, 30, 64])
def test_tree_attention_is_attention(heads, groups, size, nodes):
    torch.manual_seed(0)
    query = torch.randn(1, nodes, heads, size, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    key, value = torch.randn(2, 1, groups, 768, size, device="cuda", dtype=torch.bfloat16)
    mask = torch.zeros(1, 1, nodes, 768, device="cuda", dtype=torch.bfloat16)
    mask[..., 1:].masked_fill_(torch.rand(nodes, 767, device="cuda") < 0.5, -torch.inf)
    mask[..., 200:600] = -torch.inf
    out = tree_attention(query, key, value, mask.repeat(1, 1, heads // groups, 1), 0.2)
    exact, plain = (
        F.scaled_dot_product_attention(
            *(x.to(dtype) for x in (query, key, value)), attn_mask=mask.to(dtype), scale=0.2, enable_gqa=True
        ).transpose(1, 2)
        for dtype in (torch.float64, torch.bfloat16)
    )
    assert (out - exact).norm() < 1.5 * (plain - exact).norm()


@pytest.mark.parametrize("compiled", [False, True])
def test_texts_of_plain_and_tree_steps_in_bfloat16_part_at_ties_only(compiled):
    """The kernels for few rows multiply bf16 alone."""
    config = {**SMALL, "hidden_size": 256, "intermediate_size": 512, "initializer_range": 0.1}
    model = _model(dtype=torch.bfloat16, **config)
    decoders = [
        Decoder(model, heads, tree, compile_step=compiled)
        for heads, tree in ((_heads(model), default_tree(3, 40)), ([], chain(0)))
    ]
    for prompt in ([5], [8, 30, 99], list(range(10, 200))):
        tree, plain = (decoder.generate([prompt], 100)[0].tokens for decoder in decoders)
        difference = first_difference(model, prompt, tree, plain)
        assert difference is None or difference.is_tie


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [500, 49152, 128256])
@pytest.mark.parametrize("number", [1, 10])
def test_top_tokens_are_those_of_topk(vocab, dtype, number):
    torch.manual_seed(0)
    logits = torch.randn(3, 2, vocab, device="cuda", dtype=dtype)
    chosen = top_tokens(logits, number)
    assert logits.gather(-1, chosen).equal(logits.topk(number).values)
    assert all(len(set(row)) == number for row in chosen.flatten(0, 1).tolist())


@pytest.mark.parametrize("shape", os.environ.get("MEDUSA_DS_SHAPES", "smollm2_135m").split(","))
@pytest.mark.parametrize("compiled", [True, False])
def test_step_times(shape, compiled):
    """Prints milliseconds of a plain step and of tree steps, bf16, batch 1, 512 tokens of text. `MEDUSA_DS_SHAPES`
    names shapes of `SHAPES`, comma-separated; with `-k "not True"` nothing is compiled."""
    model = _model(dtype=torch.bfloat16, liger=not compiled, **SHAPES[shape])
    bandwidth = copy_bandwidth(torch.device("cuda"))
    plain = step_ms(Decoder(model, [], chain(0), compile_step=compiled), 512, 50)
    share = plain_step_bytes(model) / (plain / 1000) / bandwidth
    how = "compiled" if compiled else "Liger"
    print(f"\n{shape}, {how}: plain {plain:.3f} ms, {share:.0%} of {bandwidth / 1e9:.0f} GB/s")
    for own in (True, False):
        heads = _heads(model, own=own)
        for nodes in (4, 16, 32, 64):
            tree = step_ms(Decoder(model, heads, default_tree(3, nodes), compile_step=compiled), 512, 50)
            label = "own projections" if own else "shared projection"
            print(f"  {nodes:3} nodes, {label}: {tree:.3f} ms = {tree / plain:.3f} x")
        del heads
    assert plain > 0


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("shape", os.environ.get("MEDUSA_DS_SHAPES", ",".join(SHAPES)).split(","))
def test_prefill_step_times(shape, compiled):
    """Prints milliseconds to a text's first token, captured and launched kernel by kernel, bf16, each length warm."""
    model = _model(dtype=torch.bfloat16, liger=not compiled, **SHAPES[shape])
    heads, tree = _heads(model, own=False), default_tree(3, 64)
    product_flops = 1e12 * measure_machine()["matmul_tflops"]
    flops = 2 * sum(p.numel() for name, p in model.named_parameters() if "layers" in name)
    how = "as compiled steps load it" if compiled else "Liger"
    print(f"\n{shape}, {how}; matrix product {product_flops / 1e12:.0f} TFLOP/s")
    for length in (16, 64, 256, 1024, 4096, 7936):
        prompt = [list(range(10, 10 + length))]
        found = {}
        for graph in (True, False):
            decoder = Decoder(model, heads, tree, graph=graph)
            first = decoder.generate(prompt, 1)[0].prefill_s
            times = sorted(decoder.generate(prompt, 1)[0].prefill_s for _ in range(9))
            found[graph] = times[4], first
        share = flops * length / found[True][0] / product_flops
        texts = ", ".join(f"{1000 * warm:.2f} ms ({1000 * first:.0f} first)" for warm, first in found.values())
        print(f"  {length:5} tokens: captured and eager {texts}; {share:.0%} of the product's rate")
    assert found[True][0] > 0
