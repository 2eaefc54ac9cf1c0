"""Strict readers for the text that users write: YAML recipes and DeepSpeed JSON.

Both run no code, bound the file's size and say the line of a mistake. Unlike PyYAML's own loader this one reads
numbers as YAML 1.2 does (`1e-4` is a float, `010` is ten, `no` is text), and refuses duplicate keys and aliases (a few
hundred bytes of nested aliases expand without end). Unlike `json`, duplicate keys and `NaN` are refused.
"""

import json
import re
from pathlib import Path
from typing import Any

import yaml

from medusa_ds.errors import UserError

MAX_BYTES = 1 << 20
KeyPath = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|false)$"), list("tf"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(~|null|)$"), ["~", "n", ""])
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?$"),
    list("-+.0123456789"),
)
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(loader.construct_scalar(node)))
_Loader.add_constructor("tag:yaml.org,2002:float", lambda loader, node: float(loader.construct_scalar(node)))


def read_text(path: Path) -> str:
    """The text of a configuration file.

    Raises:
        UserError: missing, a directory, unreadable, over 1 MiB or not UTF-8.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path}: found {path.stat().st_size} bytes; a configuration file has at most {MAX_BYTES}")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); name an existing file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8 text") from None


def parse_yaml(text: str, where: str) -> tuple[Any, dict[KeyPath, int]]:
    """Parse YAML text.

    Args:
        text: one YAML document.
        where: name of its origin for messages.

    Returns:
        The data, and the line (from 1) of every key path in it.

    Raises:
        UserError: all duplicate keys, aliases and non-text keys, or the first syntax error.
    """
    loader = _Loader(text)
    try:
        for token in yaml.scan(text):
            if isinstance(token, yaml.AliasToken):
                line = token.start_mark.line + 1
                raise UserError(f"{where}:{line}: found the alias *{token.value}; write the value out")
        node = loader.get_single_node()
        lines: dict[KeyPath, int] = {}
        problems: list[str] = []
        if node is not None:
            _walk(node, (), lines, problems, where)
        if problems:
            raise UserError(*problems)
        return (None if node is None else loader.construct_document(node)), lines
    except (yaml.MarkedYAMLError, yaml.reader.ReaderError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        at = f":{mark.line + 1}" if mark else ""
        what = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{where}{at}: not valid YAML ({what})") from None
    finally:
        loader.dispose()


def _walk(node: yaml.Node, path: KeyPath, lines: dict[KeyPath, int], problems: list[str], where: str) -> None:
    if isinstance(node, yaml.SequenceNode):
        for index, child in enumerate(node.value):
            lines[(*path, index)] = child.start_mark.line + 1
            _walk(child, (*path, index), lines, problems, where)
    elif isinstance(node, yaml.MappingNode):
        for key_node, child in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != "tag:yaml.org,2002:str":
                problems.append(f"{where}:{line}: a key must be text; quote it")
                continue
            here = (*path, key_node.value)
            if here in lines:
                name = ".".join(map(str, here))
                problems.append(f"{where}:{line}: duplicate key {name}, first on line {lines[here]}; keep one")
            lines[here] = line
            _walk(child, here, lines, problems, where)


def read_json(path: Path) -> Any:
    """Parse a JSON file strictly: no duplicate keys, comments, trailing commas, `NaN` or `Infinity`.

    Raises:
        UserError: with the line of the mistake.
    """
    text = read_text(path)

    def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        for key in keys:
            if keys.count(key) > 1:
                raise ValueError(f"duplicate key {key!r}")
        return dict(pairs)

    def refuse_constant(name: str) -> Any:
        raise ValueError(f"{name} is not a JSON number")

    try:
        return json.loads(text, object_pairs_hook=refuse_duplicates, parse_constant=refuse_constant)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON ({error.msg})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({str(error)[:200]})") from None
