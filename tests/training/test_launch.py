"""What a rank takes of its host."""

import pytest
import torch

from medusa_ds.training.launch import BESIDE_A_GPU, share_cores


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
