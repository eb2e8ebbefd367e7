"""Projection: what a rank, or a class of ranks, communicates, in order, when it runs an explicit program.

>>> from shardlib.layout import Layout
>>> from shardlib.compiler.complete import complete
>>> from shardlib.language.trace import Function, trace
>>> from shardlib.language.verbs import reshard
>>> mesh = Mesh(tp=2)
>>> p = complete(trace(Function(lambda x: reshard("N/tp -> N/1", x), "N/tp -> N/1")), Layout(), mesh)
>>> [str(c) for c in project(p, mesh, 0, dict(N=5))]
['all_gather of 3 float32 over ranks 0 1']
"""
from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from shardlib.compiler.sizes import complete_sizes
from shardlib.dtypes import ITEMSIZE, inner_dtypes, value_dtypes
from shardlib.errors import SpecError
from shardlib.language.exchanges import exchanges, meets_over
from shardlib.language.held import SEND, carries_sent, ends, runs, stage_axis
from shardlib.language.moves import Coordinate, Placed, axes_of, placed
from shardlib.language.scan import SCAN
from shardlib.mesh import Mesh, check_sizes
from shardlib.program import Program, Scan, Step
from shardlib.reports.classes import Classes
from shardlib.spec import Spec

NAMED = 64          # the most ranks of a group that a message names one by one


@dataclass(frozen=True)
class Call:
    """One collective of one rank. numel: elements that it brings; root: for rooted ones, the in-group rank.

    group: its ranks.  shapes: what each of them brings.  pair: of a send, from which coordinate to which.
    In the calls of a class, `group` is the axes that it
    is over, without those of one coordinate, and `shapes` are of the members that stand for all.
    """
    op: str
    group: tuple[int, ...] | tuple[str, ...]
    dtype: str
    numel: int
    shapes: tuple[tuple[int, ...], ...]
    root: int | None = None
    step: str = ""
    pair: tuple[int, int] | None = None

    @property
    def axes(self) -> tuple[str, ...]:
        """Those that its group is over, in the calls of a class."""
        return tuple(a for a in self.group if isinstance(a, str))

    def __str__(self) -> str:
        ranks = " ".join(map(str, self.group)) if len(self.group) <= NAMED else \
            f"{' '.join(map(str, self.group[:3]))} .. {self.group[-1]} ({len(self.group)} ranks)"
        return f"{self.op} of {self.numel} {self.dtype} over ranks {ranks}"

    def same(self, other: Call) -> bool:
        """Whether two members of a group call the same collective."""
        return ((self.op, self.group, self.dtype, self.shapes, self.root, self.pair)
                == (other.op, other.group, other.dtype, other.shapes, other.root, other.pair))


@dataclass(frozen=True)
class Repeat:
    """What the body of a scan calls, `times` over."""
    name: str
    times: int
    calls: Calls

    def unrolled(self) -> list[Call | Repeat]:
        return [call for i in range(self.times) for call in _within(f"{self.name}[{i}].", self.calls)]


Calls = tuple["Call | Repeat", ...]


