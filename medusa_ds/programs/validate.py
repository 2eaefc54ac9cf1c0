"""Check a recipe with its DeepSpeed config and the files it names, then what its model can do; touches no GPU.

Example:
    medusa-ds validate smollm2_135m_stage1 train.lr=1e-3 --world-size 2
"""

from medusa_ds.config.loading import STUB_LAST, find_recipe
from medusa_ds.config.parsing import read_text
from medusa_ds.config.settings import RecipeSettings
from medusa_ds.config.types import Count


class Settings(RecipeSettings):
    """What the command line says."""

    world_size: Count | None = None
    """Ranks that train."""


def run(settings: Settings) -> None:
    """Print what the model can do, where its config can be had, how a file without the launch stub starts, and `ok`.

    Raises:
        UserError: every mistake of the recipe, before a hub is asked; or its model cannot do what it asks for.
    """
    recipe = settings.load_recipe(planning=False)
    if settings.world_size:
        recipe.ds_config(settings.world_size, on_gpu=True)

    from medusa_ds.decoding.session import describe
    from medusa_ds.model.backbone import UnreachableError, settled
    from medusa_ds.training.build import load_start

    if recipe.heads.init_from:
        load_start(recipe.heads, recipe.heads.shape)
    try:
        recipe = settled(recipe, planning=True)
        print(*describe(recipe.model), sep="\n")
    except UnreachableError as error:
        print(f"the model was not asked what it can do: {error}")
    if STUB_LAST not in read_text(find_recipe(settings.recipe)):
        start = f"deepspeed --module medusa_ds {settings.recipe}"
        print(f"without the first and last line that shipped recipes have, it is started by: {start}")
    print("ok")
