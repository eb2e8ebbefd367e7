"""What a convolution sees: for each place along a dim, its neighbours along a new one.

`windows("B Y D -> B Y P D", x, before=1, after=1)` has x[y + p - 1] at (y, p), and 0 beyond the ends; with an
einsum it is a convolution, over several dims one after the other:

    y = einsum("B Y P D, P D F -> B Y F", windows("B Y D -> B Y P D", x, before=1, after=1), kernel)

It is linear, so a sum may be owed. Where the dim is split, each rank gets of the others what its windows see
of their pieces, its halo, and no more; the derivative takes back, and adds up what overlaps. That is so where
the windows' dim is split alike: it has the same name, or the layout gives both the same axes, `Y="sp",
Z="sp"`; else the dim is whole, and declarative text has another dim split instead, or gathers.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shardlib.errors import SpecError
from shardlib.language.exchanges import Exchange, Exchanges, Requests, Site
from shardlib.language.halo import Halo
from shardlib.language.local_code import LocalCode
from shardlib.language.steps import Steps
from shardlib.language.value import Operand, Value, apply
from shardlib.program import Op, Step, number
from shardlib.reference import Dims
from shardlib.rules import Rule
from shardlib.spec import Dim, Spec, parse_specs
from shardlib.wires import ALL_TO_ALL

Pieces = Sequence[tuple[int, int]]


def _dims(x: Spec, made: Spec) -> tuple[Dim, Dim, Dim]:
    """The dim that is looked along, what it is called in the result, and the new one behind it."""
    new = [i for i, n in enumerate(made.labels) if n not in x.labels]
    last = new[-1]
    return x.dims[last - 1], made.dims[last - 1], made.dims[last]


def cut(x: Tensor, dim: int, size: int, before: int, after: int, stride: int, dilation: int) -> Tensor:
    """Windows of `size` along `dim`, behind which they are."""
    if not before + x.shape[dim] + after:
        return x.unsqueeze(dim + 1).expand([size if i == dim + 1 else -1 for i in range(x.ndim + 1)])
    behind = x.ndim - 1 - dim
    x = F.pad(x, (*[0, 0] * behind, before, after))
    reach = dilation * (size - 1) + 1
    return x.unfold(dim, reach, stride)[..., ::dilation].movedim(-1, dim + 1)


def laid(g: Tensor, dim: int, length: int, before: int, after: int, stride: int, dilation: int) -> Tensor:
    """The transpose: what stands in windows, added up where it was cut."""
    shape = [n for i, n in enumerate(g.shape) if i != dim + 1]
    shape[dim] = before + length + after
    out = g.new_zeros(shape)
    reach = (g.shape[dim] - 1) * stride + 1
    for p, one in enumerate(g.unbind(dim + 1) if g.shape[dim] else ()):
        out.narrow(dim, p * dilation, reach).unfold(dim, 1, stride)[..., 0].add_(one)
    return out.narrow(dim, before, length)


def cut_of_pieces(group: object, halo: Halo, x: Tensor, dim: int, *how: int) -> Requests:
    """The windows of this rank, `x` being its piece of what they are cut from."""
    return cut((yield from halo.brought(group, x, dim)), dim, *how)


def laid_to_pieces(group: object, halo: Halo, g: Tensor, dim: int, *how: int) -> Requests:
    """The transpose, of this rank's windows and the others', on this rank's piece."""
    return (yield from halo.added(group, laid(g, dim, *how), dim))


def laid_at(g: Tensor, dim: int, at: int, rows: tuple[int, int], *how: int) -> Tensor:
    """The transpose, of this rank's windows, on (start, size) of all rows; it begins at row `at` of these."""
    made, (start, size) = laid(g, dim, *how), rows
    low, high = max(at, start), min(at + made.shape[dim], start + size)
    out = made.new_zeros([size if i == dim else n for i, n in enumerate(made.shape)])
    if low < high:
        out.narrow(dim, low - start, high - low).copy_(made.narrow(dim, low - at, high - low))
    return out


