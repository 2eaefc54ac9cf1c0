"""A recipe: one YAML file plus dotted overrides, typed and checked before any hub, GPU or process group is touched.

`Recipe.load` reports every mistake of a file at once; the sections and their keys stand in `sections`. A
relative path is looked for beside the recipe, then in the folder above it, then in the working directory; one that an
override names is looked for in the working directory first. `output` and `heads.init_from`, which is another run's
output, are relative to the working directory.

The stock launcher runs the file it is given with Python, so a recipe opens and closes with the launch stub, two lines
that make it valid YAML and valid Python at once; to YAML the key `_` is a plain scalar that `load` drops.
"""

import copy
import difflib
import fnmatch
import inspect
import json
import os
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from medusa_ds.config import deepspeed as ds_config
from medusa_ds.config.loading import Origin, apply_overrides, find_recipe, read_recipe, resolve_paths, shipped
from medusa_ds.config.parsing import parse_yaml, redact, secret_keys
from medusa_ds.config.sections import (
    DataSpec,
    HeadsSpec,
    LossSpec,
    ModelSpec,
    Section,
    SourceSpec,
    TrainSpec,
    WandbSpec,
)
from medusa_ds.config.types import Stage, allowed, parts
from medusa_ds.errors import UserError, counted, one_line

_MANUAL_HEAD = """\
# Keys of a recipe

Made by `medusa-ds show --keys`. A recipe is a YAML file; each key stands here by its full name, by which the command
line sets it too: `train.lr=1e-3`, or `train.steps=null` to leave out what the file has.

`deepspeed FILE [key=value ...]` starts a recipe with the first and the last line of the shipped ones, which
`medusa-ds init` and `medusa-ds list --copy` write as well; without these lines DeepSpeed's launcher reads YAML as
Python and ends with a SyntaxError. `deepspeed --module medusa_ds FILE [key=value ...]` starts any recipe.

Files that a recipe names are looked for beside it, in the folder above and in the working directory, those on the
command line and `heads.init_from` in the working directory first."""


