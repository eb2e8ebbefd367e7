"""The moves between specs of one value: what each is called, and what one rank does for it.

| verb | from -> to | communication |
|---|---|---|
| shard | `T D -> T/tp D` | none: keep the own piece |
| owe | `D -> D +tp`, `T/tp D -> T D +tp` | none: keep at coordinate 0, or pad with zeros |
| all_reduce | `T D +tp -> T D` | the sum, on every rank |
| reduce_scatter | `T D +tp -> T/tp D` | the own piece of the sum |
| all_gather | `T/tp D -> T D` | all pieces |
| all_to_all | `T/tp D -> T D/tp` | a split moves from one dim to another |
| permute | `T/x/y D -> T/y/x D` | the order of a dim's axes changes |

Every move is the identity on what its operand denotes, so its transpose is the move between the duals.
"""
from __future__ import annotations

import math
from typing import Any, Iterable, Mapping, Sequence

from shardlib.local_code import LocalCode
from shardlib.mesh import Mesh
from shardlib.program import Op, Step
from shardlib.rules import Rule
from shardlib.spec import Spec
from shardlib.trace import RESHARD, Operand, Value, apply


def changed_dims(have: Spec, want: Spec) -> list[int]:
    """The dims whose axes differ."""
    return [i for i, (a, b) in enumerate(zip(have.dims, want.dims)) if a.axes != b.axes]


def removed(have: Spec, want: Spec) -> tuple[str, ...]:
    """The axes over which `have` owes and `want` does not."""
    return tuple(o.axis for o in have.owed if o not in want.owed)


def axes_of(step: Step, mesh: Mesh) -> tuple[str, ...]:
    """The mesh axes over which a collective step communicates, as its group has them: in mesh order, or in that of the split."""
    (have,), (want,) = step.ins, step.outs
    changed = changed_dims(have, want)
    if step.op is REDUCE_SCATTER:
        return want.dims[changed[0]].axes[len(have.dims[changed[0]].axes):]
    gone = tuple(a for i in changed for a in have.dims[i].axes if a not in want.dims[i].axes)
    if step.op is ALL_GATHER:
        return gone
    axes = removed(have, want) or gone or tuple(a for i in changed for a in have.dims[i].axes)
    return tuple(a for a in mesh.axes if a in axes)


def exchanged(mesh: Mesh, sizes: Mapping[str, int], have: Spec, want: Spec, source: Mapping[str, int], target: Mapping[str, int]) -> int:
    """Elements that `source` holds of `have` and `target` holds of `want`: of an all_to_all or permute, what one has for the other."""
    return math.prod(n for _, n in _overlap(mesh, sizes, have, want, range(len(have.dims)), source, target).values())


def _overlap(mesh: Mesh, sizes: Mapping[str, int], have: Spec, want: Spec, dims: Iterable[int], source: Mapping[str, int],
             target: Mapping[str, int]) -> dict[int, tuple[int, int]]:
    """Per dim: (global start, size) of what `source` has and `target` wants."""
    out = {}
    for i in dims:
        (a, n), (b, m) = mesh.rows(have.dims[i], sizes, source), mesh.rows(want.dims[i], sizes, target)
        start, stop = max(a, b), min(a + n, b + m)
        out[i] = (start, stop - start) if stop > start else (a, 0)
    return out


def _extent(e: LocalCode, spec: Spec, i: int, coordinate: Mapping[str, int]) -> tuple[int, int]:
    """(start, size) in rows along dim i."""
    return e.mesh.rows(spec.dims[i], e.sizes, coordinate)


def _members(e: LocalCode, axes: Sequence[str]) -> list[dict[str, int]]:
    """Coordinates of the group over `axes` that this rank is in, in order."""
    return [e.mesh.coordinate(r) for r in e.mesh.group(axes, e.rank)]


def _shard(e: LocalCode, step: Step, args: list[str]) -> str:
    (have,), (want,), text = step.ins, step.outs, args[0]
    for i in changed_dims(have, want):
        (at, _), (start, size) = _extent(e, have, i, e.coordinate), _extent(e, want, i, e.coordinate)
        text = f"{text}.narrow({i}, {start - at}, {size})"
    return text


