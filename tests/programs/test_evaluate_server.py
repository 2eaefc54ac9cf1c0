"""`medusa-ds evaluate --server` against a server of this process that answers well, wrongly, slowly or not at all."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
import torch
from exporting import MakeRun
from support import QuietServer

from medusa_ds.cli import main
from medusa_ds.decoding.decoder import Decoder
from medusa_ds.decoding.trees import chain
from medusa_ds.programs import evaluate
from medusa_ds.runs import load_run

NEW = 24


class Fake(QuietServer):
    """Answers plainly, and says that every request took two drafts with 2, 1 and 0 accepted tokens by position.

    `behaviour` names what happens to the requests from number `since` on, the first being 0.
    """

    def __init__(self, run: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.run = load_run(run, torch.device("cpu"), torch.float32)
        self.decoder = Decoder(self.run.backbone, None, chain(0))
        self.models, self.metrics, self.answer = json.dumps({"data": [{"id": "tiny"}]}), "", ""
        self.behaviour, self.since, self.asked, self.lock = "", 0, 0, threading.Lock()
        self.released = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Fake

    def log_message(self, *_: Any) -> None: ...

    def reply(self, text: str, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def do_GET(self) -> None:
        if self.path == "/v1/models":
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
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            number, server.asked = server.asked, server.asked + 1
            behaviour = server.behaviour if number >= server.since else ""
            assert asked["model"] == "tiny" and asked["temperature"] == 0
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
            self.reply(json.dumps({"choices": [choice], "usage": {"completion_tokens": len(row.tokens)}}))


@pytest.fixture
def served(make_run: MakeRun, tmp_path: Path) -> Iterator[tuple[Fake, list[str]]]:
    """A server, and the command that measures it on four prompts."""
    run = make_run()
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f'{{"turns": ["from {word}", "and"]}}\n' for word in ("red", "sun")))
    server = Fake(run)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    command = ["evaluate", str(run), "--prompts", str(prompts), "--max-new-tokens", str(NEW), "--device", "cpu"]
    yield server, [*command, "--server", server.url, "--json", str(tmp_path / "report.json")]
    server.released.set()
    server.shutdown()
    thread.join()
    server.server_close()


def report_of(command: list[str]) -> dict[str, Any]:
    return json.loads(Path(command[-1]).read_text())


@pytest.mark.parametrize("in_flight", ["1", "3"])
def test_a_server_is_measured_like_our_own_decoder(
    served: tuple[Fake, list[str]], capsys: pytest.CaptureFixture[str], in_flight: str
) -> None:
    server, command = served
    main([*command[:-2], "--in-flight", in_flight, *command[-2:]])
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
    assert f"tokens/s, {in_flight} at a time" in out and "differ from plain greedy: 0 of 4" in out


def test_texts_that_differ_and_a_page_that_is_missing_are_told(
    served: tuple[Fake, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
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
def test_what_a_failing_server_answered_is_kept(
    served: tuple[Fake, list[str]], capsys: pytest.CaptureFixture[str], behaviour: str, text: str
) -> None:
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
        ({"text": "\ud800"}, "UnicodeEncodeError"),
        ({"text": 5}, "'int' object has no attribute 'encode'"),
        ({"token_ids": "abc"}, "an answer whose tokens are no numbers"),
        ({"token_ids": [[1], [2]]}, "an answer whose tokens are no numbers"),
        ({"token_ids": [-1]}, "an answer whose tokens are no numbers"),
        ({"token_ids": [300]}, "found token 300; the run's model has 300: it serves another model"),
    ],
)
def test_answers_of_odd_shapes_are_one_line(
    served: tuple[Fake, list[str]], capsys: pytest.CaptureFixture[str], answer: Any, text: str
) -> None:
    server, command = served
    choices = [{"text": "red"} | (answer if isinstance(answer, dict) else {})]
    whole = json.dumps({"choices": choices, "usage": {"completion_tokens": 3}})
    server.behaviour, server.answer = "answer", answer if answer == DEEP else whole
    with pytest.raises(SystemExit, match="2"):
        main(command)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: --server: ") and text in error


@pytest.mark.parametrize("models", [DEEP, '{"data": [{"id": 5}]}'])
def test_lists_of_models_of_odd_shapes_are_one_line(
    served: tuple[Fake, list[str]], capsys: pytest.CaptureFixture[str], models: str
) -> None:
    server, command = served
    server.models = models
    with pytest.raises(SystemExit, match="2"):
        main(command)
    assert "start it, or name another" in capsys.readouterr().err


@pytest.mark.parametrize("count", ["nan", "inf", "many"])
def test_counts_that_are_no_numbers_are_none(
    served: tuple[Fake, list[str]], capsys: pytest.CaptureFixture[str], count: str
) -> None:
    server, command = served
    server.metrics = f'vllm:spec_decode_num_drafts_total{{engine="0"}} {count}\n'
    main(command)
    assert "no counts of drafts on its /metrics" in capsys.readouterr().out


def test_a_server_that_is_gone_is_not_asked_for_ever(
    served: tuple[Fake, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    server, command = served
    server.behaviour, server.since = "error", 1
    with pytest.raises(SystemExit):
        main(command)
    assert "no request was answered, the first: ValueError: status 500" in capsys.readouterr().err
    assert server.asked == 4  # of four, the last was not asked any more


def test_mistakes_are_found_before_the_models_load(
    served: tuple[Fake, list[str]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, command = served
    monkeypatch.setattr(evaluate.Settings, "load", lambda _: pytest.fail("loaded"))
    at = command.index("--server") + 1
    for url in ("http://127.0.0.1:9/v1", "localhost", "http://a\nb/v1", command[at] + "/x"):
        with pytest.raises(SystemExit):
            main([*command[:at], url, *command[at + 1 :]])
        error = capsys.readouterr().err
        says = f"--server: {url}: " in error and "start it, or name another" in error
        no_url = f"--server: found {url!r}; allowed is a URL such as http" in error
        assert error.count("\n") == 1 and (no_url if url in ("localhost", "http://a\nb/v1") else says)
    with pytest.raises(SystemExit):
        main([*command, "--acceptance", "typical"])
    assert "a server is asked for greedy texts" in capsys.readouterr().err
