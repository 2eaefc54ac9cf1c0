"""The distillation program with a server that misbehaves."""

import gc
import gzip
import json
import re
import threading
import time
from collections import Counter

import pytest
from distill_runs import lines, run
from support import QuietHandler, QuietServer

from medusa_ds import cli
from medusa_ds.distilling import server as server_module
from medusa_ds.distilling.requests import Sampling
from medusa_ds.distilling.served import HeadServer
from medusa_ds.distilling.server import Server
from medusa_ds.errors import UserError


class Faults(QuietHandler):
    """An OpenAI-compatible server that answers a request only after some faults."""

    protocol_version = "HTTP/1.1"
    asked: Counter
    plan: dict
    always: tuple | None = None  # status, content type, body
    thoughts: dict

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        said = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
        fault = "".join(self.plan.get(said, [])[self.asked[said] : self.asked[said] + 1])
        self.asked[said] += 1
        if fault == "closed":
            self.connection.close()
            self.close_connection = True
            return
        time.sleep({"hang": 3, "slow": 0.4}.get(fault, 0))
        text = f"answer to {said}" if "messages" in body else "tell me of birds"
        message = {"role": "assistant", "content": text, **self.thoughts}
        choice = {"index": 0, "finish_reason": "stop", "message": message, "text": text}
        answer = {"choices": [choice], "usage": {"completion_tokens": 3}}
        if fault == "endless":
            answer["padding"] = "x" * server_module.MAX_ANSWER_BYTES
        bodies = {"no choices": b'{"error": "overloaded"}', "no json": b"<html>"}
        status, kind = int(fault) if fault.isdigit() else 200, "application/json"
        data = bodies.get(fault, json.dumps(answer).encode())
        if self.always:
            status, kind, data = self.always
        self.send_response(status)
        self.send_header("Content-Type", kind)
        if fault == "compressed":
            data = gzip.compress(data)
            self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Length", str(len(data) + 50 * (fault == "cut")))
        self.end_headers()
        self.wfile.write(data)
        if fault == "cut":
            self.close_connection = True


@pytest.fixture
def server():
    handler = type("Handler", (Faults,), {"asked": Counter(), "plan": {}, "thoughts": {}})
    with QuietServer(handler) as running:
        yield handler, running.url
    for asking in threading.enumerate():
        if asking.name.startswith("ThreadPoolExecutor"):
            asking.join(5)
    gc.collect()  # sockets that a client has left are told here, where it is known, and not in another file's test


pytest.importorskip("openai")
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnhandledThreadExceptionWarning",
    "ignore::ResourceWarning",
    "ignore::pytest.PytestUnraisableExceptionWarning",
)


def numbered(folder, count):
    """Prompts that are numbers."""
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps({"turns": [f"number {n}"]}) + "\n" for n in range(count)))
    return file


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


def test_a_servers_answer_cannot_fill_the_memory(tiny_recipe, tmp_path, server, capfd, monkeypatch):
    """Red when an answer is read whole, however long, or unpacked."""
    monkeypatch.setattr(server_module, "MAX_ANSWER_BYTES", 1 << 16)
    handler, url = server
    handler.plan = {"number 1": ["endless"] * 9, "number 2": ["compressed"] * 9}
    file, out = numbered(tmp_path, 6), tmp_path / "out.jsonl"
    run(tiny_recipe, out, file, "--server", url, "--timeout", "5", "--retries", "1", "--batch", "2")
    assert "6 rows asked = 4 written" in capfd.readouterr().out
    assert sorted(row["row"] for row in lines(out)) == [0, 3, 4, 5]


def test_a_server_that_is_gone_ends_the_run_and_keeps_rows(tiny_recipe, tmp_path, server, capfd):
    """Mutation: never stop; a run then asks every row in vain."""
    handler, url = server
    file, out = numbered(tmp_path, 80), tmp_path / "out.jsonl"
    handler.plan = {f"number {n}": ["400"] * 9 for n in range(30, 80)}
    more = ["--server", url, "--timeout", "2", "--retries", "1", "--batch", "2"]
    with pytest.raises(SystemExit, match="2"):
        run(tiny_recipe, out, file, *more)
    assert "failed one after the other" in capfd.readouterr().err
    assert len(lines(out)) == 30
    handler.plan = {}
    run(tiny_recipe, out, file, *more)
    assert sorted(row["row"] for row in lines(out)) == list(range(80))


def test_a_server_makes_prompts_from_the_template(tiny_recipe, tmp_path, server, capfd):
    handler, url = server
    out = tmp_path / "out.jsonl"
    cli.main(["distill", str(tiny_recipe), "--out", str(out), "--synthesize", "3", "--server", url])
    assert "2 x made prompt: near-duplicate" in capfd.readouterr().out
    assert handler.asked["<|im_start|>user\n"] == 3
    said = [message["content"] for message in lines(out)[0]["messages"]]
    assert said == ["tell me of birds", "answer to tell me of birds"]


