"""The kinds of heads by the name that `heads.kind` of a recipe has for them."""

from typing import Any

from medusa_ds.heads.base import Heads
from medusa_ds.heads.hydra import HydraHeads
from medusa_ds.heads.medusa import MedusaHeads

KINDS: dict[str, type[Heads]] = {kind.kind: kind for kind in (MedusaHeads, HydraHeads)}


def make_heads(shape: dict[str, Any], **options: Any) -> Heads:
    """Heads at their start, of a shape as `heads.json` has it, other keys of which are passed over; see `Heads`."""
    sizes = (shape[key] for key in ("num", "layers", "hidden_size", "vocab_size"))
    return KINDS[shape["kind"]](*sizes, own_projection=shape["lm_head"] == "own", **options)
