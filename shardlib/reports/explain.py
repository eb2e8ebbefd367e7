"""explain: where the traffic comes from. A table for a person, and the same as JSON.

One row a collective of the program: the user's line, the spec before and after, the group, bytes a rank
receives, the predicted time, and why it is there; then what each rank holds, and how unevenly. With a
runtime, also the communicator that takes it on this machine, and its time as measured there.
"""
from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from math import prod
from typing import Any, overload

import torch
from rich.console import Console
from rich.table import Table

from shardlib.compiler.passes.fuse import fusion_report
from shardlib.distributed.communicators.protocol import Call
from shardlib.distributed.runtime import Runtime
from shardlib.dtypes import ITEMSIZE, inner_dtypes, value_dtypes
from shardlib.errors import bytes_text
from shardlib.language.cond import COND
from shardlib.language.exchanges import Exchange, Site, exchanges, meets_over, received
from shardlib.language.held import carries_sent, here, runs
from shardlib.language.moves import Coordinate, Placed, axes_of, placed
from shardlib.language.scan import SCAN
from shardlib.mesh import Mesh
from shardlib.program import Program, Step
from shardlib.reports.classes import Classes, PerRank, classes_of
from shardlib.reports.project import check_given, rounds, sent, stage_classes
from shardlib.reports.timetable import Timetable, timetable
from shardlib.schedules.schedule import Schedule


@dataclass(frozen=True)
class CostModel:
    """A collective takes `latency_us` and `bytes / bytes_per_us`.

    `source` says where the numbers come from.
    """
    latency_us: float = 20.0
    bytes_per_us: float = 100_000.0
    source: str = "assumed, not measured: 20 µs a collective, 100 GB/s"


@dataclass(frozen=True)
class Traffic:
    """One collective of a program. times: how often it runs (scan), where its `branch` is taken (cond).

    bytes_of: what ranks receive, each time.
    """
    op: str
    where: str
    function: str
    branch: str
    before: str
    after: str
    axes: tuple[str, ...]
    group_size: int
    times: int
    bytes_of: PerRank
    predicted_us: float
    why: str
    communicator: str = ""
    choice: str = ""

    @property
    def received(self) -> tuple[int, ...]:
        """Bytes by rank, each time."""
        return self.bytes_of.by_rank

    @property
    def bytes(self) -> int:
        """Bytes that the busiest rank receives, each time."""
        return self.bytes_of.most

    def to_json(self) -> dict[str, Any]:
        """The same as plain data."""
        return {**_plain(self, bytes_of="received"), "bytes": self.bytes}


@dataclass(frozen=True)
class Explanation:
    """What `explain` found. `print` it, or take `to_json()`.

    collectives: that one run makes; bytes_of: what ranks receive in one run. Of a cond both count the larger
    branch: they are at most that. held: the bytes of the arguments. kernels: who runs what several may take,
    and why, on the first rank. fusions: what was fused, and what is like it and was not, where the passes of
    `fuse` ran.
    """
    program: str
    mesh: str
    traffic: tuple[Traffic, ...]
    collectives: int
    bytes_of: PerRank
    held: PerRank
    cost_source: str
    unmet: tuple[str, ...] = ()
    kernels: tuple[str, ...] = ()
    fusions: tuple[str, ...] = ()

    @property
    def received(self) -> tuple[int, ...]:
        """Bytes in one run, by rank."""
        return self.bytes_of.by_rank

    @property
    def argument_bytes(self) -> tuple[int, ...]:
        """Bytes of the arguments, by rank."""
        return self.held.by_rank

    @property
    def bytes(self) -> int:
        """Bytes that the busiest rank receives in one run; it need not be the busiest in each collective."""
        return self.bytes_of.most

    @property
    def imbalance(self) -> float:
        """What the fullest rank holds of the arguments, over the mean."""
        mean = self.held.total / self.held.classes.mesh.world_size
        return self.held.most / mean if mean else 1.0

    def to_json(self) -> dict[str, Any]:
        """The same as plain data.

        What ranks receive and hold is a list by rank. Of more than 1,024 ranks it is a list of {bytes,
        ranks, where}: each number once, with how many ranks have it, and their coordinates.
        """
        plain = _plain(self, bytes_of="received", held="argument_bytes")
        plain["traffic"] = [t.to_json() for t in self.traffic]
        plain |= {"bytes": self.bytes, "imbalance": self.imbalance}
        return json.loads(json.dumps(plain))

    def __str__(self) -> str:
        out = io.StringIO()
        console = Console(file=out, width=150, force_terminal=False, emoji=False)
        table = Table(title=f"{self.program} on mesh {self.mesh or '(one rank)'}", title_justify="left",
                      box=None, pad_edge=False)
        routed, branched = any(t.communicator for t in self.traffic), any(t.branch for t in self.traffic)
        for name in ("line", *(["branch"] if branched else []), "collective", "before", "after", "ranks",
                     "times", "bytes", "µs", *(["by"] if routed else []), "why"):
            table.add_column(name, justify="right" if name in ("ranks", "times", "bytes", "µs") else "left",
                             overflow="fold")
        for t in self.traffic:
            table.add_row(t.where, *([t.branch] if branched else []), t.op, t.before, t.after,
                          f"{'/'.join(t.axes)}={t.group_size}", str(t.times), bytes_text(t.bytes),
                          f"{t.predicted_us:.3g}", *([t.communicator] if routed else []), t.why)
        console.print(table)
        for choice in dict.fromkeys(t.choice for t in self.traffic if t.choice):
            console.print(choice)
        most = "at most " if branched else ""
        console.print(f"{most}{self.collectives} collectives, {bytes_text(self.bytes)} received per rank and "
                      f"run; times {self.cost_source}")
        console.print(
            f"arguments: {bytes_text(self.held.most)} on the fullest rank, {self.imbalance:.2f} x the mean")
        for line in (*self.kernels, *self.unmet, *self.fusions):
            console.print(line)
        return out.getvalue()

    def __repr__(self) -> str:
        return str(self).rstrip()       # a debugger ends the line itself