def _owe(e: LocalCode, step: Step, args: list[str]) -> str:
    (have,), (want,), text = step.ins, step.outs, args[0]
    pads = [0, 0] * len(have.dims)
    for i in changed_dims(have, want):
        (at, n), (start, size) = _extent(e, have, i, e.coordinate), _extent(e, want, i, e.coordinate)
        pads[2 * (len(have.dims) - 1 - i):][:2] = [0, 0]
        pads[2 * (len(have.dims) - 1 - i)] = at - start
        pads[2 * (len(have.dims) - 1 - i) + 1] = start + size - at - n
    fresh = [o.axis for o in want.owed if o not in have.owed and o.axis not in have.split_axes]
    if any(e.coordinate[a] for a in fresh):
        return f"torch.zeros({tuple(e.shape(want))}, dtype={text}.dtype, device={text}.device)"
    return f"F.pad({text}, {tuple(pads)})" if any(pads) else text


def _all_reduce(e: LocalCode, step: Step, args: list[str]) -> str:
    axes = axes_of(step, e.mesh)
    kind = next(o.kind for o in step.ins[0].owed if o.axis in axes)
    return e.collective(axes, "all_reduce", [args[0]], repr("sum" if kind == "+" else "max"))


def _reduce_scatter(e: LocalCode, step: Step, args: list[str]) -> str:
    (have,), (want,) = step.ins, step.outs
    (i,) = changed_dims(have, want)
    axes = axes_of(step, e.mesh)
    sizes = tuple(_extent(e, want, i, c)[1] for c in _members(e, axes))
    kind = next(o.kind for o in have.owed if o.axis in axes)
    return e.collective(axes, "reduce_scatter", [args[0]], f"{i}, {sizes}, {('sum' if kind == '+' else 'max')!r}")


def _all_gather(e: LocalCode, step: Step, args: list[str]) -> str:
    (have,), (want,) = step.ins, step.outs
    (i,) = changed_dims(have, want)
    axes = axes_of(step, e.mesh)
    return e.collective(axes, "all_gather", [args[0]], f"{i}, {tuple(_extent(e, have, i, c)[1] for c in _members(e, axes))}")


def _exchange(e: LocalCode, step: Step, args: list[str]) -> str:
    """Each rank cuts what it has by what the others want, and joins what it gets: both along one dim or along two."""
    (have,), (want,) = step.ins, step.outs
    changed = changed_dims(have, want)
    axes = axes_of(step, e.mesh)
    members = _members(e, axes)
    pieces = [_overlap(e.mesh, e.sizes, have, want, changed, e.coordinate, c) for c in members]
    arrive = [_overlap(e.mesh, e.sizes, have, want, changed, c, e.coordinate) for c in members]
    mine = {i: _extent(e, have, i, e.coordinate)[0] for i in changed}
    cut = [args[0] + "".join(f".narrow({i}, {start - mine[i]}, {size})" for i, (start, size) in piece.items()) for piece in pieces]
    shape = list(e.shape(have))
    shapes = tuple(tuple(piece[i][1] if i in piece else n for i, n in enumerate(shape)) for piece in arrive)
    dim = next(i for i in changed if len(have.dims[i].axes) >= len(want.dims[i].axes))     # all_to_all: the one that grows here
    order = sorted(range(len(members)), key=lambda j: (arrive[j][dim][0], j))
    even = len({exchanged(e.mesh, e.sizes, have, want, a, b) for a in members for b in members}) == 1
    got = e.collective(axes, "all_to_all", cut, f"{shapes}, True" if even else repr(shapes), many=True)
    if order == list(range(len(members))):
        return f"torch.cat({got}, {dim})"
    return f"torch.cat([p[j] for p in [{got}] for j in {order}], {dim})"


