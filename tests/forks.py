"""Ranks as forks of a process that has imported everything: a second where a launch takes fifteen.

In each fork Python runs the program as the stock launcher has it run: as `__main__`, with the same arguments and the
variables of its rank. What the launcher does itself (signals, exit statuses, nodes, modules) is tested by
`support.launch`.
"""

import atexit
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TextIO

_AT_START = dict(os.environ)
PORTS: set[int] = set()
"""Ports given out since the last test ended."""
_servers: list[subprocess.Popen[str]] = []


def free_port() -> int:
    """A port that nobody listens on at the moment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    PORTS.add(port)
    return port


def run_forks(
    program: str | Path,
    *arguments: str,
    logs: list[Path],
    cwd: Path,
    env: dict[str, str] | None = None,
    timeout: float = 600,
) -> list[int]:
    """Run a program on as many ranks as there are logs, which may be the same file; exit statuses by rank.

    Ranks that outlive a failed one by seconds are killed, as all are after `timeout` seconds.
    """
    if not _servers:
        surroundings = {**_AT_START, "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "DS_LOG_LEVEL": "error"}
        command = [sys.executable, __file__]
        _servers.append(
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=surroundings)
        )
        atexit.register(_servers[0].communicate)
    count, port = str(len(logs)), str(free_port())
    launch = {"WORLD_SIZE": count, "LOCAL_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    request = {
        "program": str(program),
        "arguments": arguments,
        "logs": [str(log) for log in logs],
        "cwd": str(cwd),
        "env": {**os.environ, **launch, **(env or {})},
        "timeout": timeout,
    }
    assert _servers[0].stdin is not None and _servers[0].stdout is not None
    _servers[0].stdin.write(json.dumps(request) + "\n")
    _servers[0].stdin.flush()
    return json.loads(_servers[0].stdout.readline())


def _serve(answers: TextIO) -> tuple[str, list[str]] | None:
    """Fork for every request on stdin, and answer it with statuses; in a fork returns what to run."""
    for line in sys.stdin:
        request, ranks = json.loads(line), {}
        for rank, log in enumerate(request["logs"]):
            pid = os.fork()
            if not pid:
                out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
                for stream, fd in enumerate((os.open(os.devnull, os.O_RDONLY), out, out)):
                    os.dup2(fd, stream)
                os.environ.clear()
                os.environ.update(request["env"], RANK=str(rank), LOCAL_RANK=str(rank))
                os.chdir(request["cwd"])
                return request["program"], request["arguments"]
            ranks[pid] = rank
            os.setpgid(pid, next(iter(ranks)))
        statuses, end = [0] * len(ranks), time.monotonic() + request["timeout"]
        while ranks:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid:
                statuses[ranks.pop(pid)] = os.waitstatus_to_exitcode(status)
                if status:
                    end = min(end, time.monotonic() + 8)
            elif time.monotonic() > end:
                for pid in ranks:
                    os.kill(pid, signal.SIGKILL)
            else:
                time.sleep(0.02)
        print(json.dumps(statuses), file=answers, flush=True)
    return None


if __name__ == "__main__":
    stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # DeepSpeed logs to stdout
    import cpuinfo
    import datasets  # noqa: F401
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401 - imports PyTorch's compiler
    import matplotlib.backends.backend_svg  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    import medusa_ds.training.hidden_cache
    import medusa_ds.training.loop  # noqa: F401

    known = cpuinfo.get_cpu_info()  # DeepSpeed's CPU Adam asks each time, which starts a process
    cpuinfo.get_cpu_info = lambda: known
    gc.freeze()  # or every fork's collections copy the pages of all modules
    if job := _serve(stdout):
        sys.argv[:], sys.path[0] = [job[0], *job[1]], str(Path(job[0]).parent)
        if "FAULT" in os.environ:
            sys.path.append(os.environ["PYTHONPATH"])
            import file_faults

            file_faults.install_from_environment()
        runpy.run_path(job[0], run_name="__main__")
    else:
        os._exit(0)  # without what libraries say of a fork server's end
