"""From the text of a recipe and its overrides to plain data with absolute paths, and back to the line of every key.

Kept apart from `recipe`, which says what the data may hold. Nothing here opens more than the recipe and, for
`heads.init_from`, the small JSON that describes the heads.
"""

import difflib
import json
import os
import re
from pathlib import Path
from typing import Any, Literal

from medusa_ds.config.parsing import KeyPath, parse_yaml, read_object, read_text
from medusa_ds.errors import UserError
from medusa_ds.files import DATA_SUFFIXES

STUB_FIRST = '_: r"""'
STUB_LAST = '# """; from medusa_ds.train import main; main(__file__)'
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
_PACKAGE = Path(__file__).resolve().parents[1]
SHAPES: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("shapes.json").read_text(encoding="utf-8"))
"""Configs of the shipped recipes' models, less what changes no shape."""


class Origin:
    """Where a key came from, for messages: `FILE:LINE: KEY: ...` or `KEY (from the command line): ...`."""

    def __init__(self, file: Path, lines: dict[KeyPath, int], overrides: list[str] | tuple[str, ...]) -> None:
        self.file, self.lines = file, lines
        self._overridden = {text.partition("=")[0] for text in overrides}

    def overridden(self, key: str) -> bool:
        """Whether an override set this key or a section that holds it."""
        return any(f"{key}.".startswith(f"{name}.") for name in self._overridden)

    def say(self, key: str, text: str) -> str:
        """One problem, with the place of its key."""
        if self.overridden(key):
            return f"{key} (from the command line, for {self.file}): {text}"
        path: KeyPath = tuple(int(part) if part.isdigit() else part for part in key.split("."))
        while path and path not in self.lines:
            path = path[:-1]
        return f"{self.file}{f':{self.lines[path]}' if path else ''}: {key}: {text}"


def shipped(folder: Literal["recipes", "ds_configs"]) -> Path:
    """Directory of the files shipped with the package: inside it when installed from a wheel, else beside it."""
    inside = _PACKAGE / folder
    return inside if inside.is_dir() else _PACKAGE.parent / folder


def find_recipe(name: str) -> Path:
    """A recipe file by path, or a shipped one by name.

    Raises:
        UserError: neither exists; names the nearest shipped one.
    """
    if os.path.isfile(name):
        return Path(name).absolute()
    known = {file.stem: file for file in sorted(shipped("recipes").glob("*.yaml"))}
    if name in known:
        return known[name]
    near = difflib.get_close_matches(Path(name).stem, known, 1)
    hint = f"did you mean the shipped {near[0]}?" if near else f"shipped are {', '.join(known)}"
    raise UserError(f"{name or '(empty)'}: no such recipe file; {hint}")


def read_recipe(file: Path) -> tuple[dict[str, Any], dict[KeyPath, int]]:
    """The data of a recipe file without the launch stub, and the line of every key.

    Raises:
        UserError: unreadable, damaged stub, not valid YAML, or not a mapping.
    """
    text = read_text(file)
    rows = text.rstrip().splitlines()
    first = next((i for i, row in enumerate(rows) if row.startswith("_:")), None)
    if first is not None:
        above = [row for row in rows[:first] if row.strip() and not row.startswith("#")]
        quotes = text.count('"""')
        if above or rows[-1] != STUB_LAST or not rows[first].startswith(STUB_FIRST) or quotes != 2:
            raise UserError(
                f'{file}:{first + 1}: the launch stub is damaged (found """ {quotes} times; allowed are the two of the '
                f'stub); the first line is `_: r"""  # a comment`, the last is `{STUB_LAST}`'
            )
    raw, lines = parse_yaml(text, str(file))
    if not isinstance(raw, dict):
        raise UserError(f"{file}: found {type(raw).__name__}; a recipe is a mapping of model, heads, stage, data, ...")
    raw.pop("_", None)
    return raw, lines


def apply_overrides(raw: dict[str, Any], overrides: list[str] | tuple[str, ...]) -> list[str]:
    """Write `key.path=value` overrides into the data, in place; returns the problems."""
    problems = []
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*", key, re.ASCII):
            problems.append(f"{text}: not an override; write key.path=value, as in train.lr=1e-3")
            continue
        if re.match(r"\s*#|[^'\"\[{|>].*\s#", value):
            problems.append(
                f"{key} (from the command line): found a #, which begins a comment in YAML; quote the value"
            )
            continue
        try:
            parsed, _ = parse_yaml(value, f"{key} (from the command line)", tuple(key.split(".")))
        except UserError as error:
            problems += error.problems
            continue
        target: Any = raw
        *parents, last = key.split(".")
        for part in parents:
            if isinstance(target, list) and part.isdigit() and int(part) < len(target):
                target = target[int(part)]
                continue
            if not isinstance(target, dict):
                break
            if target.get(part) is None:
                target[part] = {}
            target = target[part]
        if isinstance(target, dict):
            target[last] = parsed
        else:
            problems.append(f"{key} (from the command line): {'.'.join(parents)} is not a section of the recipe")
    return problems