def _plain(found: Traffic | Explanation, **names: str) -> dict[str, Any]:
    """The fields, some under other names."""
    values = {names.get(f.name, f.name): getattr(found, f.name) for f in fields(found)}
    return {name: value.plain() if isinstance(value, PerRank) else value for name, value in values.items()}


@overload
def explain(program: Program, mesh: Mesh, sizes: Mapping[str, int], dtypes: Mapping[str, str] | None = ...,
            default: str = ..., cost: CostModel = ..., runtime: Runtime | None = ...,
            schedule: None = ...) -> Explanation: ...
@overload
def explain(program: Program, mesh: Mesh, sizes: Mapping[str, int], dtypes: Mapping[str, str] | None = ...,
            default: str = ..., *, schedule: Schedule) -> Timetable: ...
def explain(program: Program, mesh: Mesh, sizes: Mapping[str, int], dtypes: Mapping[str, str] | None = None,
            default: str = "float32", cost: CostModel = CostModel(), runtime: Runtime | None = None,
            schedule: Schedule | None = None) -> Explanation | Timetable:
    """Every collective of an explicit program, with its cost at these sizes, and what each rank holds.

    sizes: of every dim; dtypes: of arguments by path, `default` of the others. Bytes are what the busiest
    rank receives each time.

    runtime: says who takes each collective and how long that took when it was measured; all ranks then call
    this.
    schedule: the one that the program was lowered for; what is told is then what ranks keep, and when.

    >>> from shardlib import Layout, einsum, lower, sharded
    >>> mesh = Mesh(dp=2, tp=4)
    >>> f = sharded("B F, F D -> B D")(lambda x, w: einsum("B F, F D -> B D", x, w))
    >>> program = lower(f, Layout(B="dp", F="tp"), mesh=mesh)
    >>> explain(program, mesh, dict(B=8, D=16, F=32))       # doctest: +ELLIPSIS +NORMALIZE_WHITESPACE
    f on mesh dp=2,tp=4
    line     collective  before      after   ranks  times  bytes  µs  why
    <...>:1  all_reduce  B/dp D +tp  B/dp D   tp=4      1  384 B  20  the layout keeps B D as B/dp D
    1 collectives, 384 B received per rank and run; times assumed, not measured: 20 µs a collective, 100 GB/s
    arguments: 640 B on the fullest rank, 1.00 x the mean
    """
    if schedule is not None:
        return timetable(program, mesh, sizes, schedule, dtypes, default)
    sizes = check_given(program, mesh, sizes, dtypes or {}, default)
    kinds = value_dtypes(program, dtypes or {}, default)
    classes = _classes(program, mesh, sizes)
    held = tuple(sum(prod(mesh.local_shape(spec, sizes, c)) * ITEMSIZE[kinds[path]]
                     for path, spec in program.arg_leaves() if here(spec, c))
                 for c in classes.firsts)
    traffic, (collectives, *received) = _Counter(classes, sizes, cost).count(program, kinds)
    source = cost.source
    if runtime is not None:
        traffic, source = _routed(traffic, runtime, cost)
    return Explanation(program.name, str(mesh), tuple(t for t, _ in traffic), collectives,
                       PerRank(classes, tuple(received)), PerRank(classes, held), source, _unmet(program),
                       tuple(dict.fromkeys(_kernels(program, mesh, sizes, classes.firsts[0], kinds))),
                       tuple(dict.fromkeys(fusion_report(program))))


