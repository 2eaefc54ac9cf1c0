"""vLLM: 0.28 to 0.33 by the plug-in in `plugins/vllm`, and Medusa heads up to 0.32 by its own reader of them.

`model.safetensors` (or shards) holds names of its layout and `model.safetensors.index.json` says so: without an index
vLLM reads every safetensors file in the directory. Heads that share the LM head get a single copy of it
(`original_lm_head` in `config.json`), of which vLLM cuts the rows that a token map names. Beside own projections it
passes over the map; the plug-in and `medusa-ds import` do not.
"""

import json
from pathlib import Path

from huggingface_hub import save_torch_state_dict

from medusa_ds.exporting.layouts import to_vllm
from medusa_ds.exporting.source import Source
from medusa_ds.files import write_json

MAX_SHARD_SIZE = "5GB"  # huggingface_hub's own; transformers has ten times that


def refuses(source: Source, allow_loss: bool) -> str | None:
    """Why it does not run these heads."""
    return source.beyond("medusa", "hydra")


def write(source: Source, directory: Path) -> None:
    """Write what it reads."""
    projections = source.projections()
    layout = to_vllm(source.heads, projections[:1] if source.shared else projections)
    if "token_map" in source.heads:
        layout["token_map"] = source.heads["token_map"]
    save_torch_state_dict(layout, directory, max_shard_size=MAX_SHARD_SIZE)
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        write_json(index, {"metadata": {}, "weight_map": dict.fromkeys(layout, "model.safetensors")})


def code(source: Source, out: str, base: str) -> str:
    """How it is used."""
    speculative = {"method": "mtp", "model": out, "num_speculative_tokens": source.meta["num"]}
    lines = [
        f"{run} {base} --speculative-config '{json.dumps(speculative | {'method': method})}'"
        for run, method in (("VLLM_USE_V2_MODEL_RUNNER=1 vllm serve", "mtp"), ("vllm serve", "medusa"))
    ]
    alone = source.meta["kind"] == "medusa"  # vLLM's own reader knows no other kind
    commands, also = "\n".join(lines if alone else lines[:1]), ", or up to 0.32 without" if alone else ""
    return f"0.28 to 0.33 with medusa-ds or its plug-in installed beside it{also}:\n\n```bash\n{commands}\n```"
