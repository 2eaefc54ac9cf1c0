"""Measure a run's heads on prompts: accuracies, tokens per step, speed-up. Takes a finished run or a checkpoint.

Example:
    medusa-ds evaluate smollm2_135m --prompts questions.jsonl

Accuracies are teacher-forced on the plain answers: every position counts. Of head k, `full` is the share of positions
where the first guesses of heads 1 to k are right, `cond` the same among those where heads 1 to k-1 are. Accepted
tokens are counted while decoding: only the positions where a step begins count, and a tree holds more than each head's
first guess. Both stand in the report under different names. With --server, a server that runs the heads decodes in
place of ours: its tokens a second, what its metrics page counts, and its texts against our plain greedy ones. With
`--json RUN/evaluation.json`, the card of an export has the figures.
"""

import time
from collections import Counter, defaultdict
from functools import partial
from itertools import pairwise
from typing import Annotated, Any

import torch
from pydantic import Field

from medusa_ds.config.settings import Beside
from medusa_ds.config.types import Count, Positive
from medusa_ds.data.prompts import Prompt, read_prompts
from medusa_ds.decoding.acceptance import AcceptanceSettings
from medusa_ds.decoding.answers import Answer, answer_prompts, device_name
from medusa_ds.decoding.decoder import Decoder, Generation
from medusa_ds.decoding.measure import (
    Difference,
    copy_bandwidth,
    first_difference,
    head_ranks,
    plain_step_bytes,
    step_ms,
)
from medusa_ds.decoding.pictures import draw_evaluation
from medusa_ds.decoding.trees import chain
from medusa_ds.distilling.served import HeadServer, Reply
from medusa_ds.errors import UserError
from medusa_ds.model.backbone import lm_head_weight
from medusa_ds.progress import progress
from medusa_ds.runs import PromptSettings, Run, encode

TOP = 5
Report = dict[str, Any]


class Settings(AcceptanceSettings, PromptSettings):
    """What the command line says."""

    server: str | None = Field(None, title="URL")
    """In place of our own decoder, measure a server that has these heads, as http://localhost:8000/v1; its key, if it
    wants one, is that of OPENAI_API_KEY."""
    server_model: Annotated[str | None, Beside("server")] = Field(None, title="NAME")
    """What the server calls the model; without it, the first that it lists."""
    in_flight: Annotated[Count, Beside("server")] = 1
    """Requests to the server at once."""
    timeout_s: Annotated[Positive, Beside("server")] = Field(300, alias="timeout", title="S")
    """Of a request to the server."""


def run(settings: Settings) -> Report:
    """Measure a run, print a table, write JSON and picture if asked, and return the report."""
    acceptance, prompts = settings.acceptance, read_prompts("--prompts", settings.prompts, settings.limit)
    if settings.server and acceptance.rule != "greedy":
        raise UserError(f"--acceptance: found {acceptance.rule}; a server is asked for greedy texts")
    server = HeadServer(settings.server, settings.server_model, settings.timeout_s) if settings.server else None
    run = settings.load()
    plain = Decoder(run.backbone, None, chain(0), acceptance, compile_step=settings.compile_step)
    if server is not None:
        return _served(settings, prompts, run, plain, server)
    options = {"compile_step": settings.compile_step, "adapt": True}
    medusa = Decoder(run.backbone, run.heads, run.tree, acceptance, **options)
    asked = progress(prompts, "prompts")
    answers, left_out = answer_prompts(asked, partial(encode, run), run.decode, plain, medusa, settings.max_new_tokens)
    report: Report = {
        "run": settings.name,
        "prompts": {"file": settings.prompts, "answers": len(answers), "left_out_too_long": left_out},
        "acceptance": vars(acceptance),
        "device": device_name(run.backbone),
        "tree": {"nodes": run.tree.nodes, "depth": run.tree.depth, "measured": run.measured},
        "heads": _accuracies(run, answers),
        "accepted": _accepted(answers),
        "speed": _speed(run, answers, plain, medusa, settings.max_new_tokens),
    }
    if acceptance.rule == "greedy":
        report["texts"] = _differences(run, answers, [a.medusa.tokens if a.medusa else None for a in answers])
    print(_table(report))
    settings.write_report(report)
    if settings.picture:
        draw_evaluation(report["heads"], report["accepted"]["distribution"], settings.picture)
    return report


