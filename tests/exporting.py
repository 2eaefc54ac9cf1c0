"""What the tests of exports share: runs to export, and what an export holds."""

import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file

from medusa_ds.cli import main


def export_(run: Path, out: str, *options: str) -> Path:
    """An export, for all programs unless the options say another."""
    options = options if "--for" in options else (*options, "--for", "all")
    with warnings.catch_warnings():
        main(["export", str(run), str(run.parent / out), "--allow-loss", *options])
    return run.parent / out


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of an export, by file and name."""
    files = [*path.glob("*.safetensors"), path / "heads" / "heads.safetensors"]
    found = {f"{file.name}:{name}": tensor for file in files for name, tensor in load_file(file).items()}
    if (path / "medusa_lm_head.pt").exists():
        found |= {f"pt:{name}": tensor for name, tensor in torch.load(path / "medusa_lm_head.pt").items()}
    return found


def assert_same(left: Path, right: Path) -> None:
    one, other = tensors_of(left), tensors_of(right)
    assert one.keys() == other.keys()
    assert [name for name in one if one[name].dtype != other[name].dtype or not one[name].equal(other[name])] == []
