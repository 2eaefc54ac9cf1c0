"""From the name of a run to its files, verified, and to what decodes: backbone, heads, tokenizer, tree.

A run is given as a training run's output directory, the `heads` folder in it, one of its checkpoints, an export, or the
name of heads that the package ships. Which base model belongs to it stands in the recipe that every one of them keeps.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from transformers import AutoTokenizer, PreTrainedModel

from medusa_ds.config.parsing import parse_yaml, read_json, read_text
from medusa_ds.config.recipe import HeadsSpec, ModelSpec
from medusa_ds.config.settings import Positional, ProgramSettings
from medusa_ds.config.types import Count
from medusa_ds.data.dialogues import Chat
from medusa_ds.data.layouts import UnusableRow
from medusa_ds.decoding.decoder import end_at
from medusa_ds.decoding.pictures import check_picture
from medusa_ds.decoding.session import position_limit
from medusa_ds.decoding.trees import Path as TreePath
from medusa_ds.decoding.trees import Tree, default_tree, most_promising
from medusa_ds.errors import UserError, one_line
from medusa_ds.files import check_writable, explained, with_nulls, write_json
from medusa_ds.heads.base import Heads
from medusa_ds.heads.files import META, load_heads
from medusa_ds.heads.kinds import make_heads
from medusa_ds.model.backbone import family_template, load_backbone, load_config, load_tokenizer, logits_of
from medusa_ds.training.checkpoint import Reader, check, completed

PRETRAINED = Path(__file__).with_name("pretrained")
_CPU_NODES = 4  # of trees that were not found on this machine: a CPU pays for every node
_MASTER = "/master"  # a checkpoint names the fp32 master of parameter P `P/master`, beside Adam's moments


@dataclass
class Saved:
    """A run's files, checked; its base model is not loaded."""

    folder: Path  # the heads folder or the checkpoint
    output: Path  # the directory that it lies in, where figures of it may be
    meta: dict[str, Any]  # what heads say of themselves, see `save_heads`
    weights: dict[str, torch.Tensor]  # state dict of the heads, on the CPU; fp32 from a checkpoint
    dtype: torch.dtype | None  # that the run saved the heads in; None for a checkpoint
    model: ModelSpec  # the base model; after stage 2 the tuned one, but of a checkpoint, which holds its weights itself
    stage: int  # of the training
    template_args: dict[str, Any]  # arguments of the chat template
    tree: list[Any] | None = None  # paths of the run's measured tree, if it has one
    checkpoint: Reader | None = None  # its tensors, if it is one
    shipped: bool = False  # whether the package holds it

    @property
    def config_file(self) -> Path | None:
        """The `heads.json` that keeps the tree; None for a checkpoint and for shipped heads, which are sealed."""
        return None if self.shipped or self.checkpoint else self.folder / "heads.json"

    @property
    def has_tokenizer(self) -> bool:
        """Whether a tokenizer lies beside the heads."""
        return (self.folder / "tokenizer_config.json").is_file()

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer beside the heads, or else the base model's, with the chat template of the training."""
        template = self.template_args.get("chat_template")
        if not self.has_tokenizer:
            return load_tokenizer(self.model, template)
        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        tokenizer.chat_template = template or tokenizer.chat_template or family_template(self.meta["base_model"])
        return tokenizer

    def load_backbone(self, device: torch.device, dtype: torch.dtype, liger: bool | None = None) -> PreTrainedModel:
        """The backbone that the heads belong to, with what stage 2 made of it.

        Raises:
            UserError: it cannot be loaded, or the checkpoint's tensors are not its own.
        """
        with self._naming_it():
            backbone = load_backbone(self.model, dtype, device=device, liger=liger)
        if self.stage == 2 and self.checkpoint is not None:
            tuned = _masters(self.checkpoint, "backbone.")
            missing = sorted(set(dict(backbone.named_parameters())) - set(tuned))
            try:
                if missing:
                    raise RuntimeError(f"{len(missing)} tensors of the backbone are missing, as {missing[0]}")
                backbone.load_state_dict(tuned, strict=False)  # buffers and tied names are not in it
            except RuntimeError as error:
                raise self._misfit(error) from None
        return backbone

    def load_heads(self, backbone: PreTrainedModel, dtype: torch.dtype) -> Heads:
        """The heads beside their backbone.

        Raises:
            UserError: they do not fit it.
        """
        vocab_size, hidden_size = backbone.get_output_embeddings().weight.shape
        shape = self.meta | {"hidden_size": hidden_size, "vocab_size": vocab_size}
        tokens, logits = self.weights.get("token_map"), logits_of(backbone)
        heads = make_heads(shape, dtype=dtype, token_map=tokens, logits=logits)
        try:
            heads.load_state_dict(self.weights)
        except RuntimeError as error:
            raise self._misfit(error) from None
        return heads.to(backbone.device)

    def position_limit(self) -> int:
        """Most tokens of a text, by the base model's config alone.

        Raises:
            UserError: it cannot be loaded, or the model cannot be decoded.
        """
        with self._naming_it():
            return position_limit(load_config(self.model))[0]

    @contextmanager
    def _naming_it(self) -> Iterator[None]:
        try:
            yield
        except UserError as error:
            where = f"{self.folder}: its base model (--base-model names another place)"
            raise UserError(*(f"{where}: {problem}" for problem in error.problems)) from None

    def _misfit(self, error: RuntimeError) -> UserError:
        return UserError(f"{self.folder}: does not fit {self.model.name} ({one_line(error, 300)})")


