"""Exported directories, as transformers alone decodes with them."""

import gc
import json
import os
import subprocess
import sys
import weakref
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from decoding_models import VOCAB, assert_samples, build, random_heads
from exporting import export_
from support import heads_meta
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache, StoppingCriteria

from medusa_ds.config.recipe import LossSpec
from medusa_ds.decoding.decoder import Decoder
from medusa_ds.decoding.trees import chain
from medusa_ds.exporting import custom_generate
from medusa_ds.heads.files import META, load_heads, save_heads
from medusa_ds.heads.joint import JointModel
from medusa_ds.heads.kinds import KINDS
from medusa_ds.heads.medusa import MedusaHeads
from medusa_ds.model.attention import base_model
from medusa_ds.model.backbone import vocabulary_projection
from medusa_ds.model.facts import Asked, build_twin
from medusa_ds.runs import load_run


@torch.no_grad()
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_guesses_are_those_of_our_own_decoder(kind: str, own: bool, tmp_path: Path) -> None:
    """Mutations: rows for tokens; the embedding as it is, not its unit; the first token for every head, or the state
    behind the blocks; a block too many."""
    model, tokens = build("llama"), torch.arange(119, 20, -1) if own else None
    heads = random_heads(kind, 2, own_projection=own, token_map=tokens)
    meta = heads_meta(3, 2, 32, VOCAB, kind=kind, lm_head="own" if own else "shared")
    save_heads(tmp_path / "heads", heads.state_dict(), meta)
    hidden_BH, root_B = torch.randn(5, 32), torch.arange(40, 45)
    wanted = Decoder(model, heads, chain(3))._propose(hidden_BH, root_B)[:, 1:]
    assert custom_generate.Heads(model, str(tmp_path), {}).guess(hidden_BH, root_B, 3).equal(wanted)


ALONE = """
import itertools, json, sys, time
ticks = itertools.count()
time.perf_counter = lambda: float(next(ticks))  # steps of every size last as long, so that all guesses are verified
sys.modules["medusa_ds"] = None  # cannot be imported
import torch, transformers
base, path = sys.argv[1:]
model = transformers.AutoModelForCausalLM.from_pretrained(base)
passes, same = {"plain": 0, "heads": 0}, 0
current = None
def count(*_):
    passes[current] += 1
model.register_forward_hook(count)
draw = torch.Generator().manual_seed(5)
for i in range(25):
    ids = torch.randint(3, 300, (1, 2 + i % 9), generator=draw)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}
    current = "plain"
    plain = model.generate(**inputs, max_new_tokens=40)
    current = "heads"
    heads = {"custom_generate": path, "medusa_heads": path, "trust_remote_code": True}
    same += model.generate(**inputs, max_new_tokens=40, **heads).equal(plain)
print(json.dumps({"same": same, **passes}))
"""