def check_move(op: Op, have: Spec, want: Spec) -> str | None:
    """Why `op` does not lead from `have` to `want`; None where it does."""
    if have.labels != want.labels:
        return "the two sides have different dims"
    lost, new = [o for o in have.owed if o not in want.owed], [o for o in want.owed if o not in have.owed]
    grown, shrunk = {}, {}
    for i in changed_dims(have, want):
        a, b = have.dims[i].axes, want.dims[i].axes
        if b[:len(a)] == a:
            grown[i] = b[len(a):]
        elif a[:len(b)] == b:
            shrunk[i] = a[len(b):]
        elif op is not PERMUTE or sorted(a) != sorted(b):
            return f"{have.dims[i]} does not become {want.dims[i]} by adding or dropping its last axes"
    gained, gone = tuple(a for x in grown.values() for a in x), tuple(a for x in shrunk.values() for a in x)
    if op in (ALL_REDUCE, REDUCE_SCATTER) and not lost:
        return f'"{have} -> {want}" pays no sum; there is nothing to reduce, and every rank would count again'
    if op in (ALL_REDUCE, REDUCE_SCATTER) and any(o.kind == "@" for o in lost):
        return f'what one coordinate holds owes no sum: "{have} -> {want}"'
    ok = {"shard": not shrunk and not lost and not new and gained and not set(gained) & {o.axis for o in have.owed},
          "owe": not grown and not lost and new and set(gone) <= {o.axis for o in new} and all(o.kind == "+" for o in new),
          "all_reduce": not grown and not shrunk and not new,
          "reduce_scatter": len(grown) == 1 and not shrunk and not new and sorted(gained) == sorted(o.axis for o in lost),
          "all_gather": len(shrunk) == 1 and not grown and not lost and not new,
          "all_to_all": len(shrunk) == 1 and len(grown) == 1 and gained == gone and not lost and not new,
          "permute": changed_dims(have, want) and not grown and not shrunk and not lost and not new}[op.name]
    return None if ok else f'it does not lead from "{have}" to "{want}"'


def _move(name: str, emit: Any) -> Op:
    return Op(name, rule=lambda step: Rule(), emit=emit, moves=True)


SHARD, OWE = _move("shard", _shard), _move("owe", _owe)
ALL_REDUCE, REDUCE_SCATTER = _move("all_reduce", _all_reduce), _move("reduce_scatter", _reduce_scatter)
ALL_GATHER, ALL_TO_ALL, PERMUTE = _move("all_gather", _all_gather), _move("all_to_all", _exchange), _move("permute", _exchange)
COLLECTIVES = (ALL_REDUCE, REDUCE_SCATTER, ALL_GATHER, ALL_TO_ALL, PERMUTE)


def shard(text: str, x: Operand) -> Value:
    """`T D -> T/tp D`: of a whole value each rank keeps its own piece. Free.

    Refused: a value that owes over that axis.

    >>> import torch
    >>> from shardlib import EXPLICIT, sharded, simulate
    >>> @sharded("T/tp D, T -> T/tp D", layout=EXPLICIT)
    ... def scaled(x, factor):
    ...     return x * shard("T -> T/tp", factor)
    >>> log = []
    >>> factor = torch.tensor([1.0, 2.0, 3.0])
    >>> simulate(scaled, None, torch.ones(3, 1), factor, mesh=Mesh(tp=2), log=log).flatten(), log
    (tensor([1., 2., 3.]), [])
    """
    return apply(SHARD, (x,), text)


def owe(text: str, x: Operand) -> Value:
    """`D -> D +tp`: a whole value stays at coordinate 0, the others have zeros. Free.

    `T/tp D -> T D +tp`: each rank pads its piece. So that a bias counts once, not once for every rank:

    >>> import torch
    >>> from shardlib import EXPLICIT, einsum, sharded, simulate
    >>> @sharded("F/tp, F/tp D, D -> D", layout=EXPLICIT)
    ... def f(x, w, bias):
    ...     y = einsum("F/tp, F/tp D -> D +tp", x, w) + owe("D -> D +tp", bias)
    ...     return all_reduce("D +tp -> D", y)
    >>> simulate(f, None, torch.ones(4), torch.ones(4, 1), torch.tensor([10.0]), mesh=Mesh(tp=2))
    tensor([14.])
    """
    return apply(OWE, (x,), text)


def all_reduce(text: str, x: Operand) -> Value:
    """`T D +tp -> T D`: an owed sum (or max) is paid, on every rank.

    Refused where nothing is owed: it would count once for every rank.

    >>> import torch
    >>> from shardlib import EXPLICIT, einsum, sharded, simulate
    >>> @sharded("T F/tp, F/tp D -> T D", layout=EXPLICIT)
    ... def f(x, w):
    ...     return all_reduce("T D +tp -> T D", einsum("T F/tp, F/tp D -> T D +tp", x, w))
    >>> log = []
    >>> simulate(f, None, torch.ones(2, 6), torch.ones(6, 1), mesh=Mesh(tp=3), log=log).flatten(), log
    (tensor([6., 6.]), [((0, 1, 2), 'all_reduce', 2)])
    """
    return apply(ALL_REDUCE, (x,), text)


