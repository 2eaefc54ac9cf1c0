"""Types of the keys of a recipe and of the options of a command, and their bounds in words."""

from collections.abc import Iterable, Iterator
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, Field

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Stage = Annotated[int, Field(ge=1, le=2)]
Split = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_.-]*(\[\d*%?:\d*%?\])?$")]

_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", NoneType: "null"}
_BOUNDS = {"ge": "of at least {}", "gt": "above {}", "le": "at most {}", "lt": "below {}", "pattern": "like {}"}


def allowed(kind: Any, metadata: Iterable[Any] = ()) -> str:
    """What a value of a type may be: `a whole number of at least 1`, `bf16 or fp32`, `a list of text`.

    `metadata` are bounds beside an annotation, as pydantic keeps those of a field.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return allowed(inner[0], [*inner[1:], *metadata])
    if origin in (Union, UnionType):
        return either([allowed(part) for part in inner if part is not NoneType])
    if origin is Literal:
        return either([str(choice) for choice in inner])
    if origin is list:
        size = next((f"{bound.max_length} times " for bound in metadata if hasattr(bound, "max_length")), "")
        return f"a list of {size}{allowed(inner[0])}"
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return f"a section of the keys {', '.join(kind.model_fields)}"
    if kind not in _WORDS:
        return "a section with keys of its own"
    bounds = [bound for item in metadata for bound in getattr(item, "metadata", [item])]
    low, high = (next((getattr(b, name) for b in bounds if hasattr(b, name)), None) for name in ("ge", "le"))
    if kind is int and low is not None and high == low + 1:
        return f"{low} or {high}"
    words = [
        text.format(getattr(bound, name))
        for bound in bounds
        for name, text in _BOUNDS.items()
        if getattr(bound, name, None) is not None
    ]
    return " ".join([_WORDS[kind], " and ".join(words)]).strip()


def parts(kind: Any) -> Iterator[Any]:
    """A type with all that it is made of."""
    yield kind
    for inner in get_args(kind):
        yield from parts(inner)


def either(choices: list[str]) -> str:
    """`a`, `a or b`, `a, b or c`."""
    return " or ".join(filter(None, [", ".join(choices[:-1]), choices[-1]]))
