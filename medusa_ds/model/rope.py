"""Rotary embeddings that turn all tokens otherwise once a text is long: a fact of a model that its config says."""

from typing import Any


def turns_beyond(config: Any) -> int | None:
    """The most tokens of a text whose positions do not depend on how many follow; None: there is no limit."""
    text = config.get_text_config()
    ropes, limits = getattr(text, "rope_parameters", None) or {}, []
    for rope in (ropes, *(value for value in ropes.values() if isinstance(value, dict))):
        if "dynamic" in str(rope.get("rope_type")):
            limits.append(text.max_position_embeddings)
        elif rope.get("rope_type") == "longrope":
            limits.append(rope["original_max_position_embeddings"])
    return min(limits, default=None)
