"""The page about a run: its figures are the run's, and it asks for nothing from outside."""

import json
import re
from pathlib import Path

import pytest

from medusa_ds.errors import UserError
from medusa_ds.programs.report import Settings, run


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    output = tmp_path / "run <1>"
    output.mkdir()
    lines = []
    for step in range(4):
        values = {"step": step, "head1_loss": 5.0 - step / 3, "head1_acc": step / 10}
        values["acceptance_length"] = 1 + step / 10
        if step in (0, 3):
            lines.append({"kind": "validation", **values})
        if step:
            lines.append({"kind": "train", "loss": 5.0, "seconds": 2.5, "tokens_per_s": 100.0, **values})
    (output / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "tra')
    data = {"train_rows": 1048, "rejected": {"not valid JSON": [2, "chat.jsonl:7"]}}
    launch = {"device": "cpu", "ranks": 2, "versions": {"torch": "2.14.1"}, "data": data}
    (output / "launches.jsonl").write_text(json.dumps(launch) + "\n")
    (output / "recipe.yaml").write_text("stage: 1 # a <recipe>\n")
    return output


def test_page_shows_the_runs_figures_and_needs_nothing_beside_it(trained):
    """Mutation: the first validation in place of the last one; no escaping of what a run is called."""
    run(Settings(output=str(trained)))
    page = (trained / "report.html").read_text()
    assert re.search(r"head1, loss</td><td>5\.000</td><td>4\.000", page)
    assert re.search(r"time in steps</td><td>8 s", page)
    for text in ("2 x cpu", "train rows</td><td>1,048", "a &lt;recipe&gt;"):
        assert text in page
    assert "run <1>" not in page
    assert len(re.findall("<svg", page)) == 4  # no memory on a CPU, no gradient norm here
    assert not re.findall(r"""(?:src|href)=["'](?!#)""", page.replace("xlink:href", "href"))
    assert "<script" not in page


def test_evaluation_is_shown_if_there_is_one_of_that_run(trained, tmp_path):
    """Named by any path to it, its heads or a checkpoint. Mutations: show another run's; show what `tree` found."""
    file, page, parts = tmp_path / "evaluation.json", tmp_path / "page.html", {"heads": {}, "speed": {}}
    for named in (trained, "elsewhere/run <1>/", trained / "heads", "run <1>/checkpoints/best"):
        report = parts | {"run": str(named), "accepted": {"mean_tokens_per_step": 2.25, "steps": [1, 2]}}
        file.write_text(json.dumps(report))
        run(Settings(output=str(trained), evaluation=str(file), out=str(page)))
        assert "accepted mean tokens per step</td><td>2.25" in page.read_text()
        page.unlink()
    for other, found in (
        ("runs/other", "one of runs/other"),
        (f"{tmp_path}/heads", "one of /"),
        (None, "no evaluation"),
    ):
        file.write_text(json.dumps(parts | ({"run": other} if other else {})))
        with pytest.raises(UserError, match=f"found {found}.*; name one of this run"):
            run(Settings(output=str(trained), evaluation=str(file), out=str(page)))
    file.write_text(json.dumps({"run": str(trained), "positions": 9, "sizes": [], "chosen": 1}))
    with pytest.raises(UserError, match="found no evaluation; name one of this run"):
        run(Settings(output=str(trained), evaluation=str(file), out=str(page)))
    assert not page.exists()


def test_a_directory_without_steps_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"holds no metrics\.jsonl; name the output directory of a run"):
        run(Settings(output=str(tmp_path)))


def test_a_head_without_a_held_out_position_has_no_figure(trained):
    """A mean over nothing is null in `metrics.jsonl`. Mutation: format it as a number; a finished run ends badly."""
    file = trained / "metrics.jsonl"
    file.write_text(file.read_text().replace('"head1_loss": 4.0', '"head1_loss": null'))
    run(Settings(output=str(trained)))
    assert re.search(r"head1, loss</td><td>5\.000</td><td>-", (trained / "report.html").read_text())


def test_a_run_that_was_held_against_nothing_yet_but_its_start_shows_one_column(trained):
    """Mutation: show the first validation as the last one too."""
    file = trained / "metrics.jsonl"
    lines = [line for line in file.read_text().splitlines() if '"validation", "step": 3' not in line]
    file.write_text("\n".join(lines))
    run(Settings(output=str(trained)))
    assert "<td>step 0</td></tr>" in (trained / "report.html").read_text()
