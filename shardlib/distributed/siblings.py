"""The other workers of this process's torchrun agent, on this host: those that are stopped can only be ended from outside.

A process that was stopped (SIGSTOP) ends neither by itself nor by the SIGTERM of its agent, which waits half a minute for it. It is
looked for among the children of the own parent, with the same job and the same attempt in its environment; nothing that comes
over the network says which process that is.
"""
from __future__ import annotations

import os
import signal
from pathlib import Path

_SAME = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_PORT")


def end_stopped() -> list[int]:
    """Ends the stopped workers beside this one; their ids."""
    found = stopped()
    for pid in found:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    return found


def stopped() -> list[int]:
    """The ids of workers of the same agent and attempt that are stopped. None where torchrun did not start this process."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return []
    mine = [f"{name}={os.environ.get(name)}" for name in _SAME]
    return [pid for pid in _siblings() if _state(pid) == "T" and set(mine) <= set(_environment(pid))]


def _siblings() -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{os.getppid()}/task").glob("*/children"):
        found += [int(pid) for pid in _read(task).split()]
    return [pid for pid in found if pid != os.getpid()]


def _state(pid: int) -> str:
    """The letter of a process's state in /proc: "T" where it is stopped."""
    return _read(Path(f"/proc/{pid}/stat")).rpartition(")")[2].strip()[:1]


def _environment(pid: int) -> list[str]:
    return _read(Path(f"/proc/{pid}/environ")).split("\0")


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
