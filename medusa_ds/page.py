"""The page about a run: one HTML file that needs nothing beside it, as its pictures are SVG."""

import html
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from medusa_ds.config.parsing import read_text
from medusa_ds.decoding.pictures import new_figure
from medusa_ds.errors import UserError
from medusa_ds.files import explained, read_json_lines, write

NAME = "report.html"
"""Of the page in a run's directory."""
_STYLE = """body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; color: #222 }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem } svg { width: 100%; height: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums } td, th { padding: .2rem .8rem .2rem 0 }
td + td { text-align: right } tr { border-bottom: 1px solid #ddd } td:first-child { min-width: 8rem }
.words td + td { text-align: left }
pre { background: #f6f6f6; padding: 1rem; overflow: auto; font-size: 13px }"""


def write_page(output: Path, file: Path, evaluation: Mapping[str, Any] | None = None) -> None:
    """Write the page about the run in `output`; `evaluation` is a report of `medusa-ds evaluate`.

    Raises:
        UserError: the run's files cannot be read, or the page cannot be written.
    """
    try:
        page = _page(output, evaluation)
    except (OSError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{output}: metrics.jsonl, launches.jsonl or recipe.yaml are missing or not what a run of this version "
            f"writes ({type(error).__name__}: {str(error)[:80]}); name the output of a run that has taken a step"
        ) from None
    with explained(f"{file}: cannot be written", "name another file in --out"):
        write(file, page)


def _page(output: Path, evaluation: Mapping[str, Any] | None) -> str:
    lines = read_json_lines(output / "metrics.jsonl")
    train, held_out = ([line for line in lines if line["kind"] == kind] for kind in ("train", "validation"))
    launches = read_json_lines(output / "launches.jsonl")
    num = sum(key.startswith("head") and key.endswith("_loss") for key in (train or held_out)[-1])
    heads = [f"head{k}" for k in range(1, num + 1)]
    parts = [
        f"<h1>{html.escape(output.resolve().name)}</h1>",
        _facts(train, launches[-1]),
        "<h2>Held-out conversations</h2>",
        _held_out(held_out, heads),
        _plot(train, held_out, {f"{name}_loss": name for name in heads} | {"lm_loss": "LM head"}, "loss, nats a token"),
        _plot(train, held_out, {f"{name}_acc": name for name in heads}, "share of right first guesses"),
        _plot(train, held_out, {"acceptance_length": "heads 1..k right"}, "acceptance length, tokens a step"),
        "<h2>Speed and memory</h2>",
        _plot(train, [], {"tokens_per_s": "all", "supervised_tokens_per_s": "supervised"}, "tokens/s of all ranks"),
        _plot(train, [], {"peak_allocated_gib": "allocated", "peak_reserved_gib": "reserved"}, "GiB of a GPU, peak"),
        _plot(train, [], {"grad_norm": "gradient norm"}, "norm"),
    ]
    if data := launches[-1].get("data"):
        counts = [(name.replace("_", " "), f"{value:,}") for name, value in data.items() if isinstance(value, int)]
        left_out = [
            (f"left out: {reason}", f"{number:,}, first {at}") for reason, (number, at) in data["rejected"].items()
        ]
        parts += ["<h2>Data</h2>", _table(counts + left_out)]
    if evaluation:
        parts += ["<h2>Decoding</h2>", _evaluation(evaluation)]
    parts += ["<h2>Recipe</h2>", f"<pre>{html.escape(read_text(output / 'recipe.yaml'))}</pre>"]
    head = f'<!doctype html><meta charset="utf-8"><title>{html.escape(output.name)}</title><style>{_STYLE}</style>'
    return head + "\n".join(parts) + "\n"


def _facts(train: list[dict[str, Any]], launch: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in launch["versions"].items() if version)
    rows = [("machine", f"{launch['ranks']} x {launch['device']}"), ("versions", versions)]
    if train:
        rows += [("steps", train[-1]["step"]), ("time in steps", f"{sum(line['seconds'] for line in train):,.0f} s")]
    return _table(rows, "words")


def _held_out(lines: list[dict[str, Any]], heads: list[str]) -> str:
    if not lines:
        return "<p>None were held out.</p>"
    ends = lines if len(lines) == 1 else [lines[0], lines[-1]]
    rows = [("", *(f"step {line['step']}" for line in ends))]
    names = {f"{head}_{kind}": f"{head}, {kind}" for head in heads for kind in ("loss", "acc")}
    for key, name in {**names, "acceptance_length": "acceptance length"}.items():
        found = (line.get(key) for line in ends)
        rows.append((name, *("-" if value is None else f"{value:.3f}" for value in found)))
    return _table(rows)


def _evaluation(report: Mapping[str, Any]) -> str:
    """Every figure of an evaluation that is a number or a word, under the path of its keys."""

    def flat(value: Any, path: str) -> list[tuple[str, str]]:
        if isinstance(value, Mapping):
            return [row for key, child in value.items() for row in flat(child, f"{path} {key}".strip())]
        shown = f"{value:,.4g}" if isinstance(value, float) else str(value)
        return [] if isinstance(value, list) else [(path.replace("_", " "), shown)]

    return _table(flat(report, ""))


def _plot(train: list[dict[str, Any]], held_out: list[dict[str, Any]], keys: Mapping[str, str], label: str) -> str:
    """Lines over the steps, held-out values as dots of the same colour; nothing where no line has the keys."""
    keys = {key: name for key, name in keys.items() if train and train[-1].get(key) is not None}
    if not keys:
        return ""
    figure = new_figure(8, 3.2)
    axes = figure.subplots()
    for key, name in keys.items():
        points = [(line["step"], line[key]) for line in train if line.get(key) is not None]
        (drawn,) = axes.plot(*zip(*points, strict=True), label=name, linewidth=1.2)
        dots = [(line["step"], line[key]) for line in held_out if line.get(key) is not None]
        if dots:
            axes.plot(*zip(*dots, strict=True), "o", color=drawn.get_color())
    axes.set(xlabel="step" + (" (dots: held out)" if held_out else ""), ylabel=label)
    axes.locator_params(axis="x", integer=True)
    axes.legend(loc="best", fontsize="small")
    stream = io.StringIO()
    figure.savefig(stream, format="svg")
    svg = stream.getvalue()
    return svg[svg.index("<svg") :]


def _table(rows: Iterable[Iterable[Any]], look: str = "figures") -> str:
    cells = ("".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) for row in rows)
    return f'<table class="{look}">' + "".join(f"<tr>{row}</tr>" for row in cells) + "</table>"