class Recipe(Section):
    """A validated recipe; these keys stand outside of all sections."""

    model: ModelSpec
    heads: HeadsSpec = HeadsSpec()
    stage: Stage
    """1: heads on a frozen backbone (Medusa-1). 2: heads and backbone together (Medusa-2)."""
    loss: LossSpec = LossSpec()
    data: DataSpec
    train: TrainSpec
    deepspeed: str = "ds_configs/zero2.json"
    """A DeepSpeed JSON, for ZeRO, offload and buckets; batch sizes, precision, optimizer and schedule are the recipe's,
    and where both say one the two have to agree. `auto`: of the shipped ones the least ZeRO stage and offload that fit
    the GPUs, by the estimate; zero2 on a CPU."""
    output: str
    """Directory of checkpoints, metrics and heads, relative to the working directory."""

    @property
    def has_frozen_start(self) -> bool:
        """Whether training needs a second copy of the model, which stays as it is: see `LossSpec.target`."""
        return self.stage == 2 and self.loss.target != "label"

    @classmethod
    def load(cls, path: str | Path, overrides: list[str] | tuple[str, ...] = (), planning: bool = False) -> "Recipe":
        """Read, override, resolve and check a recipe.

        Args:
            path: a recipe file, or the name of a shipped one (`smollm2_135m_stage1`).
            overrides: `key.path=value`, values in YAML.
            planning: the run that `heads.init_from` names need not have happened yet, as for an estimate.

        Returns:
            The recipe with every default that depends on the stage filled in and every path absolute.

        Raises:
            UserError: every mistake found, each with file, key, what was found and what is allowed.
        """
        file = find_recipe(str(path))
        raw, lines = read_recipe(file)
        at = Origin(file, lines, overrides)
        written = raw["model"].get("name") if isinstance(raw.get("model"), dict) else None
        problems = apply_overrides(raw, overrides)
        if isinstance(raw.get("model"), dict) and isinstance(package := raw["model"].get("package"), dict):
            package.setdefault("stands_for", written)
        secret = "looks like a secret (not shown); secrets come from the environment, as in HF_TOKEN or WANDB_API_KEY"
        problems += [at.say(key, secret) for key in secret_keys(raw)]
        problems += resolve_paths(raw, at, planning)
        recipe: Recipe | None = None
        wrong: set[str] = set()
        try:
            recipe = cls.model_validate(raw)
        except ValidationError as error:
            problems += _explain(error, raw, at)
            wrong = {".".join(map(str, _key(item))) for item in error.errors()}
            recipe = cls._without(raw, wrong)
        if recipe is not None:
            problems += [at.say(key, text) for key, text in recipe.misfits() if key not in wrong]
        json_file = raw["deepspeed"]
        if isinstance(json_file, str) and os.path.exists(json_file):
            try:
                settings = ds_config.load(Path(json_file))
                zero = settings.get("zero_optimization", {})
                if recipe is not None and recipe.model.frozen_precision == "fp8" and zero.get("stage") == 3:
                    text = f"found fp8 with ZeRO-3 ({json_file}), which partitions the frozen weights; use zero2.json"
                    problems.append(at.say("model.frozen_precision", text))
                if recipe is not None and not wrong:
                    ds_config.resolve(settings, Path(json_file), recipe.ds_values(), file)
            except UserError as error:
                problems += error.problems
        if problems or recipe is None:
            raise UserError(*dict.fromkeys(redact(text) for text in problems))
        return recipe._with_defaults()

    @classmethod
    def kept(cls, text: str, where: str) -> "Recipe":
        """A resolved recipe that a run has kept; its data need not be on this machine.

        Raises:
            UserError: it is none.
        """
        try:
            return cls.model_validate(parse_yaml(text, where)[0])
        except ValidationError as error:
            raise UserError(f"{where}: not a resolved recipe ({one_line(error)})") from None

    def misfits(self) -> Iterator[tuple[str, str]]:
        """Keys that do not fit the rest of the recipe, each with what is wrong."""
        for name, part in self:
            for key, text in part._contradictions(self) if isinstance(part, Section) else ():
                yield f"{name}.{key}", text

    @classmethod
    def _without(cls, raw: dict[str, Any], wrong: set[str]) -> "Recipe | None":
        """The recipe less its wrong keys, so that contradictions among the others show in the same report."""
        rest = copy.deepcopy(raw)
        needed = {"model.name": "any/model", "data.path": "sample", "train.lr": 1.0, "train.global_batch_size": 1}
        for key in wrong:
            target: Any = rest
            *parents, last = key.split(".")
            for part in parents:
                target = target.get(part) if isinstance(target, dict) else None
            if isinstance(target, dict):
                target.pop(last, None)
                if key in needed:
                    target[last] = needed[key]
        try:
            return cls.model_validate(rest)
        except ValidationError:
            return None

    def _with_defaults(self) -> "Recipe":
        """Fill in what follows from the stage."""
        stage2 = self.stage == 2
        loss = self.loss.model_copy(update={"coefficient": (self.loss.coefficient or 0.2) if stage2 else None})
        train = self.train.model_copy(update={"lr_multiplier": (self.train.lr_multiplier or 4.0) if stage2 else None})
        model = self.model.model_copy(update={"frozen": not stage2})
        return self.model_copy(update={"loss": loss, "train": train, "model": model})

    def ds_values(self, world_size: int | None = None, on_gpu: bool | None = None) -> dict[str, Any]:
        """What the recipe owns of a DeepSpeed config, by dotted DeepSpeed key.

        Args:
            world_size: ranks; None leaves out what depends on them.
            on_gpu: whether ranks have a GPU; None leaves out a precision of `auto`.

        Raises:
            UserError: the batch sizes do not multiply out.
        """
        train = self.train
        values: dict[str, Any] = {
            "train_batch_size": train.global_batch_size,
            "train_micro_batch_size_per_gpu": train.micro_batch_size,
            "gradient_clipping": float(train.max_grad_norm),
            "optimizer.type": "AdamW",
            "optimizer.params.lr": train.lr,
            "optimizer.params.betas": train.betas,
            "optimizer.params.eps": train.eps,
            "optimizer.params.weight_decay": train.weight_decay,
            "fp16.enabled": False,
            "seed": train.seed,
            "tensorboard.enabled": train.tensorboard,
            "wandb.enabled": bool(train.wandb),
        }
        if isinstance(train.wandb, WandbSpec):
            named = {"wandb.project": train.wandb.project, "wandb.group": train.wandb.group}
            values |= {key: value for key, value in named.items() if value is not None}
        if train.precision != "auto" or on_gpu is not None:
            values["bf16.enabled"] = train.precision == "bf16" or (train.precision == "auto" and bool(on_gpu))
        if world_size is not None:
            if train.global_batch_size % (train.micro_batch_size * world_size):
                raise UserError(
                    f"train.global_batch_size: found {train.global_batch_size}, which {counted(world_size, 'rank')} x "
                    f"train.micro_batch_size {train.micro_batch_size} do not divide; allowed here: multiples of "
                    f"{train.micro_batch_size * world_size}"
                )
            values["gradient_accumulation_steps"] = train.global_batch_size // (train.micro_batch_size * world_size)
        return values

    def ds_config(self, world_size: int, on_gpu: bool) -> dict[str, Any]:
        """The DeepSpeed config of a run: the JSON file with everything the recipe owns filled in.

        With `deepspeed: auto`, which a run replaces by what fits its GPUs, it is what a CPU takes: zero2.
        """
        path = shipped("ds_configs") / "zero2.json" if self.deepspeed == "auto" else Path(self.deepspeed)
        return ds_config.resolve(ds_config.load(path), path, self.ds_values(world_size, on_gpu), None)

    def to_yaml(self) -> str:
        """The resolved recipe as YAML (JSON values, which YAML reads)."""
        out = []
        for key, value in self.model_dump(mode="json").items():
            if isinstance(value, dict):
                out.append(f"{key}:")
                out += [f"  {name}: {json.dumps(item, ensure_ascii=False)}" for name, item in value.items()]
            else:
                out.append(f"{key}: {json.dumps(value, ensure_ascii=False)}")
        return "\n".join(out) + "\n"