# -- what the windows of a rank reach ------------------------------------------------------------------------

@dataclass(frozen=True)
class Reach:
    """Of windows one behind the other: which rows they see, from `start` up to `stop`, and how many places
    before and after these, beyond the ends."""
    start: int
    stop: int
    left: int
    right: int

    @classmethod
    def of(cls, rows: tuple[int, int], size: int, length: int, o: Mapping[str, int]) -> Reach:
        """rows: (start, number) of the windows, each of `size`, over `length` rows."""
        number, low = rows[1], rows[0] * o["stride"] - o["before"]
        high = low + (number - 1) * o["stride"] + o["dilation"] * (size - 1) + 1 if number else low
        start = min(max(low, 0), length)
        stop = min(max(high, start), length)
        left = max(0, min(start, high) - low)
        return cls(start, stop, left, high - low - left - (stop - start))


def _number(size: int, length: int, o: Mapping[str, int]) -> int:
    """How many windows there are."""
    room = o["before"] + length + o["after"] - o["dilation"] * (size - 1) - 1
    return room // o["stride"] + 1 if room >= 0 else 0


def _lengths(step: Step) -> tuple[Dim, tuple[Dim, ...], Callable] | None:
    """How many windows there are, of a dim of another name."""
    old, now, new = dims = _dims(*_sides(step))
    if old.label == now.label or any(len(d.factors) != 1 for d in dims):
        return None
    return now, (new, old), lambda size, length: _number(size, length, step.options)


def _sides(step: Step) -> tuple[Spec, Spec]:
    """What is looked along, and what has the windows."""
    return (step.ins[0], step.outs[0]) if step.op is WINDOWS else (step.outs[0], step.ins[0])


def _over(step: Step) -> tuple[str, ...]:
    """The axes over which pieces need rows of each other: those of the dim, if its windows have them, too."""
    old, now, _ = _dims(*_sides(step))
    return old.axes if old.axes == now.axes else ()


def _checked(e: LocalCode, step: Step) -> tuple[int, Reach]:
    """The place of the dim, and what this rank's windows see. SpecError where there are more or fewer windows
    than the result has."""
    x, made = _sides(step)
    (old, now, new), o = _dims(x, made), step.options
    if not e.count(new) or (n := _number(e.count(new), e.count(old), o)) != e.count(now) or not n:
        raise SpecError(f"windows: {now.label} is {e.count(now)}; of {old.label}={e.count(old)} with "
                        f"{', '.join(f'{k}={v}' for k, v in o.items())} there are "
                        f"{_number(max(e.count(new), 1), e.count(old), o)} windows of "
                        f"{new.label}={e.count(new)}")
    return x.dims.index(old), Reach.of(e.rows(now), e.count(new), e.count(old), o)


def _halo(old: Pieces, now: Pieces, me: int, size: int, length: int, o: Mapping[str, int]) -> Halo:
    """old, now: (start, size) of what each member has of the dim, and of its windows."""
    seen = [Reach.of(rows, size, length, o) for rows in now]
    return Halo(old, tuple((each.start, each.stop) for each in seen), me)


def _halo_code(e: LocalCode, step: Step) -> str:
    old, now, new = _dims(*_sides(step))
    me = e.mesh.number(old.axes, e.coordinate)
    halo = _halo(e.pieces(old), e.pieces(now), me, e.count(new), e.count(old), step.options)
    return f"{e.use(Halo)}({halo.pieces}, {halo.wanted}, {me})"


