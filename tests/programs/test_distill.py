"""The distillation program with its own engine: interrupted runs, accounting, ranks."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from distill_runs import arguments, content, count_lines, lines, run
from support import cli as forked
from support import fault, launch, take_sigint

from medusa_ds import cli
from medusa_ds.config.recipe import DataSpec
from medusa_ds.data.sources import load_conversations
from medusa_ds.programs.distill import Settings

WORDS = "red green blue one two three four five six seven".split()


@pytest.fixture
def prompts(tmp_path):
    """30 conversations in three formats, two of them unusable."""
    file = tmp_path / "prompts.jsonl"
    rows = [{"turns": [f"from {WORDS[n % 10]} to {n}"] + ["and on"] * (n % 3)} for n in range(20)]
    rows += [
        {
            "messages": [
                {"role": "system", "content": "be brief"},
                {"role": "user", "content": f"{n}?"},
                {"role": "assistant", "content": "not this"},
            ]
        }
        for n in range(4)
    ]
    rows += [{"conversations": [{"from": "human", "value": f"say {n}"}]} for n in range(4)]
    rows += [{"turns": []}, {"turns": ["<|im_end|> hello"]}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_rows_are_complete_and_read_by_data_path(tiny_recipe, tmp_path, prompts, capsys):
    """Without prompts of a benchmark. Mutation: begin the next turn from the original conversation instead of the
    answered one."""
    out, benchmark = tmp_path / "out.jsonl", tmp_path / "benchmark.jsonl"
    benchmark.write_text(json.dumps({"turns": ["From RED to 10!"]}) + "\n")
    run(tiny_recipe, out, prompts, "--synthesize", "12", "--exclude", str(benchmark))
    printed = capsys.readouterr().out
    rows = lines(out)
    removed = [row for row in lines(tmp_path / "out.jsonl.progress") if "removed" in row]
    assert "42 rows asked =" in printed
    assert f"{len(rows)} written" in printed
    assert "1 x unusable row" in printed
    assert "1 x control tokens in a prompt" in printed
    assert "1 x overlap with --exclude (first: " in printed and 10 not in [row["row"] for row in rows]
    numbers = [row["row"] for row in rows + removed]
    assert len(set(numbers)) == len(numbers)
    assert rows
    for row in rows:
        roles = [message["role"] for message in row["messages"] if message["role"] != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert len(row["tokens"]) == len(roles) // 2
        if row["row"] < 20:
            assert len(roles) // 2 == 1 + row["row"] % 3
    data = load_conversations(DataSpec(path=str(out), validation=0.0))
    assert len(data.once) == len(rows)


def test_answers_end_where_the_template_ends_them(tiny_recipe, tiny_model, tmp_path, prompts, capsys):
    """As with a generation_config.json that knows `<|endoftext|>` alone. Mutation: go by that file."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    (model / "generation_config.json").write_text('{"eos_token_id": 0}')
    run(tiny_recipe, tmp_path / "out.jsonl", prompts, f"model.name={model}")
    assert capsys.readouterr().err.count("answers end at token 2 too, as by the chat template") == 1
    run(tiny_recipe, tmp_path / "whole.jsonl", prompts)
    ended = [row["messages"] for row in lines(tmp_path / "whole.jsonl")]
    assert ended and all(messages in [row["messages"] for row in lines(tmp_path / "out.jsonl")] for messages in ended)


def test_unfinished_answers_are_kept_and_end_their_conversation(tiny_recipe, tmp_path, prompts):
    """Red when an answer that was cut off is not marked, or its conversation goes on."""
    out = tmp_path / "out.jsonl"
    run(tiny_recipe, out, prompts, "--keep-unfinished")
    cut = [row for row in lines(out) if row["messages"][-1].get("unfinished")]
    assert cut
    assert all(row["tokens"][-1] == 24 for row in cut)
    assert not any(message.get("unfinished") for row in lines(out) for message in row["messages"][:-1])
    removed = [row["removed"] for row in lines(tmp_path / "out.jsonl.progress") if "removed" in row]
    assert not any("cut off" in reason for reason in removed)