def _key(error: Any) -> tuple[int | str, ...]:
    """Where an error of pydantic is, without the branches of a union; the name of an unknown key may be that of one."""
    *above, last = error["loc"]
    branches = {"str", "bool", "int", "float", *(section.__name__ for section in sections().values())}
    above += [last] if error["type"] != "extra_forbidden" else []
    kept = [part for part in above if isinstance(part, int) or (re.fullmatch(r"\w+", part) and part not in branches)]
    return (*kept, last) if error["type"] == "extra_forbidden" else tuple(kept)


def _explain(error: ValidationError, raw: dict[str, Any], at: Origin) -> list[str]:
    """Pydantic's errors as `FILE:LINE: KEY: what was found; what is allowed`, one a key."""
    problems: dict[str, str] = {}
    hidden = [key.split(".") for key in secret_keys(raw)]
    for item in error.errors():
        loc, kind = _key(item), item["type"]
        key = ".".join(map(str, loc))
        found = json.dumps(item["input"], default=str, ensure_ascii=False)
        found = found if len(found) <= 80 else found[:77] + "..."
        if any(list(map(str, loc)) == path[: len(loc)] for path in hidden):
            found = "a secret"
        if kind == "extra_forbidden":
            problems[key] = _unknown_key(loc)
        elif kind == "missing":
            problems[key] = "missing; it has no default"
        elif not (key == "data.path" and isinstance(item["input"], list)):  # its items say what is wrong
            mend = " in quotes" if _allowed(loc) == "text" and isinstance(item["input"], int | float) else ""
            problems[key] = f"found {found}; allowed is {_allowed(loc)}{mend}"
    return [at.say(key, text) for key, text in problems.items()]


def sections(section: type[BaseModel] | None = None, prefix: str = "") -> dict[str, type[BaseModel]]:
    """The sections of a recipe by dotted key; the recipe itself has the empty one."""
    section = section or Recipe
    found = {prefix: section}
    for name, field in section.model_fields.items():
        for kind in parts(field.annotation):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                found |= sections(kind, f"{prefix}.{name}".removeprefix("."))
    return found


def manual(pattern: str = "") -> str:
    """Every key that holds a pattern (`*` is anything), what it may be, its default and meaning, as Markdown."""
    lines = [] if pattern else [_MANUAL_HEAD]
    for prefix, section in sections().items():
        entries = []
        for name, field in section.model_fields.items():
            key = f"{prefix}{'.N' * (prefix == 'data.path')}.{name}".removeprefix(".")
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                continue
            if fnmatch.fnmatch(key, f"*{pattern}*"):
                default = "needed" if field.is_required() else f"default `{json.dumps(field.default)}`"
                text = f"- `{key}` ({allowed(field.annotation, field.metadata)}; {default}): {field.description}"
                entries.append(textwrap.fill(text, 120, subsequent_indent="  ", break_on_hyphens=False))
        if entries:
            meaning = textwrap.fill(inspect.getdoc(section) or "", 120)
            lines += ["", f"## {prefix or 'top level'}", "", meaning, "", *entries]
    return "\n".join(lines).strip()


def _unknown_key(loc: tuple[int | str, ...]) -> str:
    known = sections()
    here = known[".".join(str(part) for part in loc[:-1] if not isinstance(part, int))]
    name = str(loc[-1])
    near = difflib.get_close_matches(name, here.model_fields, 1)
    if near:
        return f"unknown key; did you mean {near[0]}?"
    for prefix, section in known.items():
        other = difflib.get_close_matches(name, section.model_fields, 1, cutoff=0.85)
        if other:
            return f"unknown key; did you mean {prefix}{'.' if prefix else ''}{other[0]}?"
    return f"unknown key; allowed are {', '.join(here.model_fields)}"


def _allowed(loc: tuple[int | str, ...]) -> str:
    """What a key may be: the words of its type."""
    *parents, name = (str(part) for part in loc if not isinstance(part, int))
    if isinstance(loc[-1], int):
        return f"text or {allowed(SourceSpec)}"
    field = sections()[".".join(parents)].model_fields[name]
    return allowed(field.annotation, field.metadata)
