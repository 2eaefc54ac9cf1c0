"""The `medusa-ds` command: everything about a recipe but training, which the `deepspeed` launcher starts.

A subcommand is an entry of `COMMANDS` and a function. Programs, and with them torch and transformers, are imported
when their subcommand is called, so that `medusa-ds list` starts at once.
"""

import argparse
import difflib
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from medusa_ds.arguments import Option, Parser, count, counts, names, option, positive, share, temperature
from medusa_ds.config.recipe import Recipe, find_recipe, shipped
from medusa_ds.errors import UserError, exit_on_user_error


class Command(NamedTuple):
    """A subcommand: its function (whose docstring is its help) and its options."""

    run: Callable[[argparse.Namespace], None]
    options: list[Option]


def list_recipes(args: argparse.Namespace) -> None:
    """List the shipped recipes, or copy one into the working directory."""
    if args.copy:
        source = find_recipe(args.copy)
        target = Path.cwd() / source.name
        if target.exists():
            raise UserError(f"{target}: exists already; move it away, or copy into another directory")
        shutil.copyfile(source, target)
        print(f"wrote {target.name}; run it with: deepspeed {target.name}")
        return
    rows = [("recipe", "model", "stage", "heads", "DeepSpeed")]
    for file in sorted(shipped("recipes").glob("*.yaml")):
        recipe = Recipe.load(file, planning=True)
        heads = f"{recipe.heads.num} x {recipe.heads.layers}"
        rows.append((file.stem, recipe.model.name, str(recipe.stage), heads, Path(recipe.deepspeed).stem))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def validate(args: argparse.Namespace) -> None:
    """Check a recipe with its DeepSpeed config and the files it names; touches no hub and no GPU."""
    recipe = Recipe.load(args.recipe, args.overrides)
    if args.world_size:
        recipe.ds_config(args.world_size, on_gpu=True)
    print("ok")


def show(args: argparse.Namespace) -> None:
    """Print the resolved recipe and DeepSpeed config, or training examples; the output is a recipe again."""
    recipe = Recipe.load(args.recipe, args.overrides, planning=True)
    if args.data:
        from medusa_ds.programs.prepare import show_examples

        show_examples(recipe, args.data)
        return
    ranks = args.world_size or 1
    settings = json.dumps(recipe.ds_config(ranks, on_gpu=True), indent=2)
    print(recipe.to_yaml())
    print(f"# DeepSpeed config of {ranks} rank{'s'[: ranks > 1]} with a GPU each; without one, precision auto is fp32.")
    print('# Sizes that say "auto" follow from the hidden size when the model is loaded.')
    print("\n".join(f"# {line}" for line in settings.splitlines()))


def prepare_data(args: argparse.Namespace) -> None:
    """Tokenise and cache the data of a recipe, and report what became of its rows."""
    recipe = Recipe.load(args.recipe, args.overrides, planning=True)
    from medusa_ds.programs.prepare import main

    main(recipe, args.hidden)


def estimate_needs(args: argparse.Namespace) -> None:
    """Estimate parameters, memory per GPU, disk and hours of a recipe."""
    recipe = Recipe.load(args.recipe, args.overrides, planning=True)
    from medusa_ds.programs.estimate import main

    main(recipe, args.world_size or [1, 2, 4, 8], args.tokens_per_second, args.data)


def distill_model(args: argparse.Namespace) -> None:
    """Let the recipe's own model answer prompts, or make them up, as training data; goes on where it was interrupted.

    Without a server the built-in engine decodes. Rows go to OUT in the format that `data.path` reads. Several GPUs
    share the rows under the launcher: deepspeed --module medusa_ds.cli distill RECIPE --out OUT ...
    """
    recipe = Recipe.load(args.recipe, args.overrides, planning=True)
    from medusa_ds.programs.distill import Sampling, Settings, distill

    sampling = Sampling(args.temperature, args.top_p, args.max_new_tokens, args.max_prompt_tokens, args.seed)
    distill(
        recipe,
        Settings(
            args.out,
            args.prompts,
            args.split,
            args.limit,
            args.synthesize or 0,
            args.synthesize_temperature,
            args.openings,
            args.exclude,
            sampling,
            args.keep_unfinished,
            args.batch,
            args.server,
            args.server_model,
            args.timeout,
            args.retries,
            args.device,
            args.dtype,
        ),
    )