def _exchanges(at: Site) -> list[Exchange]:
    x, made = _sides(at.step)
    (old, now, new), back = _dims(x, made), at.step.op is WINDOWS_VJP
    size, length = at.sizes[new.names[0]], at.sizes[old.names[0]]
    halo = _halo(at.pieces(old), at.pieces(now), at.me, size, length, at.step.options)
    row = prod(n for n, dim in zip(at.shape(x), x.dims) if dim != old)
    why = "what windows see of other pieces" + (", taken back" if back else "")
    return [Exchange(ALL_TO_ALL, at.step.ins[0], at.dtypes[0] or "float32", halo.parts(row, back), why)]


def _code(e: LocalCode, step: Step, args: list[str]) -> str:
    at, reach = _checked(e, step)
    old, now, new = _dims(*_sides(step))
    if e.mesh.size(old.axes) > 1 and not _over(step):
        raise SpecError(f"windows: {old.label} is split, and {now.label} is not split alike")
    how = f"{e.count(new)}, {reach.left}, {reach.right}, {step.options['stride']}, {step.options['dilation']}"
    if e.mesh.size(old.axes) > 1:
        text = f"{_halo_code(e, step)}, {args[0]}, {at}, {how}"
        return e.exchanging(cut_of_pieces, old.axes, [ALL_TO_ALL], text)
    seen = (reach.start, reach.stop - reach.start)
    x = args[0] if seen == (0, e.count(old)) else f"{args[0]}.narrow({at}, {seen[0]}, {seen[1]})"
    return f"{e.use(cut)}({x}, {at}, {how})"


def _code_vjp(e: LocalCode, step: Step, args: list[str]) -> str:
    at, reach = _checked(e, step)
    old, now, _ = _dims(*_sides(step))
    if not _over(step) and not {*old.axes}.isdisjoint(now.axes):
        raise SpecError(f"windows_vjp: {old.label} and {now.label} are split over {' and '.join(old.axes)}")
    how = (f"{reach.stop - reach.start}, {reach.left}, {reach.right}, {step.options['stride']}, "
           f"{step.options['dilation']}")
    if e.mesh.size(_over(step)) > 1:
        text = f"{_halo_code(e, step)}, {args[0]}, {at}, {how}"
        return e.exchanging(laid_to_pieces, old.axes, [ALL_TO_ALL], text)
    if e.rows(old) == (reach.start, reach.stop - reach.start):
        return f"{e.use(laid)}({args[0]}, {at}, {how})"
    return f"{e.use(laid_at)}({args[0]}, {at}, {reach.start}, {e.rows(old)}, {how})"


def _vjp(b: Steps, step: Step, ct: Sequence[str]) -> list[str]:
    return [b.call(WINDOWS_VJP, ct, outs=(step.ins[0].owing(),), **step.options)]


def _rule(step: Step) -> Rule:
    """A dim that keeps its name is split as it is, and one that gets another if both are split alike."""
    old, now, new = _dims(*_sides(step))
    taken = old if step.op is WINDOWS else now
    alike = ((old.names[0], now.names[0]),) if old.label != now.label else ()
    if not alike or _over(step):
        return Rule(linear=((0,),), whole=new.names, met=taken.names if alike else (), alike=alike)
    if step.op is WINDOWS:
        return Rule(linear=((0,),), whole=(*old.names, *new.names), alike=alike)
    return Rule(linear=((0,),), whole=new.names, sums=taken.names, alike=alike)


def _slid(d: Dims, x: Tensor, spec: Spec, made: Spec) -> Tensor:
    """For each place in a window, the elements that stand there; the last one, added, is what is outside."""
    (old, now, new), o = (_dims(spec, made), d.options)
    length, count = d.count(*old.names), d.count(*now.names)
    if not count or not d.count(*new.names) or count != _number(d.count(*new.names), length, o):
        raise ValueError("there are more windows, or fewer")
    at, to, behind = (d.names.index(i.label) for i in (old, now, new))
    x, columns = torch.cat((x, torch.zeros_like(x.sum(at, keepdim=True, dtype=x.dtype))), at), []
    for p in range(d.count(*new.names)):
        places = torch.arange(count) * o["stride"] + p * o["dilation"] - o["before"]
        columns.append(x.index_select(at, torch.where((places < 0) | (places >= length), length, places)))
    return torch.cat(columns, behind).transpose(at, to)


