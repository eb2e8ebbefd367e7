"""One rank of test_generate: command lines of `generate`, each in a process of its own that starts where this
one stands, with torch imported, and finds the store that torchrun would hold for it on a port of its own.
What each did is written to a file per rank.

    torchrun --nproc-per-node 2 generate_worker.py FOLDER
"""
from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from shardlib.models.generate import main

DEADLINE_S = 40.0


def ended(child: int) -> int | None:
    """The exit status of `child`; None if it had to be killed."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


if __name__ == "__main__":
    folder, rank, done = Path(sys.argv[1]), os.environ["RANK"], []
    for i, case in enumerate(json.loads((folder / "cases.json").read_text())):
        files = [folder / f"{i}.{rank}.{name}" for name in ("out", "err")]
        child = os.fork()
        if child == 0:
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(case["port"]),
                           "TORCHELASTIC_USE_AGENT_STORE": "True"}
            for fd, file in zip((1, 2), files):
                os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT, 0o600), fd)
            code = main(case["arguments"])
            sys.stdout.flush()
            os._exit(code)          # a Python with torch in it takes a second to end
        done.append({"code": ended(child), "stdout": files[0].read_text(), "stderr": files[1].read_text()})
    (folder / f"rank{rank}.json").write_text(json.dumps(done))