def test_stopped_killed_and_resumed_equals_uninterrupted(tiny_recipe, tmp_path, prompts):
    """Mutations: seed by the order of answers; leave out rows that were written before."""
    whole = run(tiny_recipe, tmp_path / "whole.jsonl", prompts, "--synthesize", "12", "--batch", "3")
    out = tmp_path / "out.jsonl"
    command = arguments(tiny_recipe, out, prompts, "--synthesize", "12", "--batch", "2")
    process = subprocess.Popen(
        [sys.executable, "-m", "medusa_ds.cli", *command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=take_sigint,
    )
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline and count_lines(out) <= 5:
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    said = process.communicate()[1]
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert 5 < (before := count_lines(out)) < sum(map(len, whole))
    dies = fault(tmp_path, 0, "kill", 8, r"out\.jsonl")
    assert "fault: kill" in forked(*command, env=dies, ends=(-signal.SIGKILL,), log_dir=tmp_path)
    assert before < count_lines(out) < sum(map(len, whole))
    with open(out, "a") as stream:
        stream.write('{"row": 0, "messages": [{"role"')
    assert run(tiny_recipe, out, prompts, "--synthesize", "12", "--batch", "5") == whole
    size = out.stat().st_size
    assert run(tiny_recipe, out, prompts, "--synthesize", "12") == whole
    assert out.stat().st_size == size


def test_other_settings_are_refused(tiny_recipe, tmp_path, prompts, refused):
    out = tmp_path / "out.jsonl"
    run(tiny_recipe, out, prompts, "--limit", "2")
    for more, says in (
        (["--limit", "3"], "prompts"),
        (["--limit", "2", "--seed", "1"], "seed: was made with 0; now 1"),
    ):
        assert says in refused(*arguments(tiny_recipe, out, prompts, *more), lines=None)
    assert "--synthesize" in refused("distill", tiny_recipe, "--out", out)


def test_openings_begin_the_made_prompts_in_turn(tiny_recipe, tmp_path, prompts, refused):
    """Mutation: keep only what the model wrote after the opening."""
    openings, out = tmp_path / "openings.txt", tmp_path / "out.jsonl"
    openings.write_text("one two\n\nthree\n")
    settings = ["--synthesize", "9", "--keep-unfinished", "--limit", "1"]
    run(tiny_recipe, out, prompts, *settings, "--openings", str(openings))
    made = {row["row"]: row["prompt"] for row in lines(tmp_path / "out.jsonl.progress") if "prompt" in row}
    assert set(made) == set(range(1, 10))
    assert all(prompt.startswith(("one two", "three")[row % 2]) for row, prompt in made.items() if prompt)
    assert any(len(prompt) > len("one two") for prompt in made.values())
    asked = {row["row"]: row["messages"][0]["content"] for row in lines(out) if row["row"] > 0}
    assert asked and all(made[row].strip() == prompt for row, prompt in asked.items())
    options = "--synthesize 6 --openings --max-new-tokens 4 --max-prompt-tokens 120 --device cpu".split()
    cli.main(["distill", str(tiny_recipe), "--out", str(tmp_path / "ours.jsonl"), *options])
    shipped = {row["row"]: row["prompt"] for row in lines(tmp_path / "ours.jsonl.progress") if "prompt" in row}
    ours = (Path(cli.__file__).parent / "data" / "openings.txt").read_text().splitlines()
    assert sum(map(bool, shipped.values())) > 1 and len(set(ours)) == len(ours) > 1000
    assert all(prompt.startswith(ours[row]) for row, prompt in shipped.items() if prompt)
    (tmp_path / "empty.txt").write_text("\n")
    for more, says in (
        (["--limit", "1", "--openings", str(openings)], "without --synthesize"),
        (["--synthesize", "1", "--openings", str(tmp_path / "none.txt")], "none.txt: cannot be read"),
        (["--synthesize", "1", "--openings", str(tmp_path / "empty.txt")], "empty.txt: found no line with text"),
    ):
        assert says in refused(*arguments(tiny_recipe, tmp_path / "bad.jsonl", prompts, *more))


def test_what_other_ranks_left_is_moved_in_once(tiny_recipe, tmp_path, prompts, capsys, refused):
    """Mutations: take a row twice; forget the parts of an interrupted run; answer rows that a part holds."""
    settings = ["--synthesize", "12", "--keep-unfinished"]
    whole = run(tiny_recipe, tmp_path / "whole.jsonl", prompts, *settings)
    assert len(whole[0]) > 9
    out = tmp_path / "out.jsonl"
    capsys.readouterr()
    for name in ("out.jsonl", "out.jsonl.progress"):
        written = (tmp_path / name.replace("out", "whole")).read_text().splitlines(keepends=True)
        (tmp_path / name).write_text("".join(written[:6]))
        (tmp_path / f"{name}.rank1").write_text("".join(written[5:9]))  # the first was moved before
        (tmp_path / f"{name}.rank12").write_text("".join(written[9:]) + '{"row": 0, "mess')
    assert run(tiny_recipe, out, prompts, *settings) == whole
    assert "answering" not in capsys.readouterr().out
    assert not list(tmp_path.glob("*.rank*"))
    (tmp_path / "other.jsonl.rank1").write_text('{"row": 1, "messages": [], "tokens": []}\n')
    assert "other.jsonl.rank1: holds rows, but" in refused(*arguments(tiny_recipe, tmp_path / "other.jsonl", prompts))


def test_ranks_share_the_rows_and_leave_what_one_process_leaves(tiny_recipe, tmp_path, prompts):
    """Of three ranks one dies; a launch of two is interrupted; two go on to the end. Mutations: ranks do not tell each
    other the prompts that they made; a rank leaves its parts; a dead rank's rows are asked again."""
    settings = ["--synthesize", "24", "--batch", "2", "--keep-unfinished"]
    whole = run(tiny_recipe, tmp_path / "whole.jsonl", prompts, *settings)
    out = tmp_path / "out.jsonl"
    dies = fault(tmp_path, 1, "kill", 8, r"out\.jsonl.*\.rank1$")
    command = arguments(tiny_recipe, out, prompts, *settings)
    text = forked(*command, ranks=3, env=dies, ends=(1, -signal.SIGKILL), log_dir=tmp_path)
    assert "fault: kill" in text and "/medusa_ds/" not in text  # no traceback of ours
    before = count_lines(out)
    assert 8 < before < sum(map(len, whole))
    tools = ("--num_gpus", "2", "--module")
    job = launch("medusa_ds.cli", *command, options=tools, log_dir=tmp_path)
    while job.process.poll() is None and count_lines(out) < before + 8:
        time.sleep(0.01)
    os.killpg(job.process.pid, signal.SIGINT)  # as a terminal does
    assert job.wait(60) != 0, job.text
    assert "/medusa_ds/" not in job.text, job.text  # the launcher shows a traceback of its own
    assert before < count_lines(out) < sum(map(len, whole)), job.text
    assert "finished rows are kept" in job.text
    text = forked(*command, ranks=2, log_dir=tmp_path)
    assert content(out) == whole
    assert not list(tmp_path.glob("*.rank*"))
    assert text.count("rows asked =") == 1
    assert "rows on 2 ranks" in text


def test_a_server_is_asked_by_one_process(tiny_recipe, tmp_path, prompts, refused, monkeypatch):
    launch = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in launch.items():
        monkeypatch.setenv(name, value)
    server = ("--server", "http://localhost:1/v1")
    assert "--server: found 2 ranks" in refused(*arguments(tiny_recipe, tmp_path / "out.jsonl", prompts, *server))
    assert not list(tmp_path.glob("out*"))


def test_limits_are_checked_before_the_model_is_loaded(tiny_recipe, tmp_path, prompts, refused, monkeypatch):
    """The default of the prompts' limit leaves room for an answer. Mutation: ask the loaded model."""
    monkeypatch.setattr("medusa_ds.programs.distill.load_backbone", lambda *_, **__: pytest.fail("loaded"))
    out = tmp_path / "out.jsonl"
    base = ["distill", tiny_recipe, "--out", out, "--prompts", prompts, "--device", "cpu"]
    limit = 2048
    for more, says in (
        (["--max-new-tokens", str(limit)], f"--max-new-tokens {limit}; prompt and answer together have at most"),
        (["--max-new-tokens", "2000", "--max-prompt-tokens", "49"], "--max-new-tokens 2000 and --max-prompt-tokens 49"),
    ):
        assert says in refused(*base, *more) and not out.exists()
    settings = Settings(recipe="x", out="x", prompts="x", max_new_tokens=2000)
    assert [settings.sampling(room).max_prompt_tokens for room in (2048, 8192, None)] == [48, 1024, 1024]


def test_a_file_without_rows_is_nobodys(tiny_recipe, tmp_path, prompts):
    """Mutation: refuse it for the settings of a run that wrote nothing."""
    out = tmp_path / "out.jsonl"
    out.write_text("")
    (tmp_path / "out.jsonl.progress").write_text('{"model": "other", "seed": 3}\n')
    run(tiny_recipe, out, prompts, "--limit", "2", "--keep-unfinished")
    assert lines(out) and lines(tmp_path / "out.jsonl.progress")[0]["seed"] == 0


def test_unusable_prompts_are_told_with_file_and_line(tiny_recipe, tmp_path, capsys):
    half = tmp_path / "half.jsonl"
    half.write_text('{"turns": ["one two"]}\n{"turns": ["three\n{"a": 1}\n')
    run(tiny_recipe, tmp_path / "out.jsonl", half, "--keep-unfinished")
    printed = capsys.readouterr().out
    assert f"1 x unusable row: not valid JSON (first: {half}:2)" in printed
    assert "no known layout in its keys: a; known are" in printed and f"(first: {half}:3)" in printed
