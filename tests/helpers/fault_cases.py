"""What each rank does in the fault matrix.

`rank_main(case, folder)` runs in every worker of a job; most workers do not come out of it.

All ranks run a program once, all together; then one of them does what the case is named after, while the
others run it again. A file `fault` says when that begins, `RANK.pid` which process a rank is, `RANK.well`
that it came to its end.
"""
from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from shardlib import (
    Layout,
    Mesh,
    Params,
    SpecError,
    compile,
    param,
    reshard,
    scan,
    sharded,
    stacked,
    value_and_grad,
)
from shardlib.distributed import Runtime, connect
from shardlib.functions import sum
from shardlib.ops import cross_entropy
from shardlib.run.turns import Pipeline
from shardlib.schedules.generators import one_f_one_b

TIMEOUT_S = 10.0


@sharded("M N/tp -> M/tp N")
def turn(x):
    return reshard("M N/tp -> M/tp N", x)


@sharded("M/tp N -> M/1 N")
def collect(x):
    return reshard("M/tp N -> M N", x)


@sharded("M/tp N, M/tp -> M/1")
def losses(x, labels):
    return cross_entropy("M/tp N, M/tp -> M/tp", x, labels)


class Layer(Params):
    w: Tensor = param("D")


class Net(Params):
    layers: Layer = stacked("L", Layer)


@sharded("B D, * -> B D")
def layer(x, w: Layer):
    return x * w.w


@sharded("B D, * -> ()")
def total(x, w: Net):
    return sum("B D -> ()", scan(layer, x, w.layers))


class Job:
    """One rank of a case: `run` is a program over gloo (all_to_all) or over shared memory (all_gather),
    `fault` marks the beginning."""

    def __init__(self, runtime: Runtime, folder: Path, memory: bool, turns: bool) -> None:
        self.runtime, self.folder, self.rank, self.pipeline = runtime, folder, runtime.rank, None
        if turns:
            self.pipeline = Pipeline(runtime, "pp")
            self.program = compile(total, Layout(L="pp"), runtime=runtime, sizes={"L": 3})
            self.args = torch.ones(4, 2), Net(layers=Layer(w=torch.ones(1, 2)))
            return
        if "pp" in runtime.mesh.axes:
            self.program = compile(value_and_grad(total), Layout(L="pp", B="mb"), runtime=runtime,
                                   sizes={"L": 3}, schedule=one_f_one_b(3, 4))
            self.args = torch.ones(4, 2), Net(layers=Layer(w=torch.ones(1, 2)))
            return
        size = runtime.mesh.size(("tp",))
        self.program = compile(collect if memory else turn, runtime=runtime,
                               sizes={"M": 2 * size, "N": 2 * size})
        self.x = torch.ones((2, 2 * size) if memory else (2 * size, 2))
        self.args, self.size = (self.x,), size

    def run(self) -> None:
        if self.pipeline:
            with torch.no_grad():
                self.pipeline.run([self.program.requests(*self.args) for _ in range(2)])
            return
        self.program(*self.args)

    def fault(self, after: float = 1.0) -> None:
        """Waits until all others have told the store where they are."""
        time.sleep(after)
        (self.folder / "fault").touch()

    def in_a_moment(self, number: int) -> None:
        """A signal for this very process, while it is in its next collective."""
        def send() -> None:
            self.fault()
            os.kill(os.getpid(), number)
        threading.Thread(target=send, daemon=True).start()


def late(job: Job) -> None:
    if job.rank == 1:
        job.fault(3.0)
    job.run()


def missing(job: Job) -> None:
    if job.rank == 1:
        job.fault()
        time.sleep(3600)
    job.run()


def killed(job: Job) -> None:
    """In a collective that rank 2 has not come to."""
    _in_a_collective(job, signal.SIGKILL)


def killed_in_memory(job: Job) -> None:
    _in_a_collective(job, signal.SIGKILL)


def stopped(job: Job) -> None:
    _in_a_collective(job, signal.SIGSTOP)


def stopped_in_memory(job: Job) -> None:
    _in_a_collective(job, signal.SIGSTOP)


def _in_a_collective(job: Job, number: int) -> None:
    if job.rank == 1:
        job.in_a_moment(number)
    if job.rank == 2:
        time.sleep(3600)
    job.run()


def raising(job: Job) -> None:
    if job.rank == 1:
        job.fault()
        raise ValueError("no such file")
    job.run()


def bad_label(job: Job) -> None:
    """Rank 1 alone has a label that does not exist.

    Its process lives on, so that nothing but its word ends the others.
    """
    program, labels = compile(losses, runtime=job.runtime, sizes={"M": 2 * job.size}), torch.tensor([0, 1])
    program(torch.zeros(2, 5), labels)
    if job.rank == 1:
        labels[1] = 7
        job.fault()
    try:
        program(torch.zeros(2, 5), labels)
    except SpecError as error:
        print(f"raised SpecError: {error}", file=sys.stderr, flush=True)
        time.sleep(3600)


