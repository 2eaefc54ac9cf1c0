"""Text Generation Inference: `medusa_lm_head.safetensors` in FasterDecoding's layout.

Heads of one residual block that share the LM head come without projections, TGI's second layout; it knows no such
layout for more blocks, where every head gets a copy.
"""

from functools import partial
from pathlib import Path

from safetensors.torch import save_file

from medusa_ds.exporting.layouts import to_medusa
from medusa_ds.exporting.source import Files, Source

FILE = "medusa_lm_head.safetensors"


def refuses(source: Source, allow_loss: bool) -> str | None:
    """Why it does not run these heads."""
    return source.beyond("medusa")


def files(source: Source) -> Files:
    """What it reads."""
    return {FILE: partial(write, source, copies=not source.shared or source.meta["layers"] != 1)}


def write(source: Source, target: Path, copies: bool) -> None:
    """The heads with a projection each, or without any."""
    layout = to_medusa(source.heads, source.meta["layers"], source.projections() if copies else [])
    save_file(layout, target, metadata={"format": "pt"})


def code(source: Source, out: str, base: str) -> str:
    """How it is used."""
    return f"```bash\ntext-generation-launcher --model-id {out}\n```"
