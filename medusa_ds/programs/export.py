"""Write heads for other programs: plain transformers, and vLLM, TGI, TensorRT-LLM, FasterDecoding/Medusa where asked.

Example:
    medusa-ds export runs/smollm2_135m_stage1 exported --for transformers,vllm

The directory has the heads once in our own layout, which transformers and all commands here read, and a file more for
each other layout that is asked for; its README.md has the code that uses them. It is made under a temporary name.
"""

import json
import shutil
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub import HfApi
from huggingface_hub import errors as hub_errors
from pydantic import Field

from medusa_ds.config.parsing import read_object
from medusa_ds.config.recipe import Recipe
from medusa_ds.config.settings import Commas, Positional, ProgramSettings
from medusa_ds.config.types import Count
from medusa_ds.data.packing import load_data
from medusa_ds.data.vocabulary import token_map
from medusa_ds.errors import UserError, counted, one_line
from medusa_ds.exporting.card import card, read_figures
from medusa_ds.exporting.source import Source
from medusa_ds.exporting.targets import TARGETS, write_export
from medusa_ds.files import check_writable, explained, replacing
from medusa_ds.heads.kinds import make_heads
from medusa_ds.model.backbone import lm_head_weight, load_backbone, load_config, load_tokenizer, logits_of
from medusa_ds.runs import open_run
from medusa_ds.training.build import heads_meta


class Settings(ProgramSettings):
    """What the command line says."""

    name: Positional[str | None] = Field(None, alias="run")
    """A run's output, its `heads`, OUTPUT/checkpoints/best, an export, or smollm2_135m: the heads that come along."""
    out: Positional[str]
    """Directory to make."""
    targets: Commas[Literal["transformers", "vllm", "tgi", "tensorrt-llm", "fasterdecoding", "all"]] = Field(
        ["transformers"], alias="for", title="NAME"
    )
    """What it is for: transformers, vllm, tgi, tensorrt-llm, fasterdecoding, or all of them."""
    untrained: str | None = Field(None, title="RECIPE")
    """In place of a run: a recipe's heads before training."""
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """Without it, the run's, or for a checkpoint and untrained heads the base model's."""
    vocab: Count | None = None
    """Cut heads to the N most frequent tokens of their training. Heads that share the LM head stay as they are, but
    vLLM reads a map (`token_map`) and cuts the LM head for them."""
    force: bool = False
    """Replace an earlier export."""
    allow_loss: bool = False
    """Write files also for a program that cannot run such heads as they are."""
    push_to_hub: str | None = Field(None, title="REPO")
    """Upload it, a tuned backbone to REPO-backbone."""


def run(settings: Settings) -> None:
    """Export heads.

    Raises:
        UserError: nothing to export, a directory that is in the way, a program that cannot run such heads, or the hub
            refuses.
    """
    name, untrained, asked = settings.name, settings.untrained, settings.targets
    if (name is None) == (untrained is None):
        raise UserError("RUN: name a run to export, or --untrained RECIPE; one of the two")
    target = Path(settings.out).absolute()
    _check_free(target, settings.force)
    wanted = getattr(torch, settings.dtype) if settings.dtype else None
    source = _untrained(untrained, wanted) if untrained else _from_run(str(name), wanted, asked != ["transformers"])
    if settings.vocab is not None:
        source = _truncate(source, Recipe.kept(source.meta["recipe"], "heads.json"), settings.vocab)
    chosen = []
    for each in [each for each in TARGETS if each in asked or "all" in asked]:
        why = TARGETS[each].refuses(source, settings.allow_loss)
        if why is None:
            chosen.append(each)
        elif each in asked:
            others = (other for other, program in TARGETS.items() if not program.refuses(source, settings.allow_loss))
            raise UserError(f"--for {each}: {why}; allowed is {', '.join(others) or 'no other program'}")
        else:
            print(f"warning: left out {each}: {why}")
    base = str(target / "backbone") if source.tuned else source.meta["base_model"]
    with explained(f"{target}: cannot be written", "name a writable directory"), replacing(target) as work:
        work.mkdir()
        write_export(work, source, chosen, base)
        card(source, chosen).save(work / "README.md")
        for file in work.rglob("*.safetensors"):  # safetensors lets only its owner read a file
            shutil.copymode(work / "config.json", file)
    print(f"exported {counted(source.meta['num'], 'head')} to {settings.out}; README.md there says how to use them")
    if settings.push_to_hub:
        _push(target, settings.push_to_hub, source, chosen)


