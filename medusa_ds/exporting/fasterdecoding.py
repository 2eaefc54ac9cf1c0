"""FasterDecoding/Medusa: `medusa_lm_head.pt`, the one pickle of an export.

Its class builds five heads whatever the files say, and one residual block that it uses for all of a head's: of heads
with more blocks the last one's weights are left, without a word. Texts stay right, but guesses are far worse.
"""

import io
from pathlib import Path

import torch

from medusa_ds.exporting.layouts import to_medusa
from medusa_ds.exporting.source import Source
from medusa_ds.files import flush


def refuses(source: Source, allow_loss: bool) -> str | None:
    """Why it does not run these heads, or would run them badly."""
    lost = None if allow_loss else _loss(source)
    return source.beyond("medusa") or (f"{lost}; train heads.layers=1, or give --allow-loss" if lost else None)


def write(source: Source, directory: Path) -> None:
    """Write what it reads."""
    content = io.BytesIO()  # torch's own writer tells nothing of a full disk
    torch.save(to_medusa(source.heads, source.meta["layers"], source.projections()), content)
    flush(directory / "medusa_lm_head.pt", content.getbuffer())
    if (num := source.meta["num"]) != 5:
        print(f"warning: FasterDecoding/Medusa builds 5 heads whatever the files say; these are {num}")


def code(source: Source, out: str, base: str) -> str:
    """How it is used."""
    problem = f"**Not for these heads: {_loss(source)}.**\n\n" if _loss(source) else ""
    return f"{problem}```bash\npython -m medusa.inference.cli --model {out}\n```"


def _loss(source: Source) -> str | None:
    """What it loses of these heads, in words; None: nothing."""
    blocks = source.meta["layers"]
    return f"it keeps one of each head's {blocks} residual blocks, so that most guesses fail" if blocks > 1 else None
