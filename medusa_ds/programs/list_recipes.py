"""List the shipped recipes, or copy one into the working directory.

Example:
    medusa-ds list --copy smollm2_135m_stage1
"""

import shutil
from pathlib import Path

from pydantic import Field

from medusa_ds.config.recipe import Recipe, find_recipe, shipped
from medusa_ds.config.settings import ProgramSettings
from medusa_ds.errors import UserError
from medusa_ds.files import check_writable


class Settings(ProgramSettings):
    """What the command line says."""

    copy_of: str | None = Field(None, alias="copy", title="NAME")
    """Copy this recipe here."""


def run(settings: Settings) -> None:
    """Print a line a recipe, or write the copy.

    Raises:
        UserError: no such recipe, or a file of its name is here already.
    """
    if settings.copy_of:
        source = find_recipe(settings.copy_of)
        target = Path.cwd() / source.name
        if target.exists():
            raise UserError(f"{target}: exists already; move it away, or copy into another directory")
        check_writable(target, "--copy")
        shutil.copyfile(source, target)
        print(f"wrote {target.name}; run it with: deepspeed {target.name}")
        return
    rows = [("recipe", "model", "stage", "heads x layers", "DeepSpeed")]
    for file in sorted(shipped("recipes").glob("*.yaml")):
        recipe = Recipe.load(file, planning=True)
        heads = f"{recipe.heads.num} x {recipe.heads.layers}"
        rows.append((file.stem, recipe.model.name, str(recipe.stage), heads, Path(recipe.deepspeed).stem))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(map(str.ljust, row, widths)).rstrip())
