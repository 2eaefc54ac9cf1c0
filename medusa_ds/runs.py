"""From the name of a run to what decodes: backbone, heads, tokenizer, tree.

A run is given as a training run's output directory, the `heads` folder in it, one of its checkpoints, or the name of
heads that the package ships. Which base model belongs to it stands in the recipe that every one of them keeps.
"""

import json
import os
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer, PreTrainedModel

from medusa_ds.config.parsing import parse_yaml, read_json, read_text
from medusa_ds.config.recipe import HeadsSpec, ModelSpec
from medusa_ds.config.settings import Positional, ProgramSettings
from medusa_ds.decoding.trees import Path as TreePath
from medusa_ds.decoding.trees import Tree, default_tree
from medusa_ds.errors import UserError
from medusa_ds.heads.base import Heads
from medusa_ds.heads.files import load_heads
from medusa_ds.heads.kinds import make_heads
from medusa_ds.model.backbone import load_backbone, load_tokenizer, logits_of

PRETRAINED = Path(__file__).with_name("pretrained")
_CPU_NODES = 4  # of trees that were not found on this machine: a CPU pays for every node
_MASTER = "/master"  # a checkpoint names the fp32 master of parameter P `P/master`, beside Adam's moments


class Run(NamedTuple):
    """What decodes.

    Attributes:
        backbone, heads: on the device, in the dtype asked for.
        tokenizer: with the chat template.
        tree: the run's own, found by `medusa-ds tree`, or a default.
        measured: whether the tree is the run's own.
        config_file: the `heads.json` that keeps the tree; None for a checkpoint and for shipped heads.
        template_args: arguments of the chat template.
    """

    backbone: PreTrainedModel
    heads: Heads
    tokenizer: Any
    tree: Tree
    measured: bool
    config_file: Path | None
    template_args: dict[str, Any]


class RunSettings(ProgramSettings):
    """Of programs that decode with a run's heads."""

    name: Positional[str] = Field(alias="run")
    """A finished run's output, its heads folder, OUTPUT/checkpoints/best, or smollm2_135m."""
    device: str | None = None
    """`cuda` or `cpu`; without it, a GPU if there is one."""
    dtype: Literal["bf16", "fp32"] | None = None
    """Without it, bf16 on a GPU and fp32 on a CPU."""

    def load_run(self, liger: bool | None = None) -> Run:
        """The run on its device; `liger` as for `load_backbone`."""
        return load_run(self.name, *place(self.device, self.dtype), liger)


