"""Bring published heads of FasterDecoding's or vLLM's layout into ours, to be used like a run.

Example:
    medusa-ds import medusa-vicuna-7b-v1.3 runs/vicuna --base-model lmsys/vicuna-7b-v1.3
"""

import json
import shlex
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer

from medusa_ds.config.parsing import read_object
from medusa_ds.config.settings import Positional, ProgramSettings
from medusa_ds.errors import UserError, counted, one_line
from medusa_ds.exporting.layouts import from_other
from medusa_ds.files import check_writable, explained, replacing
from medusa_ds.heads.files import save_heads

_FILES = ("model.safetensors", "medusa_lm_head.safetensors", "medusa_lm_head.pt")


class Settings(ProgramSettings):
    """What the command line says."""

    directory: Positional[str]
    """Holds model.safetensors (or shards), medusa_lm_head.safetensors or medusa_lm_head.pt."""
    out: Positional[str]
    """Directory to make; its `heads` folder has the heads, and other commands take it as a run."""
    base_model: str | None = Field(None, title="NAME")
    """Hub id or directory; without it, as config.json says."""


def run(settings: Settings) -> None:
    """Write the heads in our layout.

    Raises:
        UserError: no heads there, tensors that do not form heads, a base model that nobody names, or a directory that
            cannot be written.
    """
    path, target = Path(settings.directory), Path(settings.out).absolute()
    if target.exists():
        raise UserError(f"{target}: exists already; name another directory")
    check_writable(target, "OUT", directory=True)
    if not path.is_dir():
        raise UserError(f"{path}: found no such directory; name one that holds published heads")
    config = read_object(path / "config.json") if (path / "config.json").is_file() else {}
    for key in ("hidden_size", "medusa_num_heads", "vocab_size"):
        if not isinstance(config.get(key), int | None):
            raise UserError(f"{path / 'config.json'}: {key}: found {config[key]!r}; allowed is a whole number")
    if (kind := config.get("heads_kind", "medusa")) != "medusa":
        raise UserError(f"{path}: found {kind} heads, and only Medusa heads are imported; an export is a run as it is")
    base = settings.base_model or config.get("base_model_name_or_path")
    if not isinstance(base, str):
        raise UserError(f"{path / 'config.json'}: names no base_model_name_or_path; give --base-model")
    base = str(Path(base).absolute()) if Path(base).is_dir() else base
    heads, shape = from_other(_read(path), bool(config.get("original_lm_head")), config.get("vocab_size"), str(path))
    _check_shape(shape, config, path)
    kept = {key: shape[key] for key in ("num", "layers", "lm_head")}
    recipe = json.dumps({"model": {"name": base}, "heads": kept, "stage": 1, "data": {}})
    with explained(f"{target}: cannot be written", "name a writable directory"), replacing(target) as work:
        save_heads(work / "heads", heads, {"base_model": base, "revision": None, "recipe": recipe, **shape})
        if (path / "tokenizer_config.json").is_file():
            AutoTokenizer.from_pretrained(path).save_pretrained(work / "heads")
    command = f"medusa-ds generate {shlex.quote(settings.out)} --prompt 'Hello'"
    print(f"imported {counted(shape['num'], 'head')} of {base}; next: {command}")


def _check_shape(shape: dict[str, Any], config: dict[str, Any], path: Path) -> None:
    """Refuse other sizes or fewer heads than the config names; published configs name fewer heads than there are."""
    hidden_size, num = config.get("hidden_size"), config.get("medusa_num_heads") or 0
    if (hidden_size or shape["hidden_size"]) != shape["hidden_size"] or shape["num"] < num:
        found = f"{counted(shape['num'], 'head')} of hidden size {shape['hidden_size']}"
        says = f"{num or 'heads'} of {hidden_size or 'no size'}"
        raise UserError(f"{path}: found {found}; config.json says {says}: complete the files or mend the config")


def _read(path: Path) -> dict[str, Tensor]:
    """Tensors of the first layout that a directory holds; a pickle is read as plain tensors."""
    index = path / "model.safetensors.index.json"
    named = read_object(index).get("weight_map") if index.is_file() else {}
    if not isinstance(named, dict):
        raise UserError(f"{index}: weight_map: found {str(named)[:80]}; allowed is an object of file names")
    shards = sorted(set(map(str, named.values())))
    files = [path / Path(name).name for name in shards] or [path / name for name in _FILES if (path / name).is_file()]
    if not files:
        raise UserError(f"{path}: holds no heads; expected {', '.join(_FILES[:-1])} or {_FILES[-1]}")
    tensors: dict[str, Tensor] = {}
    for file in files[: len(shards) or 1]:
        try:
            pickled = file.suffix == ".pt"
            tensors |= torch.load(file, map_location="cpu", weights_only=True) if pickled else load_file(file)
        except Exception as error:  # a damaged or foreign pickle fails in many ways
            raise UserError(f"{file}: cannot be read ({one_line(error)})") from None
    return tensors
