"""Projection: what one rank of a mesh communicates, in order, when it runs an explicit program.

>>> from shardlib.layout import Layout
>>> from shardlib.complete import complete
>>> from shardlib.moves import reshard
>>> from shardlib.trace import Function, trace
>>> mesh = Mesh(tp=2)
>>> p = complete(trace(Function(lambda x: reshard("N/tp -> N/1", x), "N/tp -> N/1")), Layout(), mesh)
>>> [str(c) for c in project(p, mesh, 0, dict(N=5))]
['all_gather of 3 float32 over ranks 0 1']
"""
from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Iterator, Mapping

from shardlib.cond import COND
from shardlib.mesh import Mesh
from shardlib.moves import ALL_GATHER, ALL_REDUCE, ALL_TO_ALL, COLLECTIVES, PERMUTE, REDUCE_SCATTER, changed_dims, exchanged, removed
from shardlib.program import Op, Program, Step
from shardlib.scan import SCAN
from shardlib.spec import Spec

ITEMSIZE = {"float64": 8, "int64": 8, "float32": 4, "int32": 4, "bfloat16": 2, "float16": 2, "bool": 1, "uint8": 1, "int8": 1}


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


def axes_of(step: Step) -> tuple[str, ...]:
    """The mesh axes over which a collective step communicates."""
    (have,), (want,) = step.ins, step.outs
    if step.op in (ALL_REDUCE,):
        return removed(have, want)
    changed = changed_dims(have, want)
    if step.op is REDUCE_SCATTER:
        return want.dims[changed[0]].axes[len(have.dims[changed[0]].axes):]
    gone = tuple(a for i in changed for a in have.dims[i].axes if a not in want.dims[i].axes)
    return gone or tuple(a for i in changed for a in have.dims[i].axes)


def project(program: Program, mesh: Mesh, rank: int, sizes: Mapping[str, int], dtypes: Mapping[str, str] | None = None,
            default: str = "float32") -> list[Call]:
    """The collectives of `rank`, scans unrolled. `dtypes`: of arguments by path, where they are not the default or int64 indices."""
    return list(_calls(program, mesh, rank, sizes, value_dtypes(program, dtypes or {}, default), default, ""))


def _calls(program: Program, mesh: Mesh, rank: int, sizes: Mapping[str, int], dtypes: dict[str, str], default: str, at: str) -> Iterator[Call]:
    for i, step in enumerate(program.steps):
        if step.op is SCAN:
            inner = _inner_dtypes(step, step.body, dtypes, default)
            for layer in range(sizes[step.options["dim"]]):
                yield from _calls(step.body, mesh, rank, sizes, inner, default, f"{at}{step.body.name}[{layer}].")
        elif step.op is COND:
            for body in step.bodies:        # whichever is taken, all take it: the predicate is whole
                inner = _inner_dtypes(step, body, dtypes, default, 1)
                yield from _calls(body, mesh, rank, sizes, inner, default, f"{at}{body.name}.")
        elif step.op in COLLECTIVES and mesh.size(axes_of(step)) > 1:
            axes = tuple(a for a in mesh.axes if a in axes_of(step)) if step.op in (ALL_REDUCE, ALL_TO_ALL, PERMUTE) else axes_of(step)
            group = mesh.group(axes, rank)
            shapes = tuple(mesh.local_shape(step.ins[0], sizes, mesh.coordinate(r)) for r in group)
            yield Call(step.op.name, group, dtypes[step.inputs[0]], prod(mesh.local_shape(step.ins[0], sizes, mesh.coordinate(rank))), shapes,
                       step=f"{at}{step.outputs[0]}{f' ({step.where})' if step.where else ''}")


def value_dtypes(program: Program, given: Mapping[str, str], default: str) -> dict[str, str]:
    """The dtype of every value. Arguments that are used as indices are int64 unless `given` says otherwise."""
    indices = _index_args(program)
    out = {path: given.get(path, "int64" if path in indices else default) for path, _ in program.arg_leaves()}
    for step in program.steps:
        ins = [out[i] for i in step.inputs]
        if step.body is not None:
            inner = _inner_dtypes(step, step.body, out, default, int(step.op is COND))
            made = [inner[n] for n, _ in step.body.result_leaves()]
        else:
            made = step.op.dtype(ins, step.options) if step.op.dtype else [ins[0] if ins else default] * len(step.outputs)
        out.update(zip(step.outputs, (default if d == "float" else d for d in made)))
    return out


def _inner_dtypes(step: Step, body: Program, dtypes: Mapping[str, str], default: str, skip: int = 0) -> dict[str, str]:
    paths = [p for p, _ in body.arg_leaves()]
    return value_dtypes(body, {p: dtypes[n] for p, n in zip(paths, step.inputs[skip:])}, default)


def _index_args(program: Program) -> set[str]:
    """The arguments that index something, here or in a body, through whatever moves."""
    found: set[str] = set()
    source: dict[str, str] = {}
    for step in program.steps:
        if step.op.moves:
            source[step.outputs[0]] = source.get(step.inputs[0], step.inputs[0])
        used = [step.inputs[i] for i in step.op.index if i < len(step.inputs)]
        for body in step.bodies:
            inner = _index_args(body)
            used += [n for (p, _), n in zip(body.arg_leaves(), step.inputs[int(step.op is COND):]) if p in inner]
        found.update(source.get(u, u) for u in used)
    return found & {p for p, _ in program.arg_leaves()}


def cost(op: Op, have: Spec, want: Spec, mesh: Mesh) -> float:
    """What a rank receives in a move, as a fraction of the global tensor, were every axis to divide it evenly."""
    local = 1 / mesh.size(have.split_axes)
    k = mesh.size(axes_of(Step(op, (have,), (want,), (), ()))) if op in COLLECTIVES else 1
    share = {ALL_REDUCE: 2 * (k - 1) / k, ALL_GATHER: k - 1.0, PERMUTE: 1.0 if k > 1 else 0.0}.get(op, (k - 1) / k)
    return share * local


def received(step: Step, mesh: Mesh, sizes: Mapping[str, int], rank: int) -> int:
    """Elements that `rank` receives in a collective step."""
    (have,), (want,), me = step.ins, step.outs, mesh.coordinate(rank)
    local, made = prod(mesh.local_shape(have, sizes, me)), prod(mesh.local_shape(want, sizes, me))
    k = mesh.size(axes_of(step))
    if step.op is ALL_REDUCE:
        return 2 * (k - 1) * local // k
    if step.op is REDUCE_SCATTER:
        return (k - 1) * made
    if step.op is ALL_GATHER:
        return made - local
    return made - exchanged(mesh, sizes, have, want, me, me)
