"""What a program does under a schedule, before it runs: what ranks keep, who idles, what a message weighs.

Times are predicted from work alone: a step counts as many units as it multiplies and adds, where it contracts
dims, and else as it makes elements. So the picture is of the schedule and of how even the stages are, head
and embedding included; what is sent takes no time in it.
"""
from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

from rich.console import Console
from rich.table import Table

from shardlib.compiler.microbatches import Cut, cut
from shardlib.dtypes import ITEMSIZE
from shardlib.errors import bytes_text
from shardlib.language.held import here, runs, stage_axis
from shardlib.language.moves import Coordinate
from shardlib.language.scan import SCAN
from shardlib.mesh import Mesh
from shardlib.program import Program, Step
from shardlib.reports.peak import AtWork
from shardlib.reports.project import check_given, rounds
from shardlib.schedules.clock import Timeline, run
from shardlib.schedules.folding import STAGES, TIME, Fold, timeless
from shardlib.schedules.schedule import Action, Schedule
from shardlib.schedules.waits import Edge, prove_schedule
from shardlib.spec import Dim, Spec

CONTRACTS = ("einsum", "grouped_einsum", "attention")


@dataclass(frozen=True)
class RankPlan:
    """What a rank along the stages' axis has, the fullest of those beside it. In bytes:

    arguments: what it holds of them.  kept: the most that is kept for backward at once.  sums: of gradients
    that are added up.  peak: the most of all that at once, with what an action holds while it runs (see
    `AtWork`).  busy: the part of the time in which it is at work.
    """
    stages: tuple[int, ...]
    arguments: int
    kept: int
    sums: int
    peak: int
    busy: float


@dataclass(frozen=True)
class Timetable:
    """`print` it. messages: of each edge between stages, the bytes of a message, and how many lie there at
    once at most.  timeline: when each action is, in units of work, as `shardlib.schedules.timeline` draws it.
    """
    program: str
    mesh: Mesh
    ranks: tuple[RankPlan, ...]
    messages: Mapping[Edge, tuple[int, int]]
    timeline: Timeline

    @property
    def idle(self) -> float:
        """The part of all ranks' time in which they do nothing."""
        return self.timeline.idle

    def __str__(self) -> str:
        schedule, out = self.timeline.schedule, io.StringIO()
        console = Console(file=out, width=150, force_terminal=False, emoji=False)
        console.print(f"{self.program} on mesh {self.mesh or '(one rank)'}, {schedule.stages} stages, "
                      f"{schedule.microbatches} microbatches")
        table = Table(box=None, pad_edge=False)
        for name in (STAGES, "stages", "arguments", "kept for backward", "sums", "peak", "busy"):
            table.add_column(name, justify="left" if name == "stages" else "right")
        for i, plan in enumerate(self.ranks):
            table.add_row(str(i), " ".join(map(str, plan.stages)), bytes_text(plan.arguments),
                          bytes_text(plan.kept), bytes_text(plan.sums), bytes_text(plan.peak),
                          f"{plan.busy:.1%}")
        console.print(table)
        for (a, b), (size, slots) in sorted(self.messages.items()):
            console.print(f"stage {a} to {b}: {bytes_text(size)} a message, {slots} at once")
        console.print(f"{self.idle:.1%} of the time idle, by work alone")
        return out.getvalue()

    def __repr__(self) -> str:
        return str(self).rstrip()       # a debugger ends the line itself