def resolve_paths(raw: dict[str, Any], at: Origin, planning: bool) -> list[str]:
    """Make input paths absolute, in place; returns a problem for each that must exist and does not."""
    problems = []

    def wrong(key: str, text: str) -> None:
        problems.append(at.say(key, text))

    def find(value: str, key: str, *more: Path) -> Path | None:
        near = (at.file.parent, at.file.parent.parent)
        places = (Path.cwd(), *near) if at.overridden(key) or key == "heads.init_from" else (*near, Path.cwd())
        paths = [place / os.path.expanduser(value) for place in (*places, *more)]
        return next((path.absolute() for path in paths if value and os.path.exists(path)), None)

    heads, model, data = (raw[name] if isinstance(raw.get(name), dict) else {} for name in ("heads", "model", "data"))
    raw.setdefault("deepspeed", "ds_configs/zero2.json")
    if isinstance(value := raw["deepspeed"], str) and value != "auto":
        found = find(value, "deepspeed", shipped("ds_configs").parent)
        if found is None:
            known = ", ".join(sorted(file.name for file in shipped("ds_configs").glob("*.json")))
            mend = f"write auto, or name a DeepSpeed JSON file; shipped in ds_configs/: {known}"
            wrong("deepspeed", f"found {value}, which does not exist; {mend}")
        raw["deepspeed"] = str(found or value)

    if isinstance(value := heads.get("init_from"), str):
        found = find(value, "heads.init_from")
        if found is None and not planning:
            mend = "run stage 1 first, or name the output directory of a finished run"
            wrong("heads.init_from", f"found {value}, which does not exist; {mend}")
        heads["init_from"] = str(found or Path(os.path.expanduser(value)).absolute())

    if isinstance(value := model.get("name"), str):
        found = find(value, "model.name")
        if found is not None and os.path.isdir(found):
            model["name"] = str(found)
        elif not _HUB_ID.fullmatch(value):
            wrong("model.name", f"found {value!r}; allowed is an existing directory or a hub id like owner/name")

    path = data.get("path")
    sources = [(data, "data.path")] if isinstance(path, str) else []
    if isinstance(path, list):
        path[:] = [{"path": item} if isinstance(item, str) else item for item in path]
        sources = [(item, f"data.path.{i}.path") for i, item in enumerate(path) if isinstance(item, dict)]
    for holder, key in [*sources, (data, "data.validation")]:
        name = key.rpartition(".")[2]
        value = holder.get(name)
        if not isinstance(value, str) or value == "sample":
            continue
        found = find(value, key)
        kinds = "a JSON, JSONL or Parquet file"
        if found is not None:
            holder[name] = str(found)
            if os.path.isdir(found) and not any(file.suffix in DATA_SUFFIXES for file in found.iterdir()):
                wrong(key, f"found {found}, a directory without {kinds}")
            elif not os.path.isdir(found) and found.suffix not in DATA_SUFFIXES:
                wrong(key, f"found {found}; a data file ends in {', '.join(DATA_SUFFIXES)}")
        elif value.endswith(DATA_SUFFIXES) or not _HUB_ID.fullmatch(value):
            mend = f"allowed are sample, {kinds}, a directory of them, or a hub id like owner/name"
            wrong(key, f"found {value!r}, which does not exist; {mend}")

    if isinstance(value := data.get("hidden_cache"), str) and value not in ("off", "auto"):
        data["hidden_cache"] = str(Path(os.path.expanduser(value)).absolute())

    if isinstance(value := raw.get("output"), str):
        output = Path(os.path.expanduser(value)).absolute()
        there = next(path for path in (output, *output.parents) if os.path.exists(path))
        if not value or not os.path.isdir(there):
            wrong("output", f"found {value!r}; allowed is a directory, which is made when missing")
        raw["output"] = str(output)
    return problems


def config_at_hand(name: str, overrides: dict[str, Any]) -> dict[str, Any]:
    """What is known of a model's config without the hub: a directory's, that of a shipped recipe's model, or nothing.

    `overrides` are `model.config`; with a `model_type` they are all of it.
    """
    config: Any = {}
    if "model_type" not in overrides:
        try:
            with open(Path(name) / "config.json", encoding="utf-8") as file:
                config = json.load(file)
        except (OSError, ValueError):
            config = SHAPES.get(name, {})
    config = config if isinstance(config, dict) else {}
    inner = config.get("text_config")
    return {**config, **(inner if isinstance(inner, dict) else {}), **overrides}


def positions_of(config: dict[str, Any]) -> int | None:
    """Tokens of a text that a model was made for, by its config: those of its rotary embeddings once stretched.

    With `linear` and `yarn` published configs name the positions before or after; those of the others are after.
    """
    positions = config.get("max_position_embeddings")
    if type(positions) is not int:  # which transformers refuses
        return None
    rope = config.get("rope_scaling") or config.get("rope_parameters")  # of both, transformers takes the first
    if isinstance(rope, dict) and rope.get("rope_type", rope.get("type")) in ("linear", "yarn"):
        before, factor = rope.get("original_max_position_embeddings") or positions, rope.get("factor") or 1
        if {type(before), type(factor)} <= {int, float}:
            positions = max(positions, int(factor * before))
    return positions


def saved_heads(path: Path) -> tuple[Path, dict[str, Any]]:
    """What a finished run (its output or the `heads` folder in it) says of its heads, and the file that says it.

    Raises:
        UserError: no such file, or not a JSON object.
    """
    file = next((f for f in (path / "heads.json", path / "heads" / "heads.json") if os.path.isfile(f)), None)
    if file is None:
        raise UserError(
            f"{path}: holds no heads.json; name the output directory of a finished run, or its heads folder"
        )
    return file, read_object(file)
