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
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMANDS = [
    line.split("#")[0].strip()
    for page in PAGES
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.S)
    for line in block.replace("\\\n", " ").splitlines()
]
SUBCOMMANDS = sorted({c.replace("deepspeed --module medusa_ds.cli ", "medusa-ds ") for c in COMMANDS})


@pytest.mark.parametrize("command", [c for c in SUBCOMMANDS if c.startswith("medusa-ds ")])
def test_medusa_ds_commands_parse(command):
    """Turns red when a page names an option that its subcommand lacks."""
    name, *rest = shlex.split(command)[1:]
    program = importlib.import_module(f"medusa_ds.programs.{cli.COMMANDS[name]}")
    found = parse(program.Settings, rest, name)
    if recipe := getattr(found, "recipe", None):
        named = ["llama3_8b_stage1", recipe] if "=" in recipe else [recipe]  # `bench` without a recipe
        Recipe.load(named[0], [*named[1:], *found.overrides], planning=True)


def test_launches_name_recipes_that_load():
    launches = re.findall(r"deepspeed ((?:--module medusa_ds )?)(\S*smollm2\S*)((?: \S+=\S+)*)", "\n".join(COMMANDS))
    assert len(launches) >= 3
    for _, recipe, overrides in launches:
        planning = "heads.init_from=" in overrides  # of a run that is not there yet
        overrides = re.sub(r"data\.path=\S+\.jsonl", "", overrides)  # what distill writes
        Recipe.load(ROOT / recipe if "/" in recipe else recipe, overrides.split(), planning=planning)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_exist(page):
    """Turns red when a page names a file of the repository that is not there."""
    rooms = r"recipes|ds_configs|medusa_ds|tests|docs|findings|plugins|\.ci"
    named = re.findall(rf"(?<![\w/.-])((?:{rooms})/[\w./-]*\w)", page.read_text())
    links = re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text())
    assert [name for name in named if not (ROOT / name).exists()] == []
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_keys_that_pages_name_exist():
    """Turns red when a page names a key of a section of the recipe that the section lacks."""
    sections = {
        name: field.annotation
        for name, field in Recipe.model_fields.items()
        if hasattr(field.annotation, "model_fields")
    }
    for page in PAGES:
        for section, key in re.findall(rf"`({'|'.join(sections)})\.([a-z_]+)(?![a-z_(])", page.read_text()):
            if key not in ("py", "json"):  # train.py of the original example, heads.json
                assert key in sections[section].model_fields, f"{page.name}: {section}.{key}"


def test_tests_that_the_page_on_reliability_names_exist():
    """Turns red when a test is renamed; the page names a file by a letter."""
    page = (ROOT / "docs" / "reliability.md").read_text()
    tests = {letter: (ROOT / path).read_text() for path, letter in re.findall(r"`(tests/\S+\.py)` \(([A-Z])\)", page)}
    named = re.findall(rf"\b([{''.join(tests)}]) ((?:`[a-z_]+`(?: L)?(?:, )?)+)", page)
    assert len(named) > 20
    names = [(letter, name) for letter, text in named for name in re.findall(r"\w{5,}", text)]
    assert [name for letter, name in names if name not in tests[letter]] == []


def test_readme_fits_a_page():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 120
    assert max(map(len, lines)) <= 120
