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
from typing import Any, NamedTuple, NoReturn

from medusa_ds.errors import UserError, exit_on_user_error
from medusa_ds.recipe import Recipe, find_recipe, shipped

Option = tuple[tuple[str, ...], dict[str, Any]]


class Command(NamedTuple):
    """A subcommand: its function (whose docstring is its help) and its options."""

    run: Callable[[argparse.Namespace], None]
    options: list[Option]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}; see {self.prog} --help")


def _option(*names: str, **settings: Any) -> Option:
    return names, settings


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"found {text!r}; allowed is a number above 0")
    return value


def _temperature(text: str) -> float:
    return 0.0 if text in ("0", "0.0") else _positive(text)


def _share(text: str) -> float:
    value = _positive(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"found {text!r}; allowed is a share above 0 and up to 1")
    return value


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) >= 1):
        raise argparse.ArgumentTypeError(f"found {text!r}; allowed is a whole number of at least 1")
    return int(text)


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
        from medusa_ds.prepare import show_examples

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
    from medusa_ds.prepare import main

    main(recipe, args.hidden)


def estimate_needs(args: argparse.Namespace) -> None:
    """Estimate parameters, memory per GPU, disk and hours of a recipe."""
    recipe = Recipe.load(args.recipe, args.overrides, planning=True)
    from medusa_ds.estimate import main

    main(recipe, args.world_size or [1, 2, 4, 8], args.tokens_per_second, args.data)


def distill_model(args: argparse.Namespace) -> None:
    """Let the recipe's own model answer prompts, or make them up, as training data; goes on where it was interrupted.

    Without a server the built-in engine decodes. Rows go to OUT in the format that `data.path` reads.
    """
    recipe = Recipe.load(args.recipe, args.overrides, planning=True)
    from medusa_ds.distill import Sampling, Settings, distill

    sampling = Sampling(args.temperature, args.top_p, args.max_new_tokens, args.max_prompt_tokens, args.seed)
    distill(recipe, Settings(
        args.out, args.prompts, args.split, args.limit, args.synthesize or 0, args.synthesize_temperature,
        args.exclude, sampling, args.batch, args.server, args.server_model, args.timeout, args.retries, args.device,
        args.dtype,
    ))  # fmt: skip


def generate_text(args: argparse.Namespace) -> None:
    """Answer a prompt with a run's heads, or chat on the terminal; shows tokens per step and per second."""
    from medusa_ds.generate import main

    main(args.run, args.prompt, acceptance=_acceptance(args), max_new_tokens=args.max_new_tokens, stop=args.stop,
         seed=args.seed, device=args.device, dtype=args.dtype)  # fmt: skip


def evaluate_run(args: argparse.Namespace) -> None:
    """Measure a run's heads on prompts: accuracies, tokens per step, speed-up. Takes a finished run or a checkpoint.

    `chain acceptance, teacher-forced` is what training calls acceptance_length: each head's first guess, at every
    position of given texts. `tokens per step, decoding` is what a tree accepts while it generates.
    """
    from medusa_ds.evaluate import evaluate

    evaluate(_settings(args))


def find_tree(args: argparse.Namespace) -> None:
    """Find the candidate tree that suits a run's heads and this machine, and write it into the run's heads.json."""
    from medusa_ds.tree import search_tree

    search_tree(_settings(args), args.nodes)


def export_run(args: argparse.Namespace) -> None:
    """Write heads in the layouts of vLLM, TGI, TensorRT-LLM, FasterDecoding/Medusa and plain transformers."""
    from medusa_ds.export import main

    main(args.run, args.out, args.engine, untrained=args.untrained, dtype=args.dtype, force=args.force,
         push_to_hub=args.push_to_hub, vocab=args.vocab)  # fmt: skip


def import_run(args: argparse.Namespace) -> None:
    """Bring published heads of FasterDecoding's or vLLM's layout into ours, to be used like a run."""
    from medusa_ds.import_heads import main

    main(args.directory, args.out, args.base_model)


def _acceptance(args: argparse.Namespace) -> Any:
    from medusa_ds.decoding.acceptance import Acceptance

    return Acceptance(args.acceptance, args.temperature, args.epsilon, args.delta)


def _settings(args: argparse.Namespace) -> Any:
    from medusa_ds.decoding.answers import Settings

    rule = {"acceptance": _acceptance(args)} if hasattr(args, "acceptance") else {}
    return Settings(args.run, args.prompts, args.max_new_tokens, args.limit, device=args.device, dtype=args.dtype,
                    compile_step=args.compile, json_file=args.json, picture=args.picture, **rule)  # fmt: skip


RECIPE = [
    _option("recipe", help="recipe file, or name of a shipped one"),
    _option("overrides", nargs="*", metavar="key=value", help="dotted overrides, as in train.lr=1e-3"),
]
WORLD_SIZE = _option("--world-size", type=_count, metavar="N", help="ranks that train")
RUN = [
    _option("run", help="a finished run's output, its heads folder, or OUTPUT/checkpoints/best"),
    _option("--device", help="cuda or cpu; without it, a GPU if there is one"),
    _option("--dtype", choices=["bf16", "fp32"], help="without it, bf16 on a GPU and fp32 on a CPU"),
]
ACCEPTANCE = [
    _option(
        "--acceptance",
        choices=["greedy", "typical", "exact"],
        default="greedy",
        help="greedy: the base model's own text; exact: samples of its distribution; typical: the Medusa paper's",
    ),
    _option("--temperature", type=_positive, default=1.0, help="of exact and typical acceptance"),
    _option("--epsilon", type=_positive, default=0.09, help="typical: hard threshold"),
    _option("--delta", type=_positive, default=0.3, help="typical: entropy-dependent threshold"),
]
PROMPTS = [
    _option("--prompts", required=True, metavar="FILE", help='JSON lines such as {"turns": ["Hello"]}'),
    _option("--limit", type=_count, metavar="N", help="take the first N conversations"),
    _option("--max-new-tokens", type=_count, default=256, metavar="N", help="of an answer"),
    _option("--compile", action="store_true", help="fuse the decoding step with torch.compile; a minute once"),
    _option("--json", metavar="FILE", help="write the report"),
    _option("--picture", metavar="FILE", help="draw it; needs medusa-ds[plots]"),
]

