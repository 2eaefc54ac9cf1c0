"""Write heads in the layouts of vLLM, TGI, TensorRT-LLM, FasterDecoding/Medusa and plain transformers.

Example:
    medusa-ds export runs/smollm2_135m_stage1 exported

One directory has them all:

    OUT/  config.json, tokenizer files, README.md    what every engine reads first
          heads/, backbone/ (stage 2)                our own layout: OUT is read like a run
          custom_generate/generate.py                transformers alone
          model.safetensors (or shards and index)    vLLM up to 0.32
          medusa_lm_head.pt, .safetensors            FasterDecoding and TensorRT-LLM, TGI

`config.json` has no `architectures`, or TGI ignores the heads, and no count of the base model's: vLLM's reader renames
every key that has "num" and "heads", or "num" and "layers", in it. Heads that share the LM head get copies of it where
an engine needs one for each head; vLLM reads a single one (`original_lm_head`) and TGI none (its second layout, for one
residual block). The directory is made under a temporary name that is renamed when complete.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData, save_torch_state_dict
from huggingface_hub import errors as hub_errors
from pydantic import Field, ValidationError
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from medusa_ds.config.parsing import parse_yaml, read_json, read_text
from medusa_ds.config.recipe import Recipe
from medusa_ds.config.settings import Positional, ProgramSettings
from medusa_ds.config.types import Count
from medusa_ds.data.packing import load_data
from medusa_ds.data.vocabulary import token_map
from medusa_ds.errors import UserError
from medusa_ds.exporting import custom_generate
from medusa_ds.exporting.layouts import expand_rows, to_medusa, to_vllm
from medusa_ds.heads.files import META, load_heads, save_heads
from medusa_ds.heads.kinds import make_heads
from medusa_ds.model.backbone import lm_head_weight, load_backbone, load_config, load_tokenizer, logits_of
from medusa_ds.runs import load_run, read_checkpoint, save_tree
from medusa_ds.training import checkpoint
from medusa_ds.training.build import heads_meta

ENGINES = ("transformers", "vllm", "tgi", "tensorrt-llm", "fasterdecoding")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
MAX_SHARD_SIZE = "5GB"  # transformers' and huggingface_hub's own


class Source(NamedTuple):
    """What is exported.

    Attributes:
        heads: state dict of `MedusaHeads`, in the dtype of the export.
        meta: as `save_heads` takes it.
        model: the base model with the run's tuned weights; None where nothing but the heads is needed.
        tokenizer: of the base model; None when the run has kept none.
        tree: the run's measured tree, if it has one.
        figures: what the run has measured of these heads, by name.
    """

    heads: dict[str, Tensor]
    meta: dict[str, Any]
    model: PreTrainedModel | None
    tokenizer: Any
    tree: list[Any] | None = None
    figures: dict[str, float] = {}

    @property
    def recipe(self) -> dict[str, Any]:
        """The resolved recipe, or of imported heads the few keys that are known."""
        raw, _ = parse_yaml(self.meta["recipe"], "heads.json: recipe")
        return raw

    @property
    def base(self) -> PreTrainedModel:
        """`model` where it is needed."""
        assert self.model is not None
        return self.model


class Settings(ProgramSettings):
    """What the command line says."""

    source: Positional[str | None] = Field(None, alias="run")
    """A finished run's output, its heads folder, or one of its checkpoints."""
    out: Positional[str]
    """Directory to make."""
    engine: Literal["transformers", "vllm", "tgi", "tensorrt-llm", "fasterdecoding", "all"] = Field("all", alias="for")
    """What it is for; all is a directory for all of them."""
    untrained: str | None = Field(None, title="RECIPE")
    """In place of a run: a recipe's heads before training."""
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """Without it, the run's, or for a checkpoint and untrained heads the base model's."""
    vocab: Count | None = None
    """Cut heads to the N most frequent tokens of their training. Heads that share the LM head stay as they are, but
    vLLM reads a map (`token_map`) and cuts the LM head for them."""
    force: bool = False
    """Replace an earlier export."""
    push_to_hub: str | None = Field(None, title="REPO")
    """Upload it, a tuned backbone to REPO-backbone."""