def timetable(program: Program, mesh: Mesh, sizes: Mapping[str, int], schedule: Schedule,
              dtypes: Mapping[str, str] | None = None, default: str = "float32") -> Timetable:
    """What a program that was lowered for `schedule` does on the ranks of `mesh`. sizes: of every dim.

    >>> from shardlib import Layout, Params, einsum, lower, param, scan, sharded, stacked, value_and_grad
    >>> from shardlib.functions import mean
    >>> from shardlib.schedules.generators import one_f_one_b
    >>> from torch import Tensor
    >>> class Layer(Params):
    ...     w: Tensor = param("D E")
    >>> class Net(Params):
    ...     layers: Layer = stacked("L", Layer)
    >>> @sharded("B D, * -> B D")
    ... def layer(x, w: Layer):
    ...     return einsum("B E, D E -> B D", einsum("B D, D E -> B E", x, w.w), w.w)
    >>> @sharded("B D, * -> ()")
    ... def loss(x, w: Net):
    ...     return mean("B D -> ()", scan(layer, x, w.layers))
    >>> mesh, schedule = Mesh(pp=2), one_f_one_b(2, 4)
    >>> program = lower(value_and_grad(loss), Layout(L="pp", B="mb"), mesh=mesh, schedule=schedule)
    >>> timetable(program, mesh, dict(L=4, B=8, D=16, E=16), schedule)  # doctest: +NORMALIZE_WHITESPACE
    loss_and_grad on mesh pp=2, 2 stages, 4 microbatches
    pp  stages  arguments  kept for backward    sums     peak   busy
     0  0          2.6 kB             1.0 kB  2.0 kB  10.0 kB  79.1%
     1  1          2.6 kB              640 B  2.1 kB   9.6 kB  80.2%
    stage 0 to 1: 128 B a message, 1 at once
    stage 1 to 0: 128 B a message, 1 at once
    20.3% of the time idle, by work alone
    """
    fold = Fold(schedule, mesh)
    sizes = check_given(program, fold.whole, sizes, dtypes or {}, default)
    parts = cut(program, fold.whole, dtypes or {}, schedule.kinds, default)
    counts = {s: Stage(fold, parts, sizes, s) for s in range(schedule.stages)}
    made = run(schedule, duration=lambda kind: 0.0, delay=lambda a: counts[a.stage].work(a))
    spent = [sum(s.end - s.start for s in made.spans if s.rank == r) for r in range(len(schedule.ranks))]
    ranks = tuple(RankPlan(fold.stages(r), *held(fold, parts, sizes, fold.at(r)),
                           spent[r] / (made.length or 1.0)) for r in range(len(schedule.ranks)))
    slots = prove_schedule(schedule).slots
    return Timetable(program.name, mesh, ranks,
                     {edge: (counts[edge[0]].sent(edge), n) for edge, n in slots.items()}, made)


def held(fold: Fold, parts: Cut, sizes: Mapping[str, int], at: Coordinate) -> tuple[int, int, int, int]:
    """Bytes of a rank's arguments, of what it keeps at once, of its sums, and of all that at most."""
    def weigh(kind: Spec, mesh: Mesh, place: Coordinate, dtype: str) -> int:
        return prod(mesh.local_shape(kind, sizes, place)) * ITEMSIZE[dtype] if here(kind, place) else 0
    stages, kinds = fold.stages(at.get(STAGES, 0)), parts.kinds
    arguments = sum(max(sizes_of) if STAGES not in kind.split_axes else sum(sizes_of)
                    for path, kind in parts.program.arg_leaves()
                    for sizes_of in [[weigh(timeless(kind), fold.still, fold.place(at, s, 0), kinds[path])
                                      for s in stages]])
    types = parts.program.types()
    sums = sum(weigh(timeless(types[path]), fold.still, fold.place(at, s, 0), wide(kinds[path]))
               for s in stages for path, _ in parts.after.arg_leaves() if TIME in types[path].owed_axes)
    results = sum(weigh(timeless(kind), fold.still, fold.place(at, s, 0), kinds[name])
                  for name, kind in parts.program.result_leaves() for s in stages)
    working = max((before + work for before, work, _ in _actions(fold, parts, sizes, at)), default=0)
    return (arguments, most_kept(fold, parts, sizes, at), sums, arguments + sums + max(working, results))


def wide(dtype: str) -> str:
    """The dtype of sums over microbatches."""
    return "float32" if dtype in ("bfloat16", "float16") else dtype


