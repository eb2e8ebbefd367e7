"""Along one dim, which is whole: concat, split, pad, slice, topk. What they make has a dim of another name.

All but topk are linear, so a sum may be owed, and concat and split are each other's derivatives, as pad and
slice are. How long the new dim is follows from the others, wherever sizes are bound (`Op.lengths`).
"""
from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from shardlib.errors import SpecError
from shardlib.language.along import order
from shardlib.language.local_code import LocalCode
from shardlib.language.steps import Steps
from shardlib.language.value import Operand, Value, apply
from shardlib.program import Op, Step, number
from shardlib.reference import Dims
from shardlib.rules import Rule
from shardlib.spec import Dim, Spec, parse_specs


def _cut(spec: Spec, other: Spec) -> Dim:
    """The one dim that the other lacks."""
    return next(d for d in spec.dims if d.label not in other.labels)


def _apart(step: Step) -> tuple[tuple[Dim, ...], tuple[Dim, ...]]:
    """Of each operand and each result, the dim that the other side lacks."""
    return (tuple(_cut(s, step.outs[0]) for s in step.ins), tuple(_cut(s, step.ins[0]) for s in step.outs))


def _whole(step: Step) -> tuple[str, ...]:
    taken, made = _apart(step)
    return tuple(dict.fromkeys(n for d in (*taken, *made) for n in d.names))


def _at(step: Step) -> int:
    return step.ins[0].dims.index(_apart(step)[0][0])


def _moved(d: Dims, x: Tensor, old: Dim, new: Dim, by: int) -> Tensor:
    """x along `new`, element i + by being what is element i along `old`; 0 where there is none."""
    here = d.index(*new.names) == d.index(*old.names) + by
    return d.sum(torch.where(here, x, 0), *old.names).to(x.dtype)


def _length(value: Any) -> bool:
    return number(value) and isinstance(value, int) and value >= 0


def _maybe(value: Any) -> bool:
    return value is None or _length(value)


# -- concat and split ----------------------------------------------------------------------------------------

def _ends(d: Dims, dims: Sequence[Dim]) -> list[int]:
    return [0, *accumulate(d.count(*dim.names) for dim in dims)]


def _concat(d: Dims, *xs: Tensor) -> Tensor:
    taken, (made,) = _apart(d.step)
    return reduce(torch.add, (_moved(d, x, dim, made, start)
                              for x, dim, start in zip(xs, taken, _ends(d, taken))))


def _split(d: Dims, x: Tensor) -> tuple[Tensor, ...]:
    (taken,), made = _apart(d.step)
    return tuple(_moved(d, x, taken, dim, -start) for dim, start in zip(made, _ends(d, made)))


def _split_code(e: LocalCode, step: Step, args: list[str]) -> str:
    counts = tuple(e.count(dim) for dim in _apart(step)[1])
    return f"{args[0]}.split({counts}, {_at(step)}){'[0]' if len(counts) == 1 else ''}"


def _concat_vjp(b: Steps, step: Step, ct: Sequence[str]) -> list[str]:
    made = b.call(SPLIT, ct, outs=tuple(s.owing() for s in step.ins))
    return [made] if len(step.ins) == 1 else list(made)


CONCAT = Op("concat", rule=lambda s: Rule(linear=(tuple(range(len(s.ins))),), whole=_whole(s)),
            reference=_concat, emit=lambda e, s, a: f"torch.cat(({', '.join(a)},), {_at(s)})",
            vjp=_concat_vjp, lengths=lambda s: (_apart(s)[1][0], _apart(s)[0], 0))
SPLIT = Op("split", rule=lambda s: Rule(linear=((0,),), whole=_whole(s)), emit=_split_code, reference=_split,
           vjp=lambda b, s, ct: [b.call(CONCAT, ct, outs=(s.ins[0].owing(),))],
           lengths=lambda s: (_apart(s)[0][0], _apart(s)[1], 0))


# -- pad and slice -------------------------------------------------------------------------------------------

def _within(e: LocalCode, step: Step, long: Dim, short: Dim, start: int) -> int:
    """How much of `long` is behind `short`, which begins at `start` of it. SpecError where it is less."""
    if (rest := e.count(long) - start - e.count(short)) < 0:
        raise SpecError(f"{step.op.name}: {short.label} is {start} to {start + e.count(short)} of "
                        f"{long.label}, and that is {e.count(long)}")
    return rest


def _pad_code(e: LocalCode, step: Step, args: list[str]) -> str:
    ((old,), (new,)), before = _apart(step), step.options["before"]
    behind = len(step.ins[0].dims) - 1 - _at(step)
    return f"F.pad({args[0]}, {(*[0] * (2 * behind), before, _within(e, step, new, old, before))})"


def _slice_code(e: LocalCode, step: Step, args: list[str]) -> str:
    ((old,), (new,)), start = _apart(step), step.options["start"]
    _within(e, step, old, new, start)
    return f"{args[0]}.narrow({_at(step)}, {start}, {e.count(new)})"


def _pad_lengths(step: Step) -> tuple[Dim, tuple[Dim, ...], int] | None:
    (taken, (made,)), after = _apart(step), step.options.get("after")
    return None if after is None else (made, taken, step.options["before"] + after)


