"""What a rank takes of its host, and what it says before DeepSpeed compiles."""

from pathlib import Path

import pytest
import torch
from support import train

from medusa_ds.errors import UserError
from medusa_ds.training.launch import BESIDE_A_GPU, announce, share_cores


@pytest.fixture
def eight_threads(monkeypatch):
    before = torch.get_num_threads()
    torch.set_num_threads(8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("LOCAL_SIZE", "2")
    yield monkeypatch
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("on_gpu", "offloads", "ranks", "threads"),
    [
        (False, False, 2, 4),
        (False, False, 16, 1),
        (True, False, 1, BESIDE_A_GPU),
        (True, False, 4, 2),
        (True, True, 1, 8),
    ],
)
def test_ranks_share_the_cores(eight_threads, on_gpu, offloads, ranks, threads):
    """Mutation: leave the ranks out, or the limit beside a GPU."""
    eight_threads.setenv("LOCAL_SIZE", str(ranks))
    share_cores(on_gpu, offloads)
    assert torch.get_num_threads() == threads


def test_the_environment_decides_first(eight_threads):
    eight_threads.setenv("OMP_NUM_THREADS", "8")
    share_cores(True, False)
    assert torch.get_num_threads() == 8


def test_an_operator_is_announced_once_a_host_and_only_where_it_is_not_there(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("LOCAL_RANK", "1")
    announce("cpu_adam")
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("LOCAL_RANK", "0")
    announce("cpu_adam")
    assert "compiles cpu_adam for this machine, once" in capsys.readouterr().out
    (tmp_path / "py311" / "cpu_adam").mkdir(parents=True)
    library = tmp_path / "py311" / "cpu_adam" / "cpu_adam.so"
    library.touch()
    announce("cpu_adam")
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(library))
    with pytest.raises(UserError, match=r"cpu_adam.so: cannot be made \(File exists\); set TORCH_EXTENSIONS_DIR"):
        announce("cpu_adam")


def test_one_rank_on_a_cpu_compiles_nothing(tmp_path):
    """Mutation: leave `__compatible_ops__` alone; then DeepSpeed builds its all-reduce in shared memory."""
    program, extensions = tmp_path / "one.py", tmp_path / "extensions"
    program.write_text(
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from worker import make_recipe\n"
        "from medusa_ds.training.launch import start_process_group; start_process_group(make_recipe('out'))\n"
        "import deepspeed; assert deepspeed.comm.comm.cdb.shm_comm_op is None\n"
    )
    train(program, log_dir=tmp_path, env={"TORCH_EXTENSIONS_DIR": str(extensions)})
    assert not extensions.exists()
