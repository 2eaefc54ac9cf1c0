"""`medusa-ds evaluate --server` against a server of this process that answers well, wrongly, slowly or not at all."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from support import QuietHandler, QuietServer

from medusa_ds.cli import main
from medusa_ds.decoding.decoder import Decoder
from medusa_ds.decoding.trees import chain
from medusa_ds.distilling.served import HeadServer
from medusa_ds.errors import UserError
from medusa_ds.programs import evaluate
from medusa_ds.runs import load_run

NEW = 24


def answer_of(choice: dict[str, Any], tokens: int = 3) -> str:
    return json.dumps({"choices": [{"text": "red"} | choice], "usage": {"completion_tokens": tokens}})


class Fake(QuietServer):
    """Answers plainly, and says that every request took two drafts with 2, 1 and 0 accepted tokens by position.

    `behaviour` names what happens to the requests from number `since` on, the first being 0.
    """

    def __init__(self, run: Path | None = None) -> None:
        super().__init__(Handler)
        if run is not None:
            self.run = load_run(run, torch.device("cpu"), torch.float32)
            self.decoder = Decoder(self.run.backbone, None, chain(0))
        self.models, self.metrics, self.answer = json.dumps({"data": [{"id": "tiny"}]}), "", ""
        self.behaviour, self.since, self.asked, self.lock = "", 0, 0, threading.Lock()
        self.keys: list[str | None] = []
        self.redirect = ""
        self.released = threading.Event()

    def shutdown(self) -> None:
        self.released.set()
        super().shutdown()


class Handler(QuietHandler):
    server: Fake

    def reply(self, text: str, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def do_GET(self) -> None:
        self.server.keys.append(self.headers["Authorization"])
        if self.server.redirect:
            self.send_response(302)
            self.send_header("Location", self.server.redirect)
            self.end_headers()
        elif self.path == "/v1/models":
            self.reply(self.server.models)
        elif self.path == "/metrics" and self.server.metrics:
            self.reply(self.server.metrics)
        elif self.path == "/metrics" and self.server.behaviour != "no metrics":
            n = self.server.asked
            counts = "".join(
                f'vllm:spec_decode_num_accepted_tokens_per_pos_total{{engine="0",position="{k}"}} {a * n}.0\n'
                for k, a in enumerate((2, 1, 0))
            )
            self.reply(f'# HELP x y\nvllm:spec_decode_num_drafts_total{{engine="0"}} {2 * n}.0\n{counts}')
        else:
            self.reply("nothing here", 404)

    def do_POST(self) -> None:
        self.server.keys.append(self.headers["Authorization"])
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            number, server.asked = server.asked, server.asked + 1
            behaviour = server.behaviour if number >= server.since else ""
            assert asked["model"] == "tiny" and asked["temperature"] == 0
            if behaviour != "answer":
                (row,) = server.decoder.generate([asked["prompt"]], asked["max_tokens"])
                text = server.run.decode(row.tokens)
        if behaviour == "error":
            self.reply("out of\nmemory", 500)
        elif behaviour == "slow":
            server.released.wait(20)
        elif behaviour == "garbage":
            self.reply("<html>")
        elif behaviour == "answer":
            self.reply(server.answer)
        elif behaviour != "dies":
            text = f"red{text}" if behaviour == "wrong" else text
            choice: dict[str, Any] = {"text": text}
            if behaviour in ("tokens", "wrong tokens"):
                choice = {"text": "", "token_ids": [(t + (behaviour != "tokens")) % 300 for t in row.tokens]}
            self.reply(answer_of(choice, len(row.tokens)))


@pytest.fixture
def served(make_run, tmp_path):
    """A server, and the command that measures it on four prompts."""
    run = make_run()
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f'{{"turns": ["from {word}", "and"]}}\n' for word in ("red", "sun")))
    command = ["evaluate", str(run), "--prompts", str(prompts), "--max-new-tokens", str(NEW), "--device", "cpu"]
    with Fake(run) as server:
        yield server, [*command, "--server", server.url, "--json", str(tmp_path / "report.json")]


@pytest.fixture
def bare():
    """A server of no model, which gives the answer that it was told."""
    with Fake() as server:
        server.behaviour = "answer"
        yield server


def report_of(command: list[str]) -> dict[str, Any]:
    return json.loads(Path(command[-1]).read_text())


def test_a_server_is_measured_like_our_own_decoder(served, capsys):
    server, command = served
    main([*command[:-2], "--in-flight", "3", *command[-2:]])
    report, out = report_of(command), capsys.readouterr().out
    assert server.asked == 5  # one that is not counted
    assert report["prompts"] | {"file": ""} == {"file": "", "answers": 4, "left_out_too_long": 0, "failed": 0}
    assert report["texts"] == {"compared": 4, "differ": 0, "differ_by_a_tie": 0, "differences": []}
    assert report["accepted"] == {
        "mean_tokens_per_step": 1 + 12 / 8,
        "steps": 8,
        "distribution": {"1": 0, "2": 4, "3": 4, "4": 0},
        "by_position": [8, 4, 0],
    }
    assert report["speed"]["tokens"] == 4 * NEW and report["speed"]["server_tokens_per_s"] > 0
    assert report["heads"]["positions"] > 0
    assert "tokens per step, decoding          2.500 (the server's own count)" in out
    assert "tokens/s, 3 at a time" in out and "differ from plain greedy: 0 of 4" in out


def test_texts_that_differ_and_a_page_that_is_missing_are_told(served, capsys):
    server, command = served
    server.behaviour, server.since = "wrong", 4
    main(command)
    assert report_of(command)["texts"]["differ"] == 1 and report_of(command)["texts"]["differences"][0]["position"] == 0
    server.since = 0
    for behaviour, differ in (("tokens", 0), ("wrong tokens", 4)):
        server.behaviour = behaviour
        main(command)
        assert report_of(command)["texts"]["differ"] == differ
    server.behaviour = "no metrics"
    main(command)
    assert "accepted" not in report_of(command) and "no counts of drafts on its /metrics" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("behaviour", "text"),
    [
        ("error", "2 of 4 requests failed, the first: ValueError: status 500: out of memory; the report is of the"),
        ("garbage", "2 of 4 requests failed, the first: JSONDecodeError"),
        ("dies", "2 of 4 requests failed, the first: RemoteDisconnected"),
        ("slow", "2 of 4 requests failed, the first: no answer in time; give more --timeout"),
    ],
)
def test_what_a_failing_server_answered_is_kept(served, capsys, behaviour, text):
    server, command = served
    server.behaviour, server.since = behaviour, 3
    with pytest.raises(SystemExit) as status:
        main([*command[:-2], "--timeout", "2", *command[-2:]])
    error = capsys.readouterr().err
    assert status.value.code == 2 and text in error.splitlines()[-1] and error.count("error: ") == 1
    assert report_of(command)["prompts"]["answers"] == report_of(command)["texts"]["compared"] == 2


DEEP = "[" * 100_000


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (DEEP, "RecursionError"),
        (answer_of({"text": "\ud800"}), "UnicodeEncodeError"),
        (answer_of({"text": 5}), "'int' object has no attribute 'encode'"),
        (answer_of({"token_ids": "abc"}), "an answer whose tokens are no numbers"),
        (answer_of({"token_ids": [[1], [2]]}), "an answer whose tokens are no numbers"),
        (answer_of({"token_ids": [-1]}), "an answer whose tokens are no numbers"),
    ],
)
def test_answers_of_odd_shapes_are_one_line(bare, answer, text):
    bare.answer = answer
    with pytest.raises(UserError, match=r"^--server: ") as error:
        HeadServer(bare.url, None, 9.0).measure([[1]], 4, 1)
    assert text in str(error.value) and "\n" not in str(error.value)


def test_lists_of_models_and_counts_of_odd_shapes_are_a_line_and_none(bare):
    bare.answer = answer_of({})
    for count in ("nan", "inf", "many"):
        bare.metrics = f'vllm:spec_decode_num_drafts_total{{engine="0"}} {count}\n'
        assert HeadServer(bare.url, None, 9.0).measure([[1]], 4, 1).drafts == 0
    for bare.models in (DEEP, '{"data": [{"id": 5}]}'):
        with pytest.raises(UserError, match=r"start it, or name another$"):
            HeadServer(bare.url, None, 9.0)


def test_a_key_goes_to_the_server_and_nowhere_else(bare, monkeypatch):
    """Fails where the server is asked without the key, or where a redirect takes it along."""
    monkeypatch.setenv("OPENAI_API_KEY", "abc\n")
    bare.answer = answer_of({})
    HeadServer(bare.url, None, 9.0).measure([[1]], 4, 1)
    assert {*bare.keys} == {"Bearer abc"}
    bare.keys.clear()
    with Fake() as other:
        other.redirect = f"{bare.url}/models"
        HeadServer(other.url, None, 9.0)
        assert (other.keys, bare.keys) == (["Bearer abc"], [None])


def test_tokens_that_the_model_lacks_are_one_line(served, refused):
    server, command = served
    server.behaviour, server.answer = "answer", answer_of({"token_ids": [300]})
    error = "error: --server: found token 300; the run's model has 300: it serves another model\n"
    assert refused(*command) == error


def test_a_server_that_is_gone_is_not_asked_for_ever(served, refused):
    server, command = served
    server.behaviour, server.since = "error", 1
    assert "no request was answered, the first: ValueError: status 500" in refused(*command)
    assert server.asked == 4  # of four, the last was not asked any more


def test_mistakes_are_found_before_the_models_load(served, refused, monkeypatch):
    _, command = served
    monkeypatch.setattr(evaluate.Settings, "load", lambda _: pytest.fail("loaded"))
    at = command.index("--server") + 1
    for url in ("http://127.0.0.1:9/v1", command[at] + "/x"):
        error = refused(*command[:at], url, *command[at + 1 :])
        assert f"--server: {url}: " in error and "start it, or name another" in error
    for url in ("localhost", "http://a\nb/v1"):
        error = refused(*command[:at], url, *command[at + 1 :])
        assert f"--server: found {url!r}; allowed is a URL such as http" in error
    assert "a server is asked for greedy texts" in refused(*command, "--acceptance", "typical")
