"""The other workers of this process's torchrun agent, on this host:
one that is stopped can only be ended from outside.

A process that was stopped (SIGSTOP) ends neither by itself nor by the SIGTERM of its agent, which waits half
a minute for it. It is looked for among the children of the own parent; nothing that comes over the network
says which process that is.
"""
from __future__ import annotations

import os
import signal
from pathlib import Path


def end_stopped() -> None:
    """Ends the stopped workers beside this one. Does nothing where torchrun did not start this process."""
    for pid in _siblings() if "TORCHELASTIC_RUN_ID" in os.environ else ():
        if _is_stopped(pid):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass


def _siblings() -> list[int]:
    """The other children of this process's parent."""
    found = [int(pid) for task in Path(f"/proc/{os.getppid()}/task").glob("*/children")
             for pid in _read(task).split()]
    return [pid for pid in found if pid != os.getpid()]


def _is_stopped(pid: int) -> bool:
    """By the letter of the process's state in /proc, which follows its name in brackets."""
    return _read(Path(f"/proc/{pid}/stat")).rpartition(")")[2].strip().startswith("T")


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
