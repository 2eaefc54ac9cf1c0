"""Strict readers for the text that users write: YAML recipes and DeepSpeed JSON.

Both run no code, bound the file's size and say the line of a mistake. Unlike PyYAML's own loader this one reads
numbers as YAML 1.2 does (`1e-4` is a float, `010` is ten, `no` is text), and refuses duplicate keys, tags and aliases
(a few hundred bytes of nested aliases expand without end). ruamel.yaml reads numbers that way too, but also dates,
`1e999` as infinity and `0o17`, and ends at the first duplicate. Unlike `json`, duplicate keys, `NaN` and lone
surrogates are refused. Values that look like secrets are found here too: secrets come from the environment.
"""

import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from medusa_ds.errors import UserError

MAX_BYTES = 1 << 20
MAX_DEPTH = 50
KeyPath = tuple[str | int, ...]
_SECRET = re.compile(
    r"\b(hf_[A-Za-z0-9]{16,}|sk-(?=[\w-]*[A-Za-z0-9]{16})[\w-]+|gh[pousr]_\w{16,}|github_pat_\w{16,}"
    r"|wandb_v1_\w{16,}|AKIA[A-Z0-9]{16})"
    r"|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"
)
_WANDB_KEY = re.compile(r"[0-9a-f]{40}")  # commits look the same: they stand under `revision` or inside a path
_OPEN = {("model", "config"), ("data", "template_args")}
"""Sections whose values are not of known types, so that no type refuses a text in place of a switch."""
_SWITCH = re.compile("yes|no|on|off", re.IGNORECASE)
_SECRET_NAME = re.compile(r"(^|_)(api_?key|passwd|password|secret|(access|auth|hf|hub)_token)$", re.IGNORECASE)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}


def finite(text: str) -> float:
    """The number that a text is.

    Raises:
        ValueError: it is infinite, or none.
    """
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is out of range")
    return value


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?$"),
    list("-+.0123456789"),
)
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))
_Loader.add_constructor("tag:yaml.org,2002:float", lambda loader, node: finite(node.value))


def read_text(path: Path) -> str:
    """The text of a configuration file.

    Raises:
        UserError: missing, not a plain file, unreadable, over 1 MiB or not UTF-8.
    """
    if not os.path.isfile(path):
        found = "not a plain file" if os.path.exists(path) else "no such file"
        raise UserError(f"{path}: {found}; name an existing text file")
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise UserError(f"{path}: found more than {MAX_BYTES} bytes; a configuration file has at most that many")
        return data.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8 text") from None


def parse_yaml(text: str, where: str, path: KeyPath = ()) -> tuple[Any, dict[KeyPath, int]]:
    """The data of a YAML document, and the line (from 1) of every key path in it; messages say `where` it is from.

    `path` is where in a recipe the document stands.

    Raises:
        UserError: all duplicate keys and non-text keys, or the first alias, tag or syntax error.
    """
    loader = None
    try:
        for token in yaml.scan(text):
            if isinstance(token, yaml.AliasToken | yaml.TagToken):
                line, kind = token.start_mark.line + 1, "tag" if isinstance(token, yaml.TagToken) else "alias"
                raise UserError(f"{where}:{line}: found a YAML {kind}; write the plain value")
        loader = _Loader(text)
        node = loader.get_single_node()
        lines: dict[KeyPath, int] = {}
        problems: list[str] = []
        if node is not None:
            _walk(node, path, lines, problems, where)
        if problems:
            raise UserError(*problems)
        return (None if node is None else loader.construct_document(node)), lines
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        at = f":{mark.line + 1}" if mark else ""
        what = getattr(error, "problem", None) or str(error).splitlines()[0]
        mend = "write spaces in place of the tab" if r"'\t'" in what else "mend or quote the value"
        raise UserError(f"{where}{at}: not valid YAML ({what}); {mend}") from None
    finally:
        if loader is not None:
            loader.dispose()


def _walk(node: yaml.Node, path: KeyPath, lines: dict[KeyPath, int], problems: list[str], where: str) -> None:
    if len(path) > MAX_DEPTH:
        raise RecursionError(f"nested deeper than {MAX_DEPTH} levels")
    if isinstance(node, yaml.SequenceNode):
        for index, child in enumerate(node.value):
            lines[(*path, index)] = child.start_mark.line + 1
            _walk(child, (*path, index), lines, problems, where)
    elif isinstance(node, yaml.MappingNode):
        for key_node, child in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != "tag:yaml.org,2002:str":
                problems.append(f"{where}:{line}: found a key that is not text; quote it")
                continue
            _walk(key_node, path, lines, problems, where)
            here = (*path, key_node.value)
            if here in lines:
                name = ".".join(map(str, here))
                problems.append(f"{where}:{line}: duplicate key {name}, first on line {lines[here]}; keep one")
            lines[here] = line
            _walk(child, here, lines, problems, where)
    elif any("\ud800" <= char <= "\udfff" for char in node.value):
        problems.append(f"{where}:{node.start_mark.line + 1}: found half a surrogate pair; write the character itself")
    elif path[:2] in _OPEN and len(path) > 2 and getattr(node, "style", "") is None and _SWITCH.fullmatch(node.value):
        text = f"found {node.value}, which is text here and so counts as true; write true or false, or quote it"
        problems.append(f"{where}:{node.start_mark.line + 1}: {text}")


def read_json(path: Path) -> Any:
    """Parse a JSON file strictly: no duplicate keys, comments, trailing commas, `NaN`, `Infinity` or lone surrogates.

    Raises:
        UserError: with the line of the mistake.
    """
    text = read_text(path)

    def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for key, value in pairs:
            if key in data:
                raise ValueError(f"duplicate key {key!r}; keep one")
            data[key] = value
        return data

    try:
        data = json.loads(text, object_pairs_hook=refuse_duplicates, parse_constant=finite, parse_float=finite)
        _check_depth(data, 0)
        json.dumps(data, ensure_ascii=False).encode("utf-8")  # lone surrogates raise here
        return data
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON ({error.msg})") from None
    except UnicodeEncodeError:
        raise UserError(f"{path}: found half a surrogate pair; write the character itself") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({str(error)[:200]})") from None


def read_object(path: Path) -> dict[str, Any]:
    """Parse a JSON file that holds an object, as `read_json`."""
    data = read_json(path)
    if not isinstance(data, dict):
        raise UserError(f"{path}: found {type(data).__name__}; allowed is a JSON object")
    return data


def _check_depth(node: Any, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise RecursionError(f"nested deeper than {MAX_DEPTH} levels")
    if isinstance(node, dict | list):
        for child in node.values() if isinstance(node, dict) else node:
            _check_depth(child, depth + 1)


def secret_keys(data: Any, path: KeyPath = ()) -> Iterator[str]:
    """Dotted keys whose value looks like a secret: a known token, a password in a URL, or a key named `api_key`."""
    if isinstance(data, dict | list):
        for key, value in data.items() if isinstance(data, dict) else enumerate(data):
            yield from secret_keys(value, (*path, key))
    elif isinstance(data, str) and path and path[-1] not in ("revision", "sha256"):
        named = data and _SECRET_NAME.search(str(path[-1]))
        if named or _SECRET.search(data) or _WANDB_KEY.fullmatch(data):
            yield ".".join(map(str, path))


def redact(text: str) -> str:
    """The text without anything that looks like a secret."""
    return re.sub(r"(?<![/\w])[0-9a-f]{40}(?![/\w])", "(not shown)", _SECRET.sub("(not shown)", text))