def generate_text(args: argparse.Namespace) -> None:
    """Answer a prompt with a run's heads, or chat on the terminal; shows tokens per step and per second."""
    from medusa_ds.programs.generate import main

    main(
        args.run,
        args.prompt,
        acceptance=_acceptance(args),
        max_new_tokens=args.max_new_tokens,
        stop=args.stop,
        seed=args.seed,
        device=args.device,
        dtype=args.dtype,
    )


def evaluate_run(args: argparse.Namespace) -> None:
    """Measure a run's heads on prompts: accuracies, tokens per step, speed-up. Takes a finished run or a checkpoint.

    `chain acceptance, teacher-forced` is what training calls acceptance_length: each head's first guess, at every
    position of given texts. `tokens per step, decoding` is what a tree accepts while it generates.
    """
    from medusa_ds.programs.evaluate import evaluate

    evaluate(_settings(args))


def find_tree(args: argparse.Namespace) -> None:
    """Find the candidate tree that suits a run's heads and this machine, and write it into the run's heads.json."""
    from medusa_ds.programs.tree import search_tree

    search_tree(_settings(args), args.nodes)


def export_run(args: argparse.Namespace) -> None:
    """Write heads in the layouts of vLLM, TGI, TensorRT-LLM, FasterDecoding/Medusa and plain transformers."""
    from medusa_ds.programs.export import main

    main(
        args.run,
        args.out,
        args.engine,
        untrained=args.untrained,
        dtype=args.dtype,
        force=args.force,
        push_to_hub=args.push_to_hub,
        vocab=args.vocab,
    )


def import_run(args: argparse.Namespace) -> None:
    """Bring published heads of FasterDecoding's or vLLM's layout into ours, to be used like a run."""
    from medusa_ds.programs.import_heads import main

    main(args.directory, args.out, args.base_model)


def measure_steps(args: argparse.Namespace) -> None:
    """Measure training steps, memory and one head's loss beside the original example; without a recipe, Llama-3-8B."""
    from medusa_ds.programs.bench import main, plan

    cases = plan(
        args.recipe,
        args.overrides,
        parts=args.part,
        stages=args.stage,
        heads=args.heads,
        sequences=args.sequence,
        batch=args.batch,
        impls=args.impl,
        zero=args.zero,
        warmup=args.warmup,
        steps=args.steps,
        gpus=args.gpus,
    )
    main(cases, args.json, args.pictures, args.profile, args.timeout)


def _acceptance(args: argparse.Namespace) -> Any:
    from medusa_ds.decoding.acceptance import Acceptance

    return Acceptance(args.acceptance, args.temperature, args.epsilon, args.delta)


def _settings(args: argparse.Namespace) -> Any:
    from medusa_ds.decoding.answers import Settings

    rule = {"acceptance": _acceptance(args)} if hasattr(args, "acceptance") else {}
    return Settings(
        args.run,
        args.prompts,
        args.max_new_tokens,
        args.limit,
        device=args.device,
        dtype=args.dtype,
        compile_step=args.compile,
        json_file=args.json,
        picture=args.picture,
        **rule,
    )


RECIPE = [
    option("recipe", help="recipe file, or name of a shipped one"),
    option("overrides", nargs="*", metavar="key=value", help="dotted overrides, as in train.lr=1e-3"),
]
WORLD_SIZE = option("--world-size", type=count, metavar="N", help="ranks that train")
RUN = [
    option("run", help="a finished run's output, its heads folder, OUTPUT/checkpoints/best, or smollm2_135m"),
    option("--device", help="cuda or cpu; without it, a GPU if there is one"),
    option("--dtype", choices=["bf16", "fp32"], help="without it, bf16 on a GPU and fp32 on a CPU"),
]
ACCEPTANCE = [
    option(
        "--acceptance",
        choices=["greedy", "typical", "exact"],
        default="greedy",
        help="greedy: the base model's own text; exact: samples of its distribution; typical: the Medusa paper's",
    ),
    option("--temperature", type=positive, default=1.0, help="of exact and typical acceptance"),
    option("--epsilon", type=positive, default=0.09, help="typical: hard threshold"),
    option("--delta", type=positive, default=0.3, help="typical: entropy-dependent threshold"),
]
ANSWERED: Any = {
    "metavar": "SOURCE",
    "help": 'JSON lines such as {"turns": ["Hello"]}, or what data.path takes; its user turns are answered',
}
PROMPTS = [
    option("--prompts", required=True, **ANSWERED),
    option("--limit", type=count, metavar="N", help="take the first N conversations"),
    option("--max-new-tokens", type=count, default=256, metavar="N", help="of an answer"),
    option("--compile", action="store_true", help="fuse the decoding step with torch.compile; a minute once"),
    option("--json", metavar="FILE", help="write the report"),
    option("--picture", metavar="FILE", help="draw it"),
]