def check_given(program: Program, mesh: Mesh, sizes: Mapping[str, int], dtypes: Mapping[str, str],
                default: str = "float32") -> dict[str, int]:
    """All sizes that follow from `sizes`. SpecError unless the mesh has the program's axes, `sizes` the dims
    of what is held and sent, and `dtypes` are some of its arguments'."""
    if not isinstance(program, Program):
        raise SpecError("what is proven and explained is a program, as lower(f, layout) returns it, not a "
                        f"{type(program).__name__}")
    if not isinstance(mesh, Mesh):
        raise SpecError(f"the mesh is a {type(mesh).__name__}; it is a Mesh, as in Mesh(dp=2, tp=4)")
    check_sizes(sizes)
    sizes = complete_sizes(program, sizes)
    paths, places = [path for path, _ in program.arg_leaves()], [program, *program.bodies()]
    held = [spec for _, spec in program.arg_leaves()]
    used = [spec for p in places for s in p.steps for spec in (*s.ins, *s.outs)]
    if lacking := [a for a in _axes((*held, *used)) if a not in mesh.axes]:
        raise SpecError(
            f"{program.name}: unknown axis {lacking[0]}; the mesh has {', '.join(mesh.axes) or 'none'}")
    scanned = [s.options["dim"] for p in places for s in p.steps if s.op is SCAN]
    needed = dict.fromkeys((*(n for spec in (*held, *sent(program)) for n in spec.names), *scanned))
    if lacking := [n for n in needed if n not in sizes]:
        raise SpecError(
            f"{program.name}: no size of {', '.join(lacking)}; sizes has {', '.join(sizes) or 'none'}: "
            f"sizes=dict({', '.join(f'{n}=...' for n in lacking)})")
    if lacking := [path for path in dtypes if path not in paths]:
        raise SpecError(f"dtypes: {program.name} has no argument {lacking[0]}; it has "
                        f"{', '.join(paths[:8])}{', ...' if len(paths) > 8 else ''}")
    for what, kind in (("default", default), *((f"dtypes: {path}", kind) for path, kind in dtypes.items())):
        if kind not in ITEMSIZE:
            raise SpecError(f"{what} is {kind!r}; a dtype is one of {', '.join(ITEMSIZE)}")
    return sizes


def _axes(specs: Sequence[Spec]) -> dict[str, None]:
    return dict.fromkeys(a for spec in specs for a in (*spec.split_axes, *(o.axis for o in spec.owed)))


def project(program: Program, mesh: Mesh, rank: int, sizes: Mapping[str, int],
            dtypes: Mapping[str, str] | None = None, default: str = "float32") -> list[Call]:
    """The collectives of `rank`, scans unrolled.

    `dtypes`: of arguments by path, where they are not the default or int64 indices.
    """
    sizes = complete_sizes(program, sizes)
    found = _calls(program, mesh, sizes, value_dtypes(program, dtypes or {}, default), mesh.coordinate(rank))
    return [replace(call, group=ranks_of(call, mesh, rank)) for call in unrolled(found)]


def calls_at(program: Program, mesh: Mesh, here: Coordinate, sizes: Mapping[str, int],
             dtypes: Mapping[str, str]) -> Calls:
    """The collectives of the rank at a coordinate, `group` being their axes."""
    return _calls(program, mesh, sizes, value_dtypes(program, dtypes), here)


def ranks_of(call: Call, mesh: Mesh, rank: int) -> tuple[int, ...]:
    """The ranks that make a call with `rank`."""
    members = mesh.group(call.axes, rank)
    return members if call.pair is None else tuple(members[i] for i in call.pair)


def project_classes(program: Program, classes: Classes, sizes: Mapping[str, int],
                    dtypes: Mapping[str, str] | None = None, default: str = "float32") -> list[Calls]:
    """The collectives of the ranks of each class."""
    kinds = value_dtypes(program, dtypes or {}, default)
    return [_calls(program, classes.mesh, sizes, kinds, here, classes.starts) for here in classes.firsts]


def sent(program: Program) -> list[Spec]:
    """The types before and after each collective of a program."""
    steps = [s for p in (program, *program.bodies()) for s in p.steps if s.op.wire or meets_over(s)]
    return [spec for s in steps for spec in (*s.ins, *s.outs)]


def stage_classes(classes: Classes, program: Program) -> Classes:
    """The classes in which each stage of a pipeline stands alone, and each member of an exchange."""
    steps = [s for p in (program, *program.bodies()) for s in p.steps]
    axes = [a for s in steps if (a := stage_axis(s))] + [a for s in steps for a in meets_over(s)]
    sends = [ends(s)[0] for s in steps if s.op is SEND]
    return classes.cut({axis: range(classes.mesh.axes[axis]) for axis in (*axes, *sends)})


