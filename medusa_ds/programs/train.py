"""The training program: a recipe becomes heads. Read `run` from top to bottom.

Launched by the stock launcher, which runs the recipe itself (`deepspeed recipes/X.yaml [key=value ...]`, whose last
line calls `main(__file__)`) or this package (`deepspeed --module medusa_ds X.yaml [key=value ...]`).

Exit status: 0 finished; 2 a mistake of the user; 3 a non-finite loss or gradient; 143, 130 or 129 stopped after
SIGTERM, SIGINT or a lost launcher, with a checkpoint written; 124 hung; 1 anything else. The same command again goes on
from the newest whole checkpoint. docs/reliability.md says what every fault does at every moment.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, closing, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medusa_ds import files
from medusa_ds.config.parsing import parse_yaml, read_json, read_text
from medusa_ds.config.recipe import Recipe, WandbSpec, find_recipe
from medusa_ds.config.settings import RecipeSettings, parse
from medusa_ds.errors import UserError, counted
from medusa_ds.ranks import Ranks, exit_on_user_error, number_of

if TYPE_CHECKING:
    from medusa_ds.training.engine import MedusaEngine
    from medusa_ds.training.supervisor import Supervisor

NON_FINITE_STATUS = 3

FREE_TO_CHANGE = (
    "model.package.stands_for model.attention model.liger_kernels data.hidden_cache loss.impl loss.chunk_mib "
    "train.micro_batch_size train.eval_every train.save_every train.keep_last train.hang_timeout "
    "train.activation_checkpointing train.tensorboard train.wandb deepspeed output"
).split()
"""Recipe keys that a resumed run may change: none of them changes what is computed."""


def main(recipe_file: str | None = None) -> None:
    """Train the recipe of the command line: `recipe_file` when it is itself the program, else the first argument."""
    arguments = [text for text in sys.argv[1:] if not text.startswith("--local_rank=")]
    given = arguments if recipe_file is None else [recipe_file, *arguments]
    with exit_on_user_error():
        slurm = os.environ.get("SLURM_STEP_NODELIST") and number_of("SLURM_NTASKS", 1) > 1
        if slurm and not os.environ.get("RANK"):
            _adopt_slurm()
        run(parse(RecipeSettings, given, "deepspeed --module medusa_ds", __doc__))


def run(settings: RecipeSettings) -> None:
    """Train a recipe, on every rank.

    Raises:
        UserError: a mistake of the recipe or its data, or an output that cannot be used.
    """
    recipe, recipe_file = settings.load_recipe(planning=False), find_recipe(settings.recipe)
    import torch

    from medusa_ds.decoding.session import describe
    from medusa_ds.model.backbone import check_attention, settled
    from medusa_ds.model.loss import resolve_impl
    from medusa_ds.training.supervisor import Supervisor, end_with_others

    ranks, output = Ranks(), Path(recipe.output)
    watch = closing(Supervisor(ranks.rank, ranks.local_size, recipe.train.hang_timeout))
    storage = files.storage(output, "; checkpoints are whole")
    with watch as supervisor, ExitStack() as stack, end_with_others(ranks.rank), storage:
        on_gpu = torch.cuda.is_available()
        resolve_impl(recipe.loss.impl, "cuda" if on_gpu else "cpu")  # refuses it before a load
        check_attention(recipe.model, on_gpu)
        recipe = settled(recipe)
        if ranks.rank == 0:
            print(*describe(recipe.model), sep="\n", flush=True)
            _claim(output, recipe, stack)
        _run(recipe, recipe_file, ranks, output, supervisor)


def _run(recipe: Recipe, recipe_file: Path, ranks: Ranks, output: Path, supervisor: Supervisor) -> None:
    say = print if ranks.rank == 0 else lambda *_, **__: None
    if (output / "heads" / "heads.json").exists():
        say(
            f"{output} holds a finished run; its heads are in {output / 'heads'}. Name another output to train anew, "
            f"with heads.init_from={output} to go on from these heads"
        )
        return
    recipe.ds_values(world_size=ranks.size)
    for monitor in ("tensorboard", "wandb"):
        if getattr(recipe.train, monitor) and importlib.util.find_spec(monitor) is None:
            raise UserError(f"train.{monitor}: found it, but {monitor} is not installed; pip install {monitor}")
    if isinstance(recipe.train.wandb, WandbSpec) and recipe.train.wandb.name:
        os.environ["WANDB_NAME"] = recipe.train.wandb.name  # which DeepSpeed's monitor has no setting for

    from medusa_ds.data.packing import load_data
    from medusa_ds.data.vocabulary import token_map
    from medusa_ds.model.backbone import load_config, load_tokenizer
    from medusa_ds.training.build import build_model
    from medusa_ds.training.engine import MedusaEngine
    from medusa_ds.training.hidden_cache import open_hidden_cache
    from medusa_ds.training.launch import start_process_group
    from medusa_ds.training.loop import Loop
    from medusa_ds.training.report import Report, quiet_libraries
    from medusa_ds.training.step import NonFiniteError, memory_hint

    quiet_libraries(ranks.rank)
    tokenizer = load_tokenizer(recipe.model, recipe.data.template_args.get("chat_template"))
    data = load_data(recipe, tokenizer)  # before any process group exists, whose timeout it could outlast
    steps = data.steps(recipe.train)
    say(f"{data.summary(recipe.train.global_batch_size)}; {counted(steps, 'step')} to take", flush=True)
    uses_cache = recipe.data.hidden_cache != "off"
    vocab = "full" if recipe.heads.init_from else recipe.heads.vocab  # those heads keep the tokens that they have
    tokens = token_map(vocab, data, tokenizer, load_config(recipe.model).get_text_config())

    try:
        with memory_hint(recipe):
            ends = open_hidden_cache(recipe, data, start_process_group(recipe)) if uses_cache else None
            engine = MedusaEngine(recipe, steps, partial(build_model, token_map=tokens, ends=ends))
        del ends
        recipe, state = engine.recipe, engine.resume_newest(data.fingerprint)
        report = Report(output, ranks.rank, steps, engine.steps_taken)
        if ranks.rank == 0:
            _keep_launch(output, engine, recipe_file, data.report)
        if recipe.train.tensorboard:
            report.say(f"TensorBoard's events: {output / 'tensorboard'}")
        if engine.steps_taken:
            report.say(f"resuming after step {engine.steps_taken} of {steps}")
        loop = Loop(engine, data, report, supervisor)
        loop.run(state)
        engine.export(output, tokenizer)  # heads.json last: it is what makes a run a finished one
        report.close()
        if ranks.rank == 0:
            _write_page(output)
        engine.close()  # waits for all ranks; one that ended while another still works would count as a dead one
        say(loop.summary(output) + _shipped(recipe), flush=True)
    except NonFiniteError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(NON_FINITE_STATUS)


def _adopt_slurm() -> None:
    """Name rank and master as torch expects them; `deepspeed --launcher slurm` leaves that to the job's variables."""
    slurm = os.environ
    if not slurm.get("MASTER_ADDR"):
        call = ["scontrol", "show", "hostnames", slurm["SLURM_STEP_NODELIST"]]
        mend = "set MASTER_ADDR to the first host of SLURM_STEP_NODELIST"
        with files.explained("MASTER_ADDR: missing, and scontrol, which would name it, does not run", mend):
            hosts = subprocess.run(call, capture_output=True, text=True).stdout.split()
        if not hosts:
            raise UserError(f"MASTER_ADDR: missing, and scontrol names no host; {mend}")
        slurm["MASTER_ADDR"] = hosts[0]
    os.environ.update(RANK=slurm["SLURM_PROCID"], LOCAL_RANK=slurm["SLURM_LOCALID"], WORLD_SIZE=slurm["SLURM_NTASKS"])
    os.environ.setdefault("MASTER_PORT", str(20000 + number_of("SLURM_JOB_ID") % 20000))


