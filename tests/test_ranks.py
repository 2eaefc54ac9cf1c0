"""What ranks learn from the environment."""

import sys

import pytest

from medusa_ds.errors import UserError
from medusa_ds.programs import train
from medusa_ds.ranks import Ranks, exit_on_user_error

VARIABLES = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_NTASKS"),
    *("SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID"),
)


def test_empty_variables_are_none(monkeypatch, capsys):
    """Mutation: read one of them without a look at whether it is empty."""
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
    alone = Ranks()
    assert (alone.rank, alone.size, alone.local_rank, alone.local_size) == (0, 1, 0, 0)
    monkeypatch.setattr(sys, "argv", ["medusa_ds", "none.yaml"])
    with pytest.raises(SystemExit, match="2"):
        train.main()
    assert "none.yaml: no such recipe file" in capsys.readouterr().err


def test_slurm_without_scontrol_asks_for_the_master(monkeypatch, capsys):
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


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"RANK": "abc"}, "RANK: found 'abc'; allowed is a whole number"),
        ({"WORLD_SIZE": "2.0"}, "WORLD_SIZE: found '2.0'; allowed"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK: found '-1'; allowed"),
        ({"LOCAL_SIZE": "two"}, "LOCAL_SIZE: found 'two'; allowed"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT: found 'http'; allowed"),
        ({"SLURM_STEP_NODELIST": "node[1-2]", "SLURM_NTASKS": "2(x2)"}, "SLURM_NTASKS: found '2(x2)'; allowed"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT: found 70000; allowed are ports up to 65535"),
        ({"RANK": "3"}, "RANK: found 3, but WORLD_SIZE is 1"),
        ({"WORLD_SIZE": "0"}, "RANK: found 0, but WORLD_SIZE is 0"),
        ({"WORLD_SIZE": "2", "RANK": "1"}, "WORLD_SIZE: found 2 without LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
    ],
)
def test_what_no_launcher_sets_is_a_line_before_a_model_is_asked(variables, says, tiny_recipe, monkeypatch, capsys):
    """Mutation: read one with `int`."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["medusa_ds", str(tiny_recipe)])
    with pytest.raises(SystemExit, match="2"):
        train.main()
    said, error = capsys.readouterr()
    assert said == ""
    assert error.startswith(f"error: {says}") and "unset it" in error and error.count("\n") == 1


def test_a_mistake_is_told_whatever_the_local_rank(monkeypatch, capsys):
    """Mutations: ask `Ranks` who shall tell it; leave it to rank 0 where there is no other rank."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for local_rank, rank in (("abc", "abc"), ("1", "")):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit, match="2"), exit_on_user_error():
            raise UserError("a mistake")
        assert capsys.readouterr().err == "error: a mistake\n"