def load_run(name: str | Path, device: torch.device, dtype: torch.dtype, liger: bool | None = None) -> Run:
    """Load a run.

    Args:
        name: an output directory, a heads folder, a checkpoint, or a folder's name in `PRETRAINED`.
        device: of all weights.
        dtype: of all weights.
        liger: see `load_backbone`.

    Raises:
        UserError: none of these, damaged, or its base model cannot be loaded.
    """
    given = Path(name)
    shipped = not given.exists() and (PRETRAINED / given.name / "heads.json").is_file() and given.name == str(name)
    given = PRETRAINED / given if shipped else given
    folder = given / "heads" if (given / "heads" / "heads.json").is_file() else given
    checkpoint = None
    if (folder / "heads.json").is_file():
        config, weights = load_heads(folder)
        text, where = config["recipe"], folder / "heads.json"
    elif (folder / "manifest.json").is_file():
        checkpoint, output = read_checkpoint(folder), folder.resolve().parents[1]
        where, config = output / "recipe.yaml", {}
        text = read_text(where)
        weights = {name[6:]: tensor for name, tensor in checkpoint.items() if name.startswith("heads.")}
    else:
        raise UserError(
            f"{name}: found no run; name a finished run's output, a heads folder, OUTPUT/checkpoints/best, or one of "
            f"{', '.join(sorted(folder.name for folder in PRETRAINED.iterdir()))}"
        )
    spec, heads_spec, stage, template_args = _from_recipe(text, str(where))
    tuned = folder.parent / "backbone"
    if stage == 2 and checkpoint is None:
        if not tuned.is_dir():
            raise UserError(f"{tuned}: missing; stage 2 tuned the backbone of these heads: keep both folders together")
        spec = ModelSpec(name=str(tuned), attention=spec.attention, liger_kernels=spec.liger_kernels)
    backbone = load_backbone(spec, dtype, device=device, liger=liger)
    vocab_size, hidden_size = backbone.get_output_embeddings().weight.shape
    shape = {key: getattr(heads_spec, key) for key in ("kind", "num", "layers", "lm_head")}
    shape |= {"hidden_size": hidden_size, "vocab_size": vocab_size}
    heads = make_heads(shape, dtype=dtype, token_map=weights.get("token_map"), logits=logits_of(backbone))
    try:
        heads.load_state_dict(weights)
        if stage == 2 and checkpoint is not None:
            own = {name[9:]: tensor for name, tensor in checkpoint.items() if name.startswith("backbone.")}
            missing = set(dict(backbone.named_parameters())) - set(own)
            if missing:
                raise RuntimeError(f"{len(missing)} tensors of the backbone are missing, as {sorted(missing)[0]}")
            backbone.load_state_dict(own, strict=False)  # buffers and tied names are not in it
    except RuntimeError as error:
        raise UserError(f"{folder}: does not fit {spec.name} ({' '.join(str(error).split())[:300]})") from None
    has_tokenizer = checkpoint is None and (folder / "tokenizer_config.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(folder) if has_tokenizer else load_tokenizer(spec)
    measured = "tree" in config
    nodes = 32 if device.type == "cuda" else _CPU_NODES
    paths = config.get("tree", [])
    if shipped and device.type == "cpu":
        paths = paths[: _CPU_NODES - 1]  # found for a GPU; the best come first
    tree = Tree.parse(paths, heads_spec.num, str(where)) if measured else default_tree(heads_spec.num, nodes)
    config_file = where if checkpoint is None and not shipped else None
    return Run(backbone, heads.to(device), tokenizer, tree, measured, config_file, template_args)


def place(device: str | None = None, dtype: str | None = None) -> tuple[torch.device, torch.dtype]:
    """Device and dtype to decode with: bf16 on a GPU, fp32 on a CPU, or as asked."""
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    wanted = dtype or ("bf16" if where.type == "cuda" else "fp32")
    return where, {"bf16": torch.bfloat16, "fp32": torch.float32}[wanted]


def encode_chat(run: Run, messages: list[dict[str, str]]) -> list[int]:
    """Tokens of a conversation by the model's chat template, up to where the assistant begins."""
    if not run.tokenizer.chat_template:
        raise UserError("tokenizer: has no chat template; decode a model that was trained for conversations")
    text = run.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **run.template_args)
    return run.tokenizer(text, add_special_tokens=False)["input_ids"]


def save_tree(config_file: Path, paths: list[TreePath]) -> None:
    """Write a tree into a run's `heads.json`, under a temporary name that is renamed when complete."""
    config = read_json(config_file) | {"tree": paths}
    temporary = config_file.with_name(f".{config_file.name}.tmp")
    try:
        temporary.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, config_file)
    except OSError as error:
        raise UserError(f"{config_file}: cannot be written ({error.strerror}); make it writable") from None


def _from_recipe(text: str, where: str) -> tuple[ModelSpec, HeadsSpec, int, dict[str, Any]]:
    raw, _ = parse_yaml(text, where)
    try:
        model, heads = ModelSpec.model_validate(raw["model"]), HeadsSpec.model_validate(raw["heads"])
        return model, heads, int(raw["stage"]), dict(raw["data"].get("template_args") or {})
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where}: not a resolved recipe ({' '.join(str(error).split())[:200]})") from None


def read_checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    """Every parameter of a checkpoint, fp32, and the heads' token map; checksums are the trainer's business."""
    tensors = {}
    try:
        for file in sorted(folder.glob("rank*.safetensors")):
            with safe_open(file, framework="pt") as content:
                for name in content.keys():  # noqa: SIM118 - not a mapping
                    if name.endswith(_MASTER):
                        tensors[name.removesuffix(_MASTER)] = content.get_tensor(name)
        file = folder / "state.json"
        if token_map := json.loads(read_text(file))["engine"].get("token_map"):  # NaN may be in it
            tensors["heads.token_map"] = torch.tensor(token_map, dtype=torch.int64)
    except (OSError, SafetensorError, KeyError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{file}: damaged ({error}); name another checkpoint") from None
    return tensors
