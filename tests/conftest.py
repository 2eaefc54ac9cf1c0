"""A tiny model on disk, conversations for it, and a recipe."""

import contextlib
import gc
import itertools
import json
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from forks import PORTS
from support import SIZES, WORDS, tiny_tokenizer, write_recipe

LONG = (
    "test_train",
    "test_faults_of_launches",
    "test_engine",
    "test_resume",
    "test_distillation",
    "test_families",
    "test_decoder",
    "test_distill",
    "test_distill_server",
    "test_communication",
    "test_bench",
    "test_prepare_hidden",
    "test_save_cut_off",
    "test_custom_generate",
    "test_recipes_train",
)
"""Files that take longest, which begin first, so that no worker is left alone with one of them at the end."""
SHARED = {"test_engine": "ranks", "test_resume": "ranks", "test_distillation": "ranks"}
"""Files of one worker, since they share a fixture that takes a minute; every other file is a group of its own."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first."""
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


def pytest_collection_finish() -> None:
    """Collections of garbage pass over all that has been imported by now, which takes half a second each time."""
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Workers take whole files, in this order (`--dist=loadgroup` does not group under pytest 9.2)."""
    from xdist.scheduler import LoadScopeScheduling

    class Files(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            return SHARED.get(Path(file).stem, file)

    config.option.loadscopereorder = False
    return Files(config, log)


@pytest.fixture
def steady_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """All steps take the same time: how much of the tree a step verifies on a CPU depends on it."""
    from medusa_ds.decoding import decoder
    from medusa_ds.exporting import custom_generate

    now = itertools.count()
    for module in (decoder, custom_generate):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: next(now) / 1000))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a random Llama of two layers, hidden size 32 and 300 tokens, with tied embeddings."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    directory = tmp_path_factory.mktemp("tiny-llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        **SIZES,
        vocab_size=300,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file of 60 conversations of regular text, which heads can learn to guess."""
    file = tmp_path_factory.mktemp("data") / "chat.jsonl"
    draw = random.Random(0)
    with open(file, "w") as stream:
        for _ in range(60):
            start = draw.randrange(len(WORDS))
            answer = " ".join(WORDS[(start + i) % len(WORDS)] for i in range(draw.randrange(4, 14)))
            turns = [{"role": "user", "content": f"from {WORDS[start]}"}, {"role": "assistant", "content": answer}]
            stream.write(json.dumps({"messages": turns}) + "\n")
    return file


@pytest.fixture
def tiny_recipe(tiny_model: Path, conversations: Path, tmp_path: Path) -> Path:
    """A stage-1 recipe of the tiny model: 6 steps of 4 sequences; output beside it."""
    return write_recipe(tmp_path, tiny_model, conversations)


@pytest.fixture
def make_run(tiny_recipe: Path, tiny_model: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes what a finished run leaves, with heads that differ from their start."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from medusa_ds.config.recipe import Recipe
    from medusa_ds.heads.files import save_heads
    from medusa_ds.heads.kinds import make_heads
    from medusa_ds.training.build import heads_meta

    def make(
        name: str = "run", *overrides: str, dtype: torch.dtype = torch.float32, tokens: torch.Tensor | None = None
    ) -> Path:
        recipe = Recipe.load(tiny_recipe, [*overrides, f"output={tmp_path / name}"])
        model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=dtype)
        heads = make_heads(heads_meta(recipe), dtype=dtype, token_map=tokens)
        heads.initialize(model.lm_head.weight)
        torch.manual_seed(1)
        with torch.no_grad():
            for tensor in heads.parameters():
                tensor += 0.3 * torch.randn_like(tensor)
            if recipe.stage == 2:
                model.lm_head.weight.mul_(1.25)
                model.save_pretrained(tmp_path / name / "backbone")
        save_heads(tmp_path / name / "heads", heads.state_dict(), heads_meta(recipe))
        AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / name / "heads")
        return tmp_path / name

    return make


@pytest.fixture(scope="module")
def group_of_one() -> Iterator[None]:
    """A process group of this process alone; one that an earlier test's engine made is used and left as it is."""
    import torch.distributed as dist

    made = not dist.is_initialized()
    if made:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    if made:
        dist.destroy_process_group()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Calls `medusa-ds`; returns what it has printed."""
    from medusa_ds.cli import main

    def call(*argv: str | Path) -> str:
        main([str(text) for text in argv])
        return capsys.readouterr().out

    return call


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Calls `medusa-ds` with what it must refuse, in so many lines (None: any) that are all it prints; returns them."""
    from medusa_ds.cli import main

    def call(*argv: str | Path, lines: int | None = 1) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(text) for text in argv])
        out, err = capsys.readouterr()
        err = re.sub(r"(?m)^\r.*\n", "", err)  # transformers' bars, where a model was loaded before
        assert stop.value.code == 2 and out == "" and lines in (None, len(err.splitlines()))
        assert err and all(line.startswith("error: ") for line in err.splitlines()), err
        return err

    return call


@pytest.fixture(autouse=True)
def no_shared_memory_left() -> Iterator[None]:
    """Remove the 66 MiB that DeepSpeed leaves in /dev/shm for every rank and port of a CPU run."""
    yield
    while PORTS:
        for file in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{PORTS.pop()}_*"):
            file.unlink(missing_ok=True)


@pytest.fixture(autouse=True, scope="session")
def no_shared_memory_left_of_other_ports() -> Iterator[None]:
    """The same at the end, for runs that chose a port themselves."""
    yield
    files, mapped = list(Path("/dev/shm").glob("deepspeed_allreduce_buffer_*")), ""
    for maps in Path("/proc").glob("[0-9]*/maps") if files else ():
        with contextlib.suppress(OSError):
            mapped += "".join(line for line in maps.read_text().splitlines() if "/dev/shm/" in line)
    for file in files:
        if str(file) not in mapped and time.time() - file.stat().st_mtime > 10:  # or it may be about to be mapped
            file.unlink(missing_ok=True)
