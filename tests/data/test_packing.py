"""Packing, order, micro-batches, and the data of a run as a whole."""

import json
import multiprocessing
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from small_tokenizers import tokenizer_of
from support import SIZES
from transformers import LlamaConfig, LlamaForCausalLM

from medusa_ds.config.recipe import DataSpec, HeadsSpec, ModelSpec, Recipe, SourceSpec, TrainSpec
from medusa_ds.data.dialogues import Chat
from medusa_ds.data.packing import Data, best_fit, load_data
from medusa_ds.errors import UserError

WORDS = "two four Hi there what is said brief chat user name".split()


def conversation(draw: np.random.Generator) -> dict:
    def say(longest: int) -> str:
        return " ".join(draw.choice(WORDS, draw.integers(1, longest)))

    turns = [("user", say(5)), ("assistant", say(20))] * draw.integers(1, 3)
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    draw = np.random.default_rng(0)
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps(conversation(draw)) + "\n" for _ in range(60)))
    return path


def recipe(path: Path | str | list[SourceSpec], **spec) -> Recipe:
    data = DataSpec(
        path=path if isinstance(path, list) else str(path), **{"max_length": 128, "validation": 0.1, **spec}
    )
    return Recipe(
        model=ModelSpec(name="x"),
        heads=HeadsSpec(),
        stage=1,
        data=data,
        output="out",
        train=TrainSpec(global_batch_size=4, lr=1e-3),
    )


def load(path: Path | list[SourceSpec], family: str = "llama3", **spec) -> Data:
    return load_data(recipe(path, **spec), tokenizer_of(family))


def real_documents(batch) -> list[tuple[list[int], list[int]]]:
    """(ids, labels) of the documents of a micro-batch, found by its positions alone, without padding."""
    out = []
    for ids, labels, positions, sources in zip(*batch[:4], strict=True):
        starts = [*(positions == 0).nonzero().flatten().tolist(), len(ids)]
        spans = list(pairwise(starts))[: len(sources)]
        assert all((positions[a:b] == torch.arange(b - a)).all() for a, b in spans)
        out += [(ids[a:b].tolist(), labels[a:b].tolist()) for a, b in spans]
    return out


def test_best_fit_fills_the_fullest_bin_that_has_room():
    packed = best_fit([0, 1, 2, 3, 4, 5], np.array([6, 5, 4, 5, 2, 3]), 10)
    assert [members.tolist() for members in packed] == [[0, 2], [1, 3], [4, 5]]
    draw = np.random.default_rng(0)
    lengths = draw.integers(1, 65, 2000)
    packed = best_fit(draw.permutation(2000), lengths, 64)
    assert sorted(np.concatenate(packed).tolist()) == list(range(2000))
    filled = [lengths[members].sum() for members in packed]
    assert max(filled) <= 64
    assert np.mean(filled) > 0.95 * 64