def _back(d: Dims, g: Tensor) -> tuple[Tensor, ...]:
    (made,), (spec,) = d.step.ins, d.step.outs
    x = d.open(g.new_zeros([d.count(*i.names) for i in spec.dims]), spec)
    return d.vjp(lambda d, x: _slid(d, x, spec, made), (x,), g, made)


def _count(value: Any, least: int) -> bool:
    return number(value) and isinstance(value, int) and value >= least


KEYWORDS = {"before": lambda v: _count(v, 0), "after": lambda v: _count(v, 0),
            "stride": lambda v: _count(v, 1), "dilation": lambda v: _count(v, 1)}
EXCHANGES = Exchanges(_over, _exchanges)
WINDOWS = Op("windows", keywords=KEYWORDS, rule=_rule, emit=_code, vjp=_vjp, exchanges=EXCHANGES,
             lengths=_lengths,
             reference=lambda d, x: _slid(d, x, d.step.ins[0], d.step.outs[0]))
WINDOWS_VJP = Op("windows_vjp", keywords=KEYWORDS, rule=_rule, emit=_code_vjp, exchanges=EXCHANGES,
                 reference=_back)


def windows(text: str, x: Operand, *, before: int = 0, after: int = 0, stride: int = 1,
            dilation: int = 1) -> Value:
    """For each place along a dim its neighbours, along a new dim behind it: what a convolution sees.

    Place p of window y is element stride y + dilation p - before, and 0 beyond the ends. As many windows as
    elements may keep their dim's name, "B Y D -> B Y P D"; else it gets another, "B Y D -> B Z P D", whose
    size follows. P is as long as the kernel. A sum may be owed.
    Where the dim is split, and its windows alike, what they see of other pieces is sent, no more. A causal
    convolution of two taps:

    >>> import torch
    >>> from shardlib import Layout, Mesh, einsum, sharded, simulate
    >>> @sharded("B T, P -> B T")
    ... def convolved(x, kernel):
    ...     return einsum("B T P, P -> B T", windows("B T -> B T P", x, before=1), kernel)
    >>> simulate(convolved, Layout(B="dp"), torch.tensor([[1.0, 2.0, 5.0]]), torch.tensor([-1.0, 1.0]),
    ...          mesh=Mesh(dp=2))
    tensor([[1., 1., 3.]])
    """
    for name, value, least in (("before", before, 0), ("after", after, 0), ("stride", stride, 1),
                               ("dilation", dilation, 1)):
        if not _count(value, least):
            raise SpecError(f"windows: {name} is {value!r}; it is a whole number, {least} or more")
    said = (f'windows "{text}": the specs are those of "B Y D -> B Y P D", or of "B Y D -> B Z P D": a new '
            'dim behind the one that is looked along')
    ins, outs = parse_specs(text, said)
    if (len(ins), len(outs)) != (1, 1) or not _fits(ins[0], outs[0]):
        raise SpecError(said)
    return apply(WINDOWS, (x,), text, before=before, after=after, stride=stride, dilation=dilation)


def _fits(x: Spec, made: Spec) -> bool:
    new = [i for i, n in enumerate(made.labels) if n not in x.labels]
    if not new or new[-1] == 0 or len(made.dims) != len(x.dims) + 1:
        return False
    kept = [*made.labels[:new[-1]], *made.labels[new[-1] + 1:]]
    unlike = [i for i, (a, b) in enumerate(zip(x.labels, kept)) if a != b]
    return unlike in ([], [new[-1] - 1]) and all(len(d.factors) == 1 for d in _dims(x, made))


TABLE = {op.name: op for op in (WINDOWS, WINDOWS_VJP)}
