"""Every file call of a save, on every rank, under ZeRO 0 to 3 in both stages, as the last one."""

import json
from pathlib import Path
from typing import Any

import pytest
from forks import run_forks

WORKER = Path(__file__).with_name("save_worker.py")


def run_pair(folder: Path, jobs: list[tuple[str, int, bool]]) -> list[dict[str, Any]]:
    logs = [folder / f"rank{rank}.log" for rank in (0, 1)]
    statuses = run_forks(WORKER, str(folder), json.dumps(jobs), logs=logs, cwd=folder, timeout=3600)
    assert statuses == [0, 0], "\n".join(log.read_text()[-3000:] for log in logs)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


def check(results: list[dict[str, Any]], folder: Path, trials: int, messages: int) -> int:
    assert results[0] == results[1], "the ranks disagree about what is newest, or about an error"
    for found in results[0].values():
        assert set(found["newest"]) == {2, 3}
        assert found["trials"] >= trials
        assert len(found["messages"]) >= messages
        for text in found["messages"]:
            assert str(folder) in text and "\n" not in text
            assert "bytes in a writable directory" in text or "older checkpoints cannot be removed" in text
            assert "No space left" in text or "Read-only file system" in text or "quota exceeded" in text
    return sum(found["trials"] for found in results[0].values())


def test_save_cut_off_at_any_file_call_resumes_with_the_same_losses(tmp_path):
    """Mutations: writing the manifest after the rename; resuming without putting `best` right."""
    check(run_pair(tmp_path, [("zero2", 1, True)]), tmp_path, trials=30, messages=5)


@pytest.mark.long
def test_save_cut_off_under_every_zero_stage(tmp_path):
    jobs = [(f"zero{zero}", stage, False) for zero in range(4) for stage in (1, 2)]
    print("saves cut off:", check(run_pair(tmp_path, jobs), tmp_path, trials=60, messages=15))
