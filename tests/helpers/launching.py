"""Real processes, alone, under torchrun, or as ranks without an agent: each with a deadline, and none left
behind when it passes."""
from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch.distributed as dist
from here import HELPERS

DEADLINE_S = 120.0      # for importing torch on a busy machine; what is tried takes seconds
GENERATE = ("-m", "shardlib.models.generate")


@dataclass(frozen=True)
class Finished:
    """A command that ended by itself."""
    returncode: int
    stdout: str
    stderr: str


def clean(environment: dict[str, str]) -> dict[str, str]:
    """This process's environment, without what torchrun or a user said of jobs, and with more."""
    kept = {name: value for name, value in os.environ.items()
            if not name.startswith(("TORCHELASTIC", "SHARDLIB"))}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **environment}


def run(command: Sequence[str | Path], deadline_s: float = DEADLINE_S, **environment: str) -> Finished:
    """Run Python with these arguments.

    AssertionError, all its processes killed, when it does not end in time.
    """
    process = subprocess.Popen([sys.executable, *map(str, command)], env=clean(environment),
                               stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True, start_new_session=True)
    try:
        out, err = process.communicate(timeout=deadline_s)
    except BaseException as error:
        for pid in [process.pid, *_descendants(process.pid)]:  # torchrun's workers have sessions of their own
            try:
                os.killpg(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        out, err = process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            raise AssertionError(f"{' '.join(map(str, command))} did not end within {deadline_s:.0f} s\n"
                                 f"{out}\n{err}") from None
        raise
    return Finished(process.returncode, out, err)


def torchrun(processes: int, command: Sequence[str | Path], deadline_s: float = DEADLINE_S,
             **environment: str) -> Finished:
    """The same under torchrun, on a port of its own."""
    return run(["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), *command],
               deadline_s, **environment)


@cache
def _server() -> subprocess.Popen[str]:
    """It ends when this process does, and its standard input with it."""
    return subprocess.Popen([sys.executable, str(HELPERS / "fork_server.py")], stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, text=True, env=clean({}))


def forked_torchrun(processes: int, command: Sequence[str | Path], deadline_s: float = DEADLINE_S,
                    **environment: str) -> Finished:
    """A script under torchrun's agent, agent and ranks forked from a process that has imported shardlib."""
    return ranks(1, [HELPERS / "agent.py", str(processes), *command], deadline_s, **environment)


def ranks(count: int, command: Sequence[str | Path], deadline_s: float = DEADLINE_S,
          **more: str) -> Finished:
    """A script on so many ranks, in the environment that torchrun gives, without its agent: where a test says
    nothing of that. They are forked from a process that has imported shardlib; this one holds the store.

    `returncode` is that of the first that failed. AssertionError, all killed, when they do not end in time.
    """
    store = dist.TCPStore("127.0.0.1", 0, count, is_master=True, wait_for_workers=False)
    environment = clean({"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
                         "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
                         "TORCHELASTIC_USE_AGENT_STORE": "True", **more})
    with tempfile.TemporaryDirectory() as folder:
        out, err = (Path(folder, name) for name in ("out", "err"))
        job = {"ranks": count, "command": [*map(str, command)], "environment": environment, "out": str(out),
               "err": str(err), "deadline_s": deadline_s}
        server = _server()
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        codes = json.loads(server.stdout.readline())
        found = Finished(next((code for code in codes if code), 0), out.read_text(), err.read_text())
    assert None not in codes or found.returncode, f"{command} did not end within {deadline_s:.0f} s\n{found}"
    return found


def _descendants(pid: int) -> list[int]:
    """The processes that `pid` and its children started, as far as they live."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = [int(child) for child in task.read_text().split()]
        except OSError:
            continue
        for child in children:
            found += [child, *_descendants(child)]
    return found
