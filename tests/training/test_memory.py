"""What training chooses from given amounts of memory; how many bytes a choice takes is held by the estimate's tests."""

from pathlib import Path
from types import SimpleNamespace

import torch
from worker import make_recipe

from medusa_ds.config.deepspeed import load, zero_settings
from medusa_ds.config.recipe import Recipe
from medusa_ds.model.backbone import load_config
from medusa_ds.training import memory
from medusa_ds.training.memory import GIB, Parameters, choose

LLAMA = SimpleNamespace(
    hidden_size=4096,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    intermediate_size=14336,
    vocab_size=128256,
)
PARTS = Parameters(
    backbone=7_504_924_672, lm_head=525_336_576, blocks=50_343_936, projections=1_576_009_728, largest=525_336_576
)
"""Llama 3 8B with three heads of one block."""


def recipe(stage: int, deepspeed: str = "auto", checkpointing: str | bool | int = "auto", micro: int = 6) -> Recipe:
    sections = {"train": {"micro_batch_size": micro, "precision": "bf16", "activation_checkpointing": checkpointing}}
    made = make_recipe("out", stage=stage, data={"max_length": 1024}, **sections)
    made = made.model_copy(update={"train": made.train.model_copy(update={"global_batch_size": 96})})
    return made if deepspeed == "zero0" else made.model_copy(update={"deepspeed": deepspeed})


def chosen(stage: int, ranks: int, gpu_gib: float, cpu_gib: float = 1e6, **settings: object) -> tuple[str, int | None]:
    found = choose(recipe(stage, **settings), PARTS, LLAMA, ranks, gpu_gib * GIB, cpu_gib * GIB)  # type: ignore[arg-type]
    assert found.fits == (found.gpu_bytes <= gpu_gib * GIB and found.cpu_bytes <= cpu_gib * GIB)
    return found.deepspeed.stem, found.recomputed


def test_the_least_zero_stage_that_fits_is_chosen_and_then_offload():
    """Mutation: turn the order of the files round."""
    assert chosen(1, 1, 80)[0] == "zero2"
    assert chosen(2, 8, 80)[0] == "zero2"
    assert chosen(2, 8, 40)[0] == "zero3"
    assert chosen(2, 1, 80)[0] == "zero2_offload"
    assert chosen(2, 1, 24)[0] == "zero3_offload"


def test_offload_needs_memory_of_the_host():
    assert not choose(recipe(2), PARTS, LLAMA, 1, 80 * GIB, 64 * GIB).fits


def test_as_few_layers_as_fit_are_recomputed():
    """Mutation: try the counts from all layers down."""
    zero, few = chosen(2, 2, 140)
    assert zero == "zero2" and few is not None and 0 < few < 32
    assert chosen(2, 2, 300) == ("zero2", 0)
    less = choose(recipe(2, checkpointing=few - 1), PARTS, LLAMA, 2, 140 * GIB, 1e15)
    assert less.deepspeed.stem != "zero2"  # one layer fewer does not fit
    assert chosen(2, 2, 140, micro=1)[1] < few  # type: ignore[operator]


def test_what_the_recipe_names_stays():
    file = str(Path(__file__).parents[2] / "ds_configs" / "zero3.json")
    assert chosen(2, 8, 80, deepspeed=file)[0] == "zero3"
    assert chosen(2, 8, 80, checkpointing=True) == ("zero2", None)
    assert chosen(2, 8, 80, checkpointing=5) == ("zero2", 5)


def test_fp8_never_meets_zero_3():
    fp8 = recipe(1).model_copy(update={"model": recipe(1).model.model_copy(update={"frozen_precision": "fp8"})})
    for gib in (80, 24, 10):
        found = choose(fp8, PARTS, LLAMA, 8, gib * GIB, 1e15)
        assert zero_settings(load(found.deepspeed)).stage == 2


def test_the_reason_names_what_was_chosen_and_what_did_not_fit():
    found = choose(recipe(2), PARTS, LLAMA, 8, 40 * GIB, 1e15)
    assert found.why.startswith("zero3 with ") and "of 40.0 GiB on each of 8 GPUs; zero" in found.why
    assert "that may not fit" in choose(recipe(2), PARTS, LLAMA, 1, GIB, 1e15).why


def test_a_cpu_takes_zero_2_and_recomputes_nothing():
    settled = memory.settle(recipe(2), torch.device("cpu"))
    assert settled.deepspeed.endswith("ds_configs/zero2.json") and settled.train.activation_checkpointing is False
    named = recipe(2, deepspeed="other.json", checkpointing=3)
    assert memory.settle(named, torch.device("cpu")) is named


def test_a_gpu_is_asked_for_what_is_free(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (80 * GIB, 80 * GIB))
    tiny = recipe(2)
    settled = memory.settle(tiny, torch.device("cuda", 0))
    assert settled.deepspeed.endswith("zero2.json") and settled.train.activation_checkpointing is False
    assert "memory: zero2 with 0 of 2 layers recomputed takes about" in capsys.readouterr().out
    config = load_config(tiny.model).get_text_config()
    parts = memory.count_parameters(tiny, config)
    assert choose(tiny, parts, config, 1, 80 * GIB, 1e15).recomputed == 0