def unrolled(calls: Iterable[Call | Repeat]) -> Iterator[Call]:
    """The calls one after another, those of scans as often as they are made."""
    for call in calls:
        if isinstance(call, Repeat):
            yield from unrolled(call.unrolled())
        else:
            yield call


def _calls(program: Program, mesh: Mesh, sizes: Mapping[str, int], dtypes: Mapping[str, str],
           here: Coordinate, starts: Mapping[str, Sequence[int]] | None = None) -> Calls:
    made: list[Call | Repeat] = []
    for step in program.steps:
        if not runs(step, here):
            continue
        # of a cond both: whichever is taken, all take it, since the predicate is whole
        for body in step.bodies:
            inner = _calls(body, mesh, sizes, inner_dtypes(step, body, dtypes), here, starts)
            if step.op is SCAN:
                comes, goes = _ends(step, mesh, sizes, dtypes, here)
                made += [*comes, Repeat(body.name, rounds(step, mesh, sizes, here), inner), *goes]
            else:
                made += _within(f"{body.name}.", inner)
        if step.op.wire and mesh.size(axes_of(step, mesh)) > 1:
            label = f"{step.outputs[0]}{f' ({step.where})' if step.where else ''}"
            made.append(_call(placed(step, mesh, sizes, here, starts), dtypes[step.inputs[0]], label))
            if step.op is SEND:
                made[-1] = _handed(step, mesh, sizes, dtypes[step.inputs[0]], here, label)
        made += _exchanged(step, mesh, sizes, dtypes, here)
    return tuple(made)


def rounds(step: Step, mesh: Mesh, sizes: Mapping[str, int], here: Coordinate) -> int:
    """How often a rank runs the body of a scan."""
    return mesh.rows(step.ins[len(Scan.of(step).carries)].dims[0], sizes, here)[1]


def _ends(step: Step, mesh: Mesh, sizes: Mapping[str, int], dtypes: Mapping[str, str],
          here: Coordinate) -> tuple[list[Call], list[Call]]:
    """What a stage of a pipeline gets from the one before, and sends to the one after."""
    made: tuple[list[Call], list[Call]] = ([], [])
    for send in carries_sent(step):
        axis, source, target = ends(send)
        if here[axis] in (source, target):
            made[here[axis] == source].append(_handed(send, mesh, sizes, dtypes[send.inputs[0]], here,
                                                      f"the carry of {step.bodies[0].name}"))
    return made


def _handed(step: Step, mesh: Mesh, sizes: Mapping[str, int], dtype: str, here: Coordinate,
            label: str) -> Call:
    (axis, source, target), shape = ends(step), mesh.local_shape(step.ins[0], sizes, here)
    return Call("send", (axis,), dtype, prod(shape), (shape, shape), None, label, (source, target))


def _call(at: Placed, dtype: str, label: str) -> Call:
    shapes = tuple(at.shape(at.have, member) for member in at.members)
    axes = tuple(a for a in at.axes if at.mesh.axes[a] > 1)
    return Call(at.move.name, axes, dtype, prod(at.shape(at.have, at.here)), shapes, at.root, label)


def _exchanged(step: Step, mesh: Mesh, sizes: Mapping[str, int], dtypes: Mapping[str, str],
               here: Coordinate) -> list[Call]:
    """Those of a step that is no move."""
    label, over = f"{step.outputs[0]}{f' ({step.where})' if step.where else ''}", meets_over(step)
    axes, me = tuple(a for a in over if mesh.axes[a] > 1), mesh.number(over, here)
    return [Call(x.wire.name, axes, x.dtype, x.parts[me].brings, tuple((p.brings,) for p in x.parts), None,
                 label) for x in exchanges(step, mesh, sizes, here, dtypes)]


def _within(where: str, calls: Calls) -> list[Call | Repeat]:
    """The same calls, whose steps are said to be in `where`."""
    return [replace(call, name=where + call.name) if isinstance(call, Repeat)
            else replace(call, step=where + call.step) for call in calls]