def _served(settings: Settings, prompts: list[Prompt], run: Run, plain: Decoder, server: HeadServer) -> Report:
    """The report of a server; answers that are missing are a `UserError` after it."""
    answers, left_out = answer_prompts(prompts, partial(encode, run), run.decode, plain, None, settings.max_new_tokens)
    found = server.measure([a.prompt for a in answers], settings.max_new_tokens, settings.in_flight)
    report: Report = {
        "run": settings.name,
        "server": {"url": server.url, "model": server.model, "in_flight": settings.in_flight},
        "prompts": {
            "file": settings.prompts,
            "answers": len(answers) - len(found.problems),
            "left_out_too_long": left_out,
            "failed": len(found.problems),
        },
        "heads": _accuracies(run, answers),
        "speed": {"server_tokens_per_s": found.tokens / found.seconds, "tokens": found.tokens},
        "texts": _differences(run, answers, [_tokens(run, *each) for each in zip(answers, found.replies, strict=True)]),
    }
    if found.drafts:
        reached = [found.drafts, *found.accepted, 0]
        report["accepted"] = {
            "mean_tokens_per_step": 1 + sum(found.accepted) / found.drafts,
            "steps": found.drafts,
            "distribution": {str(n): a - b for n, (a, b) in enumerate(pairwise(reached), 1)},
            "by_position": found.accepted,
        }
    accepted = report.get("accepted")
    lines = _accuracy_lines(report["heads"])
    lines += _step_lines(accepted, "the server's own count") if accepted else ["no counts of drafts on its /metrics"]
    lines.append(
        f"the server                         {report['speed']['server_tokens_per_s']:.1f} tokens/s, "
        f"{settings.in_flight} at a time"
    )
    print("\n".join([*lines, *_text_lines(report["texts"])]))
    settings.write_report(report)
    if settings.picture and accepted:
        draw_evaluation(report["heads"], accepted["distribution"], settings.picture)
    if found.problems:
        raise UserError(
            f"--server: {server.url}: {len(found.problems)} of {len(answers)} requests failed, the first: "
            f"{found.problems[0]}; the report is of the others"
        )
    return report


def _tokens(run: Run, answer: Answer, reply: Reply) -> list[int] | None:
    """A server's answer; where it tells no tokens, those of its text, which need not be what it decoded."""
    plain, rows = answer.plain.tokens, lm_head_weight(run.backbone).shape[0]
    if reply.ids and max(reply.ids) >= rows:
        raise UserError(f"--server: found token {max(reply.ids)}; the run's model has {rows}: it serves another model")
    if reply.problem or reply.ids is not None:
        return reply.ids
    same = reply.text == run.decode(plain)
    return plain if same else run.tokenizer(reply.text, add_special_tokens=False)["input_ids"]


def _accuracies(run: Run, answers: list[Answer]) -> Report:
    """Teacher-forced figures over the same positions for all heads."""
    ranks_Mk = torch.cat([head_ranks(run.backbone, run.heads, a.prompt, a.plain.tokens) for a in answers])
    total = max(len(ranks_Mk), 1)
    right_Mk = (ranks_Mk == 0).cumprod(1).bool()
    result: Report = {"positions": len(ranks_Mk)}
    before, chain_length = total, 1.0
    for k, (ranks_M, right_M) in enumerate(zip(ranks_Mk.T, right_Mk.T, strict=True), 1):
        result[f"head{k}"] = {f"top{top}": int((ranks_M < top).sum()) / total for top in range(1, TOP + 1)}
        full = int(right_M.sum())
        result[f"full_acc_{k}"], result[f"cond_acc_{k}"] = full / total, full / max(before, 1)
        before, chain_length = full, chain_length + full / total
    result["chain_acceptance_teacher_forced"] = chain_length
    return result


def _accepted(answers: list[Answer]) -> Report:
    """Tokens of a decoding step; a step that the length limit cut short is left out, one that ended the text is not."""
    by_category: dict[str, list[int]] = defaultdict(list)
    for answer in answers:
        assert answer.medusa is not None
        steps = answer.medusa.accepted
        by_category[answer.category] += steps[:-1] if answer.medusa.finish == "length" else steps
    steps = [count for counts in by_category.values() for count in counts]
    return {
        "mean_tokens_per_step": _mean(steps),
        "steps": len(steps),
        "distribution": {str(count): share for count, share in sorted(Counter(steps).items())},
        "by_category": {category: _mean(counts) for category, counts in sorted(by_category.items())},
    }


