"""How far a program is, on a terminal and in a pipe."""

import sys

import pytest

from medusa_ds import progress


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when the test says so."""
    now = [100.0]
    for name in ("tqdm.std.time", "time.monotonic"):
        monkeypatch.setattr(name, lambda: now[0])
    return now


def test_a_pipe_gets_a_line_now_and_then_and_nothing_of_what_is_short(clock, capsys):
    """Mutation: print at every item, the last one twice, or rewrite a line that nobody can rewrite."""
    for _ in progress.progress(range(10), "prompts"):
        clock[0] += 1
    assert capsys.readouterr().err == ""
    for _ in progress.progress(range(4), "prompts"):
        clock[0] += 10
    halfway, end = "2 of 4 prompts in 00:20, 00:20 left\n", "4 of 4 prompts in 00:40, 00:00 left\n"
    assert capsys.readouterr().err == halfway + end
    with progress.Progress(4, "prompts") as bar:
        clock[0] += 20
        bar.update(3)
        bar.update(1)
    assert [line.split(" in ")[0] for line in capsys.readouterr().err.splitlines()] == [
        "3 of 4 prompts",
        "4 of 4 prompts",
    ]


def test_a_terminal_gets_a_bar_and_rows_their_tokens(clock, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    bar = progress.Progress(4, "rows")
    clock[0] += 10
    bar.add(2, 500)
    bar.close()
    shown = capsys.readouterr().err
    assert "2 of 4 rows, 500 tokens, 50 tokens/s in 00:10, 00:10 left" in shown and "\r" in shown
    silent = progress.Progress(4, "rows", silent=True)
    silent.add(4, 4)
    silent.close()
    assert capsys.readouterr().err == ""
