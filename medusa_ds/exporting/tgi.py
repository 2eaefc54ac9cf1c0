"""Text Generation Inference: `medusa_lm_head.safetensors` in FasterDecoding's layout.

Heads of one residual block that share the LM head come without projections, TGI's second layout; it knows no such
layout for more blocks, where every head gets a copy.
"""

from pathlib import Path

from safetensors.torch import save_file

from medusa_ds.exporting.layouts import to_medusa
from medusa_ds.exporting.source import Source


def refuses(source: Source, allow_loss: bool) -> str | None:
    """Why it does not run these heads."""
    return source.beyond("medusa")


def write(source: Source, directory: Path) -> None:
    """Write what it reads."""
    write_heads(source, directory, copies=not source.shared or source.meta["layers"] != 1)


def write_heads(source: Source, directory: Path, copies: bool) -> None:
    """Write the heads with a projection each, or without any, unless the file is there, which serves both programs."""
    if not (file := directory / "medusa_lm_head.safetensors").exists():
        layout = to_medusa(source.heads, source.meta["layers"], source.projections() if copies else [])
        save_file(layout, file, metadata={"format": "pt"})


def code(source: Source, out: str, base: str) -> str:
    """How it is used."""
    return f"```bash\ntext-generation-launcher --model-id {out}\n```"