def _slice_lengths(step: Step) -> tuple[Dim, tuple[Dim, ...], int] | None:
    ((taken,), made), o = _apart(step), step.options
    if o.get("stop") is not None:
        return made[0], (), o["stop"] - o["start"]
    return None if o.get("after") is None else (taken, made, o["start"] + o["after"])


def _after(step: Step) -> dict[str, Any]:
    """What is behind, where it is said; in derivatives all dims have their sizes."""
    return {"after": step.options["after"]} if step.options.get("after") is not None else {}


def _pad_vjp(b: Steps, step: Step, ct: Sequence[str]) -> list[str]:
    return [b.call(SLICE, ct, outs=(step.ins[0].owing(),), start=step.options["before"], **_after(step))]


def _slice_vjp(b: Steps, step: Step, ct: Sequence[str]) -> list[str]:
    return [b.call(PAD, ct, outs=(step.ins[0].owing(),), before=step.options["start"], **_after(step))]


PAD = Op("pad", keywords={"before": _length, "after": _maybe}, emit=_pad_code, lengths=_pad_lengths,
         rule=lambda s: Rule(linear=((0,),), whole=_whole(s)),
         vjp=_pad_vjp,
         reference=lambda d, x: _moved(d, x, *_pair(d), d.options["before"]))
SLICE = Op("slice", keywords={"start": _length, "stop": _maybe, "after": _maybe}, emit=_slice_code,
           rule=lambda s: Rule(linear=((0,),), whole=_whole(s)), lengths=_slice_lengths,
           vjp=_slice_vjp,
           reference=lambda d, x: _sliced(d, x, d.options["start"]))


def _sliced(d: Dims, x: Tensor, start: int) -> Tensor:
    taken, made = _pair(d)
    if start + d.count(*made.names) > d.count(*taken.names):
        raise IndexError("more than there is")
    return _moved(d, x, taken, made, -start)


def _pair(d: Dims) -> tuple[Dim, Dim]:
    (taken,), (made,) = _apart(d.step)
    return taken, made


# -- topk ----------------------------------------------------------------------------------------------------

def _topk_code(e: LocalCode, step: Step, args: list[str]) -> str:
    (taken,), (made, _) = _apart(step)
    if e.count(made) > e.count(taken):
        raise SpecError(f"topk: k is {e.count(made)}, and {taken.label} is {e.count(taken)}")
    return f"{e.use(largest)}({args[0]}, {_at(step)}, {e.count(made)})"


def largest(x: Tensor, dim: int, k: int) -> tuple[Tensor, Tensor]:
    """The k largest along a dim, and where they are: among equals, the first ones."""
    values, places = torch.sort(x, dim=dim, descending=True, stable=True)
    return values.narrow(dim, 0, k), places.narrow(dim, 0, k)


def _topk(d: Dims, x: Tensor) -> tuple[Tensor, Tensor]:
    (taken,), (made, _) = _apart(d.step)
    if d.count(*made.names) > d.count(*taken.names):
        raise ValueError("more than there are")
    old, new = d.names.index(taken.label), d.names.index(made.label)
    places = order(x.detach(), old, descending=True).narrow(old, 0, d.count(*made.names))
    return torch.take_along_dim(x, places, old).transpose(old, new), places.transpose(old, new)


def _put_rule(step: Step) -> Rule:
    """Of those that a rank has, each to its place: what is split is summed up."""
    (taken, *_), (made,) = _apart(step)
    return Rule(linear=((1,),), whole=made.names, sums=taken.names)


def _put(d: Dims, places: Tensor, g: Tensor) -> Tensor:
    """g at its places."""
    (taken, *_), (made,) = _apart(d.step)
    return d.sum(torch.where(d.index(*made.names) == places, g, 0), *taken.names)


TOPK_VJP = Op("topk_vjp", rule=_put_rule, index=(0,),
              takes=("index", "float"), dtype=lambda d, o: [d[1]], reference=_put,
              emit=lambda e, s, a: f"{a[1]}.new_zeros({e.shape(s.outs[0])})"
                                   f".scatter_({_at(s)}, {a[0]}, {a[1]})")
TOPK = Op("topk", keywords={"k": _length}, rule=lambda s: Rule(whole=_whole(s)), emit=_topk_code,
          reference=_topk, takes=("number",), dtype=lambda d, o: [d[0], "int64"],
          vjp=lambda b, s, ct: [b.call(TOPK_VJP, [s.outputs[1], ct[0]], outs=(s.ins[0].owing(),))],
          lengths=lambda s: (_apart(s)[1][0], (), s.options["k"]))


# -- what one calls ------------------------------------------------------------------------------------------

