"""What several tests use: a tiny tokenizer, and running a recipe, with the launcher as a user does and without."""

import contextlib
import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
from forks import free_port, run_forks

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
"""Of tiny models, for the configs of transformers."""
WORDS = "red green blue one two three four five six seven sun moon star river stone tree bird fish".split()


def heads_meta(num: int, layers: int, hidden_size: int, vocab_size: int, **more: Any) -> dict[str, Any]:
    """What saved heads with projections of their own say of themselves, for `save_heads`."""
    sizes = {"num": num, "layers": layers, "hidden_size": hidden_size, "vocab_size": vocab_size}
    return {"base_model": "owner/model", "revision": None, "lm_head": "own", "recipe": "stage: 1\n", **sizes, **more}


def write_recipe(folder: Path, model: Path, conversations: Path) -> Path:
    """A stage-1 recipe in a folder: 6 steps of 4 sequences; output beside it."""
    file = folder / "tiny.yaml"
    file.write_text(
        f"""_: r\"\"\"  # launch stub
model:
  name: {model}
heads:
  num: 3
stage: 1
data:
  path: {conversations}
  max_length: 64
  validation: 0.2
train:
  global_batch_size: 4
  micro_batch_size: 2
  steps: 6
  lr: 1e-2
  save_every: 2
deepspeed: ds_configs/zero2.json
output: {folder / "out"}
# \"\"\"; from medusa_ds.train import main; main(__file__)
"""
    )
    return file


class QuietHandler(BaseHTTPRequestHandler):
    """Of requests that nobody is told of."""

    def log_message(self, *_: Any) -> None:
        """Nothing."""


class QuietServer(ThreadingHTTPServer):
    """A server that answers while its body runs.

    It says nothing of clients that hang up: its tracebacks would cut lines in two that a test reads.
    """

    def __init__(self, handler: type[QuietHandler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self._thread = threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> "QuietServer":
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()

    def handle_error(self, *_: Any) -> None:
        """Nothing."""


def tiny_tokenizer() -> Any:
    """A byte-level BPE tokenizer of 300 tokens with ChatML's control tokens and template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 4 + ["user assistant system\n"] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=CHATML,
    )


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Every write beyond so many bytes of a file fails, as on a full disk, whatever language it is written in."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@dataclass
class Run:
    """A finished or running launch: its process, and what it has printed once it has ended."""

    process: subprocess.Popen[str]
    log: Path

    @property
    def text(self) -> str:
        """Everything printed so far."""
        return self.log.read_text(errors="replace")

    def members(self) -> dict[str, psutil.Process]:
        """The processes of the launch that are there, by name: runner, launcher, rank 0, rank 1, ..."""
        found = {}
        with contextlib.suppress(psutil.NoSuchProcess):
            found["runner"] = psutil.Process(self.process.pid)
            for child in found["runner"].children(recursive=True):
                with contextlib.suppress(psutil.Error):  # a short-lived one, such as a probe of DeepSpeed's, has ended
                    command = " ".join(child.cmdline())
                    if rank := re.search(r"--local_rank=(\d)", command):
                        found.setdefault(f"rank {rank[1]}", child)
                    elif "deepspeed.launcher.launch" in command:
                        found.setdefault("launcher", child)
        return found

    def wait(self, timeout: float = 600) -> int:
        """Wait for the end and return the exit status; what takes longer is killed and fails."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise AssertionError(f"still running after {timeout} s:\n{self.text}") from None

    def wait_for(self, text: str, timeout: float = 600) -> None:
        """Wait until a text has been printed."""
        end = time.monotonic() + timeout
        while text not in self.text:
            assert time.monotonic() < end and self.process.poll() is None, f"never printed {text!r}:\n{self.text}"
            time.sleep(0.05)


_LAUNCHES = iter(range(10**9))


def _new_log(log_dir: Path) -> Path:
    return log_dir / f"log-{os.getpid()}-{next(_LAUNCHES)}.txt"


def take_sigint() -> None:
    """A script's background jobs ignore SIGINT, and so would their children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def launch(
    recipe: str | Path,
    *overrides: str,
    ranks: int = 1,
    module: bool = False,
    env: dict[str, str] | None = None,
    cwd: Path | None = None,
    port: int | None = None,
    options: tuple[str, ...] | None = None,
    pipe: bool = False,
    log_dir: Path,
) -> Run:
    """Start `deepspeed RECIPE overrides` in a session of its own, so that a test can signal the whole tree.

    With `pipe` its lines go through `cat`, which a signal to the tree ends, and its errors to `stderr.txt`.
    """
    deepspeed = shutil.which("deepspeed", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert deepspeed is not None
    options = options or ("--num_gpus", str(ranks))
    target = ["--module", "medusa_ds", str(recipe)] if module else [str(recipe)]
    command = [deepspeed, "--master_port", str(port or free_port()), *options, *target, *overrides]
    if pipe:
        command = ["bash", "-c", f"{shlex.join(command)} 2>{shlex.quote(str(log_dir / 'stderr.txt'))} | cat"]
    log = _new_log(log_dir)
    surroundings = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "PYTHONPATH": "", **(env or {})}
    with open(log, "w") as stream:
        process = subprocess.Popen(
            command,
            stdout=stream,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=cwd or log_dir,
            env=surroundings,
            start_new_session=True,
            preexec_fn=take_sigint,
        )
    return Run(process, log)


def launched(*arguments: str | Path, **options: Any) -> str:
    """A `launch` to its end, which must be a good one; returns what it printed."""
    run = launch(*arguments, **options)
    status = run.wait()
    assert status == 0, run.text
    return run.text


def train(
    recipe: str | Path,
    *overrides: str,
    log_dir: Path,
    ranks: int = 1,
    env: dict[str, str] | None = None,
    ends: tuple[int, ...] = (0,),
) -> str:
    """Run a recipe's ranks to their end without the launcher; returns what they printed.

    Every exit status must be one of `ends`.
    """
    log = _new_log(log_dir)
    statuses = run_forks(recipe, *overrides, logs=[log] * ranks, cwd=log_dir, env=env)
    text = log.read_text(errors="replace")
    assert set(statuses) <= set(ends), (statuses, text)
    return text


def cli(*arguments: str | Path, log_dir: Path, **options: Any) -> str:
    """`medusa-ds` as in `train`."""
    program = log_dir / "cli.py"
    program.write_text("from medusa_ds.cli import main\n\nmain()\n")
    return train(program, *map(str, arguments), log_dir=log_dir, **options)


def fault(under: Path, rank: int | None, do: str, call: int = 1, match: str = "") -> dict[str, str]:
    """The environment in which a rank meets a fault at one of its calls for files; see `reliability/inject`."""
    values = {"under": str(under), "rank": rank, "do": do, "call": call, "match": match}
    return {"PYTHONPATH": str(Path(__file__).parent / "reliability" / "inject"), "FAULT": json.dumps(values)}


def metrics_of(output: Path, kind: str = "train") -> list[dict[str, Any]]:
    """Lines of a run's `metrics.jsonl`."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def losses_of(output: Path) -> list[float]:
    """Training losses by step."""
    return [line["loss"] for line in metrics_of(output)]
