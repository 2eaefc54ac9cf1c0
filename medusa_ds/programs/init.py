"""Write a commented recipe for a model: sizes and ZeRO config from the estimate, its chat template looked at.

Example:
    medusa-ds init Qwen/Qwen3-8B --data mine.jsonl --out qwen3_8b.yaml
"""

import json
import math
import os
import shlex
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from medusa_ds.config.loading import STUB_LAST, positions_of
from medusa_ds.config.recipe import Recipe
from medusa_ds.config.settings import Positional, ProgramSettings
from medusa_ds.data.dialogues import Chat
from medusa_ds.errors import UserError
from medusa_ds.files import check_writable, explained, write
from medusa_ds.model.backbone import load_config, load_tokenizer
from medusa_ds.training.gpus import GPUS
from medusa_ds.training.memory import GIB, choose, count_parameters

_ASSUMED = "H100 80GB"


class Settings(ProgramSettings):
    """What the command line says."""

    model: Positional[str]
    """Hub id or directory of a causal language model."""
    data: str = Field("sample", title="PATH")
    """Conversations: a JSON, JSONL or Parquet file, a directory of such files, a hub dataset, or the sample."""
    out: str | None = Field(None, title="FILE")
    """Where to write; without it MODEL_stage1.yaml, here."""


def run(settings: Settings) -> None:
    """Write the recipe.

    Raises:
        UserError: the file exists, or a model or data that cannot be found or used.
    """
    name = Path(settings.model).name.lower().replace("-", "_").replace(".", "") or "model"
    out = Path(settings.out or f"{name}_stage1.yaml")
    if out.exists():
        raise UserError(f"{out}: exists already; move it away, or name another file with --out")
    check_writable(out, "--out")
    source = os.path.abspath(settings.data) if os.path.exists(settings.data) else settings.data
    model = os.path.abspath(settings.model) if Path(settings.model).is_dir() else settings.model
    cuda = torch.cuda.is_available()
    gpus = torch.cuda.device_count() if cuda else 1
    values: dict[str, Any] = {
        "model": {"name": model},
        "stage": 1,
        "data": {"path": source, "max_length": 1024 if cuda else 512},
        "train": {"global_batch_size": 48 * gpus if cuda else 8, "micro_batch_size": 1, "lr": 1e-3},
        "deepspeed": "auto",
        "output": f"runs/{out.stem}",
    }
    recipe = Recipe.model_validate(values)
    config = load_config(recipe.model).get_text_config()
    positions = positions_of(config.to_dict()) or recipe.data.max_length
    values["data"]["max_length"] = min(recipe.data.max_length, positions)
    values["train"]["lr"] = 1e-3 if config.hidden_size >= 2048 else 3e-3
    recipe, parts = Recipe.model_validate(values), count_parameters(recipe, config)
    memory = torch.cuda.mem_get_info()[1] if cuda else GPUS[_ASSUMED].gib * GIB
    for size in (6, 3, 2, 1) if cuda else (1,):  # which divide the batch of 8 GPUs too
        values["train"]["micro_batch_size"] = size
        choice = choose(Recipe.model_validate(values), parts, config, gpus, memory, math.inf)
        if choice.fits and choice.cpu_bytes == 0:
            break
    text = _TEXT.format(
        file=out.name,
        model=json.dumps(model, ensure_ascii=False),
        parameters=(parts.backbone + parts.lm_head) / 1e6,
        trained=parts.trainable(1) / 1e6,
        template=_look_at_template(recipe),
        data=json.dumps(source, ensure_ascii=False),
        max_length=values["data"]["max_length"],
        positions=positions,
        batch=values["train"]["global_batch_size"],
        micro=values["train"]["micro_batch_size"],
        lr=f"{values['train']['lr']:.0e}".replace("e-0", "e-"),
        deepspeed=choice.deepspeed.name,
        why=choice.why,
        where="this machine's GPUs" if cuda else f"an {_ASSUMED}; this machine has no GPU",
        output=json.dumps(values["output"], ensure_ascii=False),
        last=STUB_LAST,
    )
    with explained(f"{out}: cannot be written", "name another file with --out"):
        write(out, text)
    try:
        Recipe.load(out)
    except UserError as error:
        out.unlink()
        raise UserError(*(text.removeprefix(f"{out.absolute()}:") for text in error.problems)) from None
    at = shlex.quote(str(out))
    print(f"wrote {out}; next: medusa-ds show {at} --data 2, medusa-ds estimate {at} --data, deepspeed {at}")


def _look_at_template(recipe: Recipe) -> str:
    """What training will find of the chat template, as comments."""
    try:
        Chat(load_tokenizer(recipe.model), {}).check()
        return "# Its chat template tells the assistant's turns exactly."
    except UserError as error:
        lines = [f"# {' '.join(problem.split())}"[:110] for problem in error.problems]
        return "\n".join(["# Training will refuse its chat template:", *lines])


_TEXT = '''\
_: r"""  # this line and the last one let the launcher run this file: deepspeed {file}
# Stage 1: heads on the frozen model. All keys: medusa-ds show --keys
model:
  # {parameters:,.0f} million parameters, of which stage 1 trains none
  name: {model}
{template}
heads:
  num: 3 # head k guesses the token k + 1 places ahead; medusa-ds evaluate tells what each is worth
  layers: 1
  # {trained:,.0f} million parameters. lm_head: shared keeps the residual blocks alone; vocab: 32768 the frequent tokens
  lm_head: own
stage: 1
data:
  # lines like {{"messages": [{{"role": "user", "content": "..."}}, {{"role": "assistant", "content": "..."}}]}}
  # best are the model's own answers, which medusa-ds distill makes
  path: {data}
  max_length: {max_length} # the model has {positions} positions
train:
  global_batch_size: {batch} # sequences of a step over all GPUs
  micro_batch_size: {micro} # of a forward pass on one GPU
  epochs: 1
  lr: {lr}
  save_every: 200
# By the estimate, on {where}:
# {why}
deepspeed: ds_configs/{deepspeed}
output: {output}
# Stage 2 trains heads and model together: stage: 2, heads.init_from: this output, lr: 1e-5, deepspeed: auto
{last}
'''