class Run(NamedTuple):
    """What decodes."""

    backbone: PreTrainedModel  # as the heads on the device, in the dtype asked for
    heads: Heads
    tokenizer: Any  # with the chat template
    tree: Tree  # the run's own, found by `medusa-ds tree`, or a default
    measured: bool  # whether the tree is the run's own
    template_args: dict[str, Any]  # arguments of the chat template

    def decode(self, tokens: list[int]) -> str:
        """The text of an answer's tokens."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True)


def encode(run: Saved | Run, messages: list[dict[str, Any]]) -> list[int]:
    """Tokens of a conversation by the run's chat template, up to where the assistant begins.

    Raises:
        UserError: there is no template, or it refuses the conversation; or that is no text.
    """
    try:
        json.dumps(messages, ensure_ascii=False).encode()
        return Chat(run.tokenizer, run.template_args).prompt(messages)
    except UnicodeEncodeError:
        raise UserError("prompt: found bytes that are no UTF-8; write it in UTF-8") from None
    except UnusableRow as error:
        raise UserError(f"prompt: {error}") from None


class RunSettings(ProgramSettings):
    """Of programs that decode with a run's heads."""

    name: Positional[str] = Field(alias="run")
    """A run's output, its `heads`, OUTPUT/checkpoints/best, an export, or smollm2_135m: the heads that come along."""
    base_model: str | None = Field(None, title="MODEL")
    """Hub id or directory of the base model, where it is not where it was in training."""
    device: str | None = None
    """`cuda` or `cpu`; without it, a GPU if there is one."""
    dtype: Literal["bf16", "fp32"] | None = None
    """Without it, bf16 on a GPU and fp32 on a CPU."""
    compile_step: bool = Field(False, alias="compile")
    """Fuse the decoding step with torch.compile: about a minute once, seconds from the second start on."""

    def open_run(self) -> Saved:
        """The files of the run, checked."""
        return open_run(self.name, self.base_model)

    def load_run(self, saved: Saved | None = None) -> Run:
        """The run on its device, already opened or not."""
        liger = False if self.compile_step else None  # what Liger fuses, Inductor fuses with more
        return load_run(saved or self.open_run(), *place(self.device, self.dtype), liger)


class PromptSettings(RunSettings):
    """Of programs that let a run answer prompts and report what they measured."""

    prompts: str = Field(title="SOURCE")
    """JSON lines such as {"turns": ["Hello"]}, or what data.path takes; its user turns are answered."""
    limit: Count | None = None
    """Take the first N conversations."""
    max_new_tokens: Count = 256
    """Of an answer."""
    json_file: str | None = Field(None, alias="json", title="FILE")
    """Write the report."""
    picture: str | None = Field(None, title="FILE")
    """Draw it."""

    def load(self, saved: Saved | None = None) -> Run:
        """The run on its device; places that cannot be written are refused first."""
        if self.json_file:
            check_writable(Path(self.json_file), "--json")
        if self.picture:
            check_picture(Path(self.picture))
        return self.load_run(saved)

    def write_report(self, report: dict[str, Any]) -> None:
        """Write a report as JSON, if asked; what could not be measured is null in it.

        Raises:
            UserError: it cannot be written.
        """
        if self.json_file:
            with explained(f"{self.json_file}: cannot be written", "name another file"):
                write_json(Path(self.json_file), with_nulls(report))


def open_run(name: str | Path, base_model: str | None = None) -> Saved:
    """Find and check the files of a run.

    It is an output directory, a heads folder, a checkpoint, an export, or a folder's name in `PRETRAINED`. `base_model`
    names its base model in place of what it says itself.

    Raises:
        UserError: none of these, not finished, or damaged; a base model for a run that has its own.
    """
    given = Path(name)
    shipped = not given.exists() and (PRETRAINED / given.name / "heads.json").is_file() and given.name == str(name)
    given = PRETRAINED / given if shipped else given
    if (given / "manifest.json").is_file():
        return _open_checkpoint(given.resolve(), base_model)
    inside = (given / "heads" / "heads.json").is_file()
    folder = given / "heads" if inside else given
    if not (folder / "heads.json").is_file():
        if unfinished := completed(given / "checkpoints"):
            raise UserError(f"{given}: not finished; name one of its checkpoints, as in {unfinished[0]}")
        raise UserError(
            f"{name or '(empty)'}: found no run; name a finished run's output, a heads folder, OUTPUT/checkpoints/best "
            f"or {', '.join(sorted(folder.name for folder in PRETRAINED.iterdir()))}"
        )
    config, weights = load_heads(folder)
    model, _, stage, template_args = _from_recipe(config["recipe"], folder / "heads.json", base_model)
    if stage == 2:
        if base_model:
            raise UserError(f"--base-model: found it, but {folder.parent} has its own, tuned in stage 2; leave it out")
        tuned = folder.parent / "backbone"
        if not tuned.is_dir():
            raise UserError(f"{tuned}: missing; stage 2 tuned the backbone of these heads: keep both folders together")
        model = ModelSpec(name=str(tuned), attention=model.attention, liger_kernels=model.liger_kernels)
    return Saved(
        folder,
        output=folder.parent if folder.absolute().name == "heads" else folder,  # as of shipped heads and copies
        meta={key: config[key] for key in META},
        weights=weights,
        dtype=getattr(torch, config["dtype"]),
        model=model,
        stage=stage,
        template_args=template_args,
        tree=config.get("tree"),
        shipped=shipped,
    )


