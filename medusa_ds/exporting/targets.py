"""The programs that heads are exported for. Another one is a file beside this, named here, see `Target`."""

from pathlib import Path
from typing import Protocol

from medusa_ds.config.parsing import read_json
from medusa_ds.exporting import fasterdecoding, tensorrt_llm, tgi, transformers, vllm
from medusa_ds.exporting.source import Source
from medusa_ds.files import write_json
from medusa_ds.heads.files import save_heads


class Target(Protocol):
    """A program that reads an export."""

    def refuses(self, source: Source, allow_loss: bool) -> str | None:
        """Why it does not run these heads, or, unless `allow_loss` says so, not as they are; None: it does."""

    def write(self, source: Source, directory: Path) -> None:
        """Write what it reads beside `config.json`, the tokenizer and our own `heads`."""

    def code(self, source: Source, out: str, base: str) -> str:
        """How the export `out` and its base model are used, as Markdown."""


TARGETS: dict[str, Target] = {
    "transformers": transformers,
    "vllm": vllm,
    "tgi": tgi,
    "tensorrt-llm": tensorrt_llm,
    "fasterdecoding": fasterdecoding,
}


def write_export(directory: Path, source: Source, targets: list[str], base: str) -> None:
    """Fill a directory.

        config.json, tokenizer files     what every engine reads first
        heads/, backbone/ (stage 2)      our own layout: the directory is read like a run
        ...                              the files of the targets; where two name the same, the later one's serves both

    `config.json` has no `architectures`, or TGI ignores the heads, and no count of the base model's: vLLM's reader
    renames every key that has "num" and "heads", or "num" and "layers", in it.
    """
    meta, tokens = source.meta, source.heads.get("token_map")
    own = {name: tensor for name, tensor in source.heads.items() if not (source.shared and name == "token_map")}
    save_heads(directory / "heads", own, meta)
    if source.tree:
        file = directory / "heads" / "heads.json"
        write_json(file, read_json(file) | {"tree": source.tree})
    if source.tuned:
        source.model.save_pretrained(directory / "backbone", max_shard_size=vllm.MAX_SHARD_SIZE)
    if source.tokenizer is not None:
        for folder in (directory, directory / "heads", *([directory / "backbone"] if source.tuned else [])):
            source.tokenizer.save_pretrained(folder)
    dtype = str(source.dtype).removeprefix("torch.")
    config = {
        "model_type": "medusa",
        "base_model_name_or_path": base,
        "hidden_size": meta["hidden_size"],
        "vocab_size": meta["vocab_size"],
        "medusa_num_heads": meta["num"],
        "num_medusa_heads": meta["num"],
        "medusa_num_layers": meta["layers"],
        "medusa_fc_bias": True,
        "dtype": dtype,
        "torch_dtype": dtype,
    } | ({"original_lm_head": True} if source.shared else {})
    if meta["kind"] != "medusa":
        config["heads_kind"] = meta["kind"]
    if source.shared and tokens is not None:
        config["truncated_vocab_size"] = len(tokens)
    write_json(directory / "config.json", config)
    for name in reversed(targets):
        TARGETS[name].write(source, directory)