COMMANDS = {
    "list": Command(list_recipes, [_option("--copy", metavar="NAME", help="copy this recipe here")]),
    "validate": Command(validate, [*RECIPE, WORLD_SIZE]),
    "show": Command(show, [
        *RECIPE, WORLD_SIZE,
        _option("--data", type=_count, metavar="N", help="print N training examples, supervised tokens coloured"),
    ]),
    "prepare": Command(prepare_data, [
        *RECIPE,
        _option("--hidden", action="store_true", help="fill data.hidden_cache too, so that no run needs the backbone"),
    ]),
    "estimate": Command(estimate_needs, [
        *RECIPE,
        _option("--world-size", type=_count, action="append", metavar="N", help="ranks; may be given several times"),
        _option("--tokens-per-second", type=_positive, metavar="X",
                help="speed of all GPUs together; without it, the one that a run into the recipe's output measured"),
        _option("--data", action="store_true", help="tokenise the data, as prepare does, to count its tokens"),
    ]),
    "distill": Command(distill_model, [
        *RECIPE,
        _option("--out", required=True, metavar="FILE", help="JSON lines to write, a conversation each"),
        _option("--prompts", metavar="SOURCE",
                help='JSON lines such as {"turns": ["Hello"]}, or what data.path takes; its user turns are answered'),
        _option("--split", default="train", help="of a hub dataset"),
        _option("--limit", type=_count, metavar="N", help="take the first N prompts"),
        _option("--synthesize", type=_count, metavar="N", help="let the model make up N prompts"),
        _option("--synthesize-temperature", type=_positive, default=1.0, metavar="T", help="of these"),
        _option("--exclude", action="append", default=[], metavar="SOURCE",
                help="leave out prompts that share eight words in a row with one of these; may be repeated"),
        _option("--temperature", type=_temperature, default=0.0, metavar="T",
                help="of the answers; 0, the default, takes the most probable token"),
        _option("--top-p", type=_share, default=1.0, metavar="P", help="draw from the most probable tokens up to P"),
        _option("--max-new-tokens", type=_count, default=512, metavar="N",
                help="of an answer; longer ones are removed"),
        _option("--max-prompt-tokens", type=_count, default=1024, metavar="N",
                help="of a conversation before an answer"),
        _option("--seed", type=int, default=0, help="of all draws"),
        _option("--batch", type=_count, metavar="N", help="rows at once, or requests in flight"),
        _option("--server", metavar="URL", help="an OpenAI-compatible server, as http://localhost:8000/v1"),
        _option("--server-model", metavar="NAME", help="the model's name there; without it, the recipe's"),
        _option("--timeout", type=_positive, default=300.0, metavar="SECONDS", help="of a request to the server"),
        _option("--retries", type=_count, default=5, metavar="N", help="of a request to the server"),
        *RUN[1:],
    ]),
    "generate": Command(generate_text, [
        *RUN, *ACCEPTANCE,
        _option("--prompt", metavar="TEXT", help="without it, chat"),
        _option("--max-new-tokens", type=_count, default=512, metavar="N", help="of an answer"),
        _option("--stop", action="append", default=[], metavar="TEXT", help="end at this text; may be repeated"),
        _option("--seed", type=int, default=0, help="of exact acceptance"),
    ]),
    "evaluate": Command(evaluate_run, [*RUN, *PROMPTS, *ACCEPTANCE]),
    "tree": Command(find_tree, [
        *RUN, *PROMPTS,
        _option("--nodes", type=_count, metavar="N", help="size; without it, the fastest by measured step times"),
    ]),
    "export": Command(export_run, [
        _option("run", nargs="?", help="a finished run's output, its heads folder, or one of its checkpoints"),
        _option("out", help="directory to make"),
        _option("--for", dest="engine", default="all", help="what it is for; all is a directory for all of them",
                choices=["transformers", "vllm", "tgi", "tensorrt-llm", "fasterdecoding", "all"]),
        _option("--untrained", metavar="RECIPE", help="in place of a run: a recipe's heads before training"),
        _option("--dtype", choices=["bfloat16", "float16", "float32"],
                help="without it, the run's, or for a checkpoint the base model's"),
        _option("--vocab", type=_count, metavar="N", help="cut heads to the N most frequent tokens of their training"),
        _option("--force", action="store_true", help="replace an earlier export"),
        _option("--push-to-hub", metavar="REPO", help="upload it, a tuned backbone to REPO-backbone"),
    ]),
    "import": Command(import_run, [
        _option("directory", help="holds model.safetensors, medusa_lm_head.safetensors or medusa_lm_head.pt"),
        _option("out", help="directory to make"),
        _option("--base-model", metavar="NAME", help="without it, as config.json says"),
    ]),
}  # fmt: skip


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
        parser = _Parser(prog=f"medusa-ds {name}", description=COMMANDS[name].run.__doc__, allow_abbrev=False)
        for names, settings in COMMANDS[name].options:
            parser.add_argument(*names, **settings)
        try:
            COMMANDS[name].run(parser.parse_intermixed_args(rest))
            sys.stdout.flush()
        except BrokenPipeError:  # `medusa-ds list | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
