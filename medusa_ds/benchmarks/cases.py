"""What is measured: a case is one point of the matrix, and its recipe is what `train` would run for it.

`ours` and `eager` train through `MedusaEngine`; `ours_fp8` is `ours` with `model.frozen_precision: fp8`. `cached` reads
hidden states from a cache, `cached_vocab` with heads of fewer tokens, `cached_fp8` the same after fp8 has filled it.
`original` is Liger's example with its mistakes corrected, see `benchmark.original`; `torch_linear_ce` is that with
PyTorch's own `linear_cross_entropy`. Every head's weights receive gradients in all of them. Where the recipe says
`heads.vocab: N`, all but the originals have heads of N tokens; random tokens are some of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal, get_args

from medusa_ds.config.recipe import LossSpec, Recipe
from medusa_ds.errors import counted

CACHED, ORIGINALS = ("cached", "cached_vocab", "cached_fp8"), ("original", "torch_linear_ce")
Impl = Literal["ours", "ours_fp8", "eager", "cached", "cached_vocab", "cached_fp8", "original", "torch_linear_ce"]
IMPLS: tuple[Impl, ...] = get_args(Impl)
DEFAULT_ZERO = {1: "zero2", 2: "zero3"}
"""By stage."""
EPOCHS = 3
_VOCAB = 32768  # of heads with fewer tokens, where the recipe names no number
LLAMA3_8B = (
    "model.init=random",
    "model.config={model_type: llama, vocab_size: 128256, hidden_size: 4096, intermediate_size: 14336, "
    "num_hidden_layers: 32, num_attention_heads: 32, num_key_value_heads: 8, max_position_embeddings: 8192, "
    "rope_parameters: {rope_type: default, rope_theta: 500000.0}, rms_norm_eps: 1.0e-5}",
)
"""Overrides of a recipe: the shape of Llama-3-8B with random weights."""


@dataclass(frozen=True)
class Case:
    """One point of the matrix.

    `recipe`, `overrides`: where the settings come from that the case does not name. `part`: `step` (a training step),
    `head` (one head's loss alone), `chat` (a step on real conversations) or `epochs` (three epochs of them, with all
    that comes before the first step). `batch`: sequences on each GPU. `impl`: of `IMPLS`. `zero`: a DeepSpeed config,
    by path or name in `ds_configs`, or `auto`, which stage 2 recomputes layers by as well.
    """

    recipe: str
    overrides: tuple[str, ...]
    part: str
    stage: int
    heads: int
    sequence: int
    batch: int
    impl: str
    zero: str
    warmup: int
    steps: int
    gpus: int = 1

    def load_recipe(self) -> Recipe:
        """The recipe of the case; in stage 2 its heads start from the LM head, as those of no stage-1 run are there.

        Raises:
            UserError: see `Recipe.load`.
        """
        named = self.zero == "auto" or "/" in self.zero or self.zero.endswith(".json")
        values = {
            "stage": self.stage,
            "heads.num": self.heads,
            "data.max_length": self.sequence,
            "train.global_batch_size": self.batch * self.gpus,
            "train.micro_batch_size": self.batch,
            "deepspeed": self.zero if named else f"ds_configs/{self.zero}.json",
        }
        if self.impl == "eager":
            values |= {"loss.impl": "eager", "loss.chunk_mib": LossSpec().chunk_mib}
        if self.impl in ("ours_fp8", "cached_fp8"):
            values["model.frozen_precision"] = "fp8"
        defaults = []
        if self.stage == 2:
            values["heads.init_from"] = "runs/stage1"
            defaults = [f"train.activation_checkpointing={'auto' if self.zero == 'auto' else 'true'}"]
        overrides = [*defaults, *self.overrides, *(f"{key}={value}" for key, value in values.items())]
        recipe = Recipe.load(self.recipe, overrides, planning=True)
        vocab: int | str = "full" if self.impl in ORIGINALS else recipe.heads.vocab
        if vocab == "full" and self.impl in CACHED[1:]:
            vocab = _VOCAB
        heads = recipe.heads.model_copy(update={"init_from": None, "vocab": vocab})
        return recipe.model_copy(update={"heads": heads})

    @property
    def name(self) -> str:
        """For people."""
        gpus = f", {self.gpus} GPUs" if self.gpus > 1 else ""
        sizes = f"stage {self.stage}, {counted(self.heads, 'head')}, {self.batch} x {self.sequence}"
        return f"{self.part}: {sizes}, {self.impl}, {self.zero}{gpus}"


def matrix(
    recipe: str,
    overrides: tuple[str, ...],
    *,
    parts: Sequence[str],
    stages: list[int],
    heads: list[int],
    sequences: list[int],
    batch: int,
    impls: Sequence[str],
    zeros: list[str] | None,
    warmup: int,
    steps: int,
    gpus: list[int],
) -> list[Case]:
    """All cases, each one's recipe checked; those that differ least from the first choices come first.

    Of the numbers of GPUs the first choices are the largest, then the least, which it is compared with; of the other
    lists, their own order. `zeros` of None is `DEFAULT_ZERO`; stage 1 takes the first. The `head` part is one case a
    length, and measures every implementation side by side; the frozen forward of `ours_fp8` and caches are stage 1's
    alone, these of real conversations; the originals know one GPU and no ZeRO.

    Raises:
        UserError: a recipe that does not allow a case.
    """
    cases = []
    for part in parts:
        one = part == "head"  # and nothing to choose
        choices = product(
            stages[: 1 if one else None],
            heads[: 1 if one else None],
            sequences,
            ["ours"] if one else impls,
            [1] if one else gpus,
        )
        for stage, num, sequence, impl, number in choices:
            if stage == 2 and (impl == "ours_fp8" or impl in CACHED):
                continue
            if (impl in CACHED and part == "step") or (impl in ORIGINALS and number > 1):
                continue
            several = stage == 2 and part != "head" and impl not in ORIGINALS
            configs = [DEFAULT_ZERO[stage]] if zeros is None or impl in ORIGINALS else zeros
            for config in configs if several else configs[:1]:
                case = Case(recipe, overrides, part, stage, num, sequence, batch, impl, config, warmup, steps, number)
                case.load_recipe()
                cases.append(case)
    most_first = sorted({*gpus}, reverse=True)
    counts = [*most_first[:1], *most_first[-1:], *most_first[1:-1]]

    def distance(case: Case) -> int:
        orders = [
            (parts, case.part),
            (heads, case.heads),
            (sequences, case.sequence),
            (impls, case.impl),
            (counts, case.gpus),
            (zeros or [], case.zero),
        ]
        return sum([*order].index(value) for order, value in orders if value in order)

    return sorted(cases, key=distance)
