"""The moves between specs of one value, a record each: its name, when it is one, what a rank does for it.

| move | from -> to | communication |
|---|---|---|
| shard | `T D -> T/tp D` | none: keep the own piece |
| owe | `D -> D +tp`, `T/tp D -> T D +tp` | none: keep at coordinate 0, or pad with zeros |
| all_reduce | `T D +tp -> T D` | the sum, on every rank |
| reduce_scatter | `T D +tp -> T/tp D` | the own piece of the sum |
| all_gather | `T/tp D -> T D` | all pieces |
| all_to_all | `T/tp D -> T D/tp` | a split moves from one dim to another |
| permute | `T/x/y D -> T/y/x D` | the order of a dim's axes changes |

Every move is the identity on what its operand denotes, so its transpose is the move between the duals. A
move that communicates has a wire (`shardlib.wires`), and two may share one: permute goes over that of
all_to_all.

>>> from shardlib.mesh import Mesh
>>> from shardlib.spec import parse
>>> step = Step(ALL_GATHER, (parse("T/tp D"),), (parse("T D"),), ("x",), ("y",))
>>> mesh, sizes = Mesh(tp=2), dict(T=5, D=3)
>>> check_move(step.op, *step.ins, *step.outs), axes_of(step, mesh), received(step, mesh, sizes, 0)
(None, ('tp',), 6)
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations, product
from math import prod

from shardlib import wires
from shardlib.language.changes import ROWS_STAY, Axes, Change, Search, change, changed_dims, moved_rows
from shardlib.language.local_code import LocalCode
from shardlib.mesh import Mesh
from shardlib.program import Op, Step
from shardlib.rules import Rule
from shardlib.spec import Spec
from shardlib.wires import Part, Wire

Coordinate = Mapping[str, int]


# -- the record ----------------------------------------------------------------------------------------------

def _communicate(e: LocalCode, step: Step, args: list[str]) -> str:
    """The code of a move over a wire: cut, ask, join."""
    at = placed(step, e.mesh, e.sizes, e.coordinate)
    got = e.collective(at.wire, at.axes, at.move.cut(at, args[0]), at.move.request(at))
    return at.move.join(at, got)


def _alone(before: Change, after: Change) -> bool:
    return False


def _same_dims(before: Change, after: Change) -> bool:
    return before.dims == after.dims

@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Move(Op):
    """One move, and an op of programs.

    example, does: its line in the docs: from -> to, and what is communicated.
    legal(change): whether it makes that change; `reorders`: it may change the order of a dim's axes.
    neighbours(search): the types that it leads to, one axis at the end of a dim's axes at a time.
    merges(before, after): whether two of it in a row are one over the product of their axes.

    Of a move over a wire, besides:
    axes(change):  those over which it communicates; `ordered`: members stand so, else as in the mesh.
    cut(at, x), join(at, got): the code of the operand that a rank brings, and of what it makes of what comes.
    request(at):   what it says beside the operand.
    root(at):      the member that is the root, over a rooted wire.
    share(k):      the most that one of k members receives, where that is not the wire's share.
    """
    rule: Callable[[Step], Rule] = lambda step: Rule()
    emit: Callable[[LocalCode, Step, list[str]], str] = _communicate
    moves: bool = True
    example: str
    does: str
    legal: Callable[[Change], bool]
    reorders: bool = False
    neighbours: Callable[[Search], Iterator[Spec]]
    merges: Callable[[Change, Change], bool] = _alone
    axes: Callable[[Change], Axes] = lambda change: ()
    ordered: bool = False
    cut: Callable[[Placed, str], list[str]] = lambda at, x: [x]
    join: Callable[[Placed, str], str] = lambda at, got: got
    request: Callable[[Placed], tuple] = lambda at: ()
    root: Callable[[Placed], int | None] = lambda at: None
    share: Callable[[int], float] | None = None

    def group(self, made: Change, mesh: Mesh) -> Axes:
        """The axes over which it communicates, as its group has them."""
        axes = self.axes(made)
        return axes if self.ordered else tuple(a for a in mesh.axes if a in axes)


@dataclass(frozen=True)
class Placed:
    """A move of a value whose dims have `sizes`, as the rank at `here` makes it: who has which rows.

    starts: of each axis the coordinates that are looked at, where these stand for all.
    """
    move: Move
    have: Spec
    want: Spec
    mesh: Mesh
    sizes: Mapping[str, int]
    here: Coordinate
    starts: Mapping[str, Sequence[int]] | None = None

    @cached_property
    def change(self) -> Change:
        return change(self.have, self.want)

    @cached_property
    def axes(self) -> Axes:
        return self.move.group(self.change, self.mesh)

    @cached_property
    def members(self) -> list[Coordinate]:
        """The members of its group, in order."""
        along = [self.starts[a] if self.starts else range(self.mesh.axes[a]) for a in self.axes]
        return [{**self.here, **dict(zip(self.axes, at))} for at in product(*along)]

    @property
    def kind(self) -> str:
        """How what is owed is paid."""
        return "sum" if self.change.lost[0].kind == "+" else "max"

    @property
    def wire(self) -> Wire:
        """What its move goes over; of a move that communicates."""
        if self.move.wire is None:
            raise TypeError(f"{self.move.name}: nothing is communicated")
        return self.move.wire

    @property
    def root(self) -> int | None:
        return self.move.root(self)

    def rows(self, spec: Spec, i: int, at: Coordinate) -> tuple[int, int]:
        """(start, size) along dim i of what a rank has of type `spec`."""
        return self.mesh.rows(spec.dims[i], self.sizes, at)

    def shape(self, spec: Spec, at: Coordinate) -> tuple[int, ...]:
        return self.mesh.local_shape(spec, self.sizes, at)

    def passed(self, source: Coordinate, target: Coordinate,
               dims: Iterable[int]) -> dict[int, tuple[int, int]]:
        """By dim: (global start, size) of what `source` holds and `target` gets."""
        out = {}
        for i in dims:
            (a, n), (b, m) = self.rows(self.have, i, source), self.rows(self.want, i, target)
            start, stop = max(a, b), min(a + n, b + m)
            out[i] = (start, stop - start) if stop > start else (a, 0)
        return out

    def part(self, at: Coordinate) -> Part:
        """What a member brings, gets and passes on, in elements."""
        def passes(target: Coordinate) -> int:
            return prod(n for _, n in self.passed(at, target, range(len(self.have.dims))).values())
        brings, gets = (prod(self.shape(spec, at)) for spec in (self.have, self.want))
        made = Part(self.mesh.size(self.axes), self.number(at), brings, gets, self.root)
        if not self.wire.many:
            return made
        return replace(made, kept=passes(at), passes=list(map(passes, self.members)))

    def number(self, at: Coordinate) -> int:
        """Which member of the group a rank is."""
        return self.mesh.number(self.axes, at)

    @property
    def even(self) -> bool:
        return self.wire.even(map(self.part, self.members))

    @property
    def received(self) -> int:
        """Elements that this rank receives."""
        return self.wire.received(self.part(self.here))


# -- what is asked of a move ---------------------------------------------------------------------------------

def check_move(op: Move, have: Spec, want: Spec) -> str | None:
    """Why `op` does not lead from `have` to `want`; None where it does."""
    if have.labels != want.labels or moved_rows(have, want):
        return "the two sides have different dims" if have.labels != want.labels else ROWS_STAY
    made, reduces = change(have, want), op.wire and op.wire.reduces
    for i in made.crossed:
        if not op.reorders or sorted(have.dims[i].axes) != sorted(want.dims[i].axes):
            return f"{have.dims[i]} does not become {want.dims[i]} by adding or dropping its last axes"
    if reduces and not made.lost:
        return f'"{have} -> {want}" pays no sum; there is nothing to reduce, and every rank would count again'
    if reduces and any(o.kind == "@" for o in made.lost):
        return f'what one coordinate holds owes no sum: "{have} -> {want}"'
    return None if op.legal(made) else f'it does not lead from "{have}" to "{want}"'


def _move(step: Step) -> Move:
    if not isinstance(step.op, Move):
        raise TypeError(f"{step.op.name} is no move")
    return step.op


def axes_of(step: Step, mesh: Mesh) -> Axes:
    """The mesh axes over which a collective step communicates, as its group has them."""
    return _move(step).group(change(step.ins[0], step.outs[0]), mesh)


def cost(move: Move, have: Spec, want: Spec, sizes: Mapping[str, int]) -> float:
    """What a rank receives in a move on axes of these sizes, in whole tensors, were all pieces even."""
    if not move.wire:
        return 0.0
    share, k = move.share or move.wire.share, prod(sizes[a] for a in move.axes(change(have, want)))
    return share(k) * (1 / prod(sizes[a] for a in have.split_axes))


def placed(step: Step, mesh: Mesh, sizes: Mapping[str, int], here: Coordinate,
           starts: Mapping[str, Sequence[int]] | None = None) -> Placed:
    """A step that is a move, as the rank at `here` makes it."""
    return Placed(_move(step), step.ins[0], step.outs[0], mesh, sizes, here, starts)


def received(step: Step, mesh: Mesh, sizes: Mapping[str, int], rank: int) -> int:
    """Elements that `rank` receives in a collective step."""
    return placed(step, mesh, sizes, mesh.coordinate(rank)).received


# -- the moves that are local --------------------------------------------------------------------------------

def _shard(e: LocalCode, step: Step, args: list[str]) -> str:
    (have,), (want,), text = step.ins, step.outs, args[0]
    for i in changed_dims(have, want):
        (at, _), (start, size) = e.rows(have.dims[i]), e.rows(want.dims[i])
        text = f"{text}.narrow({i}, {start - at}, {size})"
    return text


def _towards_shard(s: Search) -> Iterator[Spec]:
    for a in s.free:
        if grown := s.grown(a):
            yield s.to(grown)


SHARD = Move(
    "shard", example="`T D -> T/tp D`", does="none: keep the own piece", emit=_shard,
    legal=lambda c: (bool(c.gained) and not (c.shrunk or c.lost or c.new)
                     and not {*c.gained} & {o.axis for o in c.have.owed}),
    neighbours=_towards_shard, merges=lambda before, after: True)


def _owe(e: LocalCode, step: Step, args: list[str]) -> str:
    (have,), (want,), text = step.ins, step.outs, args[0]
    pads = [0, 0] * len(have.dims)                                      # F.pad counts dims from the last
    for i in changed_dims(have, want):
        (at, n), (start, size) = e.rows(have.dims[i]), e.rows(want.dims[i])
        last = 2 * (len(have.dims) - 1 - i)
        pads[last], pads[last + 1] = at - start, start + size - at - n
    fresh = [o.axis for o in want.owed if o not in have.owed and o.axis not in have.split_axes]
    if any(e.coordinate[a] for a in fresh):
        return f"torch.zeros({tuple(e.shape(want))}, dtype={text}.dtype, device={text}.device)"
    return f"F.pad({text}, {tuple(pads)})" if any(pads) else text


def _towards_owe(s: Search) -> Iterator[Spec]:
    for a in s.free:
        if a in s.due:
            yield s.to(owing=(*s.here.owed, s.wanted[a]))
    for _, a, rest in s.ends():
        if a in s.due:
            yield s.to(rest, owing=(*s.here.owed, s.wanted[a]))


OWE = Move(
    "owe", example="`D -> D +tp`, `T/tp D -> T D +tp`", does="none: keep at coordinate 0, or pad with zeros",
    legal=lambda c: (not (c.grown or c.lost) and c.new != () and {*c.gone} <= {o.axis for o in c.new}
                     and all(o.kind == "+" for o in c.new)),
    emit=_owe, neighbours=_towards_owe, merges=lambda before, after: True)


# -- the moves that pay what is owed -------------------------------------------------------------------------

def _towards_all_reduce(s: Search) -> Iterator[Spec]:
    """Over several axes at once, where all owe alike."""
    paid = [a for a in s.axes if a in s.payable and s.owed[a] != s.wanted.get(a) and not s.grown(a)]
    for n in range(1, len(paid) + 1):
        for some in combinations(paid, n):
            if len({s.owed[a].kind for a in some}) == 1:
                yield s.to(owing=s.without(*some))


ALL_REDUCE = Move(
    "all_reduce", example="`T D +tp -> T D`", does="the sum, on every rank", wire=wires.ALL_REDUCE,
    legal=lambda c: not (c.grown or c.shrunk or c.new),
    neighbours=_towards_all_reduce, axes=lambda c: c.paid, request=lambda at: (at.kind,))


def _pieces(at: Placed, spec: Spec) -> tuple[int, tuple[int, ...]]:
    """The dim that is cut or put together, and how many rows of it each member has as type `spec`."""
    (i,) = at.change.dims
    return i, tuple(at.rows(spec, i, member)[1] for member in at.members)


def _towards_reduce_scatter(s: Search) -> Iterator[Spec]:
    for a in s.axes:
        if a in s.payable and (grown := s.grown(a)):
            yield s.to(grown, owing=s.without(a))


REDUCE_SCATTER = Move(
    "reduce_scatter", example="`T D +tp -> T/tp D`", does="the own piece of the sum",
    legal=lambda c: len(c.grown) == 1 and not (c.shrunk or c.new) and sorted(c.gained) == sorted(c.paid),
    neighbours=_towards_reduce_scatter, merges=_same_dims, wire=wires.REDUCE_SCATTER,
    axes=lambda c: c.gained, ordered=True, request=lambda at: (*_pieces(at, at.want), at.kind))


# -- the moves of what splits a dim --------------------------------------------------------------------------

def _towards_all_gather(s: Search) -> Iterator[Spec]:
    for _, _, rest in s.ends():
        yield s.to(rest)


ALL_GATHER = Move(
    "all_gather", example="`T/tp D -> T D`", does="all pieces", wire=wires.ALL_GATHER,
    legal=lambda c: len(c.shrunk) == 1 and not (c.grown or c.lost or c.new),
    neighbours=_towards_all_gather, merges=_same_dims,
    axes=lambda c: c.gone, ordered=True, request=lambda at: _pieces(at, at.have))


def _cut(at: Placed, x: str) -> list[str]:
    """What this rank has, cut by what the others want."""
    first = {i: at.rows(at.have, i, at.here)[0] for i in at.change.dims}

    def piece(member: Coordinate) -> str:
        wanted = at.passed(at.here, member, at.change.dims)
        return x + "".join(f".narrow({i}, {start - first[i]}, {n})" for i, (start, n) in wanted.items())
    return [piece(member) for member in at.members]


def _arriving(at: Placed) -> list[dict[int, tuple[int, int]]]:
    """By member, by dim: (global start, size) of what this rank gets from it."""
    return [at.passed(member, at.here, at.change.dims) for member in at.members]


def _shapes(at: Placed) -> tuple:
    """Of what comes; and that all pieces of all members are even, where they are."""
    mine = at.shape(at.have, at.here)
    shapes = tuple(tuple(got[i][1] if i in got else n for i, n in enumerate(mine)) for got in _arriving(at))
    return (shapes, True) if at.even else (shapes,)


def _join(at: Placed, got: str) -> str:
    """What comes, by where it lies along the dim that grows here, or whose axes change their order."""
    dim = next(i for i in at.change.dims if len(at.have.dims[i].axes) >= len(at.want.dims[i].axes))
    arrive, members = _arriving(at), range(len(at.members))
    order = sorted(members, key=lambda j: (arrive[j][dim][0], j))
    if order == list(members):
        return f"torch.cat({got}, {dim})"
    return f"torch.cat([p[j] for p in [{got}] for j in {order}], {dim})"


def _towards_all_to_all(s: Search) -> Iterator[Spec]:
    for j, a, rest in s.ends():
        if (grown := s.grown(a)) and grown[0] != j:
            yield s.to(rest, grown)


ALL_TO_ALL = Move(
    "all_to_all", example="`T/tp D -> T D/tp`", does="a split moves from one dim to another",
    legal=lambda c: len(c.shrunk) == len(c.grown) == 1 and c.gained == c.gone and not (c.lost or c.new),
    neighbours=_towards_all_to_all, wire=wires.ALL_TO_ALL, axes=lambda c: c.gone,
    cut=_cut, request=_shapes, join=_join)


def _towards_permute(s: Search) -> Iterator[Spec]:
    """Those axes first that stay, as they are wanted."""
    for i, *_ in s.ends():
        axes = s.here.dims[i].axes
        staying = tuple(a for a in s.want.dims[i].axes if a in axes)
        order = staying + tuple(a for a in axes if a not in staying)
        if order != axes:
            yield s.to((i, order))


PERMUTE = Move(
    "permute", example="`T/x/y D -> T/y/x D`", does="the order of a dim's axes changes",
    legal=lambda c: bool(c.crossed) and not (c.grown or c.shrunk or c.lost or c.new), reorders=True,
    neighbours=_towards_permute, axes=lambda c: tuple(a for i in c.dims for a in c.have.dims[i].axes),
    wire=wires.ALL_TO_ALL, share=lambda k: 1.0 if k > 1 else 0.0, cut=_cut, request=_shapes, join=_join)

MOVES = (SHARD, OWE, ALL_REDUCE, REDUCE_SCATTER, ALL_GATHER, ALL_TO_ALL, PERMUTE)
COLLECTIVES = tuple(move for move in MOVES if move.wire)
RESHARD = Op("reshard", rule=lambda step: Rule(), moves=True)       # whatever chain of moves is cheapest
TABLE: dict[str, Op] = {op.name: op for op in (*MOVES, RESHARD)}