KEY = "sk-" + "a1B2" * 8
NEVER = [
    ((401, "application/json", b'{"error": "no such key"}'), 'status 401, application/json: {"error": "no such key"}'),
    ((500, "text/plain", b"overloaded " + b"x" * 200), f"status 500, text/plain: overloaded {'x' * 69};"),
    ((200, "text/html; charset=utf-8", b"<html> \n Hello</html>"), "status 200, text/html: <html> Hello</html>"),
    ((200, "application/json", b'{"models": []}'), 'status 200, application/json: {"models": []}'),
    ((200, "application/json", b'{"choices": []}'), 'status 200, application/json: {"choices": []}'),
    ((200, "application/json", b'{"choices": [{"message": {}}]}'), "status 200, application/json"),
]


@pytest.mark.parametrize(("always", "said"), NEVER)
def test_a_server_that_never_answers_ends_the_run_at_once(
    tiny_recipe, tmp_path, server, capfd, monkeypatch, always, said
):
    """One line, status 2, no row touched, and another URL may take the file. Mutation: count it as failed rows."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    handler, url = server
    file, out = numbered(tmp_path, 50), tmp_path / "out.jsonl"
    handler.always = always
    more = ["--server", url, "--timeout", "5", "--retries", "1"]
    with pytest.raises(SystemExit, match="2"):
        run(tiny_recipe, out, file, *more, "--seed", "7")
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and said in errors[0] and url in errors[0], errors
    assert "expected is JSON with `choices`" in errors[0] and KEY not in errors[0]
    assert sum(handler.asked.values()) <= 12 and lines(out) == []
    handler.always = None
    run(tiny_recipe, out, file, *more)
    assert len(lines(out)) == 50


@pytest.mark.parametrize(
    "ask",
    [
        lambda: Server("http://x/v1", "m", Sampling(0.0, 1.0, 8, 8, 0), 1, 9.0, 1),
        lambda: HeadServer("http://x", "m", 1),
    ],
)
def test_a_key_that_no_header_holds_is_told_and_not_shown(ask, monkeypatch):
    """Mutation: leave it to the client, whose error spells the key; a line's end after it is none of the key's."""
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY[:9]}\n{KEY[9:]}")
    with pytest.raises(UserError, match="OPENAI_API_KEY: found what is not printable") as error:
        ask()
    assert KEY[:9] not in str(error.value)
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\n")
    assert Server("http://x/v1", "m", Sampling(0.0, 1.0, 8, 8, 0), 1, 9.0, 1).client.api_key == KEY


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://127.0.0.1:9/v1", "http://127.0.0.1:9/v1: 3 requests failed .* no answer, ConnectError"),
        ("localhost:8000/v1", "found 'localhost:8000/v1'; allowed is a URL such as http://localhost:8000/v1"),
        ("file:///etc/passwd", "found 'file:///etc/passwd'; allowed is a URL"),
        ("http://", "found 'http://'; allowed is a URL"),
        (f"http://me:{KEY}@localhost:8000/v1", "found a key in the URL (not shown); set OPENAI_API_KEY"),
        (f"http://localhost:8000/v1?api_key={KEY}", "found a key in the URL (not shown); set OPENAI_API_KEY"),
        (f"http://localhost:8000/{KEY}/v1", "found a key in the URL (not shown); set OPENAI_API_KEY"),
    ],
)
def test_an_address_that_is_no_servers(tiny_recipe, tmp_path, capfd, url, said):
    """Mutation: repeat the URL that holds a key."""
    more = ["--server", url, "--timeout", "2", "--retries", "1"]
    with pytest.raises(SystemExit, match="2"):
        run(tiny_recipe, tmp_path / "out.jsonl", numbered(tmp_path, 9), *more)
    text = capfd.readouterr().err
    assert re.search(said.replace("(", r"\(").replace(")", r"\)"), text), text
    assert text.count("error: ") == 1 and KEY not in text and "Traceback" not in text


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning"])
def test_a_servers_thoughts_are_kept(tiny_recipe, tmp_path, server, key):
    """Mutation: take the content alone."""
    handler, url = server
    handler.thoughts = {key: "hm"}
    out = tmp_path / "out.jsonl"
    run(tiny_recipe, out, numbered(tmp_path, 9), "--server", url)
    assert {message.get("reasoning_content") for row in lines(out) for message in row["messages"]} == {None, "hm"}
    assert all(row["messages"][1]["reasoning_content"] == "hm" for row in lines(out))
