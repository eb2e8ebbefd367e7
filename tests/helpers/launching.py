"""Real processes, alone or under torchrun: each with a deadline, and none left behind when it passes."""
from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

DEADLINE_S = 120.0      # for importing torch on a busy machine; what is tried takes seconds
GENERATE = ("-m", "shardlib.models.generate")


@dataclass(frozen=True)
class Finished:
    """A command that ended by itself."""
    returncode: int
    stdout: str
    stderr: str


def run(command: Sequence[str | Path], deadline_s: float = DEADLINE_S, **environment: str) -> Finished:
    """Run Python with these arguments.

    AssertionError, all its processes killed, when it does not end in time.
    """
    env = {name: value for name, value in os.environ.items()
           if not name.startswith(("TORCHELASTIC", "SHARDLIB"))}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **environment}
    process = subprocess.Popen([sys.executable, *map(str, command)], env=env, stdin=subprocess.DEVNULL,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               start_new_session=True)
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