def _classes(program: Program, mesh: Mesh, sizes: Mapping[str, int]) -> Classes:
    """The classes of ranks that receive the same, and hold arguments of the same sizes.

    Beside sizes two things tell ranks apart: who takes the larger parts of what does not divide
    (`Wire.turn`), and where a rank stands along axes that change their order.
    """
    found = classes_of(mesh, [*(spec for _, spec in program.arg_leaves()), *sent(program)], sizes)
    cuts: dict[str, set[int]] = {axis: set() for axis in mesh.axes}
    steps = [s for p in (program, *program.bodies()) for s in p.steps if s.op.wire]
    for at in {(s.op, s.ins, s.outs): placed(s, mesh, sizes, found.firsts[0]) for s in steps}.values():
        for axis in (a for i in at.change.crossed for a in at.have.dims[i].axes):
            cuts[axis] |= set(range(mesh.axes[axis]))
        brought = {prod(at.shape(at.have, c)) for c in found.firsts}
        for turn in {at.wire.turn(n, mesh.size(at.axes)) for n in brought} - {0}:
            for axis in reversed(at.axes):                              # the coordinates of that member
                turn, digit = divmod(turn, mesh.axes[axis])
                cuts[axis] |= {digit, digit + 1}
    return stage_classes(found.cut(cuts), program)


def _routed(traffic: Sequence[tuple[Traffic, Call]], runtime: Runtime,
            cost: CostModel) -> tuple[list[tuple[Traffic, Call]], str]:
    """The same with who takes each, and µs by the routing table where it has them;
    and where the times come from."""
    runtime.create_groups(dict.fromkeys(t.axes for t, _ in traffic))
    made, measured = [], 0
    for t, call in traffic:
        call = call._replace(device=runtime.device.type)
        choice = runtime.group(t.axes).router.choice(call)
        measured += choice.us is not None
        made.append((replace(t, communicator=choice.communicator,
                             choice=f"{t.op} of {bytes_text(max(call.nbytes, 0))}: {choice.why}",
                             predicted_us=t.predicted_us if choice.us is None else choice.us), call))
    assumed = f"; {len(made) - measured} of {len(made)}: {cost.source}" if measured < len(made) else ""
    return made, f"{runtime.table.source}{assumed}" if measured else cost.source


def _kernels(program: Program, mesh: Mesh, sizes: Mapping[str, int], at: Coordinate,
             kinds: Mapping[str, str]) -> Iterator[str]:
    """A line for each step of which several kernels may run."""
    for step in program.steps:
        for body in step.bodies:
            yield from _kernels(body, mesh, sizes, at, inner_dtypes(step, body, kinds))
        if step.op.runs:
            site = Site(step, meets_over(step), mesh, sizes, at, tuple(map(kinds.get, step.inputs)))
            yield f"{step.op.name}{f' of {step.where}' if step.where else ''}: {step.op.runs(site)}"


def _unmet(program: Program) -> tuple[str, ...]:
    """Entries of the layout that some ops could not follow, a line for each dim and axis."""
    places: dict[tuple[str, str], list[str]] = {}
    for dim, axis, where in (u for p in (program, *program.bodies()) for u in p.unmet):
        places.setdefault((dim, axis), []).append(where)
    return tuple(f"{dim} is not split over {axis} at {', '.join(dict.fromkeys(found))}: there another dim "
                 "has it" if any(found) else f"{dim} is not split over {axis}: no value has that dim"
                 for (dim, axis), found in places.items())


