"""Plans of a run: hours, the ZeRO config to take and the largest micro-batch, without the hub."""

import math
import re

import pytest

from medusa_ds.config.recipe import Recipe
from medusa_ds.model.backbone import load_config
from medusa_ds.training.gpus import GPUS
from medusa_ds.training.memory import GIB, choose, count_parameters


@pytest.fixture(autouse=True)
def no_hub(place, monkeypatch):
    monkeypatch.setattr("medusa_ds.model.backbone.model_path", lambda spec: pytest.fail(f"asked for {spec.name}"))


@pytest.mark.parametrize(
    ("stage", "gpu", "peak", "share", "link"), [(1, "a100-80gb", 312e12, 0.63, 300e9), (2, "h200", 989e12, 0.6, 450e9)]
)
def test_hours_are_flops_and_bytes_over_what_the_gpu_does(stage, gpu, peak, share, link, said):
    """Llama-3-8B's FLOPs by hand. Mutation: leave the heads out, count one pass in stage 2, or no communication."""
    out = said("estimate", f"llama3_8b_stage{stage}", "--gpus", "8", "--gpu", gpu, "--rows", "121000")
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336
    forward = 2 * 32 * layer + 4 * 32 * 4096 * 512
    vocabulary, block = 4096 * 128256, 4096 * 4096
    head = 6 * block + 6 * vocabulary - (2 * block if stage == 1 else 0)
    token = (1 if stage == 1 else 3) * forward + 3 * head + (6 * vocabulary if stage == 2 else 0)
    recipe = Recipe.load(f"llama3_8b_stage{stage}", planning=True)
    batch = recipe.train.global_batch_size
    steps = math.ceil((121000 - 512) / batch * recipe.train.epochs)
    trained = 3 * (block + vocabulary) + (32 * layer + 2 * vocabulary if stage == 2 else 0)
    seconds = batch * 1024 * token / (8 * peak * share) + 3 * 7 / 8 * 2 * trained / (0.6 * link)
    seconds += 16e-3 * trained / 1.63e9 / 8
    found = re.search(
        r"time: about ([\d.]+) hours on 8 x .* for ([\d,]+) steps of at most [\d,]+ tokens, ([\d.]+) GFLOP a token, at "
        r"([\d,]+) tokens/s",
        out,
    )
    assert found is not None, out
    assert int(found[2].replace(",", "")) == steps
    assert float(found[1]) == pytest.approx(steps * seconds / 3600, abs=0.06)
    assert float(found[3]) == pytest.approx(token / 1e9, rel=2e-3)
    assert int(found[4].replace(",", "")) == pytest.approx(batch * 1024 / seconds, rel=2e-3)


def test_a_line_of_each_number_of_hosts_with_what_measured_steps_were_off_by(said):
    """Mutation: the table of one recipe's file for another, or a host's network for all."""
    asked = ["llama3_8b_stage2", "--gpu", "h200", "--nodes", "1,16"]
    lines = [line.split() for line in said("estimate", *asked).splitlines()]
    one, many = ([line for line in lines if line[:2] == [str(nodes), str(8 * nodes)]][-1] for nodes in (1, 16))
    assert one[2] == many[2] == "zero2" and float(one[-1]) > float(many[-1]) > 0.7
    slow = said("estimate", *asked, "--network", "100", "deepspeed=ds_configs/zero3.json")
    row = next(line.split() for line in slow.splitlines() if line.startswith("     16   128  zero3"))
    assert float(row[-1]) < 0.2 and int(row[6].rstrip("%")) > 80
    assert "measured steps of one and two H200s were off by: stage 1 -" in slow
    assert "a step of" not in said("estimate", "smollm2_135m_stage1", "--gpu", "rtx-3060")  # whose peak is not known


def test_rows_follow_from_a_split(said):
    asked = ["llama3_8b_stage1", "--gpu", "h200"]
    assert "give --rows N" in said("estimate", *asked)
    assert "for 40 steps" in said("estimate", *asked, "data.split=train[80:2080]", "train.global_batch_size=48")
    assert "for 50 steps" in said(
        "estimate", *asked, "--rows", "2400", "data.validation=sample"
    )  # of which none are held


def test_the_micro_batch_named_is_the_largest_that_fits(said):
    """Mutation: name the smallest, or one that does not divide the batch."""
    recipe = Recipe.load("smollm2_135m_stage1", ["train.global_batch_size=960"])
    out = said("estimate", "smollm2_135m_stage1", "train.global_batch_size=960", "--gpus", "1", "--gpu", "rtx-3060")
    assert "take deepspeed: ds_configs/zero2.json" in out
    largest = int(re.search(r"train.micro_batch_size up to (\d+) fits", out)[1])
    shape = {"model_type": "llama", "tie_word_embeddings": True, "vocab_size": 49152, "hidden_size": 576}
    shape |= {"intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
    config = load_config(recipe.model.model_copy(update={"config": shape}))
    parts = count_parameters(recipe, config)

    def fits(size):
        train = recipe.train.model_copy(update={"micro_batch_size": size})
        tried = recipe.model_copy(update={"train": train})
        return choose(tried, parts, config, 1, GPUS["RTX 3060"].gib * GIB, math.inf).fits

    divisors = [size for size in range(1, 961) if 960 % size == 0]
    assert largest == max(size for size in divisors if fits(size)) < 960


def test_an_unknown_gpu_is_a_line(refused):
    err = refused("estimate", "llama3_8b_stage1", "--gpu", "a100")
    assert err.startswith("error: --gpu: found 'a100'; allowed is") and "a100-80gb" in err


@pytest.mark.parametrize("name", ["a100-80gb", "A100 80GB", "NVIDIA A100-SXM4-80GB"])
def test_a_gpu_is_known_by_its_words(name, said):
    assert "2 x A100 80GB: take deepspeed" in said("estimate", "llama3_8b_stage1", "--gpus", "2", "--gpu", name)


def test_auto_is_told_for_the_gpus_of_this_machine_or_how_to_ask(said, monkeypatch):
    """Mutation: look for `--gpu` alone."""
    asked = ["llama3_8b_stage2", "deepspeed=auto", "train.steps=1"]
    assert "auto takes what fits the GPUs; name them, as in --gpus 8 --gpu a100-80gb" in said("estimate", *asked)
    here = {"is_available": True, "device_count": 4, "get_device_name": "NVIDIA H100 80GB HBM3"}
    for name, value in here.items():
        monkeypatch.setattr(f"torch.cuda.{name}", lambda value=value: value)
    found = said("estimate", *asked)
    assert found == said("estimate", *asked, "--gpu", "h100-80gb", "--gpus", "4")
    assert "4 x H100 80GB: take deepspeed" in found
    assert re.search(r"time: about [\d.]+ minutes on 4 x H100 80GB for 1 step", found)
    assert "2 x H100 80GB: take" in said("estimate", *asked, "--gpus", "2")


def test_activations_are_the_kinds_own(said):
    """Mutation: count Hydra's as Medusa's."""
    asked = ["llama3_8b_stage1", "train.micro_batch_size=16", "data.max_length=4096", "train.global_batch_size=128"]
    medusa, hydra = (
        float(re.search(r"activations ([\d.]+)", said("estimate", *asked, f"heads.kind={kind}"))[1])
        for kind in ("medusa", "hydra")
    )
    assert hydra - medusa == pytest.approx(3 * 2 * 16 * 4096 * 4096 * 2 / GIB, abs=0.11)
