"""Write one HTML page about a run: losses, accuracies, rates, memory, data, recipe, evaluation.

Example:
    medusa-ds report runs/smollm2_135m_stage1

The page needs nothing beside it: its pictures are SVG. Training writes it at the end of each run; this command writes
it anew, for a run that is still going on too.
"""

from pathlib import Path
from typing import Any

from pydantic import Field

from medusa_ds.config.parsing import read_object
from medusa_ds.config.settings import Positional, ProgramSettings
from medusa_ds.errors import UserError
from medusa_ds.page import NAME, write_page


class Settings(ProgramSettings):
    """What the command line says."""

    output: Positional[str]
    """A run's output directory."""
    evaluation: str | None = Field(None, title="FILE")
    """JSON of `medusa-ds evaluate RUN --json FILE`, to be shown too."""
    out: str | None = Field(None, title="FILE")
    """The page; without it, report.html in the run's directory."""


def run(settings: Settings) -> None:
    """Write one HTML page about a run: losses, accuracies, rates, memory, data, recipe, evaluation."""
    output = Path(settings.output)
    if not (output / "metrics.jsonl").is_file():
        raise UserError(f"{output}: holds no metrics.jsonl; name the output directory of a run that has taken a step")
    evaluation = _read_evaluation(Path(settings.evaluation), output) if settings.evaluation else None
    file = Path(settings.out) if settings.out else output / NAME
    write_page(output, file, evaluation)
    print(f"wrote {file}")


def _read_evaluation(file: Path, output: Path) -> dict[str, Any]:
    """The report of an evaluation of this run: of its output, its heads or a checkpoint, by whatever path."""
    report = read_object(file)
    named = Path(str(report.get("run")))
    if named.parent.name == "checkpoints":
        named = named.parents[1]
    elif named.name == "heads":
        named = named.parent
    evaluates = report.keys() >= {"run", "heads", "speed"}
    if not evaluates or (named.resolve() != output.resolve() and named.name != output.resolve().name):
        found = f"one of {report['run']}" if evaluates else "no evaluation"
        mend = f"name one of this run, which medusa-ds evaluate {output} --json {file} would write"
        raise UserError(f"--evaluation: {file}: found {found}; {mend}")
    return report