def run(settings: Settings) -> None:
    """Export heads.

    Raises:
        UserError: nothing to export, a directory that is in the way, or the hub refuses.
    """
    run, untrained, engine = settings.source, settings.untrained, settings.engine
    if (run is None) == (untrained is None):
        raise UserError("RUN: name a run to export, or --untrained RECIPE; one of the two")
    target = Path(settings.out).absolute()
    _check_free(target, settings.force)
    wanted = DTYPES[settings.dtype] if settings.dtype else None
    source = _untrained(untrained, wanted) if untrained else _from_run(Path(str(run)), wanted)
    if settings.vocab is not None:
        recipe = _recipe(source.meta["recipe"], Path("heads.json: recipe"))
        source = _truncate(source, recipe, settings.vocab)
    with _directory(target) as work:
        _write(work, target, source, engine)
    print(f"exported {source.meta['num']} heads to {settings.out}; README.md there has the launch lines")
    if engine in ("all", "fasterdecoding") and source.meta["num"] != 5:
        print(f"warning: FasterDecoding/Medusa builds 5 heads whatever the files say; these are {source.meta['num']}")
    if settings.push_to_hub:
        _push(target, settings.push_to_hub)


def _from_run(run: Path, dtype: torch.dtype | None) -> Source:
    tree, step = None, None
    if (run / "manifest.json").is_file():
        folder, output = run.resolve(), run.resolve().parents[1]
        if problems := checkpoint.check(folder):
            raise UserError(*problems)
        recipe = _recipe(read_text(output / "recipe.yaml"), output / "recipe.yaml")
        meta, step = heads_meta(recipe), int(folder.name.removeprefix("step-"))
        heads = {name[6:]: tensor for name, tensor in read_checkpoint(folder).items() if name.startswith("heads.")}
        dtype = dtype or _dtype_of(recipe)
    else:
        output = run if (run / "heads").is_dir() else run.parent
        unfinished = checkpoint.completed(run / "checkpoints")
        if unfinished and output != run:
            raise UserError(f"{run}: not finished; name one of its checkpoints, as in {unfinished[0]}")
        folder = output / "heads" if output == run else run
        if not (folder / "heads.json").is_file():
            raise UserError(f"{run}: found no run; name a finished run's output, a heads folder, or a checkpoint")
        config, heads = load_heads(folder)
        meta, tree = {key: config[key] for key in META}, config.get("tree")
        dtype = dtype or getattr(torch, config["dtype"])
    heads = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in heads.items()}
    source = Source(heads, meta, None, None, tree, _figures(output, step))
    if source.recipe["stage"] == 2 or meta["lm_head"] == "shared" or step is not None:
        loaded = load_run(run, torch.device("cpu"), dtype)
        return source._replace(model=loaded.backbone, tokenizer=loaded.tokenizer)
    if (folder / "tokenizer_config.json").is_file():
        return source._replace(tokenizer=AutoTokenizer.from_pretrained(folder))
    return source


def _untrained(recipe_file: str, dtype: torch.dtype | None) -> Source:
    recipe = Recipe.load(recipe_file, planning=True)
    dtype = dtype or _dtype_of(recipe)
    model, meta = load_backbone(recipe.model, dtype, device="cpu", liger=False), heads_meta(recipe)
    weight = lm_head_weight(model).detach()
    heads = make_heads(meta, dtype=dtype, logits=logits_of(model))
    heads.initialize(weight, model.get_output_embeddings().bias)
    source = Source(heads.state_dict(), meta, model, load_tokenizer(recipe.model))
    return source if recipe.heads.vocab == "full" else _truncate(source, recipe, int(recipe.heads.vocab))


def _truncate(source: Source, recipe: Recipe, number: int) -> Source:
    """Keep the rows of the most frequent tokens of the recipe's training labels."""
    if "token_map" in source.heads:
        raise UserError(f"--vocab: found {number}, but the heads have {len(source.heads['token_map'])} tokens already")
    tokenizer, config = load_tokenizer(recipe.model), load_config(recipe.model).get_text_config()
    tokens = token_map(number, load_data(recipe, tokenizer), tokenizer, config)
    assert tokens is not None
    heads = {name: weight[tokens] if "projection" in name else weight for name, weight in source.heads.items()}
    return source._replace(heads=heads | {"token_map": tokens})


def _dtype_of(recipe: Recipe) -> torch.dtype:
    """The base model's own dtype: checkpoints are fp32 whatever the run computed in."""
    dtype = load_config(recipe.model).dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def _recipe(text: str, where: Path) -> Recipe:
    """A recipe that a run has kept; its data need not be on this machine."""
    try:
        return Recipe.model_validate(parse_yaml(text, str(where))[0])
    except ValidationError as error:
        raise UserError(f"{where}: not a resolved recipe ({' '.join(str(error).split())[:200]})") from None


