"""Tensors placed on all ranks of a mesh, and put together again: for the simulator, and for tests.

>>> from shardlib.mesh import Mesh
>>> from shardlib.spec import parse
>>> mesh, x = Mesh(tp=2), torch.arange(6.).view(3, 2)
>>> pieces = place(x, parse("T/tp D"), dict(T=3, D=2), mesh)
>>> [tuple(p.shape) for p in pieces], bool((join(pieces, parse("T/tp D"), dict(T=3, D=2), mesh) == x).all())
([(2, 2), (1, 2)], True)

Pieces of an owed sum are always drawn at random, as large as the value: with (x, 0, 0, ...) many nonlinear
functions pass for linear ones. What ranks elsewhere hold of a value that is held at one coordinate is NaN.

A tensor of type `(E T)~J D` means one of all pairs, (E T) D, zero where a pair was not chosen. `chosen`, of
all pairs, has for each by which choice of its token it is there, or J where it is not. A rank holds the rows
of its own chosen pairs, in order, and behind them what means nothing: NaN here, so that nobody reads it.

>>> mesh, kind, sizes = Mesh(ep=2), parse("(E/ep T)~J D"), dict(E=2, T=3, J=1, D=1)
>>> x, chosen = torch.arange(6.).view(6, 1), torch.tensor([1, 0, 1, 0, 1, 0])
>>> pieces = place_rows(x, chosen, kind, sizes, mesh)
>>> [p.view(-1).tolist() for p in pieces]
[[1.0, nan, nan], [3.0, 5.0, nan]]
>>> join_rows(pieces, chosen, kind, sizes, mesh).view(-1).tolist()
[0.0, 1.0, 0.0, 3.0, 0.0, 5.0]
>>> [p.tolist() for p in place_rows(chosen, chosen, parse("(E/ep T)~J"), sizes, mesh)]
[[1, 3, 3], [0, 2, 3]]
"""
from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from shardlib.errors import SpecError
from shardlib.mesh import Mesh
from shardlib.program import Program
from shardlib.spec import Owed, Spec
from shardlib.tree import leaves


def region(kind: Spec, sizes: Mapping[str, int], mesh: Mesh,
           coordinate: Mapping[str, int]) -> tuple[slice, ...]:
    """The slices of the global tensor that `coordinate` holds."""
    rows = [mesh.rows(dim, sizes, coordinate) for dim in kind.dims]
    return tuple([slice(start, start + size) for start, size in rows])


def place(x: Tensor, kind: Spec, sizes: Mapping[str, int], mesh: Mesh,
          generator: torch.Generator | None = None) -> list[Tensor]:
    """What each rank holds of `x` as type `kind`.

    Where a sum is owed, random pieces that sum to x; an owed max, likewise.
    """
    owed, held = [o for o in kind.owed if o.kind != "@"], [o for o in kind.owed if o.kind == "@"]
    combos = list(itertools.product(*(range(mesh.axes[o.axis]) for o in owed)))
    pieces = {c: x for c in combos}
    if len(combos) > 1 and owed[0].kind == "+":
        scale = max(1.0, float(x.detach().abs().nan_to_num(0, 0, 0).max()) if x.numel() else 1.0)
        drawn = [(scale * torch.randn(x.shape, generator=generator, dtype=torch.float64,
                                      device="cpu")).to(x.dtype) for _ in combos[1:]]
        pieces = dict(zip(combos, [x - torch.stack(drawn).sum(0), *drawn]))
    elif len(combos) > 1:
        winner = torch.randint(len(combos), x.shape, generator=generator, device="cpu")
        pieces = {c: torch.where(winner == i, x, x - torch.rand(x.shape, generator=generator, device="cpu"))
                  for i, c in enumerate(combos)}
    parts = [pieces[tuple(c[o.axis] for o in owed)][region(kind, sizes, mesh, c)].clone()
             for c in mesh.coordinates()]
    return [p if _here(c, held) else p.fill_(torch.nan if p.is_floating_point() else 0)
            for p, c in zip(parts, mesh.coordinates())]


def _here(coordinate: Mapping[str, int], held: Sequence[Owed]) -> bool:
    return all(coordinate[o.axis] == o.at for o in held)


def shard_of(x: Tensor, kind: Spec, mesh: Mesh, coordinate: Mapping[str, int]) -> Tensor:
    """The piece of the global tensor `x` that `coordinate` holds as type `kind` (nothing owed): a view.

    >>> from shardlib.spec import parse
    >>> shard_of(torch.arange(3), parse("T/tp"), Mesh(tp=2), dict(tp=1))
    tensor([2])
    """
    for i, dim in enumerate(kind.dims):
        if dim.axes:
            if len(dim.factors) > 1:
                raise SpecError(f"shard_of: {dim} is a group; take it apart first")
            start, size = mesh.extent(x.shape[i], dim.axes, coordinate)
            x = x.narrow(i, start, size)
    return x


def arg_types(program: Program, name: str) -> dict[str, Spec]:
    """path -> type of the leaves of the argument `name`.

    >>> from shardlib import Layout, lower, sharded
    >>> arg_types(lower(sharded("T D -> T D")(lambda x: x), Layout(T="tp"), mesh=Mesh(tp=2)), "x")
    {'x': T/tp D}
    """
    return dict(leaves(name, dict(program.args)[name]))


class NotReplicated(AssertionError):
    """Ranks that should hold equal values do not."""