COMMANDS = {
    "list": Command(list_recipes, [option("--copy", metavar="NAME", help="copy this recipe here")]),
    "validate": Command(validate, [*RECIPE, WORLD_SIZE]),
    "show": Command(
        show,
        [
            *RECIPE,
            WORLD_SIZE,
            option("--data", type=count, metavar="N", help="print N training examples, supervised tokens coloured"),
        ],
    ),
    "prepare": Command(
        prepare_data,
        [
            *RECIPE,
            option(
                "--hidden", action="store_true", help="fill data.hidden_cache too, so that no run needs the backbone"
            ),
        ],
    ),
    "estimate": Command(
        estimate_needs,
        [
            *RECIPE,
            option("--world-size", type=count, action="append", metavar="N", help="ranks; may be given several times"),
            option(
                "--tokens-per-second",
                type=positive,
                metavar="X",
                help="speed of all GPUs together; without it, the one that a run into the recipe's output measured",
            ),
            option("--data", action="store_true", help="tokenise the data, as prepare does, to count its tokens"),
        ],
    ),
    "distill": Command(
        distill_model,
        [
            *RECIPE,
            option("--out", required=True, metavar="FILE", help="JSON lines to write, a conversation each"),
            option("--prompts", **ANSWERED),
            option("--split", default="train", help="of a hub dataset"),
            option("--limit", type=count, metavar="N", help="take the first N prompts"),
            option("--synthesize", type=count, metavar="N", help="let the model make up N prompts"),
            option("--synthesize-temperature", type=positive, default=1.0, metavar="T", help="of these"),
            option(
                "--openings",
                nargs="?",
                const=str(Path(__file__).with_name("data") / "openings.txt"),
                metavar="FILE",
                help="they begin with the lines of a text file in turn, so that they differ more; without FILE, ours",
            ),
            option(
                "--exclude",
                action="append",
                default=[],
                metavar="SOURCE",
                help="leave out prompts that share eight words in a row with one of these; may be repeated",
            ),
            option(
                "--temperature",
                type=temperature,
                default=0.0,
                metavar="T",
                help="of the answers; 0, the default, takes the most probable token",
            ),
            option("--top-p", type=share, default=1.0, metavar="P", help="draw from the most probable tokens up to P"),
            option(
                "--max-new-tokens", type=count, default=512, metavar="N", help="of an answer; longer ones are removed"
            ),
            option(
                "--keep-unfinished",
                action="store_true",
                help="keep answers that are cut off or repeat themselves, "
                "without a label on their end: heads that decode long texts meet such text",
            ),
            option(
                "--max-prompt-tokens", type=count, default=1024, metavar="N", help="of a conversation before an answer"
            ),
            option("--seed", type=int, default=0, help="of all draws"),
            option("--batch", type=count, metavar="N", help="rows at once, or requests in flight"),
            option("--server", metavar="URL", help="an OpenAI-compatible server, as http://localhost:8000/v1"),
            option("--server-model", metavar="NAME", help="the model's name there; without it, the recipe's"),
            option("--timeout", type=positive, default=300.0, metavar="SECONDS", help="of a request to the server"),
            option("--retries", type=count, default=5, metavar="N", help="of a request to the server"),
            *RUN[1:],
        ],
    ),
    "bench": Command(
        measure_steps,
        [
            option("recipe", nargs="?", help="recipe file or name; without it, Llama-3-8B's shape with random weights"),
            option("overrides", nargs="*", metavar="key=value", help="dotted overrides, as in loss.chunk_mib=512"),
            option(
                "--part", type=names, default=["step"], metavar="A,B", help="step, head (its loss alone), chat, epochs"
            ),
            option("--stage", type=counts, metavar="N,N", help="without it, the recipe's, or 1 and 2"),
            option("--heads", type=counts, default=[3, 5], metavar="N,N", help="numbers of heads; 3,5"),
            option(
                "--sequence",
                type=counts,
                default=[1024, 2048, 4096, 8192],
                metavar="N,N",
                help="sequence lengths; 1024,2048,4096,8192",
            ),
            option("--batch", type=count, default=6, metavar="N", help="sequences of a step on each GPU; 6"),
            option("--gpus", type=counts, default=[1], metavar="N,N", help="numbers of GPUs, a rank on each; 1"),
            option(
                "--impl",
                type=names,
                metavar="A,B",
                help="ours, ours_fp8, eager, cached, cached_vocab, cached_fp8, "
                "original, torch_linear_ce; without it, all that the machine can do",
            ),
            option("--zero", metavar="NAME", help="DeepSpeed config; zero2 in stage 1, zero3 in stage 2"),
            option("--warmup", type=count, default=3, metavar="N", help="steps before the measured ones; 3"),
            option("--steps", type=count, default=10, metavar="N", help="measured steps; 10"),
            option("--json", default="bench.json", metavar="FILE", help="the report; bench.json"),
            option("--pictures", metavar="DIR", help="draw it"),
            option(
                "--profile", metavar="DIR", help="write a profiler trace of one step a case, and say where time goes"
            ),
            option("--timeout", type=count, default=1800, metavar="S", help="seconds of one case; 1800"),
        ],
    ),
    "generate": Command(
        generate_text,
        [
            *RUN,
            *ACCEPTANCE,
            option("--prompt", metavar="TEXT", help="without it, chat"),
            option("--max-new-tokens", type=count, default=512, metavar="N", help="of an answer"),
            option("--stop", action="append", default=[], metavar="TEXT", help="end at this text; may be repeated"),
            option("--seed", type=int, default=0, help="of exact acceptance"),
        ],
    ),
    "evaluate": Command(evaluate_run, [*RUN, *PROMPTS, *ACCEPTANCE]),
    "tree": Command(
        find_tree,
        [
            *RUN,
            *PROMPTS,
            option("--nodes", type=count, metavar="N", help="size; without it, the fastest by measured step times"),
        ],
    ),
    "export": Command(
        export_run,
        [
            option("run", nargs="?", help="a finished run's output, its heads folder, or one of its checkpoints"),
            option("out", help="directory to make"),
            option(
                "--for",
                dest="engine",
                default="all",
                help="what it is for; all is a directory for all of them",
                choices=["transformers", "vllm", "tgi", "tensorrt-llm", "fasterdecoding", "all"],
            ),
            option("--untrained", metavar="RECIPE", help="in place of a run: a recipe's heads before training"),
            option(
                "--dtype",
                choices=["bfloat16", "float16", "float32"],
                help="without it, the run's, or for a checkpoint the base model's",
            ),
            option(
                "--vocab", type=count, metavar="N", help="cut heads to the N most frequent tokens of their training"
            ),
            option("--force", action="store_true", help="replace an earlier export"),
            option("--push-to-hub", metavar="REPO", help="upload it, a tuned backbone to REPO-backbone"),
        ],
    ),
    "import": Command(
        import_run,
        [
            option("directory", help="holds model.safetensors, medusa_lm_head.safetensors or medusa_lm_head.pt"),
            option("out", help="directory to make"),
            option("--base-model", metavar="NAME", help="without it, as config.json says"),
        ],
    ),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run a subcommand; a user's mistake is a line on standard error and exit status 2."""
    # transformers imports deepspeed, which warns when there is no GPU
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno > logging.WARNING)
    with exit_on_user_error():
        given = sys.argv[1:] if argv is None else argv
        # the launcher names the rank: `deepspeed --module medusa_ds.cli prepare RECIPE --hidden`
        name, *rest = [text for text in given if not text.startswith("--local_rank=")] or ["--help"]
        if name in ("-h", "--help"):
            print("usage: medusa-ds COMMAND ...\n\nTrain with: deepspeed RECIPE.yaml [key=value ...]\n")
            print(
                "\n".join(
                    f"  {key:10} {(command.run.__doc__ or '').splitlines()[0]}" for key, command in COMMANDS.items()
                )
            )
            print("\nmedusa-ds COMMAND --help lists its options.")
            return
        if name not in COMMANDS:
            near = difflib.get_close_matches(name, COMMANDS, 1, cutoff=0.4)
            hint = f"did you mean {near[0]}?" if near else f"allowed are {', '.join(COMMANDS)}"
            raise UserError(f"medusa-ds {name}: no such command; {hint}")
        parser = Parser(prog=f"medusa-ds {name}", description=COMMANDS[name].run.__doc__, allow_abbrev=False)
        for flags, settings in COMMANDS[name].options:
            parser.add_argument(*flags, **settings)
        try:
            COMMANDS[name].run(parser.parse_intermixed_args(rest))
            sys.stdout.flush()
        except BrokenPipeError:  # `medusa-ds list | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