def reduce_scatter(text: str, x: Operand) -> Value:
    """`T D +tp -> T/tp D`: an owed sum (or max) is paid, each rank its own piece.

    That moves half of what an all_reduce does. The gradient of a weight that is split at rest, from a batch
    that is split over the same axis:

    >>> import torch
    >>> from shardlib import EXPLICIT, einsum, sharded, simulate
    >>> @sharded("B/dp D, B/dp F -> D/dp F", layout=EXPLICIT)
    ... def gradient(x, g):
    ...     return reduce_scatter("D F +dp -> D/dp F", einsum("B/dp D, B/dp F -> D F +dp", x, g))
    >>> x, g = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0], [10.0]])
    >>> simulate(gradient, None, x, g, mesh=Mesh(dp=2))
    tensor([[31.],
            [42.]])
    """
    return apply(REDUCE_SCATTER, (x,), text)


def all_gather(text: str, x: Operand) -> Value:
    """`T/tp D -> T D`: every rank gets all pieces of a dim.

    The axes that go are the last of that dim: T/x/y becomes T/x, or T. Refused: several dims at once.

    >>> import torch
    >>> from shardlib import EXPLICIT, sharded, simulate
    >>> from shardlib.functions import softmax
    >>> @sharded("V/tp -> V", layout=EXPLICIT)
    ... def probabilities(logits):
    ...     return softmax(all_gather("V/tp -> V", logits), along="V")
    >>> simulate(probabilities, None, torch.zeros(5), mesh=Mesh(tp=2))
    tensor([0.2000, 0.2000, 0.2000, 0.2000, 0.2000])
    """
    return apply(ALL_GATHER, (x,), text)


def all_to_all(text: str, x: Operand) -> Value:
    """`T/tp K -> T K/tp`: a split moves from one dim to another. Pieces may be uneven.

    Heads in place of time, so that what runs along time has all of it (Jacobs et al. 2023):

    >>> import torch
    >>> from shardlib import EXPLICIT, sharded, simulate
    >>> from shardlib.functions import softmax
    >>> @sharded("T/cp K -> T/cp K", layout=EXPLICIT)
    ... def over_time(scores):
    ...     by_head = softmax(all_to_all("T/cp K -> T K/cp", scores), along="T")
    ...     return all_to_all("T K/cp -> T/cp K", by_head)
    >>> simulate(over_time, None, torch.tensor([[0.0, 5.0], [0.0, 5.0]]), mesh=Mesh(cp=2))
    tensor([[0.5000, 0.5000],
            [0.5000, 0.5000]])
    """
    return apply(ALL_TO_ALL, (x,), text)


def reshard(text: str, x: Operand) -> Value:
    """From one spec to another of the same dims, by the moves that receive least, printed in its place.

    >>> from shardlib import EXPLICIT, lower, sharded
    >>> @sharded("T/tp D +dp -> T D/dp", layout=EXPLICIT)
    ... def f(x):
    ...     return reshard("T/tp D +dp -> T D/dp", x)
    >>> lower(f, mesh=Mesh(dp=2, tp=2))
    @sharded("T/tp D +dp -> T D/dp", layout=EXPLICIT)
    def f(x):
        x2 = reduce_scatter("T/tp D +dp -> T/tp D/dp", x)
        x3 = all_gather("T/tp D/dp -> T D/dp", x2)
        return x3
    """
    return apply(RESHARD, (x,), text)


def permute(text: str, x: Operand) -> Value:
    """`T/x/y -> T/y/x`: the axes that split a dim change their order, and ranks the pieces that they hold.

    >>> import torch
    >>> from shardlib import EXPLICIT, sharded, simulate
    >>> @sharded("T/x/y, T/y/x -> T/y/x", layout=EXPLICIT)
    ... def added(a, b):
    ...     return permute("T/x/y -> T/y/x", a) + b
    >>> log, one_to_four = [], torch.tensor([1.0, 2.0, 3.0, 4.0])
    >>> simulate(added, None, one_to_four, one_to_four, mesh=Mesh(x=2, y=2), log=log)
    tensor([2., 4., 6., 8.])
    >>> log
    [((0, 1, 2, 3), 'all_to_all', 1)]
    """
    return apply(PERMUTE, (x,), text)


TABLE = {op.name: op for op in (SHARD, OWE, *COLLECTIVES, RESHARD)}
