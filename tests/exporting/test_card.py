"""What a model card says of an export."""

import json

import pytest

from medusa_ds.errors import UserError
from medusa_ds.exporting.card import read_figures


def test_figures_of_a_long_run_that_is_still_writing_are_read(tmp_path):
    """Mutation: read them as a configuration file, which has at most 1 MiB and no half a line."""
    step = json.dumps({"kind": "train", "step": 1, "loss": 1.0, "more": "x" * 1000}) + "\n"
    held_out = json.dumps({"kind": "validation", "step": 40, "head1_acc": 0.5, "head1_loss": 3.0}) + "\n"
    (tmp_path / "metrics.jsonl").write_text(step * 1100 + held_out + step[:20])
    assert read_figures(tmp_path, None) == read_figures(tmp_path, 40) == ({"head1_acc": 0.5}, "")
    assert read_figures(tmp_path, 20) == ({}, "")


@pytest.mark.parametrize("line", [b"\0\0\n", b"\xff\n", b"[]\n", b"{}\n"])
def test_metrics_that_no_run_writes_are_a_users_mistake(tmp_path, line):
    """As a machine that lost its power leaves them. Mutation: let what reads them raise."""
    (tmp_path / "metrics.jsonl").write_bytes(line)
    with pytest.raises(UserError, match=r"metrics\.jsonl: not what a run writes"):
        read_figures(tmp_path, None)


def test_figures_of_a_server_without_a_page_of_metrics_are_read(tmp_path):
    """Mutation: count on accepted tokens."""
    report = {"heads": {"full_acc_1": 0.5, "head1": {"top1": 0.25}}, "speed": {"server_tokens_per_s": 9.0}}
    (tmp_path / "evaluation.json").write_text(json.dumps(report))
    assert read_figures(tmp_path, None) == ({"full_acc_1": 0.5, "head1_acc": 0.25}, "")


@pytest.mark.parametrize("report", ["[]", "{}", '{"heads": []}', '{"heads": {"a": {}}, "speed": {}}', '{"heads": 3'])
def test_an_evaluation_that_is_none_is_a_users_mistake(tmp_path, report):
    (tmp_path / "evaluation.json").write_text(report)
    with pytest.raises(UserError, match=r"evaluation\.json:"):
        read_figures(tmp_path, None)
