"""What ranks learn from the environment."""

import sys

import pytest

from medusa_ds.programs import train
from medusa_ds.ranks import Ranks

VARIABLES = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "SLURM_NTASKS"),
    *("SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID"),
)


def test_empty_variables_are_none(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Mutation: read one of them without a look at whether it is empty."""
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
    alone = Ranks()
    assert (alone.rank, alone.size, alone.local_rank, alone.local_size) == (0, 1, 0, 0)
    monkeypatch.setattr(sys, "argv", ["medusa_ds", "none.yaml"])
    with pytest.raises(SystemExit, match="2"):
        train.main()
    assert "none.yaml: no such recipe file" in capsys.readouterr().err


def test_slurm_without_scontrol_asks_for_the_master(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Outside of a step, as in `salloc`, nothing is adopted. Mutation: look at SLURM_NTASKS alone."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "argv", ["medusa_ds", "none.yaml"])
    for variables, says in (({}, "none.yaml: no such"), ({"SLURM_STEP_NODELIST": "node[1-2]"}, "set MASTER_ADDR to")):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit, match="2"):
            train.main()
        assert says in capsys.readouterr().err