def distil(run: Path) -> None:
    """Teach a run's heads the greedy text of its backbone."""
    loaded = load_run(run, torch.device("cpu"), torch.float32)
    draw = torch.Generator().manual_seed(4)
    prompts, settings = torch.randint(3, 300, (96, 4), generator=draw), {"do_sample": False, "pad_token_id": 0}
    texts = loaded.backbone.generate(prompts, max_new_tokens=40, min_new_tokens=40, **settings)
    model = JointModel(loaded.backbone, loaded.heads, 1, LossSpec(impl="torch"))
    optimizer = torch.optim.Adam(loaded.heads.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        losses = model(texts, texts, torch.arange(44).expand(96, -1)).losses[1:]
        sum(loss.loss_sum / len(loss.predicted) for loss in losses).backward()
        optimizer.step()
    config, _ = load_heads(run)
    save_heads(run / "heads", loaded.heads.state_dict(), {key: config[key] for key in META})


def test_transformers_alone_decodes_greedily_with_fewer_passes(make_run, tmp_path) -> None:
    """Turns red when `decode` accepts one guess more than agrees, or leaves the cache uncropped."""
    run = make_run()
    distil(run)
    path = export_(run, "out", "--for", "transformers")
    base = json.loads((path / "config.json").read_text())["base_model_name_or_path"]
    env = {**os.environ, "PYTHONPATH": "", "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", ALONE, base, str(path)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["same"] == 25
    assert counts["heads"] < 0.8 * counts["plain"], counts


def decode_with(path: Path, model: Any, ids: torch.Tensor, **options: Any) -> Any:
    mask = options.pop("attention_mask", torch.ones_like(ids))
    settings = {"attention_mask": mask, "pad_token_id": 0, "trust_remote_code": True, **options}
    return model.generate(ids, custom_generate=str(path), medusa_heads=str(path), **settings)


def test_custom_generate_handles_batches_processors_streams_and_refusals(make_run, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    run = make_run()
    distil(run)
    path = export_(run, "out", "--for", "transformers")
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    ids = torch.randint(3, 300, (4, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 30, "do_sample": False}
    plain = model.generate(ids, pad_token_id=0, **settings)
    ends = [int(plain[0, 13]), int(plain[1, 25])]  # rows end at different steps
    stops = {"stop_strings": ["a", "e", "o"], "tokenizer": AutoTokenizer.from_pretrained(tiny_model)}
    for options in ({}, {"repetition_penalty": 1.3}, {"eos_token_id": ends}, stops):
        plain = model.generate(ids, pad_token_id=0, **settings, **options)
        assert decode_with(path, model, ids, **settings, **options).equal(plain), options
    assert (plain[:, -1] == 0).any()  # the last ones stopped some row

    streamed: list[int] = []
    stream = SimpleNamespace(put=lambda ids: streamed.extend(ids.flatten().tolist()), end=lambda: streamed.append(-1))
    settings = {"max_new_tokens": 9, "do_sample": False, "return_dict_in_generate": True}
    out = decode_with(path, model, ids[:1], streamer=stream, **settings)
    assert streamed == [*out.sequences[0].tolist(), -1]
    with pytest.raises(ValueError, match="give medusa_heads="):
        model.generate(ids[:1], custom_generate=str(path), trust_remote_code=True)
    for options in (
        {"num_beams": 2},
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"output_scores": True, "return_dict_in_generate": True},
        {"inputs_embeds": torch.zeros(1, 9, 32)},
    ):
        with pytest.raises(ValueError, match="These heads"):
            decode_with(path, model, ids[:1], max_new_tokens=4, do_sample=False, **options)


@pytest.mark.usefixtures("steady_clock")
def test_sampling_with_heads_has_the_models_distribution(tmp_path: Path) -> None:
    """Over all texts of three tokens. Turns red when a wrong guess, not the drawn token, is kept."""
    model, heads = build("llama", vocab_size=4, eos_token_id=None), MedusaHeads(2, 1, 32, 4)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.5)  # distributions that are neither flat nor one-sided
    heads.initialize(model.lm_head.weight)
    save_heads(tmp_path / "heads", heads.state_dict(), heads_meta(2, 1, 32, 4))
    decoding = partial(custom_generate.decode, heads=custom_generate.Heads(model, str(tmp_path), {}))
    settings = {"custom_generate": decoding, "max_new_tokens": 3, "do_sample": True, "top_k": 0}
    passes: list[int] = []
    hook = model.register_forward_hook(lambda *_: passes.append(1))
    torch.manual_seed(0)
    texts = [model.generate(torch.tensor([[1, 3]] * 2), **settings)[:, 2:] for _ in range(200)]
    hook.remove()
    assert len(passes) < 2.9 * 200  # guesses were kept
    assert_samples(torch.cat(texts), model, [1, 3])


def run_of(asked: Asked, path: Path) -> tuple[Any, MedusaHeads]:
    """A small model of a family, and heads as a run leaves them, with a block that is no identity."""
    model = build_twin(asked)
    model.generation_config.eos_token_id = model.generation_config.bos_token_id = None
    vocab, size = model.get_output_embeddings().weight.shape
    heads = MedusaHeads(2, 1, size, vocab, logits=vocabulary_projection(model).logits)
    heads.initialize(model.get_output_embeddings().weight, model.get_output_embeddings().bias)
    torch.nn.init.normal_(heads[0].blocks[0].weight)
    save_heads(path / "heads", heads.state_dict(), heads_meta(2, 1, size, vocab))
    return model, heads


@pytest.mark.parametrize("family", ["minicpm3", "phi", "opt"])
def test_heads_read_what_the_base_model_gives_and_guess_with_its_bias(family, tmp_path, monkeypatch) -> None:
    """Mutations: hand over what the LM head is given, which MiniCPM3 scales; leave the bias out."""
    model, heads = run_of(Asked(AutoConfig.for_model(family)), tmp_path)
    other, seen = custom_generate.Heads(model, str(tmp_path), {}), []
    guess = other.guess
    monkeypatch.setattr(other, "guess", lambda hidden, *more: seen.append(hidden) or guess(hidden, *more))
    decoding = partial(custom_generate.decode, heads=other)
    text = model.generate(torch.tensor([[7, 20, 9]]), custom_generate=decoding, max_new_tokens=6, do_sample=False)
    hidden = base_model(model)(input_ids=text, use_cache=False).last_hidden_state[0]
    torch.testing.assert_close(seen[0][0], hidden[2], rtol=1e-4, atol=1e-4)
    wanted = torch.stack([head.logits(hidden).argmax(-1) for head in heads], 1)
    assert other.guess(hidden, text[0], 2).equal(wanted)


FIXED = dict.fromkeys(("llama", "gemma2", "mistral", "gpt2", "falcon", "mixtral", "qwen3", "phi", "cohere2"), True)
FIXED |= {"gpt_neo": False}


class Waits(TorchDispatchMode):
    """Counts the numbers that Python asks tensors for: what waits for one cannot be a graph on a GPU."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def few_places_at_first(monkeypatch) -> None:
    """64, and as many as there are to be later."""
    make = custom_generate._fixed_passes
    few = {"_fixed_passes": lambda *args: make(*args[:3], 32 if args[2] < 32 else args[3]), "GRAPHS_ON": "cpu"}
    for name, value in few.items():
        monkeypatch.setattr(custom_generate, name, value)


@pytest.mark.usefixtures("steady_clock")
@pytest.mark.parametrize("family", FIXED)
def test_passes_over_fixed_places_give_the_same_text(family, tmp_path, monkeypatch) -> None:
    """As a GPU replays them, launched; over windows of sliding attention and over more places than there were at first.
    GPT-Neo counts its window from the end of the places, so it goes on over a cache that grows. Mutations: keys of a
    window at the beginning; what the last pass guessed wrongly counted as known; fresh places without the old ones;
    masks that the model makes itself, which asks for the cache's length."""
    windows = {"sliding_window": 8} if family in ("gemma2", "mistral", "mixtral", "cohere2") else {}
    model, _ = run_of(Asked(AutoConfig.for_model(family, **windows)), tmp_path)
    few_places_at_first(monkeypatch)
    read, reads = custom_generate.FixedPasses.read, []
    monkeypatch.setattr(custom_generate.FixedPasses, "read", lambda *args: reads.append(args[0].slots) or read(*args))
    prepare, waits = custom_generate.FixedPasses._prepare, Waits()

    def counted(*args: Any) -> Any:
        own, given, run = prepare(*args)

        def within() -> None:
            with waits:
                run()

        return own, given, within

    monkeypatch.setattr(custom_generate.FixedPasses, "_prepare", counted)
    heads = custom_generate.Heads(model, str(tmp_path), {})
    ids = torch.randint(1, 80, (2, 19), generator=torch.Generator().manual_seed(0))
    settings = {"max_new_tokens": 60, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    plain = model.generate(ids, **settings)
    own = {"custom_generate": partial(custom_generate.decode, heads=heads, graphs=True)}
    assert model.generate(ids, **settings, **own).equal(plain)
    assert (set(reads) == {64, 128}) if FIXED[family] else (reads == [64])
    assert not waits.count
    settings["attention_mask"][0, :3] = 0
    reads.clear()
    assert model.generate(ids, **settings, **own).equal(model.generate(ids, **settings)) and reads
    reads.clear()
    model.generation_config.return_dict_in_generate = True  # the cache too, which has to hold the text then
    model.generate(ids, **settings, **own)
    assert not reads


@pytest.mark.usefixtures("steady_clock")
@pytest.mark.parametrize("short_of_memory", [False, True])
def test_a_cache_that_grows_takes_over_where_more_places_do_not_do(short_of_memory, tmp_path, monkeypatch) -> None:
    """A window as long as the first places is counted from their end, which no pass over these shows. Mutations: take
    more places unasked; raise what a GPU raises that has no room for them; leave wrong guesses in the cache."""
    monkeypatch.setattr("medusa_ds.model.facts._WINDOW", 70)
    family = "llama" if short_of_memory else "gpt_neo"
    model, _ = run_of(Asked(AutoConfig.for_model(family)), tmp_path)
    few_places_at_first(monkeypatch)
    make, made = custom_generate._Places.__init__, set()

    def places(self: Any, layer: Any, slots: int, *args: Any) -> None:
        made.add(slots)
        if short_of_memory and slots > 64:
            raise torch.OutOfMemoryError
        make(self, layer, slots, *args)

    monkeypatch.setattr(custom_generate._Places, "__init__", places)
    own = partial(custom_generate.decode, heads=custom_generate.Heads(model, str(tmp_path), {}), graphs=True)
    ids = torch.randint(1, 80, (2, 19), generator=torch.Generator().manual_seed(7))
    settings = {"max_new_tokens": 110, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    assert model.generate(ids, custom_generate=own, **settings).equal(model.generate(ids, **settings))
    assert made == {64, 192}


@pytest.mark.parametrize("error", [AssertionError, KeyError])
def test_a_model_whose_code_takes_no_fixed_places_goes_on_without(error, tmp_path, monkeypatch) -> None:
    """Whatever a model of remote code may raise. Mutation: let it pass."""
    model, _ = run_of(Asked(AutoConfig.for_model("llama")), tmp_path)
    few_places_at_first(monkeypatch)
    monkeypatch.setattr(custom_generate._Places, "update", Mock(side_effect=error))
    own = partial(custom_generate.decode, heads=custom_generate.Heads(model, str(tmp_path), {}), graphs=True)
    ids, settings = torch.tensor([[7, 20, 9]]), {"max_new_tokens": 9, "do_sample": False}
    assert model.generate(ids, custom_generate=own, **settings).equal(model.generate(ids, **settings))
    assert custom_generate._Places.update.called


@pytest.mark.usefixtures("steady_clock")
def test_a_cache_that_grows_takes_over_where_passes_of_more_tokens_cannot_be_made(tmp_path, monkeypatch) -> None:
    """What a GPU raises that has no memory for one more graph; the places are free then. Mutations: let it pass; keep
    a name for the passes."""
    model, _ = run_of(Asked(AutoConfig.for_model("llama")), tmp_path)
    few_places_at_first(monkeypatch)
    made: Any = weakref.WeakSet()
    prepare, ended = custom_generate.FixedPasses._prepare, []

    def one_alone(self: Any, inputs: dict[str, Any]) -> Any:
        made.add(self)
        if self.passes:
            ended.append(inputs["input_ids"].shape[1])
            raise torch.OutOfMemoryError
        return prepare(self, inputs)

    monkeypatch.setattr(custom_generate.FixedPasses, "_prepare", one_alone)
    heads, left = custom_generate.Heads(model, str(tmp_path), {}), []
    guess = heads.guess

    def counted(*args: Any) -> Any:
        if ended:
            gc.collect()
            left.append(len(made))
        return guess(*args)

    monkeypatch.setattr(heads, "guess", counted)
    own = partial(custom_generate.decode, heads=heads, graphs=True)
    ids = torch.randint(1, 80, (2, 19), generator=torch.Generator().manual_seed(7))
    settings = {"max_new_tokens": 60, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    assert model.generate(ids, custom_generate=own, **settings).equal(model.generate(ids, **settings))
    assert len(ended) == 1 and set(left) == {0}


def test_a_model_that_waits_for_the_gpu_is_asked_once(tmp_path, monkeypatch) -> None:
    """Mutation: ask at every text."""
    model, _ = run_of(Asked(AutoConfig.for_model("llama")), tmp_path)
    few_places_at_first(monkeypatch)
    read, reads = custom_generate.FixedPasses.read, []

    def waiting(self: Any, *args: Any) -> Any:
        reads.append(self)
        self.waits = True
        return read(self, *args)

    monkeypatch.setattr(custom_generate.FixedPasses, "read", waiting)
    own = partial(custom_generate.decode, heads=custom_generate.Heads(model, str(tmp_path), {}), graphs=True)
    ids, settings = torch.tensor([[7, 20, 9]]), {"max_new_tokens": 9, "do_sample": False}
    for _ in range(2):
        assert model.generate(ids, custom_generate=own, **settings).equal(model.generate(ids, **settings))
    assert len(reads) == 1


class Knows(custom_generate.Heads):
    """Heads that know the text, by the tokens that the cache holds."""

    def __init__(self, model: Any, source: str, cache: Any, text: torch.Tensor) -> None:
        super().__init__(model, source, {})
        self.cache, self.text = cache, text

    def guess(self, hidden: torch.Tensor, token: torch.Tensor, number: int) -> torch.Tensor:
        """The text's own tokens."""
        return self.text[:, self.cache.get_seq_length() + 1 :][:, :number]


def test_a_cache_that_is_handed_in_holds_the_text_and_no_guess_behind_its_end(tmp_path) -> None:
    """Mutation: take away only the guesses that were wrong."""
    model, _ = run_of(Asked(AutoConfig.for_model("llama")), tmp_path)
    ids = torch.tensor([[7, 20, 9]])
    text = model.generate(ids, max_new_tokens=16, do_sample=False)
    settings = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": int(text[0, 4])}  # the first of two guesses
    found = []
    for with_heads in (False, True):
        cache = DynamicCache(config=model.config)
        heads = Knows(model, str(tmp_path), cache, text)
        own = {"custom_generate": partial(custom_generate.decode, heads=heads)} if with_heads else {}
        first = model.generate(ids, past_key_values=cache, return_dict_in_generate=True, **settings, **own)
        assert any(value is cache for value in first.values()) and cache.get_seq_length() == 4
        more = torch.cat([first.sequences, ids], 1)
        found.append(model.generate(more, past_key_values=cache, max_new_tokens=9, do_sample=False))
    assert found[0].equal(found[1])


def test_rows_that_no_end_token_ended_go_on_as_in_transformers(tmp_path) -> None:
    """Mutation: fill them in any case."""

    class After(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            return (input_ids[:, -1] == 84) & torch.tensor([True, False, False])

    model, _ = run_of(Asked(AutoConfig.for_model("llama")), tmp_path)
    ids = torch.randint(1, 80, (3, 9), generator=torch.Generator().manual_seed(0))
    settings = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "stopping_criteria": [After()]}
    plain = model.generate(ids, **settings)
    assert (plain[0, 9:-1] == 84).any()
    decoding = partial(custom_generate.decode, heads=custom_generate.Heads(model, str(tmp_path), {}))
    assert model.generate(ids, custom_generate=decoding, **settings).equal(plain)


def test_what_would_give_another_text_is_refused(tmp_path) -> None:
    """Texts over which all positions turn, layers that cannot go back, no cache, prompt tuning, a quantised LM head,
    heads of another model."""
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    asked = Asked(AutoConfig.for_model("llama", rope_parameters=rope, max_position_embeddings=16))
    model, _ = run_of(asked, tmp_path)
    heads, ids = custom_generate.Heads(model, str(tmp_path), {}), torch.tensor([[7, 20, 9]])
    settings = {"custom_generate": partial(custom_generate.decode, heads=heads), "do_sample": False}
    model.generate(ids, max_new_tokens=13, **settings)
    with pytest.raises(ValueError, match="These heads need at most 16 tokens"):
        model.generate(ids, max_new_tokens=14, **settings)
    state, _ = run_of(Asked(AutoConfig.for_model("qwen3_next")), tmp_path / "state")
    decoding = partial(custom_generate.decode, heads=custom_generate.Heads(state, str(tmp_path / "state"), {}))
    with pytest.raises(ValueError, match="this model's cannot"):
        state.generate(ids, custom_generate=decoding, max_new_tokens=6)
    none, _ = run_of(Asked(AutoConfig.for_model("rwkv")), tmp_path / "none")
    decoding = partial(custom_generate.decode, heads=custom_generate.Heads(none, str(tmp_path / "none"), {}))
    with pytest.raises(ValueError, match="this model's code keeps none"):
        none.generate(ids, custom_generate=decoding, max_new_tokens=6)
    model.prepare_inputs_for_generation = model.prepare_inputs_for_generation  # as PEFT does
    with pytest.raises(ValueError, match="prompt tuning"):
        model.generate(ids, max_new_tokens=3, **settings)
    quantised = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear})
    with pytest.raises(ValueError, match="not quantised"):
        custom_generate.Heads(quantised, str(tmp_path), {})
    other = build_twin(Asked(AutoConfig.for_model("llama", hidden_size=48, num_attention_heads=4)))
    with pytest.raises(ValueError, match=r"are for an LM head of \(160, "):
        custom_generate.Heads(other, str(tmp_path), {})
