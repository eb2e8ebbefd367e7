"""One process of a test world: reads requests from standard input, a line of JSON each, and answers in kind.

It never outlives a request by more than DEADLINE_S, nor its parent: a request that hangs ends the process,
with the stacks of its threads on standard error.
"""
from __future__ import annotations

import faulthandler
import os
import sys
import traceback
from typing import Any

import conformance
import msgspec
import scenarios
import torch

from shardlib.distributed import Runtime, connect
from shardlib.errors import SpecError
from shardlib.mesh import Mesh

DEADLINE_S = 45.0
TIMEOUT_S = 15.0      # a busy machine takes seconds to let four processes meet


class Request(msgspec.Struct):
    """`do` is connect, check, run or close; the rest is what that needs."""
    do: str
    mesh: str = ""
    groups: list[tuple[str, ...]] = []
    environment: dict[str, str] = {}
    cases: list[conformance.Case] = []
    communicator: str = ""
    name: str = ""
    arguments: list[Any] = []


class Worker:
    runtime: Runtime | None = None

    def connect(self, request: Request) -> str:
        self.close(request)
        os.environ.update(request.environment)
        try:
            self.runtime = connect(Mesh.parse(request.mesh), device="cpu", timeout_s=TIMEOUT_S)
        except SpecError as error:
            return str(error)
        self.runtime.create_groups(request.groups)
        return ""

    def check(self, request: Request) -> list[str]:
        """What is wrong, up to the first case that raises:
        after one that does, the groups may be of no more use.

        communicator: the only one that may take a case; "" where the group chooses.
        """
        failures = []
        for case in request.cases:
            try:
                group = self.runtime.group(case.axes)
                found = conformance.check(case, conformance.only(request.communicator, group)
                                          if request.communicator else group)
            except Exception:
                return [*failures, f"rank {self.runtime.rank}: {case}: {traceback.format_exc()}"]
            failures += [f"rank {self.runtime.rank}: {case}: {failure}" for failure in found]
        return failures

    def run(self, request: Request) -> Any:
        return getattr(scenarios, request.name)(self.runtime, *request.arguments)

    def ready(self, request: Request) -> None:
        """It has started."""

    def close(self, request: Request) -> None:
        if self.runtime is not None:
            self.runtime.close()
        self.runtime = None


def main() -> None:
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)                                       # whatever else prints must not look like an answer
    worker = Worker()
    for line in sys.stdin:
        faulthandler.dump_traceback_later(DEADLINE_S, exit=True)
        request = msgspec.json.decode(line, type=Request)
        try:
            answer = {"result": getattr(worker, request.do)(request)}
        except Exception:
            answer = {"error": traceback.format_exc()}
        print(msgspec.json.encode(answer).decode(), file=answers, flush=True)
        faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    main()
