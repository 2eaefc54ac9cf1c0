"""Check a recipe with its DeepSpeed config and the files it names; touches no hub and no GPU.

Example:
    medusa-ds validate smollm2_135m_stage1 train.lr=1e-3 --world-size 2
"""

from medusa_ds.config.settings import RecipeSettings
from medusa_ds.config.types import Count


class Settings(RecipeSettings):
    """What the command line says."""

    world_size: Count | None = None
    """Ranks that train."""


def run(settings: Settings) -> None:
    """Print `ok`.

    Raises:
        UserError: every mistake of the recipe.
    """
    recipe = settings.load_recipe(planning=False)
    if settings.world_size:
        recipe.ds_config(settings.world_size, on_gpu=True)
    print("ok")
