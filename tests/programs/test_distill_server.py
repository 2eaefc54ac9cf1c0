"""The distillation program with a server that misbehaves."""

import gzip
import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from distill_runs import lines, run

from medusa_ds import cli
from medusa_ds.distilling import server as server_module


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
        answer = {
            "id": "1",
            "object": "x",
            "created": 0,
            "model": "m",
            "choices": [choice],
            "usage": {"prompt_tokens": 1, "completion_tokens": 3, "total_tokens": 4},
        }
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