def test_every_epoch_uses_each_conversation_once_and_shuffles(file):
    train = load(file).train
    orders, step = [], 0
    for epoch in range(3):
        steps = -(-len(train.epoch(epoch)) // 4)
        rows = [row for s in range(step, step + steps) for sequence in train.global_batch(s, 4) for row in sequence]
        assert sorted(rows) == list(range(54))
        orders.append(rows)
        step += steps
    assert orders[0] != orders[1] != orders[2]
    assert train.steps_per_epoch(4) == -(-len(train) // 4)


def test_order_is_a_pure_function_of_seed_and_step(file):
    """As needed for an exact resume: a fresh object asked for a late step first answers the same."""
    used, fresh = load(file).train, load(file).train
    early = [used.micro_batches(step, 4, 2, 0, 1) for step in range(12)]
    late = fresh.micro_batches(11, 4, 2, 0, 1)
    assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(late, early[11], strict=True))
    other = load(file, seed=1).train
    assert [r.tolist() for r in other.epoch(0)] != [r.tolist() for r in used.epoch(0)]


@pytest.mark.parametrize("packing", [True, False])
def test_global_batch_does_not_depend_on_ranks_and_micro_batch_size(file, packing):
    """Mutation: let every rank read the same sequences."""
    train = load(file, packing=packing).train

    def documents(micro_batch_size: int, world_size: int) -> list:
        ranks = [train.micro_batches(2, 8, micro_batch_size, rank, world_size) for rank in range(world_size)]
        assert {len(batches) for batches in ranks} == {8 // micro_batch_size // world_size}
        assert all(len(batch.input_ids) == micro_batch_size for batches in ranks for batch in batches)
        return sorted(document for batches in ranks for batch in batches for document in real_documents(batch))

    assert documents(8, 1) == documents(1, 1) == documents(2, 2) == documents(1, 8) == documents(2, 4)


def test_documents_are_the_encoded_conversations(file):
    """Mutations: shift labels by one; let positions run on across documents."""
    train = load(file).train
    tokenizer = tokenizer_of("llama3")
    rows = [json.loads(line)["messages"] for line in file.read_text().splitlines()]
    for batch in train.micro_batches(0, 4, 2, 0, 1):
        sources = [source for sequence in batch.sources for source in sequence]
        for source, (ids, labels) in zip(sources, real_documents(batch), strict=True):
            expected = Chat(tokenizer, {}).encode(rows[int(source.rsplit(":")[-1]) - 1])
            assert (ids, labels) == (expected.input_ids, expected.labels)


def test_padding_is_a_document_of_its_own_without_labels(file):
    """Real EOS keeps its label although padding may have its id. Mutation: ignore labels that equal the pad id."""
    tokenizer = tokenizer_of("llama3")
    tokenizer.pad_token = tokenizer.eos_token
    data = load_data(recipe(file, packing=False), tokenizer)
    batch = data.train.micro_batches(0, 4, 4, 0, 1)[0]
    assert batch.input_ids.shape[1] % 8 == 0
    lengths = [int(data.train.lengths[row[0]]) for row in data.train.global_batch(0, 4)]
    assert batch.input_ids.shape[1] - max(lengths) < 8
    for ids, labels, positions, length in zip(*batch[:3], lengths, strict=True):
        assert (ids[length:] == tokenizer.pad_token_id).all()
        assert (labels[length:] == -100).all()
        assert (positions[length:] == torch.arange(len(ids) - length)).all()
        assert labels[length - 1] == tokenizer.eos_token_id
    assert load(file).train.micro_batches(0, 4, 4, 0, 1)[0].input_ids.shape == (4, 128)


def test_no_position_is_beyond_max_length(file):
    """Padding's neither, where that is no multiple of 8. Mutation: round up above it."""
    for packing in (False, True):
        train = load(file, packing=packing, max_length=21).train
        assert max(batch.position_ids.max() for batch in train.micro_batches(0, 4, 2, 0, 1)) == 20


def test_last_batch_of_an_epoch_is_filled_with_empty_sequences(file):
    train = load(file, packing=False).train
    last = train.steps_per_epoch(8) - 1
    assert [len(sequence) for sequence in train.global_batch(last, 8)] == [1] * (54 % 8) + [0] * (8 - 54 % 8)
    batch = train.micro_batches(last, 8, 1, 7, 8)[0]
    assert batch.sources == [[]]
    assert batch.input_ids.shape == (1, 8)
    assert (batch.labels == -100).all()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_loss_and_gradient_equal_unpacked(file, attention):
    """Mutation: let positions run on across documents."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=430, attn_implementation=attention)).double()
    packed, unpacked = load(file).train, load(file, packing=False).train
    assert len(packed) < len(unpacked) / 2
    losses, gradients = [], []
    for train in (packed, unpacked):
        total = torch.zeros((), dtype=torch.float64)
        for step in range(train.steps_per_epoch(4)):
            for batch in train.micro_batches(step, 4, 2, 0, 1):
                logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
                targets = torch.where(batch.position_ids[:, 1:] > 0, batch.labels[:, 1:], -100)
                total = total + torch.nn.functional.cross_entropy(
                    logits[:, :-1].flatten(0, 1), targets.flatten(), reduction="sum"
                )
        model.zero_grad()
        total.backward()
        losses.append(total.item())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    assert (gradients[0] - gradients[1]).norm() < 1e-10 * gradients[1].norm()


def test_report_accounts_for_every_row(file):
    bad = [{"messages": []}, {"messages": [{"role": "assistant", "content": "x"}, *conversation_of("Hi", "Yes")]}]
    long = conversation_of("two " * 200, "four")
    cut = conversation_of("Hi", "four " * 200)
    with file.open("a") as stream:
        stream.write(
            "".join(json.dumps(row if isinstance(row, dict) else {"messages": row}) + "\n" for row in (*bad, long, cut))
        )
    report = load(file, validation=0.0).report
    assert report["rejected"] == {
        "an empty conversation": (1, f"{file}:61"),
        "begins with an assistant turn": (1, f"{file}:62"),
        "no supervised token within data.max_length": (1, f"{file}:63"),
    }
    assert (report["rows"], report["used"], report["train_rows"], report["cut"]) == (64, 61, 61, 1)
    train = load(file, validation=0.0).train
    examples = [train.example(number) for number in range(61)]
    assert report["tokens"] == sum(len(example.input_ids) for example in examples)
    assert report["supervised_tokens"] == sum(label != -100 for example in examples for label in example.labels)
    assert max(len(example.input_ids) for example in examples) == 128


def test_rows_that_a_weight_repeats_are_counted_once(tmp_path):
    """Fails where every place of a repeated row is counted: more would be left out than were read."""
    bad = {"messages": [{"role": "assistant", "content": "x"}, *conversation_of("Hi", "Yes")]}
    odd = {"messages": [{"role": "user", "content": "Hi", "mask": 1}, {"role": "assistant", "content": "two"}]}
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (odd, bad)))
    report = load([SourceSpec(path=str(path), weight=5)], validation=0.0).report
    assert report["rejected"] == {"begins with an assistant turn": (1, f"{path}:2")}
    assert [found for found, _ in report["notes"].values()] == [1]
    assert (report["rows"], report["used"], report["train_rows"]) == (2, 1, 5)


def conversation_of(question: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def test_fingerprint_tells_changed_data_and_is_the_same_elsewhere(file, tmp_path):
    first = load(file)
    moved = tmp_path / "moved.jsonl"
    moved.write_text(file.read_text())
    assert load(moved).fingerprint == first.fingerprint
    moved.write_text(file.read_text().replace("two", "four", 1))
    assert load(moved).fingerprint != first.fingerprint
    assert load(file, max_length=64).fingerprint != first.fingerprint
    assert load(file, "smollm2").fingerprint != first.fingerprint


def test_template_arguments_are_part_of_the_cache_key(file):
    on, off = load(file, "qwen3"), load(file, "qwen3", template_args={"enable_thinking": False})
    assert on.report["tokens"] == off.report["tokens"]
    assert on.report["supervised_tokens"] == off.report["supervised_tokens"] + 4 * 54


def _work(path: Path, queue: multiprocessing.Queue) -> None:
    from medusa_ds.data import packing

    tokenised = 0
    real = packing.Chat.encode

    def counting(*args, **kwargs):
        nonlocal tokenised
        tokenised += 1
        return real(*args, **kwargs)

    packing.Chat.encode = counting
    data = load(path)
    queue.put((data.fingerprint, [row.tolist() for row in data.train.epoch(1)], tokenised))


def test_one_process_tokenises_while_others_wait(file):
    """Mutation: drop the lock."""
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    workers = [context.Process(target=_work, args=(file, queue)) for _ in range(3)]
    for worker in workers:
        worker.start()
    results = [queue.get(timeout=300) for _ in workers]
    for worker in workers:
        worker.join()
    assert results[0][:2] == results[1][:2] == results[2][:2]
    assert sorted(result[2] for result in results) == [0, 0, 60]


def test_nothing_to_learn_from_is_an_error(tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps({"messages": conversation_of("two " * 200, "four")}) + "\n")
    with pytest.raises(
        UserError,
        match=r"data: no supervised token in 1 row: 1 x no supervised token within "
        r"data.max_length, first .*x.jsonl:1",
    ):
        load(tmp_path / "x.jsonl")