def _claim(output: Path, recipe: Recipe, stack: ExitStack) -> None:
    """Keep other runs out of the output while the stack lasts, and refuse another recipe's checkpoints or heads."""
    try:
        with files.explained(f"{output}: cannot be written", "name a writable directory in output"):
            output.mkdir(parents=True, exist_ok=True)
            stack.enter_context(files.lock(output / "lock"))
    except files.InUseError as holder:
        raise UserError(f"{output}: in use by {holder}; wait for that run or name another output") from None
    kept, finished = output / "recipe.yaml", (output / "heads" / "heads.json").exists()
    if not finished and not list((output / "checkpoints").glob("step-*")):
        return  # nothing is lost
    if kept.exists():
        from transformers.utils.generic import flatten_dict

        text = read_text(kept)
        recipes = parse_yaml(text, str(kept))[0], recipe.model_dump(mode="json")
        before, now = (flatten_dict({"": each}) for each in recipes)  # an empty file is no dictionary
        changed = {key for key in {*before, *now} if before.get(key) != now.get(key) and not _is_free(key)}
        if changed:  # perhaps an older version's, which let keys stand that changed nothing
            with suppress(UserError):
                changed -= {key for key, _ in Recipe.kept(text, str(kept)).misfits()}
        further = f"; to train these heads further, set heads.init_from={output} and another output" if finished else ""
        if changed:
            raise UserError(
                *(
                    f"{output}: {key}: this output was made with {before.get(key)!r}; the recipe says {now.get(key)!r}"
                    for key in sorted(changed)
                ),
                f"{output}: belongs to another recipe; name another output, or go back to the values above{further}",
            )
    elif recipe.heads.init_from:
        raise UserError(
            f"{output}: heads.init_from is a warm start, but checkpoints to resume from are here; name another output"
        )


