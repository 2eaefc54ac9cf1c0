"""The chat of `medusa-ds generate`, driven through a pseudo-terminal."""

import contextlib
import os
import pty
import select
import subprocess
import sys
import time

import pytest
from support import take_sigint

SLOW = """
import sys, time
from medusa_ds.decoding.decoder import Decoder
step = Decoder.step
def slow(*arguments):
    time.sleep(0.05)
    step(*arguments)
Decoder.step = slow
from medusa_ds.cli import main
main(["generate", sys.argv[1], "--device", "cpu", "--max-new-tokens", "40"])
"""


class Screen:
    """A chat and all that it has shown."""

    def __init__(self, run):
        main, side = pty.openpty()
        env = {**os.environ, "TERM": "dumb", "OMP_NUM_THREADS": "1", "INPUTRC": "/dev/null"}
        options = {"stdin": side, "stdout": side, "stderr": side, "start_new_session": True, "env": env}
        options["preexec_fn"] = take_sigint
        take_terminal = "import fcntl, os, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0);"
        self.process = subprocess.Popen([sys.executable, "-c", take_terminal + SLOW, str(run)], **options)
        os.close(side)
        self.file, self.text, self.seen = main, "", 0

    def send(self, keys):
        os.write(self.file, keys.encode())

    def wait(self, text, seconds=120):
        """Read on until a text stands behind what was waited for before; what came up to its end."""
        end = time.monotonic() + seconds
        while text not in self.text[self.seen :]:
            assert time.monotonic() < end, self.text
            if select.select([self.file], [], [], 1)[0]:
                try:
                    self.text += os.read(self.file, 4096).decode(errors="replace")
                except OSError:  # the other side is closed
                    assert text in self.text[self.seen :], self.text
        begin, self.seen = self.seen, self.text.index(text, self.seen) + len(text)
        return self.text[begin : self.seen]


@pytest.fixture
def screen(make_run):
    chat = Screen(make_run())
    yield chat
    chat.process.kill()
    chat.process.wait()
    os.close(chat.file)


def test_a_chat_is_greeted_stopped_edited_cleared_and_left(screen):
    """Mutation: let KeyboardInterrupt pass, or leave readline out."""
    greeting = screen.wait("> ")
    assert "/help lists commands" in greeting and greeting.count("chat with") == 1
    screen.send("/help\n")
    assert "Ctrl-C stops an answer" in screen.wait("\n> ")
    screen.send("/nonsense\n")
    assert "/nonsense: no such command" in screen.wait("\n> ")
    screen.send("from red\n")
    screen.wait("from red\r\n")
    time.sleep(0.5)
    screen.send("\x03")
    assert "ended by Ctrl-C]" in screen.wait("\n> ")
    screen.send("from sum\x7fn\x1b[D\n")  # what an arrow key sends moves in the line
    assert "^[[" not in screen.wait("\n> ")
    screen.send("\x1b[A")  # and brings the last line back
    screen.wait("from sun")
    screen.send("\n")
    screen.wait("\n> ")
    screen.send("/clear\n")
    screen.wait("\n> ")
    screen.send("\x04")
    assert screen.process.wait(60) == 0
    assert "Traceback" not in screen.text


def test_ctrl_c_at_the_prompt_leaves(screen):
    screen.wait("> ")
    for _ in range(6):  # Python sees a signal that comes between the prompt and the read only with the next key
        time.sleep(0.5)
        screen.send("\x03")
        with contextlib.suppress(subprocess.TimeoutExpired):
            screen.process.wait(20)
            break
    assert screen.process.wait(1) == 0


def test_an_answer_comes_with_a_line_of_figures_alone(make_run):
    """Not with what libraries say while they load. Mutation: leave their bars on."""
    command = f"-m medusa_ds.cli generate {make_run()} --prompt hi --max-new-tokens 2 --device cpu"
    env = {key: value for key, value in os.environ.items() if not key.startswith(("HF_HUB_DISABLE", "TRANSFORMERS_"))}
    done = subprocess.run([sys.executable, *command.split()], capture_output=True, text=True, env=env)
    assert done.returncode == 0 and done.stderr.startswith("[2 tokens, ") and done.stderr.count("\n") == 1