@dataclass(frozen=True)
class _Counter:
    """Counts what a program sends: its rows, and one run's sum: collectives, then bytes received by class."""
    classes: Classes
    sizes: Mapping[str, int]
    cost: CostModel

    def count(self, program: Program, kinds: Mapping[str, str], times: int = 1,
              branch: str = "") -> tuple[list[tuple[Traffic, Call]], list[int]]:
        rows, total, mesh = [], [0] * (1 + len(self.classes)), self.classes.mesh
        for step in program.steps:
            if step.bodies:
                again = [rounds(step, mesh, self.sizes, c) if step.op is SCAN else 1
                         for c in self.classes.firsts]
                parts = [self.count(body, inner_dtypes(step, body, kinds), times * max(again), taken)
                         for body, taken in zip(step.bodies, _branches(step, branch))]
                rows += [row for made, _ in parts for row in made]
                total = [n + many * max(more) for many, n, *more in
                         zip((max(again), *again), total, *(sums for _, sums in parts))]
                for move in carries_sent(step):
                    dtype = kinds[move.inputs[0]]
                    row = self._row(move, program, ITEMSIZE[dtype], times, branch)
                    rows.append((row, _call(self._placed(move, self.classes.firsts[0]), dtype)))
                    total = [n + more for n, more in zip(total, (1, *row.bytes_of.values))]
            elif step.op.wire and mesh.size(axes_of(step, mesh)) > 1:
                dtype = kinds[step.inputs[0]]
                row = self._row(step, program, ITEMSIZE[dtype], times, branch)
                rows.append((row, _call(self._placed(step, self.classes.firsts[0]), dtype)))
                total = [n + more for n, more in zip(total, (1, *row.bytes_of.values))]
            for i, x in enumerate(exchanges(step, mesh, self.sizes, self.classes.firsts[0], kinds)):
                rows.append((self._exchanged(step, program, i, kinds, times, branch), _asked(x)))
                total = [n + more for n, more in zip(total, (1, *rows[-1][0].bytes_of.values))]
        return rows, total

    def _exchanged(self, step: Step, program: Program, i: int, kinds: Mapping[str, str], times: int,
                   branch: str) -> Traffic:
        """Of the i-th exchange of a step that is no move."""
        mesh, axes, of = self.classes.mesh, meets_over(step), []
        for at in self.classes.firsts:
            x = exchanges(step, mesh, self.sizes, at, kinds)[i]
            of.append(received(x, mesh.number(axes, at)) * ITEMSIZE[x.dtype] if runs(step, at) else 0)
        got = PerRank(self.classes, tuple(of))
        us = self.cost.latency_us + got.most / self.cost.bytes_per_us
        return Traffic(x.wire.name, str(step.where or ""), program.name, branch, str(x.of),
                       str(step.outs[0]), axes, mesh.size(axes), times, got, us, x.why)

    def _row(self, step: Step, program: Program, itemsize: int, times: int, branch: str) -> Traffic:
        axes = axes_of(step, self.classes.mesh)
        got = PerRank(self.classes, tuple(self._placed(step, c).received * itemsize if runs(step, c) else 0
                                          for c in self.classes.firsts))
        us = self.cost.latency_us + got.most / self.cost.bytes_per_us
        return Traffic(step.op.name, str(step.where or ""), program.name, branch, str(step.ins[0]),
                       str(step.outs[0]), axes, self.classes.mesh.size(axes), times, got, us, step.why)

    def _placed(self, step: Step, here: Coordinate) -> Placed:
        return placed(step, self.classes.mesh, self.sizes, here, self.classes.starts)


def _asked(x: Exchange) -> Call:
    """What an exchange asks of a GroupCoordinator."""
    even = x.wire.even(x.parts)
    nbytes = x.wire.whole(x.parts[0]) * ITEMSIZE[x.dtype] if even or not x.wire.many else -1
    return Call(x.wire.name, None, getattr(torch, x.dtype), "cpu", nbytes, even)


def _branches(step: Step, branch: str) -> tuple[str, ...]:
    """What the rows of a step's bodies say of the branch that they are in; `branch`: of the step itself."""
    if step.op is not COND:
        return (branch,)
    around, on, (yes, no) = branch and f"{branch}, ", step.inputs[0], step.bodies
    return f"{around}{yes.name} if {on}", f"{around}{no.name} if not {on}"


def _call(at: Placed, dtype: str) -> Call:
    """What a move asks of a GroupCoordinator."""
    wire, even = at.wire, at.even
    nbytes = wire.whole(at.part(at.here)) * ITEMSIZE[dtype] if even or not wire.many else -1
    return Call(wire.name, at.kind if wire.reduces else None, getattr(torch, dtype), "cpu", nbytes, even)
