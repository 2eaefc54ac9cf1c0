"""The distillation program: interrupted runs, accounting, and a server that misbehaves."""

import gzip
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from support import cli as forked
from support import fault, launch

from medusa_ds import cli
from medusa_ds.data.sources import load_conversations
from medusa_ds.distilling import server as server_module
from medusa_ds.recipe import DataSpec

WORDS = "red green blue one two three four five six seven".split()


@pytest.fixture
def prompts(tmp_path):
    """30 conversations in three formats, two of them unusable."""
    file = tmp_path / "prompts.jsonl"
    rows = [{"turns": [f"from {WORDS[n % 10]} to {n}"] + ["and on"] * (n % 3)} for n in range(20)]
    rows += [{"messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": f"{n}?"},
                           {"role": "assistant", "content": "not this"}]} for n in range(4)]  # fmt: skip
    rows += [{"conversations": [{"from": "human", "value": f"say {n}"}]} for n in range(4)]
    rows += [{"turns": []}, {"turns": ["<|im_end|> hello"]}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def arguments(recipe, out, prompts, *more):
    return ["distill", str(recipe), "--out", str(out), "--prompts", str(prompts), "--max-new-tokens", "24",
            "--max-prompt-tokens", "120", "--temperature", "1", "--device", "cpu", *more]  # fmt: skip


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def content(out):
    """Everything that a run leaves, without its order."""
    progress = lines(out.with_name(out.name + ".progress"))
    return [sorted(map(json.dumps, rows)) for rows in (lines(out), progress)]


def count_lines(out):
    return sum(file.read_bytes().count(b"\n") for file in out.parent.glob(f"{out.name}*"))


def run(recipe, out, prompts, *more):
    cli.main(arguments(recipe, out, prompts, *more))
    return content(out)


def test_rows_are_complete_and_read_by_data_path(tiny_recipe, tmp_path, prompts, capsys):
    """Mutation: begin the next turn from the original conversation instead of the answered one."""
    out = tmp_path / "out.jsonl"
    run(tiny_recipe, out, prompts, "--synthesize", "12")
    printed = capsys.readouterr().out
    rows = lines(out)
    removed = [row for row in lines(tmp_path / "out.jsonl.progress") if "removed" in row]
    assert "42 rows asked =" in printed
    assert f"{len(rows)} written" in printed
    assert "1 x unusable row" in printed
    assert "1 x control tokens in a prompt" in printed
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
    assert data.used == len(rows)


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
        [sys.executable, "-m", "medusa_ds.cli", *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job ignores it
    )  # fmt: skip
    deadline = time.monotonic() + 120
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


def test_other_settings_are_refused(tiny_recipe, tmp_path, prompts, capsys):
    out = tmp_path / "out.jsonl"
    run(tiny_recipe, out, prompts, "--limit", "2")
    for more, says in (
        (["--limit", "3"], "prompts"),
        (["--limit", "2", "--seed", "1"], "seed: was made with 0; now 1"),
    ):
        with pytest.raises(SystemExit, match="2"):
            run(tiny_recipe, out, prompts, *more)
        assert says in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        cli.main(["distill", str(tiny_recipe), "--out", str(out)])
    assert "--synthesize" in capsys.readouterr().err


def test_openings_begin_the_made_prompts_in_turn(tiny_recipe, tmp_path, prompts, capsys):
    """Mutation: keep only what the model wrote after the opening."""
    openings, out = tmp_path / "openings.txt", tmp_path / "out.jsonl"
    openings.write_text("one two\n\nthree\n")
    settings = ["--synthesize", "9", "--keep-unfinished", "--limit", "1"]
    plain = run(tiny_recipe, tmp_path / "plain.jsonl", prompts, *settings)
    begun = run(tiny_recipe, out, prompts, *settings, "--openings", str(openings))
    made = {row["row"]: row["prompt"] for row in lines(tmp_path / "out.jsonl.progress") if "prompt" in row}
    assert set(made) == set(range(1, 10)) and begun != plain
    assert all(prompt.startswith(("one two", "three")[row % 2]) for row, prompt in made.items() if prompt)
    assert any(len(prompt) > len("one two") for prompt in made.values())
    asked = {row["row"]: row["messages"][0]["content"] for row in lines(out) if row["row"] > 0}
    assert asked and all(made[row].strip() == prompt for row, prompt in asked.items())
    cli.main(["distill", str(tiny_recipe), "--out", str(tmp_path / "ours.jsonl"), "--synthesize", "6", "--openings",
              "--max-new-tokens", "4", "--max-prompt-tokens", "120", "--device", "cpu"])  # fmt: skip
    shipped = {row["row"]: row["prompt"] for row in lines(tmp_path / "ours.jsonl.progress") if "prompt" in row}
    ours = (Path(cli.__file__).parent / "data" / "openings.txt").read_text().splitlines()
    assert any(shipped.values()) and len(set(ours)) == len(ours) > 1000
    assert all(prompt.startswith(ours[row]) for row, prompt in shipped.items() if prompt)
    (tmp_path / "empty.txt").write_text("\n")
    for more, says in (
        (["--limit", "1", "--openings", str(openings)], "without --synthesize"),
        (["--synthesize", "1", "--openings", str(tmp_path / "none.txt")], "none.txt: cannot be read"),
        (["--synthesize", "1", "--openings", str(tmp_path / "empty.txt")], "empty.txt: found no line with text"),
    ):
        with pytest.raises(SystemExit, match="2"):
            run(tiny_recipe, tmp_path / "bad.jsonl", prompts, *more)
        assert says in capsys.readouterr().err


def test_prompts_of_a_benchmark_are_left_out(tiny_recipe, tmp_path, prompts, capsys):
    excluded = tmp_path / "bench.jsonl"
    excluded.write_text(json.dumps({"turns": ["From RED to 10!"]}) + "\n")
    out = tmp_path / "out.jsonl"
    run(tiny_recipe, out, prompts, "--exclude", str(excluded))
    assert "1 x overlap with --exclude" in capsys.readouterr().out
    assert 10 not in [row["row"] for row in lines(out)]


def test_what_other_ranks_left_is_moved_in_once(tiny_recipe, tmp_path, prompts, capsys):
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
    with pytest.raises(SystemExit, match="2"):
        run(tiny_recipe, tmp_path / "other.jsonl", prompts)
    assert "other.jsonl.rank1: holds rows, but" in capsys.readouterr().err


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


def test_a_server_is_asked_by_one_process(tiny_recipe, tmp_path, prompts, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="2"):
        run(tiny_recipe, tmp_path / "out.jsonl", prompts, "--server", "http://localhost:1/v1")
    assert "--server: found 2 ranks" in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


class Faults(BaseHTTPRequestHandler):
    """An OpenAI-compatible server that answers a request only after some faults."""

    protocol_version = "HTTP/1.1"
    asked: Counter
    plan: dict
    dead = False

    def log_message(self, *_):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        said = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
        time_before = self.asked[said]
        self.asked[said] += 1
        fault = self.plan.get(said, [])[time_before : time_before + 1]
        if self.dead:
            fault = ["closed"]
        if fault == ["closed"]:
            self.connection.close()
            self.close_connection = True
            return
        if fault == ["hang"]:
            time.sleep(3)
        if fault == ["slow"]:
            time.sleep(0.4)
        status = int(fault[0]) if fault and fault[0].isdigit() else 200
        text = f"answer to {said}" if "messages" in body else "tell me of birds"
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}, "text": text}
        answer = {"id": "1", "object": "x", "created": 0, "model": "m", "choices": [choice],
                  "usage": {"prompt_tokens": 1, "completion_tokens": 3, "total_tokens": 4}}  # fmt: skip
        data = json.dumps(answer).encode()
        if fault == ["no choices"]:
            data = b'{"error": "overloaded"}'
        if fault == ["no json"]:
            data = b"<html>"
        if fault == ["endless"]:
            data = json.dumps(answer | {"padding": "x" * server_module.MAX_ANSWER_BYTES}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        if fault == ["compressed"]:
            data = gzip.compress(data)
            self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Length", str(len(data) + (50 if fault == ["cut"] else 0)))
        self.end_headers()
        self.wfile.write(data)
        if fault == ["cut"]:
            self.close_connection = True


@pytest.fixture
def server():
    handler = type("Handler", (Faults,), {"asked": Counter(), "plan": {}})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield handler, f"http://127.0.0.1:{running.server_port}/v1"
        running.shutdown()
        thread.join()


pytest.importorskip("openai")
BROKEN = "ignore::pytest.PytestUnhandledThreadExceptionWarning"


@pytest.mark.filterwarnings(BROKEN, "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_failing_server_costs_no_finished_row(tiny_recipe, tmp_path, server, capfd):
    """Mutation: let a failed request end the run, or count it as removed."""
    handler, url = server
    faults = ["500", "503", "429", "closed", "cut", "slow", "hang"]
    texts = [f"number {n}" for n in range(20)]
    handler.plan = {text: [name] for text, name in zip(texts, faults, strict=False)}
    for n, name in enumerate(("no choices", "no json", "400")):
        handler.plan[texts[10 + n]] = [name]
    file, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    file.write_text("".join(json.dumps({"turns": [text, f"more {text}"]}) + "\n" for text in texts))
    more = ["--server", url, "--timeout", "1", "--retries", "2", "--batch", "4"]
    run(tiny_recipe, out, file, *more)
    assert "20 rows asked = 17 written" in (printed := capfd.readouterr().out)
    assert "0 removed + 3 failed" in printed
    first = {row["row"]: row for row in lines(out)}
    run(tiny_recipe, out, file, *more)  # asks the three again, whose faults are over
    rows = {row["row"]: row for row in lines(out)}
    assert "20 rows asked = 20 written" in capfd.readouterr().out
    assert all(rows[number] == row for number, row in first.items())
    assert len(lines(out)) == len(rows) == 20
    for number, row in rows.items():
        said = [message["content"] for message in row["messages"]]
        turns = [texts[number], f"more {texts[number]}"]
        assert said == [turns[0], f"answer to {turns[0]}", turns[1], f"answer to {turns[1]}"]
    assert all(handler.asked[f"more {text}"] == 1 for text in texts)


@pytest.mark.filterwarnings(BROKEN, "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_servers_answer_cannot_fill_the_memory(tiny_recipe, tmp_path, server, capfd, monkeypatch):
    """Red when an answer is read whole, however long, or unpacked."""
    monkeypatch.setattr(server_module, "MAX_ANSWER_BYTES", 1 << 16)
    handler, url = server
    handler.plan = {"number 1": ["endless"] * 9, "number 2": ["compressed"] * 9}
    file, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    file.write_text("".join(json.dumps({"turns": [f"number {n}"]}) + "\n" for n in range(6)))
    run(tiny_recipe, out, file, "--server", url, "--timeout", "5", "--retries", "1", "--batch", "2")
    assert "6 rows asked = 4 written" in capfd.readouterr().out
    assert sorted(row["row"] for row in lines(out)) == [0, 3, 4, 5]


@pytest.mark.filterwarnings(BROKEN, "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_server_that_is_gone_ends_the_run_and_keeps_rows(tiny_recipe, tmp_path, server, capfd):
    """Mutation: never stop; a run then asks every row in vain."""
    handler, url = server
    file, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    file.write_text("".join(json.dumps({"turns": [f"number {n}"]}) + "\n" for n in range(80)))
    handler.plan = {f"number {n}": ["400"] * 9 for n in range(30, 80)}
    more = ["--server", url, "--timeout", "2", "--retries", "1", "--batch", "2"]
    with pytest.raises(SystemExit, match="2"):
        run(tiny_recipe, out, file, *more)
    assert "failed one after the other" in capfd.readouterr().err
    assert len(lines(out)) == 30
    handler.plan = {}
    run(tiny_recipe, out, file, *more)
    assert sorted(row["row"] for row in lines(out)) == list(range(80))


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_server_makes_prompts_from_the_template(tiny_recipe, tmp_path, server, capfd):
    handler, url = server
    out = tmp_path / "out.jsonl"
    cli.main(["distill", str(tiny_recipe), "--out", str(out), "--synthesize", "3", "--server", url])
    assert "2 x made prompt: near-duplicate" in capfd.readouterr().out
    assert handler.asked["<|im_start|>user\n"] == 3
    said = [message["content"] for message in lines(out)[0]["messages"]]
    assert said == ["tell me of birds", "answer to tell me of birds"]
