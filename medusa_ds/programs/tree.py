"""Find the candidate tree that suits a run's heads and this machine, and write it into the run's heads.json.

Example:
    medusa-ds tree runs/smollm2_135m_stage1 --prompts questions.jsonl

Ranks come from teacher-forced passes over plain greedy answers. Trees are found on joint counts; what they promise is
what decoding would accept of answers that they were not found on, since a tree of 64 nodes fits the noise of some
hundred positions.
"""

from functools import partial
from typing import Any

from medusa_ds.config.types import Count
from medusa_ds.data.prompts import read_prompts
from medusa_ds.decoding.answers import answer_prompts, device_name
from medusa_ds.decoding.decoder import Decoder
from medusa_ds.decoding.measure import head_ranks, step_ms
from medusa_ds.decoding.pictures import draw_tree
from medusa_ds.decoding.trees import RankCounts, Tree, best_tree, chain
from medusa_ds.errors import UserError
from medusa_ds.files import check_writable
from medusa_ds.progress import progress
from medusa_ds.runs import PromptSettings, encode, save_tree

WIDTH = 10  # guesses of a head that are told apart
SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64)
Report = dict[str, Any]


class Settings(PromptSettings):
    """What the command line says."""

    nodes: Count | None = None
    """Size with the root; without it, the fastest by measured step times."""


def run(settings: Settings) -> Report:
    """Find the best tree for a run, print what was found and write it into the run's `heads.json`."""
    nodes = settings.nodes
    prompts = read_prompts("--prompts", settings.prompts, settings.limit)
    saved = settings.open_run()
    config_file = saved.config_file
    if config_file is None:
        raise UserError(
            f"{settings.name}: checkpoints and shipped heads are sealed; name a finished run's output or heads"
        )
    check_writable(config_file, "RUN")
    run = settings.load(saved)
    answers, _ = answer_prompts(
        progress(prompts, "prompts"),
        partial(encode, run),
        run.decode,
        Decoder(run.backbone, None, chain(0)),
        None,
        settings.max_new_tokens,
    )
    per_answer = [head_ranks(run.backbone, run.heads, a.prompt, a.plain.tokens) for a in answers]
    if min(sum(map(len, half)) for half in (per_answer[::2], per_answer[1::2])) == 0:
        raise UserError("prompts: too few answers to find a tree; give more prompts or more new tokens")
    width = min(WIDTH, run.heads.num_rows)
    counts, *halves = (RankCounts(part, width) for part in (per_answer, per_answer[::2], per_answer[1::2]))
    context = max(len(answer.prompt) + len(answer.plain.tokens) for answer in answers)
    sizes: list[Report] = []
    for size in progress(sorted({*SIZES, nodes or 1}), "sizes"):
        tree = counts.find_tree(size)
        decoder = Decoder(run.backbone, run.heads, tree, compile_step=settings.compile_step)
        joint, independent = _held_out(halves, size)
        milliseconds = step_ms(decoder, context)
        sizes.append(
            {
                "nodes": tree.nodes,
                "depth": tree.depth,
                "step_ms": milliseconds,
                "paths": tree.paths,
                "expected": counts.tokens_per_step(tree),
                "held_out": joint,
                "held_out_independent": independent,
                "tokens_per_s": 1000 * joint / milliseconds,
            }
        )
    fastest = max(sizes, key=lambda row: row["tokens_per_s"])
    large = [row for row in sizes if row["nodes"] >= (nodes or 1)] or sizes[-1:]
    chosen = fastest if nodes is None else large[0]
    report = {
        "run": settings.name,
        "device": device_name(run.backbone),
        "positions": counts.total,
        "context": context,
        "sizes": sizes,
        "chosen": chosen["nodes"],
    }
    save_tree(config_file, chosen["paths"])
    print(f"{counts.total} positions; step times at {context} tokens of text on {report['device']}")
    print("nodes  step ms  tokens/step  (independence)  tokens/s")
    for row in sizes:
        mark = "*" if row is chosen else " "
        figures = row["step_ms"], row["held_out"], row["held_out_independent"], row["tokens_per_s"]
        print(f"{row['nodes']:5}{mark} {figures[0]:8.2f} {figures[1]:12.3f} {figures[2]:15.3f} {figures[3]:9.1f}")
    print("tokens/step: of trees found on one half of the answers, decoding the other")
    if chosen["tokens_per_s"] < fastest["tokens_per_s"]:
        ratio = fastest["tokens_per_s"] / chosen["tokens_per_s"]
        print(f"note: {fastest['nodes']} nodes are {ratio:.2f} times as fast here; leave out --nodes to take them")
    print(f"wrote the tree of {chosen['nodes']} nodes to {config_file}")
    settings.write_report(report)
    if settings.picture:
        draw_tree(Tree(chosen["paths"]), counts, settings.picture)
    return report


def _held_out(halves: list[RankCounts], size: int) -> tuple[float, float]:
    """Tokens per step on half of the answers with joint and independent trees of the other half; mean of both ways."""
    joint = independent = 0.0
    for own, other in (halves, halves[::-1]):
        joint += other.tokens_per_step(own.find_tree(size)) / 2
        independent += other.tokens_per_step(best_tree(own.independent_probability, own.num, own.width, size)) / 2
    return joint, independent