def _from_run(name: str, dtype: torch.dtype | None, needs_lm_head: bool) -> Source:
    saved = open_run(name)
    step = None if saved.checkpoint is None else saved.checkpoint.step
    dtype = dtype or saved.dtype or _dtype(load_config(saved.model).dtype)
    heads = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in saved.weights.items()}
    needs_model = saved.stage == 2 or (needs_lm_head and saved.meta["lm_head"] == "shared")
    model = saved.load_backbone(torch.device("cpu"), dtype) if needs_model else None
    has_tokenizer = saved.has_tokenizer or needs_model or saved.shipped or step is not None
    tokenizer = saved.tokenizer if has_tokenizer else None
    return Source(heads, saved.meta, model, tokenizer, saved.tree, *read_figures(saved.output, step))


def _untrained(recipe_file: str, dtype: torch.dtype | None) -> Source:
    recipe = Recipe.load(recipe_file, planning=True)
    dtype = dtype or _dtype(load_config(recipe.model).dtype)
    model, meta = load_backbone(recipe.model, dtype, device="cpu", liger=False), heads_meta(recipe)
    weight = lm_head_weight(model).detach()
    heads = make_heads(meta, dtype=dtype, logits=logits_of(model))
    heads.initialize(weight, model.get_output_embeddings().bias)
    tokenizer = load_tokenizer(recipe.model, recipe.data.template_args.get("chat_template"))
    source = Source(heads.state_dict(), meta, model, tokenizer)
    return source if recipe.heads.vocab == "full" else _truncate(source, recipe, int(recipe.heads.vocab))


def _truncate(source: Source, recipe: Recipe, number: int) -> Source:
    """Keep the rows of the most frequent tokens of the recipe's training labels."""
    if "token_map" in source.heads:
        raise UserError(f"--vocab: found {number}, but the heads have {len(source.heads['token_map'])} tokens already")
    tokenizer = load_tokenizer(recipe.model, recipe.data.template_args.get("chat_template"))
    data, config = load_data(recipe, tokenizer), load_config(recipe.model).get_text_config()
    tokens = token_map(number, data, tokenizer, config)
    assert tokens is not None
    source.heads = {name: weight[tokens] if "projection" in name else weight for name, weight in source.heads.items()}
    source.heads["token_map"] = tokens
    return source


def _dtype(configured: object) -> torch.dtype:
    """The base model's own dtype: checkpoints are fp32 whatever the run computed in."""
    return configured if isinstance(configured, torch.dtype) else torch.float32


def _check_free(target: Path, force: bool) -> None:
    """Refuse a directory that is in the way; with force, one that is not an earlier export."""
    check_writable(target, "OUT", directory=True)
    if not target.exists():
        return
    if not force:
        raise UserError(f"{target}: exists already; name another directory, or give --force to replace an export")
    config = target / "config.json"
    if not config.is_file() or read_object(config).get("model_type") != "medusa":
        raise UserError(f"{target}: is no earlier export, so --force does not replace it; name another directory")


def _push(out: Path, repository: str, source: Source, targets: list[str]) -> None:
    """Upload; a tuned backbone goes to `REPOSITORY-backbone`, since engines take the base model by its own name."""
    api, config = HfApi(), read_object(out / "config.json")
    try:
        name = api.create_repo(repository, exist_ok=True).repo_id
        if source.tuned:
            config["base_model_name_or_path"] = api.create_repo(f"{name}-backbone", exist_ok=True).repo_id
            api.upload_folder(repo_id=config["base_model_name_or_path"], folder_path=out / "backbone")
        text = str(card(source, targets, name, config["base_model_name_or_path"]))
        replaced = {"config.json": json.dumps(config, indent=2) + "\n", "README.md": text}
        api.upload_folder(repo_id=name, folder_path=out, ignore_patterns=["backbone/*", *replaced])
        for file, content in replaced.items():
            api.upload_file(path_or_fileobj=content.encode(), path_in_repo=file, repo_id=name)
    except (hub_errors.HTTPError, hub_errors.HFValidationError, OSError) as error:
        raise UserError(f"--push-to-hub {repository}: {one_line(error)}; {out} is complete: upload it later") from None
    print(f"uploaded to https://huggingface.co/{name}")