def _specs(op: Op, text: str, meant: str, ins: int, outs: int) -> tuple[tuple[Spec, ...], tuple[Spec, ...]]:
    """Operands and results of a text. SpecError unless each has the same dims, in order, but for one, in one
    place; 0 stands for two or more."""
    said = f'{op.name} "{text}": the specs are those of "{meant}": one dim is another, in its place'
    sides = parse_specs(text, said)
    if any(len(side) != n if n else len(side) < 2 for side, n in zip(sides, (ins, outs))):
        raise SpecError(said)
    first, *others = (*sides[0], *sides[1])
    places = [i for i, d in enumerate(first.dims) if any(s.labels[i:i + 1] != (d.label,) for s in others)]
    made = [s.labels[places[0]] for s in (first, *others)] if len(places) == 1 and all(
        len(s.dims) == len(first.dims) for s in others) else []
    if not made or {*made[:len(sides[0])]} & {*made[len(sides[0]):]} or any(
            len(s.dims[places[0]].factors) != 1 for s in (first, *others)):
        raise SpecError(said)
    return sides


def concat(text: str, *xs: Operand) -> Value:
    """Values one behind the other along a dim, which gets a name of its own and the length of all together.

    A sum may be owed, by all of them. The dim is whole.

    >>> import torch
    >>> from shardlib import Layout, Mesh, sharded, simulate
    >>> f = sharded("B T, B S -> B N")(lambda old, new: concat("B T, B S -> B N", old, new))
    >>> simulate(f, Layout(B="dp"), torch.zeros(2, 1), torch.ones(2, 2), mesh=Mesh(dp=2))
    tensor([[0., 1., 1.],
            [0., 1., 1.]])
    """
    _specs(CONCAT, text, "B T D, B S D -> B N D", 0, 1)
    return apply(CONCAT, xs, text)


def split(text: str, x: Operand) -> tuple[Value, ...]:
    """A value cut along a dim into pieces, each of a name of its own; other values say how long, or `sizes=`.

    A sum may be owed. The dim is whole.

    >>> import torch
    >>> from shardlib import compile, sharded
    >>> f = sharded("B N -> B Q, B K")(lambda x: split("B N -> B Q, B K", x))
    >>> compile(f, sizes=dict(Q=2))(torch.tensor([[1, 2, 3]]))          # K is what is left
    (tensor([[1, 2]]), tensor([[3]]))
    """
    _specs(SPLIT, text, "B N D -> B T D, B S D", 1, 0)
    return apply(SPLIT, (x,), text)


def pad(text: str, x: Operand, *, before: int = 0, after: int = 0) -> Value:
    """A value with zeros before and after it along a dim, which gets a name of its own. The dim is whole.

    >>> import torch
    >>> from shardlib import sharded
    >>> f = sharded("B T -> B S")(lambda x: pad("B T -> B S", x, before=1, after=2))
    >>> f(torch.tensor([[1.0, 2.0]]))
    tensor([[0., 1., 2., 0., 0.]])
    """
    for name, count in (("before", before), ("after", after)):
        if not _length(count):
            raise SpecError(f"pad: {name} is {count!r}; it is a whole number, 0 or more")
    _specs(PAD, text, "B T D -> B S D", 1, 1)
    return apply(PAD, (x,), text, before=before, after=after)


def slice(text: str, x: Operand, start: int = 0, stop: int | None = None) -> Value:     # noqa: A001
    """What is from `start` up to `stop` along a dim, or to its end, under a name of its own.

    A negative `stop` leaves out as many at the end. The dim is whole; a sum may be owed.

    >>> import torch
    >>> from shardlib import sharded
    >>> f = sharded("B T -> B S, B S")(lambda x: (slice("B T -> B S", x, stop=-1), slice("B T -> B S", x, 1)))
    >>> f(torch.tensor([[1, 2, 3]]))                                    # each beside the next one
    (tensor([[1, 2]]), tensor([[2, 3]]))
    """
    if not _length(start):
        raise SpecError(f"slice: start is {start!r}; it is a whole number, 0 or more")
    if stop is not None and (not number(stop) or not isinstance(stop, int) or 0 <= stop < start):
        raise SpecError(f"slice: stop is {stop!r}; it is a whole number, not before start, which is {start}")
    _specs(SLICE, text, "B T D -> B S D", 1, 1)
    end: dict[str, Any] = {"after": 0} if stop is None else {"after": -stop} if stop < 0 else {"stop": stop}
    return apply(SLICE, (x,), text, start=start, **end)


def topk(text: str, x: Operand, *, k: int) -> tuple[Value, Value]:
    """The k largest along a dim, the largest first, and their places (int64): among equals, the first ones.

    NaN is the largest. The dim is whole. Refused of a sum that is still owed, and more than there are.

    >>> import torch
    >>> from shardlib import sharded
    >>> route = sharded("T E -> T K, T K")(lambda scores: topk("T E -> T K", scores, k=2))
    >>> route(torch.tensor([[1.0, 3.0, 2.0, 3.0]]))
    (tensor([[3., 3.]]), tensor([[1, 3]]))
    """
    if not _length(k):
        raise SpecError(f"topk: k is {k!r}; it is a whole number, 0 or more")
    (taken,), (made,) = _specs(TOPK, text, "B V -> B K", 1, 1)
    return apply(TOPK, (x,), f"{taken} -> {made}, {made}", k=k)


TABLE = {op.name: op for op in (CONCAT, SPLIT, PAD, SLICE, TOPK, TOPK_VJP)}
