"""The harness of the fault matrix: starts jobs, waits until all their workers are gone,
and says what each rank has said.

    with Launcher() as launcher:
        outcome = launcher.start("missing", folder).outcome()
        outcome.said[0]                     # what rank 0 wrote on stderr, numbers that vary written as N

A job gets DEADLINE_S from the moment at which its fault begins; AssertionError if a worker is there longer.
The deadline is for workers: the agent, which is torchrun's, is ended by its pid where it does not go with
them.
"""
from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import fault_cases

HERE = Path(__file__).resolve().parent
START_S = 60.0          # for the import of torch, and all that comes before the fault, on a busy machine
DEADLINE_S = 10.0


@dataclass(frozen=True)
class Outcome:
    """said: by rank; well: the ranks that came to their end, and so ended with exit status 0."""
    said: tuple[str, ...]
    well: tuple[int, ...]


class Started:
    """One job, running."""

    def __init__(self, case: str, folder: Path, agent: int) -> None:
        self.case, self.folder, self.agent = case, folder, agent
        self.size = fault_cases.mesh_of(case).world_size

    def outcome(self, deadline_s: float = DEADLINE_S) -> Outcome:
        """What became of it.

        AssertionError if its workers are there after `deadline_s`; none of its processes is left.
        """
        try:
            self._wait("its workers to start", START_S, lambda: len(self._pids()) == self.size)
            self._wait("its fault", START_S, lambda: (self.folder / "fault").exists() or not self._alive())
            self._wait("its workers to end", deadline_s, lambda: not self._alive())
        finally:
            for pid in [*self._alive(), self.agent]:
                _kill(pid)
        logs = sorted(self.folder.glob("logs/*/attempt_0/*/stderr.log"),
                      key=lambda file: int(file.parent.name))
        well = tuple(r for r in range(self.size) if (self.folder / f"{r}.well").exists())
        return Outcome(tuple(normal(file.read_text()) for file in logs), well)

    def _wait(self, what: str, seconds: float, done: Callable[[], bool]) -> None:
        end = time.monotonic() + seconds
        while not done():
            if time.monotonic() > end:
                raise AssertionError(f"{self.case}: waited {seconds:.0f} s for {what}; ranks "
                                     f"{' '.join(map(str, self._ranks_alive()))} are there")
            time.sleep(0.05)

    def _pids(self) -> dict[int, int]:
        return {int(file.stem): int(text) for file in self.folder.glob("*.pid") if (text := file.read_text())}

    def _ranks_alive(self) -> list[int]:
        return sorted(rank for rank, pid in self._pids().items() if is_alive(pid))

    def _alive(self) -> list[int]:
        return [self._pids()[rank] for rank in self._ranks_alive()]


class Launcher:
    """A process with torch imported, whose forks are the agents and workers of jobs."""

    def __init__(self) -> None:
        path = os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
        self._lock = threading.Lock()
        environment = {name: value for name, value in os.environ.items()
                       if not name.startswith(("TORCHELASTIC", "SHARDLIB"))}
        self.process = subprocess.Popen([sys.executable, str(HERE / "fault_launcher.py")],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.DEVNULL, text=True,
                                        env={**environment, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"})

    def start(self, case: str, folder: Path) -> Started:
        folder.mkdir(parents=True)
        with self._lock:
            print(case, fault_cases.mesh_of(case).world_size, folder, file=self.process.stdin, flush=True)
            return Started(case, folder, int(self.process.stdout.readline()))

    def __enter__(self) -> Launcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(10)
        finally:
            self.process.kill()
            self.process.wait()
            self.process.stdout.close()


VARIES = {r"\.py:\d+": ".py:N", r"(has waited \d+ s|ends) in": "waits in", r"\[127\.0\.0\.1\]:\d+": "PEER",
          "(Connection closed by peer PEER|(Read|Write) error PEER: .*)": "PEER LOST"}


def normal(text: str) -> str:
    """Our own lines, and what was raised, without what varies:
    seconds, lines, ports, and which of the ranks ends the job."""
    text = "\n".join(line for line in text.splitlines()
                     if line.startswith(("shardlib [", "raised ", "  rank", "compile the same")))
    for pattern, fixed in VARIES.items():
        text = re.sub(pattern, fixed, text)
    return text


def shared() -> list[str]:
    """What this library has in /dev/shm."""
    return [file.name for file in Path("/dev/shm").glob("shardlib-*")]


def is_alive(pid: int) -> bool:
    """Whether a process is there, and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _kill(pid: int) -> None:
    """Ends a process that does not end by itself within some seconds."""
    end = time.monotonic() + 5.0
    while is_alive(pid) and time.monotonic() < end:
        time.sleep(0.05)
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
