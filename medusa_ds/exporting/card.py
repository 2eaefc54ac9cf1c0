"""The model card of an export: what the heads are, how every program uses them, what was measured, their recipe."""

import re
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, model_info
from huggingface_hub import errors as hub_errors

from medusa_ds.config.parsing import read_json
from medusa_ds.errors import UserError, counted, one_line
from medusa_ds.exporting.source import Source
from medusa_ds.exporting.targets import TARGETS
from medusa_ds.files import read_json_lines

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_MEANINGS = {
    r"head\d+_acc": "share of positions where the head's first guess is the text's own token",
    r"full_acc_\d+": "share of positions where the first guesses of all heads up to this one are right",
    r"cond_acc_\d+": "the same among the positions where those of the heads before it are right",
    r"acceptance_length|chain_acceptance_teacher_forced": "tokens of a step that verifies each head's first guess, "
    "counted at every position of given texts, the LM head's own token included",
    r"mean_tokens_per_step": "tokens that a step added while a tree of guesses was decoded",
    r"speed_up(_end_to_end)?": "tokens a second over those of plain decoding on the same machine, with prefill",
    r"speed_up_decoding": "the same without prefill",
}


def card(source: Source, targets: list[str], out: str = ".", base: str | None = None) -> ModelCard:
    """The card of an export with the files of these targets.

    `out`: what users call it, its repository, or by default the directory that they stand in. `base`: what they call
    its base model; None: `./backbone`, or as the heads name it.
    """
    meta = source.meta
    named = _without_directories(meta["base_model"])
    title = f"{meta['kind'].capitalize()} heads for {named}"
    base = base or ("./backbone" if source.tuned else named)
    paths = source.recipe["data"].get("path") or []
    paths = [paths] if isinstance(paths, str) else [item if isinstance(item, str) else item["path"] for item in paths]
    data = ", ".join(map(_without_directories, paths)) or "not recorded"
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type="conversations",
            dataset_name=source.measured_on or data,
            metric_type="accuracy" if "acc" in name.split("_") else name,
            metric_value=value,
            metric_name=name,
        )
        for name, value in source.figures.items()
    ]
    on_hub = is_hub_id(meta["base_model"])
    info = ModelCardData(
        base_model=meta["base_model"] if on_hub else None,
        license=license_of(meta["base_model"]),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[meta["kind"], "speculative-decoding"],
        datasets=[path for path in paths if is_hub_id(path)] or None,
        model_name=title,
        eval_results=results or None,
    )
    size = len(source.heads.get("token_map", ()))
    tokens = f", guesses among the {size} most frequent of {meta['vocab_size']} tokens" if size else ""
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("medusa-ds", "torch", "transformers"))
    here = "Run inside this directory.\n\n" if out == "." else ""
    if base == named and not on_hub:
        here += (
            f"Write the path of the base model in place of `{named}`, which is the directory that it was made in.\n\n"
        )
    uses = "\n\n".join(f"### {name}\n\n{TARGETS[name].code(source, out, base)}" for name in targets)
    others = (name for name, program in TARGETS.items() if name not in targets and not program.refuses(source, False))
    missing = ", ".join(others)
    more = (
        f"\n\nFiles for {missing}: `medusa-ds export {out} OTHER --for {missing.replace(', ', ',')}`."
        if missing
        else ""
    )
    figures = "\n".join(f"- {name} {value:.4g}: {_meaning(name)}" for name, value in source.figures.items())
    on = f"On {source.measured_on}:\n\n" if source.measured_on and figures else ""
    recipe = yaml.safe_dump(_relative(source.recipe), sort_keys=False, allow_unicode=True)
    return ModelCard(
        f"---\n{info.to_yaml()}\n---\n\n# {title}\n\n{counted(meta['num'], 'head')} of "
        f"{counted(meta['layers'], 'layer')}, LM head {meta['lm_head']}{tokens}. Base model "
        f"of the heads: {base}. Data: {data}. Exported with {versions}.\n\n## Use\n\n"
        f"{here}{uses}{more}\n\n## Measured\n\n{on}{figures or 'Nothing.'}\n\n## Recipe\n\n"
        f"```yaml\n{recipe.strip()}\n```\n"
    )


def read_figures(run: Path, step: int | None) -> tuple[dict[str, float], str]:
    """What was measured and on what: a run's `evaluation.json` (see `medusa-ds evaluate --json`), or in training.

    Raises:
        UserError: the file is not what these write.
    """
    file = run / "evaluation.json"
    try:
        if step is None and file.is_file():
            return _figures_of(read_json(file))
        file = run / "metrics.jsonl"
        records = read_json_lines(file) if file.is_file() else []
        chosen = [record for record in records if record["kind"] == "validation" and step in (None, record["step"])]
    except (AttributeError, OSError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"{file}: not what a run writes ({one_line(error)}); move it away to export without") from None
    last = chosen[-1] if chosen else {}
    return {name: value for name, value in last.items() if "acc" in name and value is not None}, ""


def _figures_of(report: dict[str, Any]) -> tuple[dict[str, float], str]:
    """Figures of an evaluation; a server that has no page of metrics tells no accepted tokens."""
    heads, accepted = report["heads"], report.get("accepted", {})
    figures = heads | {f"{name}_acc": tops["top1"] for name, tops in heads.items() if isinstance(tops, dict)}
    figures["mean_tokens_per_step"] = accepted.get("mean_tokens_per_step")
    figures |= {name: value for name, value in report["speed"].items() if name.startswith("speed_up")}
    on = [_without_directories(str(report.get("prompts", {}).get("file", ""))), str(report.get("device", ""))]
    measured = {name: value for name, value in figures.items() if isinstance(value, float)}
    return measured, ", ".join(filter(None, on))


def is_hub_id(name: str) -> bool:
    """Whether a name is a repository's, and no file or directory."""
    return bool(_HUB_ID.fullmatch(name)) and not Path(name).suffix.startswith(".json") and not Path(name).exists()


def license_of(base: str) -> str | None:
    """The licence that the base model's own card names, from its directory or the hub; None where neither says."""
    try:
        if (Path(base) / "README.md").is_file():
            return ModelCard.load(Path(base) / "README.md").data.license
        info = model_info(base, timeout=5).card_data if is_hub_id(base) else None
        return None if info is None else info.license
    except (hub_errors.HTTPError, OSError, ValueError):
        return None


def _meaning(name: str) -> str:
    return next((text for pattern, text in _MEANINGS.items() if re.fullmatch(pattern, name)), "see metrics.jsonl")


def _without_directories(name: str) -> str:
    """A path on the maker's machine by its last part; all other names as they are."""
    return Path(name).name if Path(name).is_absolute() else name


def _relative(value: Any) -> Any:
    """The same data with `_without_directories` of every text."""
    if isinstance(value, dict):
        return {key: _relative(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_relative(part) for part in value]
    return _without_directories(value) if isinstance(value, str) else value
