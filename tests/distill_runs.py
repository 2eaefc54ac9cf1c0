"""Runs of `medusa-ds distill` on a tiny model, and what they leave."""

import json

from medusa_ds import cli


def arguments(recipe, out, prompts, *more):
    options = "--max-new-tokens 24 --max-prompt-tokens 120 --temperature 1 --device cpu".split()
    return ["distill", str(recipe), "--out", str(out), "--prompts", str(prompts), *options, *more]


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def content(out):
    """Everything that a run leaves, without its order."""
    progress = lines(out.with_name(out.name + ".progress"))
    return [sorted(map(json.dumps, rows)) for rows in (lines(out), progress)]


def count_lines(out):
    return sum(file.read_bytes().count(b"\n") for file in out.parent.glob(f"{out.name}*"))


def run(recipe, out, prompts, *more):
    cli.main(arguments(recipe, out, prompts, *more))
    return content(out)
