"""The import program: published heads of other projects become ours, so that they are read like a run's."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer

from medusa_ds.config.parsing import read_json
from medusa_ds.errors import UserError
from medusa_ds.exporting.layouts import from_other
from medusa_ds.heads.medusa import save_heads

_FILES = ("model.safetensors", "medusa_lm_head.safetensors", "medusa_lm_head.pt")


def main(directory: str, out: str, base_model: str | None = None) -> None:
    """Bring heads in FasterDecoding's or vLLM's layout into ours.

    Args:
        directory: holds `model.safetensors` (or shards), `medusa_lm_head.safetensors` or `medusa_lm_head.pt`.
        out: directory to make; its `heads` folder has the heads, and `generate`, `evaluate` and `heads.init_from` take
            it as a run.
        base_model: hub id or directory; None: as `config.json` says.

    Raises:
        UserError: no heads there, tensors that do not form heads, or a base model that nobody names.
    """
    path, target = Path(directory), Path(out).absolute()
    if target.exists():
        raise UserError(f"{target}: exists already; name another directory")
    config = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    base = base_model or config.get("base_model_name_or_path")
    if not isinstance(base, str):
        raise UserError(f"{path / 'config.json'}: names no base_model_name_or_path; give --base-model")
    base = str(Path(base).absolute()) if Path(base).is_dir() else base
    heads, shape = from_other(_read(path), bool(config.get("original_lm_head")), config.get("vocab_size"), str(path))
    kept = {key: shape[key] for key in ("num", "layers", "lm_head")}
    recipe = json.dumps({"model": {"name": base}, "heads": kept, "stage": 1, "data": {}})
    save_heads(target / "heads", heads, {"base_model": base, "revision": None, "recipe": recipe, **shape})
    if (path / "tokenizer_config.json").is_file():
        AutoTokenizer.from_pretrained(path).save_pretrained(target / "heads")
    print(f"imported {shape['num']} heads of {base}; next: medusa-ds generate {out} --prompt 'Hello'")


def _read(path: Path) -> dict[str, Tensor]:
    """Tensors of the first layout that a directory holds; a pickle is read as plain tensors."""
    index = path / "model.safetensors.index.json"
    shards = sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else []
    files = [path / Path(name).name for name in shards] or [path / name for name in _FILES if (path / name).is_file()]
    if not files:
        raise UserError(f"{path}: holds no heads; expected {', '.join(_FILES[:-1])} or {_FILES[-1]}")
    try:
        if files[0].suffix == ".pt":
            return torch.load(files[0], map_location="cpu", weights_only=True)
        return {name: tensor for file in files[: len(shards) or 1] for name, tensor in load_file(file).items()}
    except Exception as error:  # a damaged or foreign pickle fails in many ways
        raise UserError(f"{files[0]}: cannot be read ({' '.join(str(error).split())[:200]})") from None