def join(pieces: Sequence[Tensor], kind: Spec, sizes: Mapping[str, int], mesh: Mesh,
         tolerance: float = 1e-9) -> Tensor:
    """What the pieces denote.

    NotReplicated where copies differ by more than `tolerance`, relative to the largest element.
    """
    shape = mesh.local_shape(kind.whole(), sizes, {})
    busy = {*kind.split_axes, *(o.axis for o in kind.owed)}
    free = [a for a in mesh.axes if a not in busy]
    kinds, held = {o.kind for o in kind.owed}, [o for o in kind.owed if o.kind == "@"]
    copies = []
    for where in itertools.product(*(range(mesh.axes[a]) for a in free)):
        parts: dict[tuple, list[Tensor]] = {}
        out = torch.zeros(shape, dtype=pieces[0].dtype, device=pieces[0].device)
        for c, piece in zip(mesh.coordinates(), pieces):
            if _here(c, held) and all(c[a] == i for a, i in zip(free, where)):
                spot = region(kind, sizes, mesh, c)
                parts.setdefault(tuple((s.start, s.stop) for s in spot), []).append(piece)
        for spot, found in parts.items():
            out[tuple(slice(a, b) for a, b in spot)] = (
                found[0] if len(found) == 1 else torch.stack(found).amax(0) if "max" in kinds
                else torch.stack(found).sum(0))
        copies.append(out)
    if not all(_alike(other, copies[0], tolerance) for other in copies[1:]):
        raise NotReplicated(f"{kind}: the copies on different ranks differ")
    return copies[0]


def _alike(other: Tensor, first: Tensor, tolerance: float) -> bool:
    """Whether two copies differ by `tolerance` at most, relative to the largest element of the first."""
    same = other == first
    if bool(same.all()) or other.is_floating_point() and bool((same | other.isnan() & first.isnan()).all()):
        return True
    wide = first.detach().double()
    scale = max(1.0, float(wide.abs().nan_to_num().max()))
    return float((other.detach().double() - wide).abs().nan_to_num(1e30).max()) <= tolerance * scale


# -- ragged dims ---------------------------------------------------------------------------------------------


def place_rows(x: Tensor, chosen: Tensor, kind: Spec, sizes: Mapping[str, int], mesh: Mesh,
               generator: torch.Generator | None = None) -> list[Tensor]:
    """What each rank holds of `x` as type `kind`, whose first dim is ragged; of `chosen`, `at`."""
    pieces = place(_opened(x, kind, sizes, mesh), kind.dense, sizes, mesh, generator)
    out = []
    for piece, c in zip(pieces, mesh.coordinates()):
        pairs, choices, count = _own(chosen, kind, sizes, mesh, c)
        rows, more = piece.reshape(count, *piece.shape[len(kind.dims[0].factors):])[pairs], sizes[_most(kind)]
        rest = mesh.rows(kind.dims[0], sizes, c)[1] - len(pairs)
        if x is chosen:
            rows, empty = pairs * more + choices, count * more
        else:
            empty = torch.nan if rows.is_floating_point() else 0
        out.append(torch.cat((rows, rows.new_full((rest, *rows.shape[1:]), empty))))
    return out


def join_rows(pieces: Sequence[Tensor], chosen: Tensor, kind: Spec, sizes: Mapping[str, int], mesh: Mesh,
              tolerance: float = 1e-9) -> Tensor:
    """What the pieces denote, of all pairs."""
    wide = []
    for piece, c in zip(pieces, mesh.coordinates()):
        pairs, _, count = _own(chosen, kind, sizes, mesh, c)
        shape = mesh.local_shape(kind.dense, sizes, c)
        made = piece.new_zeros(count, *piece.shape[1:])
        made[pairs] = piece[:len(pairs)]
        wide.append(made.view(shape))
    return join(wide, kind.dense, sizes, mesh, tolerance).flatten(0, len(kind.dims[0].factors) - 1)


def choices_of(pieces: Sequence[Tensor], kind: Spec, sizes: Mapping[str, int], mesh: Mesh) -> list[Tensor]:
    """By which choice each own pair is there, of what each rank holds as `at`."""
    out = []
    for at, c in zip(pieces, mesh.coordinates()):
        count, more = prod(mesh.local_shape(kind.dense, sizes, c)), sizes[_most(kind)]
        made = at.new_full((count,), more)
        live = at[at < count * more]
        made[live // max(more, 1)] = live % max(more, 1)
        out.append(made.view(mesh.local_shape(kind.dense, sizes, c)))
    return out


def _most(kind: Spec) -> str:
    return kind.dims[0].ragged


def _opened(x: Tensor, kind: Spec, sizes: Mapping[str, int], mesh: Mesh) -> Tensor:
    return x.reshape(mesh.local_shape(kind.dense.whole(), sizes, {}))


def _own(chosen: Tensor, kind: Spec, sizes: Mapping[str, int], mesh: Mesh,
         coordinate: Mapping[str, int]) -> tuple[Tensor, Tensor, int]:
    """The chosen among a rank's own pairs, by which choice of their tokens, and how many pairs it has."""
    pairs = Spec(kind.dims[:1])
    here = _opened(chosen, pairs, sizes, mesh)[region(pairs.dense, sizes, mesh, coordinate)].reshape(-1)
    found = (here < sizes[_most(kind)]).nonzero()[:, 0]
    return found, here[found], len(here)
