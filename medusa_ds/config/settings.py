"""The settings of a program, and the command line made from them in one way for all programs.

A program's `Settings` subclasses the one here: a field is the option of its name (or alias), the docstring under it the
help, its type the choices and bounds; a list may be given several times, or with commas between its items. It is not
`pydantic_settings`, whose command line takes no positional arguments between options, as overrides of a recipe are,
and answers a mistake with several lines.
"""

import argparse
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple, NoReturn, TypeVar, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from medusa_ds.config.recipe import Recipe
from medusa_ds.config.types import allowed, parts
from medusa_ds.errors import UserError

_T = TypeVar("_T")
_S = TypeVar("_S", bound="ProgramSettings")


class Bare(NamedTuple):
    """Marks an option that may be given without a value, and says what it means then."""

    value: str


class Beside(NamedTuple):
    """Marks an option that means something only beside another one."""

    option: str


_POSITIONAL = "positional"
REST = "rest"
"""Marks the list that takes what the program's own options and arguments leave over, as it is."""
Positional = Annotated[_T, _POSITIONAL]
Commas = Annotated[list[_T], BeforeValidator(lambda text: text.split(",") if isinstance(text, str) else text)]


class ProgramSettings(BaseModel):
    """Base of the settings of every program."""

    model_config = ConfigDict(
        use_attribute_docstrings=True, extra="forbid", frozen=True, allow_inf_nan=False, populate_by_name=True
    )


class RecipeSettings(ProgramSettings):
    """Of programs that take a recipe."""

    recipe: Positional[str]
    """Recipe file, or name of a shipped one."""
    overrides: Positional[list[str]] = []
    """Dotted overrides, as in train.lr=1e-3."""

    def load_recipe(self, planning: bool = True) -> Recipe:
        """The recipe; see `Recipe.load`."""
        return Recipe.load(self.recipe, self.overrides, planning)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}; see {self.prog} --help")


def parse(settings: type[_S], argv: Sequence[str], prog: str, description: str | None = None) -> _S:
    """Settings from the arguments of a program; `description` stands above the options that `--help` prints.

    Raises:
        UserError: every value that is not allowed, or an option that does not exist.
    """
    form = argparse.RawDescriptionHelpFormatter
    parser = _Parser(prog, description=description, formatter_class=form, allow_abbrev=False)
    rest = next((name for name, field in settings.model_fields.items() if REST in field.metadata), None)
    for name, field in settings.model_fields.items():
        if name != rest:
            flag, options = _option(name, field)
            parser.add_argument(flag, **options)
    found, unknown = parser.parse_known_intermixed_args(list(argv))
    if unknown and rest is None:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if unknown and argv[0] == unknown[0]:  # its value would be taken for what comes first
        parser.error(f"{argv[0]}: found before all else; options that are handed on come last")
    given = vars(found) | ({rest: unknown} if rest else {})
    try:
        parsed = settings.model_validate(given)
    except ValidationError as error:
        fields = {field.alias or name: (name, field) for name, field in settings.model_fields.items()}
        problems = []
        for item in error.errors():
            name, field = fields[str(item["loc"][0])]
            may_be = allowed(field.annotation, field.metadata).removeprefix("a list of ")
            problems.append(f"{prog}: {_option(name, field)[0]}: found {item['input']!r}; allowed is {may_be}")
        raise UserError(*problems) from None
    for name in (name for name in settings.model_fields if name in parsed.model_fields_set):
        field = settings.model_fields[name]
        for needed in (marker.option for marker in field.metadata if isinstance(marker, Beside)):
            if not getattr(parsed, needed):
                option = _option(name, field)[0]
                raise UserError(f"{option}: found it without --{needed}, beside which it is read; give both or neither")
    return parsed


def _option(name: str, field: FieldInfo) -> tuple[str, dict[str, Any]]:
    """Name and arguments of `add_argument`; values stay text, which the settings read."""
    kind, markers = field.annotation, field.metadata
    key = field.alias or name
    bare = next((marker for marker in markers if isinstance(marker, Bare)), None)
    inner = [*markers, *parts(kind)]
    choices = next((get_args(part) for part in inner if get_origin(part) is Literal), None)
    metavar = field.title or ("N" if int in inner else "X" if float in inner else "TEXT")
    options: dict[str, Any] = {"help": _help(field), "default": argparse.SUPPRESS}
    if kind is bool:
        return f"--{key.replace('_', '-')}", options | {"action": "store_true"}
    several = any(get_origin(part) is list for part in inner)
    if _POSITIONAL in markers:
        more = {"nargs": "*", "metavar": "key=value"} if several else {} if field.is_required() else {"nargs": "?"}
        return key, options | more
    if any(isinstance(part, BeforeValidator) for part in inner):
        options["metavar"] = f"{metavar},{metavar}"
    else:
        options |= {"choices": choices, "metavar": None if choices else metavar}
        options |= {"action": "append"} if several else {}
        options |= {"nargs": "?", "const": bare.value} if bare else {}
    return f"--{key.replace('_', '-')}", options | {"dest": key, "required": field.is_required()}


def _help(field: FieldInfo) -> str:
    text = " ".join((field.description or "").split()).removesuffix(".")
    default = field.get_default()
    if isinstance(default, list):
        default = ",".join(map(str, default))
    if not field.is_required() and default not in (None, False, ""):
        text += f" (default: {default})"
    return text.replace("%", "%%")
