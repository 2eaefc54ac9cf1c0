"""Fuzzed recipes, DeepSpeed JSON, data rows, saved heads and checkpoints: an answer in lines, never a traceback.

Derandomised: `-m long` runs 10,000 in total, CI a few hundred.
"""

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_recipes import SECRET
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import heads_meta

from medusa_ds.config import deepspeed as ds_config
from medusa_ds.config.recipe import Recipe
from medusa_ds.data.layouts import UnusableRow
from medusa_ds.data.sources import _line_rows, read_conversation
from medusa_ds.errors import UserError
from medusa_ds.heads.files import load_heads, save_heads
from medusa_ds.heads.medusa import MedusaHeads
from medusa_ds.training import checkpoint
from medusa_ds.training.checkpoint import encode_manifest, write_file

pytestmark = pytest.mark.usefixtures("group_of_one")

RECIPE = (Path(__file__).parents[2] / "recipes" / "smollm2_135m_stage1.yaml").read_text()
ZERO = json.loads((Path(__file__).parents[2] / "ds_configs" / "zero3_offload.json").read_text())
TOP_LEVEL = sorted(ds_config.TOP_LEVEL | {"elasticity", "amp", "unknown"})
SAME: dict[str, Any] = {
    "derandomize": True,
    "deadline": None,
    "database": None,
    "suppress_health_check": list(HealthCheck),
}
KEYS = (
    "model model.name model.revision model.config model.frozen model.init heads heads.num heads.init_from stage data "
    "data.path data.path.0.path data.split data.seed data.template_args train train.lr train.steps train.betas "
    "loss.impl deepspeed output _ x x.y"
).split()


def fuzz(*strategies: st.SearchStrategy[Any]) -> Callable[[Any], Any]:
    """Two tests of one function, with the same examples every time: a short one and one of 2,000 examples."""

    def make(function: Any) -> Any:
        @pytest.mark.parametrize("examples", [150, pytest.param(2000, marks=pytest.mark.long)])
        def test(tmp_path: Path, examples: int) -> None:
            asked = settings(max_examples=examples, **SAME)
            asked(given(st.tuples(*strategies))(lambda drawn: function(tmp_path, *drawn)))()

        return test

    return make


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(
        ["auto", "1e999", SECRET, "/etc/passwd", "../..", "~nobody/x", "\ud800", "sample", "\x00", "a" * 5000]
    )
)
values = st.recursive(
    scalars,
    lambda child: st.lists(child, max_size=4) | st.dictionaries(st.text(max_size=12), child, max_size=4),
    max_leaves=12,
)
edits = st.lists(st.tuples(st.integers(0, 10**6), st.binary(max_size=6), st.integers(0, 8)), min_size=1, max_size=4)


def edited(content: bytes, changes: list[tuple[int, bytes, int]]) -> bytes:
    for place, text, removed in changes:
        at = place % (len(content) + 1)
        content = content[:at] + text + content[at + removed :]
    return content


def answered(error: UserError) -> None:
    for problem in error.problems:
        assert problem and "Traceback" not in problem and len(problem) < 2000
        assert SECRET not in problem, "a secret was printed"