def _keep_launch(output: Path, engine: MedusaEngine, recipe_file: Path, data: dict[str, Any]) -> None:
    """Keep what a run was made of: the resolved recipe, and a line a launch with versions, git state, command, data."""
    files.write(output / "recipe.yaml", engine.recipe.to_yaml())
    from medusa_ds.training.report import library_versions

    launch = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "recipe_file": str(recipe_file),
        "directory": str(Path.cwd()),
        "host": socket.gethostname(),
        "device": engine.device_name,
        "ranks": engine.world_size,
        "python": platform.python_version(),
        "versions": library_versions(),
        "git": _git_state(recipe_file.parent),
        "deepspeed": engine.ds_config,
        "data": data,
    }
    with open(output / "launches.jsonl", "a", encoding="utf-8") as stream:
        stream.write(json.dumps(launch) + "\n")


def _git_state(directory: Path) -> dict[str, Any] | None:
    """Commit of the recipe's repository and whether its tracked files were changed; None outside a repository."""
    call = ("git", "-C", str(directory))
    try:
        commit = subprocess.run([*call, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
        status = subprocess.run([*call, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return {"commit": commit.stdout.strip(), "changed": bool(status.stdout)} if commit.returncode == 0 else None


def _write_page(output: Path) -> None:
    """The page about the run, without which a run is a finished one all the same."""
    from medusa_ds.page import NAME, write_page

    try:
        write_page(output, output / NAME)
    except UserError as error:
        print(f"warning: {error}", flush=True)


def _shipped(recipe: Recipe) -> str:
    """A line where the package has heads of this model that learned from far more than a first run does."""
    from medusa_ds.runs import PRETRAINED

    for folder in PRETRAINED.iterdir() if recipe.stage == 1 else ():
        if read_json(folder / "heads.json")["base_model"] == recipe.model.name:
            return f"\nfar stronger heads for this model are shipped: medusa-ds generate {folder.name} --prompt ..."
    return ""


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in FREE_TO_CHANGE)