def _write(work: Path, target: Path, source: Source, engine: str) -> None:
    """Fill the directory `work`, which will be `target`."""
    heads, meta, tuned = source.heads, source.meta, source.recipe["stage"] == 2
    shared, tokens = meta["lm_head"] == "shared", heads.get("token_map")
    save_heads(work / "heads", {k: v for k, v in heads.items() if not (shared and k == "token_map")}, meta)
    if source.tree:
        save_tree(work / "heads" / "heads.json", source.tree)
    if tuned:
        source.base.save_pretrained(work / "backbone", max_shard_size=MAX_SHARD_SIZE)
    base = str(target / "backbone") if tuned else meta["base_model"]
    if source.tokenizer is not None:
        for folder in (work, work / "heads", *([work / "backbone"] if tuned else [])):
            source.tokenizer.save_pretrained(folder)
    dtype = next(str(t.dtype).removeprefix("torch.") for t in heads.values() if t.is_floating_point())
    config = {
        "model_type": "medusa",
        "base_model_name_or_path": base,
        "hidden_size": meta["hidden_size"],
        "vocab_size": meta["vocab_size"],
        "medusa_num_heads": meta["num"],
        "num_medusa_heads": meta["num"],
        "medusa_num_layers": meta["layers"],
        "medusa_fc_bias": True,
        "dtype": dtype,
        "torch_dtype": dtype,
    } | ({"original_lm_head": True} if shared else {})
    if shared and tokens is not None:
        config["truncated_vocab_size"] = len(tokens)
    (work / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    numbers = range(meta["num"])
    projections = [lm_head_weight(source.base).detach() if shared else heads[f"{h}.projection.weight"] for h in numbers]
    if tokens is not None and not shared:
        projections = [expand_rows(weight, tokens, meta["vocab_size"]) for weight in projections]
    engines = ENGINES if engine == "all" else (engine,)
    if "transformers" in engines:
        (work / "custom_generate").mkdir()
        shutil.copyfile(custom_generate.__file__, work / "custom_generate" / "generate.py")
    if "vllm" in engines:
        layout = to_vllm(heads, projections[:1] if shared else projections)
        if tokens is not None:  # beside own projections vLLM passes over it; `medusa-ds import` does not
            layout["token_map"] = tokens
        save_torch_state_dict(layout, work, max_shard_size=MAX_SHARD_SIZE)
        index = work / "model.safetensors.index.json"
        if not index.exists():  # without one, vLLM reads every safetensors file in the directory
            names = {"metadata": {}, "weight_map": dict.fromkeys(layout, "model.safetensors")}
            index.write_text(json.dumps(names, indent=2) + "\n", encoding="utf-8")
    if "tgi" in engines:
        layout = to_medusa(heads, meta, [] if shared and meta["layers"] == 1 else projections)
        save_file(layout, work / "medusa_lm_head.safetensors", metadata={"format": "pt"})
    if "fasterdecoding" in engines or "tensorrt-llm" in engines:
        torch.save(to_medusa(heads, meta, projections), work / "medusa_lm_head.pt")
    _card(source, str(target), base, engines).save(work / "README.md")
    for file in work.rglob("*.safetensors"):  # safetensors lets only its owner read a file
        shutil.copymode(work / "config.json", file)


def _card(source: Source, out: str, base: str, engines: tuple[str, ...]) -> ModelCard:
    meta, num = source.meta, source.meta["num"]
    path = source.recipe["data"].get("path") or []
    data = [path] if isinstance(path, str) else [item["path"] for item in path]
    named = ", ".join(data) or "not recorded"
    card = ModelCardData(
        base_model=None if Path(meta["base_model"]).is_absolute() else meta["base_model"],
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["medusa", "speculative-decoding"],
        datasets=[name for name in data if name != "sample" and not Path(name).is_absolute()] or None,
        model_name=Path(out).name,
        eval_results=[
            EvalResult("text-generation", "conversations", named, "accuracy", value, metric_name=name)
            for name, value in source.figures.items()
        ]
        or None,
    )
    speculative = json.dumps({"method": "medusa", "model": out, "num_speculative_tokens": num})
    lines = {
        "transformers": f'model.generate(**inputs, custom_generate="{out}", trust_remote_code=True)',
        "vllm": f"vllm serve {base} --speculative-config '{speculative}'  # up to 0.32",
        "tgi": f"text-generation-launcher --model-id {out}",
        "tensorrt-llm": f"python examples/medusa/convert_checkpoint.py --model_dir {base} --medusa_model_dir {out} "
        f"--num_medusa_heads {num} --num_medusa_layers {meta['layers']} --output_dir CHECKPOINT",
        "fasterdecoding": f"python -m medusa.inference.cli --model {out}",
    }
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("medusa-ds", "torch", "transformers"))
    launch = "\n".join(f"- {name}: `{lines[name]}`" for name in engines)
    size = len(source.heads.get("token_map", ()))
    tokens = f", guesses among the {size} most frequent of {meta['vocab_size']} tokens" if size else ""
    measured = "\n".join(f"- {name}: {value:.4f}" for name, value in source.figures.items()) or "Nothing."
    return ModelCard(
        f"---\n{card.to_yaml()}\n---\n\n# Medusa heads for {meta['base_model']}\n\n{num} heads of {meta['layers']} "
        f"residual blocks, LM head {meta['lm_head']}{tokens}. Base model of the heads: {base}. Data: {named}. Exported "
        f"with {versions}.\n\n## Use\n\n{launch}\n\n## Measured\n\n{measured}\n\n## Recipe\n\n```yaml\n"
        f"{meta['recipe'].strip()}\n```\n"
    )


