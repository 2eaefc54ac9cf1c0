"""Run by several processes at once: each scenario trains a tiny random model and returns what the tests compare."""

import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.ops.op_builder import AsyncIOBuilder
from deepspeed.utils import get_z3_leaf_modules
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from medusa_ds.config.recipe import Recipe
from medusa_ds.data.packing import MicroBatch
from medusa_ds.errors import UserError
from medusa_ds.heads.files import load_heads
from medusa_ds.training import build as builder
from medusa_ds.training import engine as engines
from medusa_ds.training import optimizer as optim
from medusa_ds.training.engine import MedusaEngine
from medusa_ds.training.step import StepLeftError

VOCAB, LENGTH, GLOBAL_BATCH, STEPS = 97, 24, 4, 4
POISON = 96  # a token that no batch holds unless a test puts it there
ROOT = Path(__file__).parents[2]
optim.ALONE = 2000  # elements: the projections of this tiny model count as large
ZEROS = ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")


def make_recipe(output: str | Path, zero: str = "zero0", stage: int = 1, **sections: dict[str, Any]) -> Recipe:
    """A recipe of a tied Llama of two layers whose head sizes no number of ranks divides."""
    config = {
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": 36,
        "intermediate_size": 47,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,
    }
    train = {
        "global_batch_size": GLOBAL_BATCH,
        "micro_batch_size": 1,
        "steps": STEPS,
        "lr": 1e-2,
        "weight_decay": 0.1,
        "max_grad_norm": 1.0,
        "precision": "fp32",
        "warmup_ratio": 0.5,
        "min_lr_ratio": 0.1,
    }
    values: dict[str, Any] = {
        "model": {"name": "tiny", "init": "random", "config": config},
        "heads": {"num": 3},
        "stage": stage,
        "data": {"path": "sample"},
        "train": train | ({"lr_multiplier": 4.0} if stage == 2 else {}),
        "loss": {"coefficient": 0.2} if stage == 2 else {},
        "output": str(output),
        "deepspeed": str(ROOT / "ds_configs" / f"{zero}.json"),
    }
    for name, section in sections.items():
        values[name] |= section
    return Recipe.model_validate(values)


def make_sequences(step: int) -> list[MicroBatch]:
    """The global batch of a step: two documents a sequence, uneven supervision, the last sequence without any."""
    draw = torch.Generator().manual_seed(step)
    sequences = []
    for index in range(GLOBAL_BATCH):
        ids = torch.randint(0, POISON, (1, LENGTH), generator=draw)
        border, masked = (int(torch.randint(low, high, (1,), generator=draw)) for low, high in ((6, 18), (1, 20)))
        labels = ids.clone()
        labels[:, : LENGTH if index == GLOBAL_BATCH - 1 else masked] = -100
        positions = torch.cat([torch.arange(border), torch.arange(LENGTH - border)])[None]
        sequences.append(MicroBatch(ids, labels, positions, [[f"data.jsonl:{step}{index}"]]))
    return sequences


def micro_batches(step: int, engine: MedusaEngine) -> list[MicroBatch]:
    size, mine = engine.recipe.train.micro_batch_size, GLOBAL_BATCH // engine.world_size
    rows = make_sequences(step)[engine.rank * mine :][:mine]
    groups = [rows[start : start + size] for start in range(0, mine, size)]
    return [
        MicroBatch(*(torch.cat(parts) for parts in list(zip(*group, strict=True))[:3]), [g.sources[0] for g in group])
        for group in groups
    ]


def train(engine: MedusaEngine, first: int = 0, last: int = STEPS) -> dict[str, Any]:
    """Steps first..last-1; losses and norms exactly, as hexadecimal text."""
    results = [engine.train_batch(micro_batches(step, engine), step) for step in range(first, last)]
    return {
        "loss": [result.loss.hex() for result in results],
        "grad_norm": [result.grad_norm.hex() for result in results],
        "counters": [result.counters.tolist() for result in results],
        "rates": [result.learning_rates for result in results],
    }


def dump(engine: MedusaEngine, file: Path) -> None:
    weights = engine.whole_state_dict(engine.model)
    if engine.rank == 0:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: weight.clone() for name, weight in weights.items()}, file)


def end(engine: MedusaEngine) -> None:
    """Free an engine and leave the process group to the next one."""
    engine._engine.destroy()


def refusal(call: Callable[..., Any], *arguments: Any) -> str:
    """What a user reads of a mistake; nothing where it is none."""
    try:
        call(*arguments)
    except UserError as error:
        return str(error)
    return ""


def make_engine(recipe: Recipe, tokens: list[int] | None = None) -> MedusaEngine:
    token_map = None if tokens is None else torch.tensor(tokens)
    return MedusaEngine(recipe, STEPS, partial(builder.build_model, token_map=token_map))