def wrong_group(job: Job) -> None:
    """Of two groups of two, and two across: rank 1 is in one of those across."""
    if job.rank == 1:
        job.fault()
        pieces = tuple(torch.ones(2) for _ in range(2))
        job.runtime.group(("dp",)).all_to_all(pieces, ((2,), (2,)))
    job.run()
    job.runtime.group(("dp",)).barrier()


def wrong_size(job: Job) -> None:
    n = 2048 if job.rank == 1 else 4096
    if job.rank == 1:
        job.fault()
    group = job.runtime.group(("tp",))
    group.all_to_all([torch.ones(n)] * job.size, [(n,)] * job.size)
    job.run()


def wrong_order(job: Job) -> None:
    group = job.runtime.group(("tp",))
    calls = [lambda: group.all_to_all([torch.ones(2)] * job.size, [(2,)] * job.size),
             lambda: group.all_gather(torch.ones(2), 0, (2,) * job.size)]
    if job.rank == 1:
        job.fault()
        calls.reverse()
    for call in calls:
        call()


def checked_size(job: Job) -> None:
    group = job.runtime.group(("tp",))
    group.all_reduce(torch.ones(5 if job.rank == 1 else 4))


def checked_pieces(job: Job) -> None:
    group, sizes = job.runtime.group(("tp",)), [[2, 2, 2], [2, 2, 2], [2, 2, 2]]
    if job.rank == 1:
        sizes[1] = [2, 2, 3]
    send, recv = sizes[job.rank], [sizes[r][job.rank] if r == job.rank else 2 for r in range(3)]
    group.all_to_all([torch.ones(n) for n in send], [(n,) for n in recv])


def checked_step(job: Job) -> None:
    group = job.runtime.group(("tp",))
    for n in ((2, 1) if job.rank == 1 else (1, 2)):
        group.all_reduce(torch.ones(4), at=f"step {n} of total, model.py:{n}: N +tp -> N")


def other_plan(job: Job) -> None:
    sizes = {"M": 6, "N": 9 if job.rank == 1 else 6}
    compile(turn, runtime=job.runtime, sizes=sizes)(torch.ones(6, sizes["N"] // 3))


def other_program(job: Job) -> None:
    f, x = (collect, torch.ones(2, 6)) if job.rank == 1 else (turn, torch.ones(6, 2))
    f.__name__ = "work"
    compile(f, runtime=job.runtime, sizes={"M": 6, "N": 6})(x)


def no_plan(job: Job) -> None:
    """Rank 1 has made its program before, for these sizes; the others have not."""
    if job.rank == 1:
        job.fault()
        return job.run()
    compile(turn, runtime=job.runtime, sizes={"M": 6, "N": 6})(job.x)


def no_watchdog(job: Job) -> None:
    """Nothing ends it: what notices that is the harness."""
    missing(job)


def stage_missing(job: Job) -> None:
    missing(job)


def stage_killed(job: Job) -> None:
    """While it waits for the microbatch that the last stage should have sent back."""
    killed(job)


def stage_late_in_turns(job: Job) -> None:
    """Ranks that are slow at random: twenty rounds end well."""
    draw = random.Random(job.rank)
    for _ in range(20):
        time.sleep(draw.choice((0, 0, 0.01)))
        job.run()


def stage_missing_in_turns(job: Job) -> None:
    missing(job)


def stage_stopped_in_turns(job: Job) -> None:
    """While the last stage waits for it, it waits for the first, which never posts."""
    if job.rank == 0:
        time.sleep(3600)
    if job.rank == 1:
        job.in_a_moment(signal.SIGSTOP)
    job.run()


CASES: dict[str, Callable[[Job], None]] = {f.__name__: f for f in (
    late, missing, killed, killed_in_memory, stopped, stopped_in_memory, raising, bad_label, wrong_group,
    wrong_size, wrong_order, checked_size, checked_pieces, checked_step, other_plan, other_program, no_plan,
    stage_missing, stage_killed, stage_late_in_turns, stage_missing_in_turns, stage_stopped_in_turns,
    no_watchdog)} | {"checked_order": wrong_order}


def mesh_of(case: str) -> Mesh:
    return Mesh(pp=3) if case.startswith("stage") else \
        Mesh(dp=2, tp=2) if case == "wrong_group" else Mesh(tp=2) if case == "no_watchdog" else Mesh(tp=3)


def rank_main(case: str, folder: str) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)           # a fork has the agent's
    here, rank = Path(folder), os.environ["RANK"]
    (here / f"{rank}.pid").write_text(str(os.getpid()))
    while len(list(here.glob("*.pid"))) < mesh_of(case).world_size:     # see `fault_launcher`
        time.sleep(0.01)
    mesh = mesh_of(case)
    timeout_s = 3600.0 if case == "no_watchdog" else TIMEOUT_S
    with connect(mesh, "cpu", timeout_s, check=case.startswith("checked")) as runtime:
        runtime.create_groups([(axis,) for axis in mesh.axes])
        job = Job(runtime, here, "memory" in case, "turns" in case)
        job.run()
        runtime.group((list(mesh.axes)[-1],)).barrier()
        try:
            CASES[case](job)
        except (RuntimeError, ValueError) as error:
            print(f"raised {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            raise
    (here / f"{rank}.well").touch()
    sys.stderr.flush()
