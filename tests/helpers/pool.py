"""Processes that stay up between tests, so that a test on real ranks costs milliseconds
and not the import of torch.

    with Pool(4) as pool:
        world = pool.connect("dp=2,tp=2", [("tp",), ("dp", "tp")])
        world.check(case, ...)                  # what is wrong on any rank, conformance.check
        world.run("places", ["tp"])             # what each rank returned, scenarios.places

The parent holds the store that torchrun's agent would hold, on a port that the system chose. Every request
has a deadline; after one that fails to come back in time, all processes are killed, and the next `connect`
starts new ones.
"""
from __future__ import annotations

import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
import torch.distributed as dist
from conformance import Case

HERE = Path(__file__).resolve().parent
START_S, DEADLINE_S = 120.0, 40.0


class Pool:
    """At most `size` worker processes, started when first needed."""

    def __init__(self, size: int) -> None:
        self.size, self.deadline_s = size, DEADLINE_S
        self._processes: list[subprocess.Popen[str]] = []
        self._errors: list[Any] = []
        self._store: dist.TCPStore | None = None
        self.joined: World | None = None

    def connect(self, mesh: str, groups: Sequence[tuple[str, ...]], processes: int) -> World:
        """A world of `processes` ranks on `mesh` with these groups.

        AssertionError with connect's own text if it refuses.
        """
        world = World(self, mesh, groups, processes)
        world.join()
        return world

    def attempt(self, mesh: str, groups: Sequence[tuple[str, ...]], processes: int) -> list[str]:
        """What each rank's `connect` said: "" where it went well, else the text of its SpecError."""
        self._start()
        self.joined = None
        self._store = dist.TCPStore("127.0.0.1", 0, processes, is_master=True, wait_for_workers=False)
        job = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1",
               "MASTER_PORT": str(self._store.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
               "GLOO_SOCKET_IFNAME": "lo"}
        return self.ask([{"do": "connect", "mesh": mesh, "groups": groups,
                          "environment": {**job, "RANK": str(rank), "LOCAL_RANK": str(rank)}}
                         for rank in range(processes)])

    def ask(self, requests: Sequence[dict[str, Any]]) -> list[Any]:
        """One answer from each of the first len(requests) workers."""
        asked = self._processes[:len(requests)]
        for process, request in zip(asked, requests):
            process.stdin.write(msgspec.json.encode(request).decode() + "\n")
            process.stdin.flush()
        lines = self._read(asked)
        answers = [msgspec.json.decode(line) if line else {"error": f"no answer\n{self._tail(i)}"}
                   for i, line in enumerate(lines)]
        if errors := [f"rank {i}: {a['error']}" for i, a in enumerate(answers) if "error" in a]:
            self.stop()
            raise AssertionError("\n".join(errors))
        return [a["result"] for a in answers]

    def _read(self, asked: Sequence[subprocess.Popen[str]]) -> list[str]:
        """A line from each, "" where the deadline passed or the process ended."""
        lines, end = [""] * len(asked), time.monotonic() + self.deadline_s
        with selectors.DefaultSelector() as selector:
            for i, process in enumerate(asked):
                selector.register(process.stdout, selectors.EVENT_READ, i)
            while selector.get_map() and time.monotonic() < end:
                for key, _ in selector.select(end - time.monotonic()):
                    lines[key.data] = key.fileobj.readline()
                    selector.unregister(key.fileobj)
        return lines

    def _start(self) -> None:
        if self._processes:
            return
        path = os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
        for _ in range(self.size):
            self._errors.append(tempfile.TemporaryFile("w+"))
            self._processes.append(subprocess.Popen(
                [sys.executable, str(HERE / "worker.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                text=True, stderr=self._errors[-1],
                env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}))
        deadline_s, self.deadline_s = self.deadline_s, START_S
        self.ask([{"do": "ready"}] * self.size)     # they have imported torch: now they meet at once
        self.deadline_s = deadline_s

    def _tail(self, i: int) -> str:
        self._errors[i].seek(0)
        return self._errors[i].read()[-3000:]

    def stop(self) -> None:
        """Kills and reaps every worker."""
        for process in self._processes:
            process.kill()
            process.communicate()
        for file in self._errors:
            file.close()
        self._processes, self._errors, self._store, self.joined = [], [], None, None

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class World:
    """The ranks of one `connect`.

    After a failure they connect anew, since a group that failed may be of no more use.
    """

    def __init__(self, pool: Pool, mesh: str, groups: Sequence[tuple[str, ...]], size: int) -> None:
        self.pool, self.mesh, self.groups, self.size = pool, mesh, groups, size

    def join(self) -> None:
        texts = self.pool.attempt(self.mesh, self.groups, self.size)
        assert texts == [""] * self.size, texts
        self.pool.joined = self

    def check(self, *cases: Case, communicator: str = "") -> list[str]:
        """What is wrong on any rank; [] is a pass.

        communicator: the only one that may take them; "" where the group chooses.
        """
        answers = self._ask(
            {"do": "check", "cases": [asdict(c) for c in cases], "communicator": communicator})
        failures = [failure for answer in answers for failure in answer]
        if failures:
            self.pool.joined = None
        return failures

    def run(self, name: str, *arguments: Any) -> list[Any]:
        """What `scenarios.<name>` returned on each rank."""
        return self._ask({"do": "run", "name": name, "arguments": arguments})

    def _ask(self, request: dict[str, Any]) -> list[Any]:
        if self.pool.joined is not self:
            self.join()
        return self.pool.ask([request] * self.size)