def trajectory(
    out: Path, zero: str, stage: int, save: bool = False, tokens: list[int] | None = None, **sections: Any
) -> dict[str, Any]:
    """Train `STEPS` steps; keep weights before and after, and a checkpoint of the second step."""
    engine = make_engine(make_recipe(out, zero, stage, **sections), tokens)
    dump(engine, out / "before.safetensors")
    result = train(engine, 0, 2)
    if save:
        engine.save({"data": "fingerprint", "note": zero}, 1.5)
    rest = train(engine, 2)
    dump(engine, out / "after.safetensors")
    end(engine)
    return {key: result[key] + rest[key] for key in result}


class _Sent(TorchDispatchMode):
    """Bytes of the tensors that collectives were called with, by name; `[ranks, ...]` of those that gather."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            whole = max(tensors, key=torch.Tensor.numel)
            if whole.dtype != torch.float64 and whole.numel() > 8:  # counts, sums, norms and flags: a few numbers
                name = func.__name__.partition(".")[0]
                self.sizes[name] = self.sizes.get(name, 0) + whole.nbytes
        return func(*args, **(kwargs or {}))


def sent(out: Path, zero: str, stage: int, zero_optimization: dict[str, Any], **sections: Any) -> dict[str, Any]:
    """What the third step's collectives were called with; DeepSpeed knows the order of a step's weights by then."""
    recipe = make_recipe(out, zero, stage, **sections)
    if zero_optimization:
        settings = json.loads(Path(recipe.deepspeed).read_text())
        settings["zero_optimization"] |= zero_optimization
        out.mkdir(parents=True, exist_ok=True)
        file = out / f"rank{os.environ['RANK']}.json"
        file.write_text(json.dumps(settings))
        recipe = recipe.model_copy(update={"deepspeed": str(file)})
    engine = MedusaEngine(recipe, STEPS)
    train(engine, 0, 2)
    with _Sent() as found:
        train(engine, 2, 3)
    end(engine)
    return found.sizes


def whole_layers(out: Path, stage: int) -> dict[str, Any]:
    """A trajectory under ZeRO 3 that gathers a decoder layer as one; how many do, and what a forward pass gathers."""

    def build(*args: Any) -> Any:
        model = builder.build_model(*args)
        engines.fetch_whole_layers(model)
        return model

    engine = MedusaEngine(make_recipe(out, "zero3", stage), STEPS, build)
    result = train(engine)
    dump(engine, out / "after.safetensors")
    leaves = get_z3_leaf_modules(engine.model)
    end(engine)
    return result | {"leaves": [type(leaf).__name__ for leaf in leaves]}


def resumed(
    out: Path, zero: str, stage: int, source: Path, tokens: list[int] | None = None, **sections: Any
) -> dict[str, Any]:
    """Go on from the checkpoint that another scenario has left in `source`."""
    engine = make_engine(make_recipe(source, zero, stage, **sections), tokens)
    state = engine.resume_newest("fingerprint")
    assert engine.steps_taken == 2, engine.steps_taken
    result = train(engine, 2)
    dump(engine, out / "after.safetensors")
    end(engine)
    return result | {"state": state}


def not_finite(out: Path, zero: str, where: str, precision: str = "fp32") -> dict[str, Any]:
    """One good step, then one where rank 1 meets a NaN in its loss or only in its gradient."""
    engine = MedusaEngine(make_recipe(out, zero, 1, train={"precision": precision}), STEPS)
    train(engine, 0, 1)
    dump(engine, out / "before.safetensors")
    batches = micro_batches(1, engine)
    if where == "loss":
        embedding = engine.model.backbone.get_input_embeddings().weight
        with torch.no_grad(), engine._gathered([embedding]):
            embedding[POISON] = float("nan")
        if engine.rank == 1:
            batches[0].input_ids[0, 0] = POISON
    elif engine.rank == 1:
        engine.model.heads[1].blocks.register_forward_hook(lambda _, __, output: _NanGradient.apply(output))
    message = refusal(engine.train_batch, batches, 1)
    if where == "loss":  # the poisoned row is no weight that the step has changed
        with torch.no_grad(), engine._gathered([embedding]):
            embedding[POISON] = 0.0
    dump(engine, out / "after.safetensors")
    end(engine)
    return {"message": message, "steps_taken": engine.steps_taken}


class _NanGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * float("nan")


def stop_flag(out: Path) -> dict[str, Any]:
    engine = MedusaEngine(make_recipe(out), STEPS)
    steps = [engine.train_batch(micro_batches(step, engine), step, lambda: engine.rank == step) for step in range(3)]  # noqa: B023
    counters = engine.eval_batch(micro_batches(0, engine))
    end(engine)
    return {"stop": [result.stop for result in steps], "eval": counters.tolist()}


def left(out: Path, zero: str) -> dict[str, Any]:
    """A step left after its first micro-batch: one rank had no time after step 2, the other is asked to stop in step 3.

    Then it is saved, as the loop does, and another engine goes on.
    """
    recipe = make_recipe(out, zero)
    engine = MedusaEngine(recipe, STEPS)
    first = train(engine, 0, 1)["loss"]
    first.append(engine.train_batch(micro_batches(1, engine), 1, short_of_time=lambda: engine.rank == 1).loss.hex())
    asked = iter([False, True])
    with pytest.raises(StepLeftError):
        engine.train_batch(micro_batches(2, engine), 2, lambda: engine.rank == 0 and next(asked))
    engine.save({"data": "fingerprint"})
    end(engine)
    engine = MedusaEngine(recipe, STEPS)
    engine.resume_newest("fingerprint")
    second = train(engine, engine.steps_taken)["loss"]
    end(engine)
    return {"loss": first + second}


def export(out: Path, zero: str, **sections: Any) -> dict[str, Any]:
    """Train stage 2 a little, save what was trained."""
    engine = MedusaEngine(make_recipe(out, zero, 2, **sections), STEPS)
    train(engine, 0, 2)
    dump(engine, out / "after.safetensors")
    engine.export(out)
    end(engine)
    return {}


def launch_errors(out: Path, source: Path) -> dict[str, Any]:
    """Messages of mistakes that show at the start, and heads taken over from a finished run."""
    found: dict[str, Any] = {"loaded": []}
    heads = {"init_from": str(source)}

    load_backbone, builder.load_backbone = builder.load_backbone, lambda *a, **k: found["loaded"].append(1)
    for name, sections in (("shapes", {"heads": heads | {"num": 2}}), ("batch", {"train": {"micro_batch_size": 3}})):
        found[name] = refusal(MedusaEngine, make_recipe(out, **sections), STEPS)
    out.mkdir(parents=True, exist_ok=True)
    nvme = {"device": "nvme", "nvme_path": str(out / "nvme")}
    compatible, AsyncIOBuilder.is_compatible = AsyncIOBuilder.is_compatible, lambda *_, **__: False
    refused = {
        "nvme": {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}, "offload_optimizer": nvme}},
        "early": {"zero_optimization": {"stage": 2, "reduce_bucket_size": 0}},
        "late": {"zero_optimization": {"stage": 3}, "gradient_predivide_factor": 2.0},
    }
    for name, settings in refused.items():
        file = out / f"{name}.json"
        file.write_text(json.dumps(settings))
        found[name] = refusal(MedusaEngine, make_recipe(out).model_copy(update={"deepspeed": str(file)}), STEPS)
        if name == "early":
            builder.load_backbone, AsyncIOBuilder.is_compatible = load_backbone, compatible
    engine = MedusaEngine(make_recipe(out, heads=heads), STEPS)
    wanted = load_heads(source)[1]
    found["warm_start"] = all(torch.equal(w, wanted[n]) for n, w in engine.model.heads.state_dict().items())

    def forward(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    engine.model.heads[0].forward = forward
    found["memory"] = refusal(train, engine, 0, 1)
    end(engine)
    return found


def other_maps(out: Path, source: Path) -> dict[str, Any]:
    """What an engine says to a checkpoint and to finished heads with another token map."""
    found = {}
    for name, tokens in (("full", None), ("fewer", list(range(10))), ("other", list(range(1, 41)))):
        engine = make_engine(make_recipe(source), tokens)
        found[name] = refusal(engine.resume_newest, "fingerprint")
        end(engine)
    engine = make_engine(make_recipe(source), list(range(40)))
    engine.resume_newest("fingerprint")
    engine.export(source)
    end(engine)
    recipe = make_recipe(out, heads={"init_from": str(source)})
    found["start"] = refusal(make_engine, recipe, list(range(40)))
    heads = recipe.heads.model_copy(update={"vocab": 40})
    engine = make_engine(recipe.model_copy(update={"heads": heads}), list(range(1, 41)))
    found["kept"] = engine.model.heads.token_map.tolist()
    end(engine)
    return found


def refusals(out: Path) -> dict[str, Any]:
    """What an engine says to checkpoints of other data and of another model."""
    found = {}
    for name, fingerprint, layers in (("data", "changed", 1), ("model", "fingerprint", 2)):
        engine = MedusaEngine(make_recipe(out, heads={"layers": layers}), STEPS)
        found[name] = refusal(engine.resume_newest, fingerprint)
        end(engine)
    return found


def main() -> None:
    folder, jobs = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    torch.set_num_threads(1)
    rank, results = os.environ["RANK"], {}
    for name, scenario, arguments in jobs:
        paths = {key: Path(value) for key, value in arguments.items() if key == "source"}
        results[name] = globals()[scenario](folder / name, **(arguments | paths))
    (folder / f"rank{rank}.json").write_text(json.dumps(results))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
