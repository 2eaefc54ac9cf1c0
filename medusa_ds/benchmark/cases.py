"""What is measured: a case is one point of the matrix, and its recipe is what `train` would run for it.

`ours` and `eager` train through `MedusaEngine`; `ours_fp8` is `ours` with `model.frozen_precision: fp8`. `original` is
Liger's example with its mistakes corrected, see `benchmark.original`; `torch_linear_ce` is that with PyTorch's own
`linear_cross_entropy`. Every head's weights receive gradients in all of them.
"""

from dataclasses import asdict, dataclass
from typing import Any

from medusa_ds.errors import UserError
from medusa_ds.recipe import Recipe

IMPLS = ("ours", "ours_fp8", "eager", "original", "torch_linear_ce")
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
    `head` (one head's loss alone) or `chat` (a step on real conversations). `impl`: of `IMPLS`. `zero`: a DeepSpeed
    config, by path or name in `ds_configs`.
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

    def load_recipe(self) -> Recipe:
        """The recipe of the case; in stage 2 its heads start from the LM head, as those of no stage-1 run are there.

        Raises:
            UserError: see `Recipe.load`.
        """
        zero = self.zero if "/" in self.zero or self.zero.endswith(".json") else f"ds_configs/{self.zero}.json"
        values = {
            "stage": self.stage, "heads.num": self.heads, "data.max_length": self.sequence,
            "train.global_batch_size": self.batch, "train.micro_batch_size": self.batch, "deepspeed": zero,
        }  # fmt: skip
        if self.impl == "eager":
            values["loss.impl"] = "eager"
        if self.impl == "ours_fp8":
            values["model.frozen_precision"] = "fp8"
        if self.stage == 2:
            values |= {"heads.init_from": "runs/stage1", "train.activation_checkpointing": "true"}
        overrides = [*self.overrides, *(f"{key}={value}" for key, value in values.items())]
        recipe = Recipe.load(self.recipe, overrides, planning=True)
        if recipe.heads.vocab != "full":
            raise UserError(f"heads.vocab: found {recipe.heads.vocab}; the baselines know full alone: leave it out")
        return recipe.model_copy(update={"heads": recipe.heads.model_copy(update={"init_from": None})})

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.part}: stage {self.stage}, {self.heads} heads, {self.batch} x {self.sequence}, {self.impl}"

    def to_json(self) -> dict[str, Any]:
        """Its fields; `Case(**fields)` is the case again."""
        return asdict(self)


def matrix(
    recipe: str, overrides: tuple[str, ...], parts: list[str], stages: list[int], heads: list[int],
    sequences: list[int], batch: int, impls: list[str], zero: str | None, warmup: int, steps: int,
) -> list[Case]:  # fmt: skip
    """All cases, each one's recipe checked.

    `zero` of None is `zero2` in stage 1 and `zero3` in stage 2. The `head` part is one case a length, and measures
    every implementation side by side; the frozen forward of `ours_fp8` is stage 1's alone.

    Raises:
        UserError: an unknown name, or a recipe that does not allow a case.
    """
    for found, allowed, option in ((parts, ("step", "head", "chat"), "--part"), (impls, IMPLS, "--impl")):
        wrong = [name for name in found if name not in allowed]
        if wrong:
            raise UserError(f"{option}: found {wrong[0]!r}; allowed are {', '.join(allowed)}")
    if wrong_stages := [stage for stage in stages if stage not in (1, 2)]:
        raise UserError(f"--stage: found {wrong_stages[0]}; allowed are 1 and 2")
    cases = []
    for part in parts:
        for stage in stages if part != "head" else stages[:1]:
            for num in heads if part != "head" else heads[:1]:
                for sequence in sequences:
                    for impl in ["ours"] if part == "head" else impls:
                        if impl == "ours_fp8" and stage == 2:
                            continue
                        config = zero or ("zero2" if stage == 1 else "zero3")
                        case = Case(recipe, overrides, part, stage, num, sequence, batch, impl, config, warmup, steps)
                        case.load_recipe()
                        cases.append(case)
    return cases