def leaves(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if isinstance(node, dict):
        return [path, *(item for key, child in node.items() for item in leaves(child, (*path, key)))]
    return [path]


@fuzz(edits, st.lists(st.tuples(st.sampled_from(KEYS), values), max_size=2), st.booleans())
def test_recipe(folder, changes, overrides, keep):
    file = folder / "r.yaml"
    file.write_bytes(RECIPE.encode() if keep else edited(RECIPE.encode(), changes))
    try:
        texts = [f"{key}={json.dumps(value, allow_nan=True)}" for key, value in overrides]
        Recipe.load(file, texts).ds_values(2, False)
    except UserError as error:
        answered(error)


@fuzz(st.sampled_from([*leaves(ZERO), *((key,) for key in TOP_LEVEL)]), values, edits, st.booleans())
def test_deepspeed_json(folder, path, value, changes, raw):
    data = json.loads(json.dumps(ZERO))
    target = data
    for key in path[:-1]:
        target = target[key]
    if path:
        target[path[-1]] = value
    else:
        data = value
    content = json.dumps(data).encode(errors="surrogatepass")
    file = folder / "z.json"
    file.write_bytes(edited(content, changes) if raw else content)
    try:
        owned = {
            "train_batch_size": 8,
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": 1.0,
            "bf16.enabled": False,
            "optimizer.type": "AdamW",
            "optimizer.params.lr": 1.0,
        }
        ds_config.fill_sizes(ds_config.resolve(ds_config.load(file), file, owned, None), 64)
    except UserError as error:
        answered(error)


turns = st.dictionaries(
    st.sampled_from(["role", "from", "content", "value", "tool_calls", "reasoning_content", "name", "x"]),
    values | st.sampled_from(["user", "assistant", "system", "human", "gpt", "tool"]),
    max_size=5,
)
rows = st.dictionaries(
    st.sampled_from(["messages", "conversations", "system", "tools", "x"]),
    st.lists(turns | values, max_size=4) | values,
)


@fuzz(rows | values, edits, st.booleans())
def test_data_row(folder, row, changes, raw):
    """Every line is a conversation or a row with a reason."""
    line = json.dumps(row).replace("\n", " ").encode()
    file = folder / "d.jsonl"
    file.write_bytes((edited(line, changes) if raw else line) + b"\n")
    for source, found in _line_rows(file):
        assert source.startswith(f"{file}:")
        with contextlib.suppress(
            UnusableRow, TypeError, ValueError, RecursionError
        ):  # `_convert` makes reasons of these
            json.loads(read_conversation(found).text())


META = heads_meta(2, 1, 4, 7)


@fuzz(
    st.sampled_from(["heads.json", "heads.safetensors"]),
    edits,
    st.sampled_from([*META, "dtype", "sha256"]),
    values,
    st.booleans(),
)
def test_saved_heads(folder, name, changes, key, value, forge):
    """Damaged, and forged by somebody who knows the format: the checksum is right, the header is not."""
    heads = folder / "heads"
    if not (folder / "good").exists():
        save_heads(folder / "good", MedusaHeads(2, 1, 4, 7).state_dict(), META)
    shutil.rmtree(heads, ignore_errors=True)
    shutil.copytree(folder / "good", heads)
    if forge:
        import hashlib

        content = (heads / "heads.safetensors").read_bytes()
        if name == "heads.safetensors":
            content = edited(content[:400], changes) + content[400:]
            (heads / name).write_bytes(content)
        config = json.loads((heads / "heads.json").read_text()) | {"sha256": hashlib.sha256(content).hexdigest()}
        if name == "heads.json":
            config[key] = value
        (heads / "heads.json").write_bytes(json.dumps(config).encode(errors="surrogatepass"))
    else:
        (heads / name).write_bytes(edited((heads / name).read_bytes(), changes))
    try:
        config, tensors = load_heads(folder)
        assert all(torch.is_tensor(tensor) for tensor in tensors.values())
    except UserError as error:
        answered(error)


@fuzz(
    st.sampled_from(["manifest.json", "state.json", "rank00000-00000.safetensors"]),
    edits,
    st.sampled_from(["step", "files", "entry", "raw", "raw"]),
    values,
)
def test_checkpoint(folder, name, changes, part, value):
    """Damage is named; a forgery with right checksums runs no code and ends in a line or in plain tensors."""
    good, root = folder / "good", folder / "checkpoints"
    if not good.exists():
        checkpoint.save(good, 20, iter([("w/master", torch.ones(3, 5))]), {"engine": {"step": 20}, "loop": {}}, 1000)
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(good, root)
    path = root / "step-000020"
    before = (path / name).read_bytes()
    content = edited(before, changes)
    if part == "raw" or name != "manifest.json":
        entry = write_file(path / name, content)
        if part != "raw":
            files = json.loads((path / "manifest.json").read_bytes())["files"] | {name: entry}
            (path / "manifest.json").write_bytes(encode_manifest(20, files))
    else:
        body = json.loads(before)
        step, files = body["step"], body["files"]
        if part == "entry":
            files["state.json"] = value
        step, files = (value, files) if part == "step" else (step, value if part == "files" else files)
        try:
            (path / "manifest.json").write_bytes(encode_manifest(step, files))
        except (TypeError, ValueError):
            return
    problems = checkpoint.check(path)
    assert all(text.startswith(str(root)) for text in problems)
    if part == "raw" and content != before:
        assert problems
    if not problems:
        reader = checkpoint.Reader(path)
        assert {key: tuple(reader.tensor(key).shape) for key in reader.shapes()} == reader.shapes()
