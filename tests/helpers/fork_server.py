"""A process with torch and shardlib imported, which forks the ranks of a job: they start in milliseconds.

Reads jobs from standard input, a line of JSON each, and answers each with the exit statuses of its ranks,
null where one was killed. As torchrun does, it ends all when one has failed; it is no agent otherwise.
"""
from __future__ import annotations

import json
import os
import runpy
import signal
import sys
import time
import traceback
from typing import Any

import shardlib.models.generate  # noqa: F401

GRACE_S = 5.0       # for the others to end by themselves when one has failed


def started(job: dict[str, Any], rank: int) -> int:
    """The id of a process that runs the command of `job` as Python would, in a session of its own."""
    if child := os.fork():
        return child
    code = 1
    try:
        os.setsid()
        os.environ.clear()
        os.environ.update(job["environment"], RANK=str(rank), LOCAL_RANK=str(rank))
        for fd, path in ((0, os.devnull), (1, job["out"]), (2, job["err"])):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600), fd)
        sys.argv = job["command"]
        sys.path.insert(0, os.path.dirname(sys.argv[0]))
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)      # a Python with torch in it takes a second to end


def statuses(children: list[int], deadline_s: float) -> list[int | None]:
    """How they ended; what is left at the deadline, or some time after one has failed, is killed."""
    found: dict[int, int | None] = {}
    end = time.monotonic() + deadline_s
    while len(found) < len(children):
        late = time.monotonic() > end
        for child in [c for c in children if c not in found]:
            if late:
                os.killpg(child, signal.SIGKILL)
            pid, status = os.waitpid(child, 0 if late else os.WNOHANG)
            if pid:
                found[child] = None if late else os.waitstatus_to_exitcode(status)
                end = end if late or not found[child] else min(end, time.monotonic() + GRACE_S)
        time.sleep(0.005)
    return [found[child] for child in children]


if __name__ == "__main__":
    for line in sys.stdin:
        job = json.loads(line)
        children = [started(job, rank) for rank in range(job["ranks"])]
        print(json.dumps(statuses(children, job["deadline_s"])), flush=True)
