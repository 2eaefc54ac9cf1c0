"""`medusa-ds show RECIPE --data N`: how each row was read, which of its turns are labels, and why others are not."""

import json

from medusa_ds.cli import main

U, A = {"role": "user", "content": "red one"}, {"role": "assistant", "content": "blue two"}
LONG = {"role": "assistant", "content": "green three " * 40}
ROWS = [
    (
        {"messages": [U, {**A, "weight": 0}, U, A], "system": "sun"},
        "messages; turns: system (no label), user (no label), assistant (no label: weight: 0), user (no label), "
        "assistant (label)",
    ),
    (
        {"conversations": [{"from": "human", "value": "red"}, {"from": "gpt", "value": "blue", "unfinished": True}]},
        "conversations; turns: user (no label), assistant (label, but not on its end: unfinished)",
    ),
    (
        {"messages": [U, {**A, "train": False}, U, LONG, U, A]},
        "messages; turns: user (no label), assistant (no label: train: false), user (no label), assistant (label), "
        "user (no label), assistant (no label: beyond data.max_length)",
    ),
    (
        {"instruction": "red", "input": "", "output": "blue"},
        "instruction + output; turns: user (no label), assistant (label)",
    ),
    ({"prompt": "red", "chosen": "blue"}, "prompt + chosen; turns: user (no label), assistant (label)"),
]


def test_each_row_tells_its_layout_and_why_turns_are_no_labels(tiny_recipe, tmp_path, capsys, monkeypatch):
    """Mutations: tell a turn by its message alone, whatever max_length leaves of it; number the rows read."""
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    file = tmp_path / "rows.jsonl"
    rows = [ROWS[0][0], {"text": "x"}, *(row for row, _ in ROWS[1:]), {"messages": [U, {**A, "mask": 1}]}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    main(["show", str(tiny_recipe), "--data", "9", f"data.path={file}", "data.validation=0", "data.max_length=128"])
    out = capsys.readouterr().out
    lines = [1, *range(3, 8)]
    expected = [f"{file}:{line}, layout: {told}" for line, (_, told) in zip(lines, ROWS, strict=False)]
    assert [line for line in out.splitlines() if ", layout: " in line][:-1] == expected
    assert "\n<|im_start|>assistant\nblue two<|im_end|>\n<|im_start|>user\n" in out  # of weight 0: no brackets
    assert out.count("[[blue two<|im_end|>]]") == 2
    assert "left out: 1 x no known layout in its keys: text; known are messages" in out and f"{file}:2)" in out
    assert f"1 x mask of a turn, which is not known here (first: {file}:7)" in out