def _figures(run: Path, step: int | None) -> dict[str, float]:
    """What was measured: the run's `evaluation.json` (see `medusa-ds evaluate --json`), or a validation in training."""
    if step is None and (run / "evaluation.json").is_file():
        report = read_json(run / "evaluation.json")
        figures = {name: value for name, value in report["heads"].items() if isinstance(value, float)}
        figures |= {f"{name}_acc": tops["top1"] for name, tops in report["heads"].items() if isinstance(tops, dict)}
        figures["mean_tokens_per_step"] = report["accepted"]["mean_tokens_per_step"]
        return figures | {"speed_up": report["speed"]["speed_up"]}
    lines = read_text(run / "metrics.jsonl").splitlines() if (run / "metrics.jsonl").is_file() else []
    records = [record for record in map(json.loads, lines) if record["kind"] == "validation"]
    chosen = [record for record in records if step in (None, record["step"])]
    last = chosen[-1] if chosen else {}
    return {name: value for name, value in last.items() if "acc" in name and value is not None}


def _check_free(target: Path, force: bool) -> None:
    """Refuse a directory that is in the way; with force, one that is not an earlier export."""
    if not target.exists():
        return
    if not force:
        raise UserError(f"{target}: exists already; name another directory, or give --force to replace an export")
    config = target / "config.json"
    if not config.is_file() or read_json(config).get("model_type") != "medusa":
        raise UserError(f"{target}: is no earlier export, so --force does not replace it; name another directory")


@contextmanager
def _directory(target: Path) -> Iterator[Path]:
    """A directory under a temporary name that becomes `target`, in place of what is there, when all went well."""
    work, old = target.with_name(f".tmp-{target.name}"), target.with_name(f".tmp-old-{target.name}")
    try:
        for path in (work, old):
            shutil.rmtree(path, ignore_errors=True)
        work.mkdir(parents=True)
        yield work
        if target.exists():
            os.rename(target, old)
        os.rename(work, target)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror or error}); name a writable directory") from None
    finally:
        for path in (work, old):
            shutil.rmtree(path, ignore_errors=True)


def _push(out: Path, repository: str) -> None:
    """Upload; a tuned backbone goes to `REPOSITORY-backbone`, since engines take the base model by its own name."""
    api, config = HfApi(), read_json(out / "config.json")
    try:
        name = api.create_repo(repository, exist_ok=True).repo_id
        if (out / "backbone").is_dir():
            tuned = api.create_repo(f"{name}-backbone", exist_ok=True).repo_id
            api.upload_folder(repo_id=tuned, folder_path=out / "backbone")
            config["base_model_name_or_path"] = tuned
        card = read_text(out / "README.md").replace(str(out / "backbone"), f"{name}-backbone").replace(str(out), name)
        replaced = {"config.json": json.dumps(config, indent=2) + "\n", "README.md": card}
        api.upload_folder(repo_id=name, folder_path=out, ignore_patterns=["backbone/*", *replaced])
        for file, text in replaced.items():
            api.upload_file(path_or_fileobj=text.encode(), path_in_repo=file, repo_id=name)
    except (hub_errors.HfHubHTTPError, hub_errors.HFValidationError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--push-to-hub {repository}: {reason}; {out} is complete: upload it later") from None
    print(f"uploaded to https://huggingface.co/{name}")
