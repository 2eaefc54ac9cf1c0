"""The `medusa-ds` command: everything about a recipe but training, which the `deepspeed` launcher starts.

A subcommand is a module of `programs`: its docstring is the help, its `Settings` are the options, `run` does the work.
It is imported, and torch and transformers with it, when it is called, so that `medusa-ds list` starts at once.
"""

import ast
import difflib
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from medusa_ds.config.settings import parse
from medusa_ds.errors import UserError
from medusa_ds.files import storage
from medusa_ds.ranks import exit_on_user_error

_NAMED_ALIKE = "validate show init prepare estimate distill bench generate evaluate tree report export serve".split()
COMMANDS = {"list": "list_recipes", **{name: name for name in _NAMED_ALIKE}, "import": "import_heads"}
"""Modules of `programs` by subcommand."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run a subcommand; a user's mistake is a line on standard error and exit status 2."""
    # transformers imports deepspeed, which warns when there is no GPU; Liger tells which kernels it has not
    for name in ("DeepSpeed", "torch.utils.cpp_extension", "liger_kernel.backends.registry"):
        logging.getLogger(name).addFilter(lambda record: record.levelno > logging.WARNING)
    given = sys.argv[1:] if argv is None else argv
    # the launcher names the rank: `deepspeed --module medusa_ds.cli prepare RECIPE --hidden`
    name, *rest = [text for text in given if not text.startswith("--local_rank=")] or ["--help"]
    if name != "serve":  # whose vLLM inherits the environment, and has its own to say
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        if not sys.stderr.isatty():
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with exit_on_user_error(), storage("a file"):
        try:
            if name in ("-h", "--help"):
                print(_overview())
            else:
                _call(name, rest)
            sys.stdout.flush()
        except BrokenPipeError:  # `medusa-ds list | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _call(name: str, argv: list[str]) -> None:
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1, cutoff=0.4)
        hint = f"did you mean {near[0]}?" if near else f"allowed are {', '.join(COMMANDS)}"
        raise UserError(f"medusa-ds {name}: no such command; {hint}")
    program = importlib.import_module(f"medusa_ds.programs.{COMMANDS[name]}")
    program.run(parse(program.Settings, argv, f"medusa-ds {name}", program.__doc__))


def _overview() -> str:
    lines = ["usage: medusa-ds COMMAND ...", "", "Train with: deepspeed RECIPE.yaml [key=value ...]", ""]
    for name, module in COMMANDS.items():
        source = Path(__file__).with_name("programs") / f"{module}.py"
        purpose = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or ""
        lines.append(f"  {name:10} {purpose.splitlines()[0]}")
    return "\n".join([*lines, "", "medusa-ds COMMAND --help lists its options."])


if __name__ == "__main__":
    main()
