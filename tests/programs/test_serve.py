"""`medusa-ds serve`: what it exports, what it starts, and what it says is missing."""

import json
import os
import shlex
import sys
from pathlib import Path

import pytest
from exporting import export_

from medusa_ds.cli import main

PYTHON = """#!{python}
import json, os, sys
if sys.argv[1] == "-c":
    print({found!r})
else:
    quiet = [name for name in ("TRANSFORMERS_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS") if name in os.environ]
    print(json.dumps([sys.argv[1:], " ".join([os.environ["VLLM_USE_V2_MODEL_RUNNER"], *quiet])]))
"""


def environment(tmp_path: Path, found: str) -> str:
    """A Python of an environment with these packages and plug-ins."""
    file = tmp_path / f"python-{'-'.join(found.split())}"
    file.write_text(PYTHON.format(python=sys.executable, found=found))
    file.chmod(0o755)
    return str(file)


def served(argv: list[str], capfd: pytest.CaptureFixture[str]) -> tuple[list[str], str]:
    """What is started, in a process of its own since it is replaced."""
    child = os.fork()
    if child == 0:
        try:
            main(["serve", *argv])
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    return json.loads(capfd.readouterr().out.splitlines()[-1])


def test_vllm_is_started_with_an_export_and_all_further_options(make_run, place, capfd, monkeypatch):
    run, python = make_run(), environment(place, "vllm named medusa other")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    for name in ("TRANSFORMERS_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS"):  # which other commands set
        monkeypatch.delenv(name, raising=False)
    argv = [str(run), "--python", python, "--port", "8001", "--enforce-eager"]
    (arguments, runner) = served(argv, capfd)
    export = place / "run-vllm"
    assert runner == "1" and arguments[:3] == ["-m", "vllm.entrypoints.cli.main", "serve"]
    assert arguments[3] == json.loads((export / "config.json").read_text())["base_model_name_or_path"]
    speculative = json.loads(arguments[arguments.index("--speculative-config") + 1])
    assert speculative == {"method": "mtp", "model": str(export), "num_speculative_tokens": 3}
    assert arguments[6:] == ["--port", "8001", "--enforce-eager"]
    made = (export / "model.safetensors").stat().st_mtime_ns
    served(argv, capfd)
    assert (export / "model.safetensors").stat().st_mtime_ns == made  # the same heads: nothing to export
    (arguments, _) = served([str(export), "--python", python, "--base-model", "here"], capfd)
    assert arguments[3] == "here" and str(export) in arguments[5]
    monkeypatch.setenv("PATH", str(place), prepend=os.pathsep)
    (arguments, _) = served([str(export), "--python", Path(python).name], capfd)
    assert arguments[2] == "serve"


def test_a_dry_run_prints_what_a_shell_takes(make_run, capsys):
    """Mutation: join the arguments without quotes."""
    export = export_(make_run(), "out", "--for", "vllm")
    capsys.readouterr()
    main(["serve", str(export), "--python", "some python", "--dry-run", "--port", "8001"])
    runner, python, *arguments = shlex.split(capsys.readouterr().out)
    assert (runner, python) == ("VLLM_USE_V2_MODEL_RUNNER=1", "some python") and arguments[-2:] == ["--port", "8001"]
    assert json.loads(arguments[arguments.index("--speculative-config") + 1])["model"] == str(export)


def test_what_is_missing_is_said_in_a_line(make_run, place, refused):
    export = str(export_(make_run(), "out", "--for", "vllm"))
    other = str(make_run("other", "heads.layers=2"))
    ready = ["--python", environment(place, "vllm named medusa")]
    for argv, text in (
        ([export, "--python", str(place / "nothing")], "does not run"),
        ([export, *ready, "--num-speculative-tokens", "4"], "found 4; allowed is at most 3, one a head"),
        ([other, *ready, "--out", export], "has other heads than"),
        ([export, "--python", environment(place, "vllm named")], "vLLM has no Medusa plug-in"),
        ([export, "--python", environment(place, "vllm medusa")], "asks for a distribution named vllm"),
        ([export, "--python", environment(place, "")], "found no vLLM"),
        (["--port", "8001", export, *ready], "--port: found before all else; options that are handed on come last"),
    ):
        assert text in refused("serve", *argv)
