"""What README and docs name exists, and their commands are ones that the programs understand."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from medusa_ds import cli
from medusa_ds.config.recipe import Recipe
from medusa_ds.config.settings import parse

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = [
    line.split("#")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    for line in block.splitlines()
]


SUBCOMMANDS = [c.replace("deepspeed --module medusa_ds.cli ", "medusa-ds ") for c in COMMANDS]


@pytest.mark.parametrize("command", [c for c in SUBCOMMANDS if c.startswith("medusa-ds ") and c != "medusa-ds list"])
def test_medusa_ds_commands_parse(command: str) -> None:
    """Turns red when the README names an option that its subcommand lacks."""
    name, *rest = shlex.split(command)[1:]
    program = importlib.import_module(f"medusa_ds.programs.{cli.COMMANDS[name]}")
    found = parse(program.Settings, rest, name)
    if getattr(found, "recipe", None):
        Recipe.load(found.recipe, found.overrides, planning=True)


def test_launches_name_recipes_that_load() -> None:
    launches = re.findall(r"deepspeed ((?:--module medusa_ds )?)(\S*smollm2\S*)((?: \S+=\S+)*)", "\n".join(COMMANDS))
    assert len(launches) >= 3
    for _, recipe, overrides in launches:
        planning = "heads.init_from=" in overrides  # of a run that is not there yet
        Recipe.load(ROOT / recipe if "/" in recipe else recipe, overrides.split(), planning=planning)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_exist(page: Path) -> None:
    """Turns red when a page names a file of the repository that is not there."""
    named = re.findall(r"(?<![\w/.-])((?:recipes|ds_configs|medusa_ds|tests|docs|\.ci)/[\w./-]*\w)", page.read_text())
    links = re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text())
    assert [name for name in named if not (ROOT / name).exists()] == []
    assert [link for link in links if not (page.parent / link).exists()] == []