def _open_checkpoint(folder: Path, base_model: str | None) -> Saved:
    if problems := check(folder):
        raise UserError(*(f"{problem}; name another checkpoint" for problem in problems))
    output, reader = folder.parents[1], Reader(folder)
    text = read_text(output / "recipe.yaml")
    model, heads, stage, template_args = _from_recipe(text, output / "recipe.yaml", base_model)
    config, weights = load_config(model).get_text_config(), _masters(reader, "heads.")
    if token_map := reader.state.get("engine", {}).get("token_map"):
        weights["token_map"] = torch.tensor(token_map, dtype=torch.int64)
    meta = {"base_model": model.name, "revision": model.revision, "recipe": text} | heads.sized(config)
    return Saved(
        folder,
        output=output,
        meta=meta,
        weights=weights,
        dtype=None,
        model=model,
        stage=stage,
        template_args=template_args,
        checkpoint=reader,
    )


def load_run(run: str | Path | Saved, device: torch.device, dtype: torch.dtype, liger: bool | None = None) -> Run:
    """Load a run, given by its name or opened (see `open_run`), with all weights in a dtype on a device.

    Raises:
        UserError: see `open_run`; its base model cannot be loaded or is another one.
    """
    saved = run if isinstance(run, Saved) else open_run(run)
    num = saved.meta["num"]
    if saved.tree is None:
        tree = default_tree(num, 32 if device.type == "cuda" else _CPU_NODES)
    else:
        tree = Tree.parse(saved.tree, num, str(saved.folder / "heads.json"))
        if saved.shipped and device.type == "cpu":  # it was found for a GPU
            tree = Tree(most_promising(tree)[: _CPU_NODES - 1])
    backbone = saved.load_backbone(device, dtype, liger)
    heads = saved.load_heads(backbone, dtype)
    tree = Tree(path for path in tree.paths if max(path) < heads.num_rows)  # as of an export that cut the heads
    if saved.tokenizer.chat_template is not None:
        end_at(backbone, Chat(saved.tokenizer, saved.template_args).ends)
    return Run(backbone, heads, saved.tokenizer, tree, saved.tree is not None, saved.template_args)


def place(device: str | None, dtype: str | None) -> tuple[torch.device, torch.dtype]:
    """Device and dtype to decode with: bf16 on a GPU, fp32 on a CPU, or as asked.

    Raises:
        UserError: no such device.
    """
    there = torch.cuda.is_available()
    if device is not None and not re.fullmatch(r"cpu|cuda(:\d+)?" if there else "cpu", device):
        raise UserError(f"--device: found {device!r}; allowed is cpu" + " or cuda" * there + ", on this machine")
    where = torch.device(device or ("cuda" if there else "cpu"))
    wanted = dtype or ("bf16" if where.type == "cuda" else "fp32")
    return where, {"bf16": torch.bfloat16, "fp32": torch.float32}[wanted]


def save_tree(config_file: Path, paths: list[TreePath]) -> None:
    """Write a tree into a run's `heads.json`.

    Raises:
        UserError: the file cannot be written.
    """
    with explained(f"{config_file}: cannot be written", "make it writable"):
        write_json(config_file, read_json(config_file) | {"tree": paths})


def _from_recipe(text: str, where: Path, base_model: str | None) -> tuple[ModelSpec, HeadsSpec, int, dict[str, Any]]:
    """Model, heads, stage and arguments of the template in a run's resolved recipe, of imported heads a part of one."""
    raw, _ = parse_yaml(text, str(where))
    try:
        if base_model:
            raw["model"] |= {"name": base_model, "revision": None}
        model, heads = ModelSpec.model_validate(raw["model"]), HeadsSpec.model_validate(raw["heads"])
        return model, heads, int(raw["stage"]), dict(raw["data"].get("template_args") or {})
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where}: not a resolved recipe ({one_line(error)})") from None


def _masters(reader: Reader, prefix: str) -> dict[str, torch.Tensor]:
    """The fp32 parameters of a checkpoint whose names begin so, without that beginning."""
    names = [name for name in reader.shapes() if name.startswith(prefix) and name.endswith(_MASTER)]
    return {name.removeprefix(prefix).removesuffix(_MASTER): reader.tensor(name) for name in names}
