"""What a model card says of an export."""

import json
from pathlib import Path

from medusa_ds.exporting.card import read_figures


def test_figures_of_a_long_run_that_is_still_writing_are_read(tmp_path: Path) -> None:
    """Mutation: read them as a configuration file, which has at most 1 MiB and no half a line."""
    step = json.dumps({"kind": "train", "step": 1, "loss": 1.0, "more": "x" * 1000}) + "\n"
    held_out = json.dumps({"kind": "validation", "step": 40, "head1_acc": 0.5, "head1_loss": 3.0}) + "\n"
    (tmp_path / "metrics.jsonl").write_text(step * 1100 + held_out + step[:20])
    assert read_figures(tmp_path, None) == read_figures(tmp_path, 40) == ({"head1_acc": 0.5}, "")
    assert read_figures(tmp_path, 20) == ({}, "")
