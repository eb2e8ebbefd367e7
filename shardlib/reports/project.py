"""Projection: what one rank of a mesh communicates, in order, when it runs an explicit program.

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

from dataclasses import dataclass
from math import prod
from typing import Iterator, Mapping, Sequence

from shardlib.compiler.sizes import complete_sizes
from shardlib.dtypes import ITEMSIZE, inner_dtypes, value_dtypes
from shardlib.errors import SpecError
from shardlib.language.moves import Placed, axes_of, placed
from shardlib.language.scan import SCAN
from shardlib.mesh import Mesh, check_sizes
from shardlib.program import Program
from shardlib.spec import Spec


@dataclass(frozen=True)
class Call:
    """One collective of one rank. numel: elements that the rank brings; root: for rooted ones, the in-group rank."""
    op: str
    group: tuple[int, ...]
    dtype: str
    numel: int
    shapes: tuple[tuple[int, ...], ...]
    root: int | None = None
    step: str = ""

    def __str__(self) -> str:
        return f"{self.op} of {self.numel} {self.dtype} over ranks {' '.join(map(str, self.group))}"

    def same(self, other: Call) -> bool:
        """Whether two members of a group call the same collective."""
        return (self.op, self.group, self.dtype, self.shapes, self.root) == (other.op, other.group, other.dtype, other.shapes, other.root)


def check_given(program: Program, mesh: Mesh, sizes: Mapping[str, int], dtypes: Mapping[str, str], default: str = "float32") -> dict[str, int]:
    """All sizes that follow from `sizes`. SpecError unless the mesh has the program's axes, `sizes` the dims of what is held and sent,
    and `dtypes` are some of its arguments'."""
    if not isinstance(program, Program):
        raise SpecError(f"what is proven and explained is a program, as lower(f, layout) returns it, not a {type(program).__name__}")
    if not isinstance(mesh, Mesh):
        raise SpecError(f"the mesh is a {type(mesh).__name__}; it is a Mesh, as in Mesh(dp=2, tp=4)")
    check_sizes(sizes)
    sizes = complete_sizes(program, sizes)
    paths, places = [path for path, _ in program.arg_leaves()], [program, *program.bodies()]
    held = [spec for _, spec in program.arg_leaves()]
    sent = [spec for p in places for s in p.steps if s.op.wire for spec in (*s.ins, *s.outs)]
    used = [spec for p in places for s in p.steps for spec in (*s.ins, *s.outs)]
    if lacking := [a for a in _axes((*held, *used)) if a not in mesh.axes]:
        raise SpecError(f"{program.name}: unknown axis {lacking[0]}; the mesh has {', '.join(mesh.axes) or 'none'}")
    scanned = [s.options["dim"] for p in places for s in p.steps if s.op is SCAN]
    if lacking := [n for n in dict.fromkeys((*(n for spec in (*held, *sent) for n in spec.names), *scanned)) if n not in sizes]:
        raise SpecError(f"{program.name}: no size of {', '.join(lacking)}; sizes has {', '.join(sizes) or 'none'}: "
                        f"sizes=dict({', '.join(f'{n}=...' for n in lacking)})")
    if lacking := [path for path in dtypes if path not in paths]:
        raise SpecError(f"dtypes: {program.name} has no argument {lacking[0]}; it has {', '.join(paths[:8])}{', ...' if len(paths) > 8 else ''}")
    for what, kind in (("default", default), *((f"dtypes: {path}", kind) for path, kind in dtypes.items())):
        if kind not in ITEMSIZE:
            raise SpecError(f"{what} is {kind!r}; a dtype is one of {', '.join(ITEMSIZE)}")
    return sizes


def _axes(specs: Sequence[Spec]) -> dict[str, None]:
    return dict.fromkeys(a for spec in specs for a in (*spec.split_axes, *(o.axis for o in spec.owed)))


def project(program: Program, mesh: Mesh, rank: int, sizes: Mapping[str, int], dtypes: Mapping[str, str] | None = None,
            default: str = "float32") -> list[Call]:
    """The collectives of `rank`, scans unrolled. `dtypes`: of arguments by path, where they are not the default or int64 indices."""
    return list(_calls(program, mesh, rank, sizes, value_dtypes(program, dtypes or {}, default), ""))


def _calls(program: Program, mesh: Mesh, rank: int, sizes: Mapping[str, int], dtypes: Mapping[str, str], at: str) -> Iterator[Call]:
    for step in program.steps:
        for body in step.bodies:            # of a cond both: whichever is taken, all take it, since the predicate is whole
            inner = inner_dtypes(step, body, dtypes)
            for name in [f"{body.name}[{i}]" for i in range(sizes[step.options["dim"]])] if step.op is SCAN else [body.name]:
                yield from _calls(body, mesh, rank, sizes, inner, f"{at}{name}.")
        if step.op.wire and mesh.size(axes_of(step, mesh)) > 1:
            yield _call(placed(step, mesh, sizes, rank), dtypes[step.inputs[0]],
                        f"{at}{step.outputs[0]}{f' ({step.where})' if step.where else ''}")


def _call(move: Placed, dtype: str, step: str) -> Call:
    shapes = tuple(move.shape(move.have, j) for j in range(len(move.members)))
    return Call(move.move.name, move.group, dtype, prod(shapes[move.me]), shapes, move.root, step)
