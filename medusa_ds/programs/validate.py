"""Check a recipe with its DeepSpeed config and the files it names; touches no hub and no GPU.

Example:
    medusa-ds validate smollm2_135m_stage1 train.lr=1e-3 --world-size 2
"""

from pathlib import Path

from medusa_ds.config.settings import RecipeSettings
from medusa_ds.config.types import Count


class Settings(RecipeSettings):
    """What the command line says."""

    world_size: Count | None = None
    """Ranks that train."""


def run(settings: Settings) -> None:
    """Print what the model can do, where its config is in the recipe or in a directory, and `ok`.

    Raises:
        UserError: every mistake of the recipe; or its model cannot do what it asks for.
    """
    recipe = settings.load_recipe(planning=False)
    if "model_type" in recipe.model.config or Path(recipe.model.name).is_dir():
        from medusa_ds.decoding.session import describe
        from medusa_ds.model.backbone import settled

        print(*describe(settled(recipe).model), sep="\n")
    if settings.world_size:
        recipe.ds_config(settings.world_size, on_gpu=True)
    print("ok")