def most_kept(fold: Fold, parts: Cut, sizes: Mapping[str, int], at: Coordinate) -> int:
    """The most bytes that a rank keeps at once, between two of its actions, for those that come later."""
    return max((after for _, _, after in _actions(fold, parts, sizes, at)), default=0)


def _actions(fold: Fold, parts: Cut, sizes: Mapping[str, int],
             at: Coordinate) -> Iterator[tuple[int, int, int]]:
    """Of each action of a rank the bytes that are kept before it, that it holds besides while it runs, and
    that are kept behind it."""
    def of(s: int, m: int, kind: str) -> int:
        """What a microbatch keeps of a stage once it has done its `kind` of action."""
        place, names = fold.place(at, s, m), units[s]
        done = order[:order.index(kind) + 1]
        given = {r.values[0]: r.tree for k in done for r in names[k].results if isinstance(r.tree, Spec)}
        later = {path for k in order[len(done):] for path, _ in names[k].arg_leaves()}
        return sum(prod(fold.whole.local_shape(given[n], sizes, place)) * ITEMSIZE[parts.kinds[n]]
                   for n in given if n in later)
    order = fold.schedule.kinds
    units = {s: dict(zip(order, parts.at(fold.place(at, s, 0)))) for s in fold.stages(at.get(STAGES, 0))}
    kept: dict[tuple[int, int], int] = {}
    work: dict[tuple, int] = {}
    for s, kind, m in fold.schedule.ranks[at.get(STAGES, 0)]:
        before, place = sum(kept.values()), fold.place(at, s, m)
        unit = units[s][kind]
        key = unit.name, s, *(fold.whole.local_shape(spec, sizes, place) for _, spec in unit.arg_leaves())
        if key not in work:
            work[key] = AtWork(fold.whole, sizes, place).most(unit, parts.kinds)
        kept[s, m] = of(s, m, kind)
        yield before, work[key], sum(kept.values())


@dataclass(frozen=True)
class Stage:
    """The work of a stage, of the ranks beside it the one with the most."""
    fold: Fold
    parts: Cut
    sizes: Mapping[str, int]
    stage: int

    def work(self, action: Action) -> float:
        place = self._place(action.microbatch)
        unit = self.parts.at(place)[self.fold.schedule.kinds.index(action.kind)]
        return float(self._of(unit, place))

    def _place(self, m: int) -> dict[str, int]:
        return self.fold.place(self.fold.at(self.fold.schedule.rank_of[self.stage]), self.stage, m)

    def _of(self, program: Program, place: Coordinate) -> int:
        return sum(self._step(s, place) for s in program.steps if runs(s, place) and not s.op.moves)

    def _step(self, step: Step, place: Coordinate) -> int:
        if step.bodies:
            many = rounds(step, self.fold.whole, self.sizes, place) if step.op is SCAN else 1
            return many * max(self._of(body, place) for body in step.bodies)
        specs = (*step.ins, *step.outs) if step.op.name.removesuffix("_vjp") in CONTRACTS else step.outs
        if specs is step.outs:
            return max((prod(self._rows(d, place) for d in spec.dims) for spec in specs), default=0)
        return prod(self._rows(d, place) for d in {d.label: d for spec in specs for d in spec.dims}.values())

    def _rows(self, dim: Dim, place: Coordinate) -> int:
        return self.fold.whole.rows(dim, self.sizes, place)[1]

    def sent(self, edge: Edge) -> int:
        """Bytes of a message on an edge: the carries of the pipeline that goes that way."""
        pipelines = [s for unit in self.parts.units for s in unit.steps if stage_axis(s)]
        step, place = pipelines[edge[1] < edge[0]], self._place(0)
        many = step.options.get("carries", 1)
        mesh, kinds = self.fold.whole, self.parts.kinds
        return sum(prod(mesh.local_shape(spec, self.sizes, place)) * ITEMSIZE[kinds[name]]
                   for spec, name in zip(step.ins[:many], step.inputs))