def _speed(run: Run, answers: list[Answer], plain: Decoder, medusa: Decoder, max_new_tokens: int) -> Report:
    """Rates of both decoders on the same prompts, decoding alone and with prefill, and what a step allows at most.

    The first token comes from the prefill, so decoding alone is without it.
    """
    rows = {"plain": [a.plain for a in answers], "medusa": [a.medusa for a in answers if a.medusa is not None]}
    context = sum(len(answer.prompt) + len(answer.plain.tokens) // 2 for answer in answers) // len(answers)
    nodes = [count for row in rows["medusa"] for count in row.nodes] or [medusa.tree.nodes]  # answers of one token
    times = {count: step_ms(medusa, context, nodes=count) for count in set(nodes)}
    steps = {"plain": step_ms(plain, context), "medusa": sum(times[count] for count in nodes) / len(nodes)}
    report: Report = {}
    for name, own in rows.items():
        report |= {
            f"{name}_decoding_tokens_per_s": _decoding_rate(own),
            f"{name}_end_to_end_tokens_per_s": _end_to_end_rate(own),
            f"{name}_prefill_ms": 1000 * sum(row.prefill_s for row in own) / len(own),
            f"{name}_step_ms": steps[name],
        }
    for kind in ("decoding", "end_to_end"):
        report[f"speed_up_{kind}"] = report[f"medusa_{kind}_tokens_per_s"] / report[f"plain_{kind}_tokens_per_s"]
    emitted = [count for row in rows["medusa"] for count in row.accepted]
    overhead = steps["medusa"] / steps["plain"]
    few = answers[:4]
    report |= {
        "step_overhead": overhead,
        "most_that_a_step_allows": _mean(emitted) / overhead,
        "context": context,
        "steps_by_nodes": {str(count): number for count, number in sorted(Counter(nodes).items())},
        "speed_up_decoding_by_category": {
            category: _decoding_rate([a.medusa for a in these if a.medusa]) / _decoding_rate([a.plain for a in these])
            for category in sorted({answer.category for answer in answers})
            if (these := [answer for answer in answers if answer.category == category])
        },
        "transformers_generate_tokens_per_s": _transformers_rate(run, few, max_new_tokens),
        "plain_tokens_per_s_on_the_same": _end_to_end_rate([a.plain for a in few]),
    }
    if run.backbone.device.type == "cuda":
        bandwidth = copy_bandwidth(run.backbone.device)
        report["copy_gb_per_s"] = bandwidth / 1e9
        report["plain_share_of_bandwidth"] = plain_step_bytes(run.backbone) / (steps["plain"] / 1000) / bandwidth
    return report


def _decoding_rate(rows: list[Generation]) -> float:
    seconds = sum(row.decode_s for row in rows)
    return sum(len(row.tokens) - 1 for row in rows) / seconds if seconds else float("nan")


def _end_to_end_rate(rows: list[Generation]) -> float:
    return sum(len(row.tokens) for row in rows) / sum(row.prefill_s + row.decode_s for row in rows)


def _transformers_rate(run: Run, answers: list[Answer], max_new_tokens: int) -> float:
    """Tokens a second of transformers' own greedy `generate`, prefill included, each prompt's length warmed up."""

    def generate(answer: Answer, limit: int) -> int:
        ids = torch.tensor([answer.prompt], device=run.backbone.device)
        out: torch.Tensor = run.backbone.generate(  # type: ignore[operator]
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit, do_sample=False, num_beams=1, pad_token_id=0
        )
        return len(out[0, ids.shape[1] :].tolist())  # waits for the device

    tokens, seconds = 0, 0.0
    for answer in answers:
        generate(answer, 2)
        started = time.perf_counter()
        tokens += generate(answer, max_new_tokens)
        seconds += time.perf_counter() - started
    return tokens / seconds


def _differences(run: Run, answers: list[Answer], others: list[list[int] | None]) -> Report:
    """Greedy texts that differ from plain decoding, each with the margin by which the base model told the two apart.

    `others` are the tokens of the other texts, None for one that is missing.
    """
    differences = []
    for answer, tokens in zip(answers, others, strict=True):
        plain = answer.plain.tokens
        if tokens is not None and tokens != plain:
            found = first_difference(run.backbone, answer.prompt, plain, tokens)
            found = found or Difference(min(len(tokens), len(plain)), float("inf"), 0.0)  # one goes on
            differences.append({**found._asdict(), "tie": found.is_tie})
    compared, ties = len(others) - others.count(None), sum(row["tie"] for row in differences)
    return {"compared": compared, "differ": len(differences), "differ_by_a_tie": ties, "differences": differences}


def _accuracy_lines(heads: Report) -> list[str]:
    names = [name for name in heads if name.startswith("head")]
    lines = ["head  " + "  ".join(f"top-{top}" for top in range(1, TOP + 1)) + "  full   cond"]
    for k, name in enumerate(names, 1):
        tops = "  ".join(f"{share:.3f}" for share in heads[name].values())
        lines.append(f"{k:4}  {tops}  {heads[f'full_acc_{k}']:.3f}  {heads[f'cond_acc_{k}']:.3f}")
    return [*lines, f"chain acceptance, teacher-forced   {heads['chain_acceptance_teacher_forced']:.3f} tokens"]


def _step_lines(accepted: Report, how: str) -> list[str]:
    shares = ", ".join(
        f"{count}: {number / max(accepted['steps'], 1):.1%}" for count, number in accepted["distribution"].items()
    )
    return [
        f"tokens per step, decoding          {accepted['mean_tokens_per_step']:.3f} ({how})",
        f"steps by tokens                    {shares}",
    ]


def _text_lines(texts: Report) -> list[str]:
    rows = [row for row in texts["differences"] if not row["tie"]]
    return [
        f"texts that differ from plain greedy: {texts['differ']} of {texts['compared']}"
        f" ({texts['differ_by_a_tie']} at a tie within rounding)",
        *(
            f"  token {row['position']}: logits {row['gap']:.4g} apart, resolution {row['resolution']:.4g}"
            for row in rows
        ),
    ]


def _table(report: Report) -> str:
    accepted, speed, tree = report["accepted"], report["speed"], report["tree"]
    lines = _accuracy_lines(report["heads"])
    origin = "tree" if tree["measured"] else "default tree, see medusa-ds tree,"
    lines += _step_lines(accepted, f"{origin} of {tree['nodes']} nodes")
    means = accepted["by_category"].items()
    lines += [f"  {name or '(none)':32} {mean:.3f}" for name, mean in means if len(means) > 1]
    for kind, what in (("decoding", "decoding alone"), ("end_to_end", "end to end, with prefill")):
        rates = speed[f"plain_{kind}_tokens_per_s"], speed[f"medusa_{kind}_tokens_per_s"]
        lines.append(
            f"{what:34} plain {rates[0]:.1f}, heads {rates[1]:.1f} tokens/s = {speed[f'speed_up_{kind}']:.2f} x"
        )
    categories = speed["speed_up_decoding_by_category"].items()
    lines += [f"  {name or '(none)':32} {ratio:.2f} x" for name, ratio in categories if len(categories) > 1]
    lines += [
        f"transformers' generate             {speed['transformers_generate_tokens_per_s']:.1f} tokens/s end to end "
        f"(plain on the same prompts: {speed['plain_tokens_per_s_on_the_same']:.1f})",
        f"step at {speed['context']} tokens of text: plain {speed['plain_step_ms']:.3f} ms, tree "
        f"{speed['medusa_step_ms']:.3f} ms = {speed['step_overhead']:.2f} x: decoding alone can be at most "
        f"{speed['most_that_a_step_allows']:.2f} x",
    ]
    if len(speed["steps_by_nodes"]) > 1:
        shares = ", ".join(f"{count}: {number}" for count, number in speed["steps_by_nodes"].items())
        lines.append(f"steps by nodes that they verified  {shares}")
    if speed["speed_up_decoding"] > 1.05 * speed["most_that_a_step_allows"]:
        lines.append("warning: measured more than a step allows; the machine was not quiet, measure again")
    if "copy_gb_per_s" in speed:
        lines.append(f"plain step: {speed['plain_share_of_bandwidth']:.0%} of {speed['copy_gb_per_s']:.0f} GB/s (copy)")
    if "texts" in report:
        lines += _text_lines(report["texts"])
    return "\n".join(lines)


def _mean(values: list[int]) -> float:
    return sum(values) / len(values) if values else float("nan")
