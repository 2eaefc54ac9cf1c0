"""Heads on disk: `heads.safetensors` with the tensors, `heads.json` with what they are.

`kind` is left out for Medusa heads: files from before there was another kind have none.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from medusa_ds.config.parsing import read_json, redact
from medusa_ds.errors import UserError
from medusa_ds.files import digest, replacing, write_json
from medusa_ds.heads.kinds import KINDS, make_heads
from medusa_ds.model.projection import Logits

FORMAT_VERSION = 1
DEFAULT_KIND = "medusa"
_TENSORS, _CONFIG = "heads.safetensors", "heads.json"


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _between(low: int, high: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and low <= value <= high


META: dict[str, Callable[[Any], bool]] = {
    "base_model": _text,
    "revision": lambda value: value is None or _text(value),
    "kind": lambda value: _text(value) and value in KINDS,
    "num": _between(1, 64),
    "layers": _between(0, 64),
    "lm_head": lambda value: value in ("own", "shared"),
    "hidden_size": _between(1, 1 << 20),
    "vocab_size": _between(1, 1 << 24),
    "recipe": _text,
}


def check_token_map(token_map: Tensor, vocab_size: int, where: str | Path) -> None:
    """Refuse what is not a list of different tokens of the vocabulary.

    Raises:
        UserError: naming the file.
    """
    is_list = token_map.dtype == torch.int64 and token_map.dim() == 1 and len(token_map) > 0
    if not is_list or token_map.min() < 0 or token_map.max() >= vocab_size or len(token_map.unique()) < len(token_map):
        raise UserError(f"{where}: token_map: allowed are different tokens below {vocab_size}; save the heads again")


def different_maps(found: list[int] | None, wanted: list[int] | None) -> str | None:
    """In what two token maps differ, in words; None where they do not."""
    if found == wanted:
        return None
    if found is None or wanted is None or len(found) != len(wanted):
        sizes = ("all tokens" if each is None else f"{len(each)} tokens" for each in (found, wanted))
        return "found projections onto {}; this recipe has {}".format(*sizes)
    ours = set(wanted)
    other = [token for token in found if token not in ours]
    return f"found {len(other)} other tokens among its {len(found)}, as {(other or found)[0]}"


def save_heads(directory: str | Path, state_dict: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Write `heads.safetensors` and `heads.json`, each whole or not at all.

    `state_dict`: of `Heads`, whole tensors. `meta`: the keys of `META`; `kind` may be left out for Medusa heads. Format
    version, dtype and the checksum that ties the two files together are added.
    """
    assert set(meta) | {"kind"} == set(META), f"meta has {sorted(meta)}, not {sorted(META)}"
    meta = {key: value for key, value in meta.items() if (key, value) != ("kind", DEFAULT_KIND)}
    directory = Path(directory)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()}
    dtype = str(next(t for t in tensors.values() if t.is_floating_point()).dtype).removeprefix("torch.")
    with replacing(directory / _TENSORS) as work:
        save_file(tensors, work)
    checksum = digest(directory / _TENSORS)
    write_json(directory / _CONFIG, {"format_version": FORMAT_VERSION, **meta, "dtype": dtype, "sha256": checksum})


def load_heads(directory: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what `save_heads` wrote, from the heads' folder or the output directory that has them in `heads/`.

    Returns:
        The config with its `kind`, and the state dict of the matching `Heads` on the CPU.

    Raises:
        UserError: missing, of another format, damaged, or with tensors that its own config does not describe.
    """
    directory = Path(directory)
    if not (directory / _CONFIG).exists() and (directory / "heads" / _CONFIG).exists():
        directory = directory / "heads"
    config, path = read_json(directory / _CONFIG), directory / _TENSORS
    if isinstance(config, dict):
        config.setdefault("kind", DEFAULT_KIND)
    _check_config(config, directory / _CONFIG)
    try:
        if digest(path) != config["sha256"]:
            raise UserError(f"{path}: damaged, its SHA-256 is not the one in {_CONFIG}; save the heads again")
        tensors = load_file(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); name the output of a finished run") from None
    except SafetensorError as error:
        raise UserError(f"{path}: not a safetensors file ({error}); save the heads again") from None
    token_map = tensors.get("token_map")
    if token_map is not None:
        check_token_map(token_map, config["vocab_size"], path)
        if config["lm_head"] == "shared":
            raise UserError(f"{path}: token_map beside lm_head: shared, which has no rows of its own; save them again")
        token_map = torch.empty_like(token_map, device="meta")
    with torch.device("meta"):
        logits = Logits(bias="0.projection.bias" in tensors)
        expected = make_heads(config, token_map=token_map, logits=logits).state_dict()
    dtypes = dict.fromkeys(expected, config["dtype"]) | {"token_map": "int64"}
    wanted = {name: f"{list(tensor.shape)} of torch.{dtypes[name]}" for name, tensor in expected.items()}
    found = {name: f"{list(tensor.shape)} of {tensor.dtype}" for name, tensor in tensors.items()}
    if differ := sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)):
        name = differ[0]
        raise UserError(f"{path}: {name}: found {found.get(name)}, {_CONFIG} says {wanted.get(name)}; save them again")
    return config, tensors


def _check_config(config: Any, path: Path) -> None:
    version = config.get("format_version") if isinstance(config, dict) else None
    if version != FORMAT_VERSION:
        found = redact(repr(version))[:80]
        raise UserError(f"{path}: found format_version {found}; this version reads {FORMAT_VERSION}")
    checks = {**META, "dtype": _text, "sha256": _text}
    wrong = [key for key, is_valid in checks.items() if not is_valid(config.get(key, ...))]
    if wrong:
        values = {key: redact(repr(config.get(key)))[:80] for key in wrong}
        raise UserError(*(f"{path}: {key}: found {values[key]}; save the heads again" for key in wrong))
