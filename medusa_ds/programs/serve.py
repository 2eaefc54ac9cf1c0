"""Serve a run's heads with vLLM: exports them if needed and starts `vllm serve`, which gets all further options.

Example:
    medusa-ds serve runs/smollm2_135m_stage1 --port 8001

vLLM 0.28 to 0.33 with the plug-in runs them; its Python may be of another environment.
"""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Annotated

from pydantic import Field

from medusa_ds.config.parsing import read_object
from medusa_ds.config.settings import REST, Positional, ProgramSettings
from medusa_ds.config.types import Count
from medusa_ds.errors import UserError, one_line
from medusa_ds.runs import open_run

RUNNER = "VLLM_USE_V2_MODEL_RUNNER"
_PROBE = """
from importlib import metadata, util
print("vllm" if util.find_spec("vllm") else "", *("named" for d in metadata.distributions(name="vllm")))
print(*(p.name for p in metadata.entry_points(group="vllm.general_plugins")))
"""


class Settings(ProgramSettings):
    """What the command line says."""

    name: Positional[str] = Field(alias="run")
    """A finished run's output, its heads folder, OUTPUT/checkpoints/best, smollm2_135m, or an export for vLLM."""
    out: str | None = Field(None, title="DIR")
    """Where the export is or will be; without it, RUN-vllm in the working directory."""
    base_model: str | None = Field(None, title="MODEL")
    """What vLLM loads, where the base model has another name or place there."""
    num_speculative_tokens: Count | None = None
    """Without it, one a head."""
    python: str = Field(sys.executable, title="PYTHON")
    """Of the environment that has vLLM."""
    dry_run: bool = False
    """Print the command instead of running it."""
    options: Annotated[list[str], REST] = []
    """For vllm serve."""


def run(settings: Settings) -> None:
    """Replace this process by vLLM's.

    Raises:
        UserError: vLLM, the plug-in or the run is missing.
    """
    if not settings.dry_run:
        _check_environment(settings.python)
    export = _exported(settings)
    config = read_object(export / "config.json")
    heads, base = config.get("medusa_num_heads"), settings.base_model or config.get("base_model_name_or_path")
    if type(heads) is not int or not isinstance(base, str):
        raise UserError(
            f"{export}: config.json names no medusa_num_heads or no base model; export the run for vllm again"
        )
    number = settings.num_speculative_tokens or heads
    if number > heads:
        raise UserError(f"--num-speculative-tokens: found {number}; allowed is at most {heads}, one a head")
    speculative = {"method": "mtp", "model": str(export), "num_speculative_tokens": number}
    command = [settings.python, "-m", "vllm.entrypoints.cli.main", "serve", base]
    command += ["--speculative-config", json.dumps(speculative), *settings.options]
    if settings.dry_run:
        print(f"{RUNNER}=1 {shlex.join(command)}")
        return
    sys.stdout.flush()
    os.execvpe(settings.python, command, {**os.environ, RUNNER: "1"})


def _check_environment(python: str) -> None:
    try:
        found = subprocess.run([python, "-c", _PROBE], capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"--python: {python}: does not run ({one_line(error)})") from None
    if "vllm" not in found:
        raise UserError(f"{python}: found no vLLM; pip install 'vllm>=0.28,<0.34' there, or name another with --python")
    if "named" not in found:
        raise UserError(f"{python}: 'vllm serve' asks for a distribution named vllm, found another's (docs/serving.md)")
    if "medusa" not in found:
        raise UserError(f"{python}: vLLM has no Medusa plug-in; pip install plugins/vllm of medusa-ds there")


def _exported(settings: Settings) -> Path:
    """The export, made by `medusa-ds export` where there is none of these heads."""
    given = Path(settings.name)
    if _is_export(given):
        return given.absolute()
    target = Path(settings.out or f"{Path(settings.name).resolve().name}-vllm").absolute()
    if _is_export(target):
        saved, there = open_run(settings.name), open_run(target)
        same = saved.weights.keys() == there.weights.keys()
        if same and all(found.to(there.weights[n].dtype).equal(there.weights[n]) for n, found in saved.weights.items()):
            return target
        raise UserError(f"{target}: has other heads than {settings.name}; name another directory with --out")
    command = [sys.executable, "-m", "medusa_ds.cli", "export", settings.name, str(target), "--for", "vllm"]
    if status := subprocess.run(command).returncode:
        raise SystemExit(status)
    return target


def _is_export(directory: Path) -> bool:
    return (directory / "config.json").is_file() and (directory / "model.safetensors.index.json").is_file()
