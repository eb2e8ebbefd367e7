"""Along one dim, which is whole: concat, split, stack, unbind, pad, slice.

What they make has a dim of another name. All are linear, so a sum may be owed, and each other's derivatives:
concat and split, stack and unbind, pad and slice. How long the new dim is follows from the others, wherever
sizes are bound (`Op.lengths`).
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from shardlib.errors import SpecError
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


def apart(step: Step) -> tuple[tuple[Dim, ...], tuple[Dim, ...]]:
    """Of each operand and each result, the dim that the other side lacks."""
    return (tuple(_cut(s, step.outs[0]) for s in step.ins), tuple(_cut(s, step.ins[0]) for s in step.outs))


def all_of_both(step: Step) -> tuple[str, ...]:
    """The names of the dims that one side lacks."""
    taken, made = apart(step)
    return tuple(dict.fromkeys(n for d in (*taken, *made) for n in d.names))


def _at(step: Step) -> int:
    return step.ins[0].dims.index(apart(step)[0][0])


def _moved(d: Dims, x: Tensor, old: Dim, new: Dim, by: int) -> Tensor:
    """x along `new`, element i + by being what is element i along `old`; 0 where there is none."""
    here = d.index(*new.names) == d.index(*old.names) + by
    return d.sum(torch.where(here, x, 0), *old.names).to(x.dtype)


def length(value: Any) -> bool:
    return number(value) and isinstance(value, int) and value >= 0


def _maybe(value: Any) -> bool:
    return value is None or length(value)


# -- concat and split ----------------------------------------------------------------------------------------

def _ends(d: Dims, dims: Sequence[Dim]) -> list[int]:
    return [0, *accumulate(d.count(*dim.names) for dim in dims)]


def _concat(d: Dims, *xs: Tensor) -> Tensor:
    taken, (made,) = apart(d.step)
    return reduce(torch.add, (_moved(d, x, dim, made, start)
                              for x, dim, start in zip(xs, taken, _ends(d, taken))))


def _split(d: Dims, x: Tensor) -> tuple[Tensor, ...]:
    (taken,), made = apart(d.step)
    return tuple(_moved(d, x, taken, dim, -start) for dim, start in zip(made, _ends(d, made)))


def _split_code(e: LocalCode, step: Step, args: list[str]) -> str:
    counts = tuple(e.count(dim) for dim in apart(step)[1])
    return f"{args[0]}.split({counts}, {_at(step)}){'[0]' if len(counts) == 1 else ''}"


def _several(made: str | tuple[str, ...]) -> list[str]:
    """What a call made, one value or several, as a list."""
    return [made] if isinstance(made, str) else list(made)


def _concat_vjp(b: Steps, step: Step, ct: Sequence[str]) -> list[str]:
    return _several(b.call(SPLIT, ct, outs=tuple(s.owing() for s in step.ins)))


CONCAT = Op("concat", rule=lambda s: Rule(linear=(tuple(range(len(s.ins))),), whole=all_of_both(s)),
            reference=_concat, emit=lambda e, s, a: f"torch.cat(({', '.join(a)},), {_at(s)})",
            vjp=_concat_vjp, lengths=lambda s: (apart(s)[1][0], apart(s)[0], 0))
SPLIT = Op("split", rule=lambda s: Rule(linear=((0,),), whole=all_of_both(s)), emit=_split_code,
           reference=_split, vjp=lambda b, s, ct: [b.call(CONCAT, ct, outs=(s.ins[0].owing(),))],
           lengths=lambda s: (apart(s)[0][0], apart(s)[1], 0))


# -- stack and unbind ----------------------------------------------------------------------------------------

def _lone(step: Step) -> tuple[int, Dim]:
    """Of the one value that holds the others side by side: the dim that they lack, and its place."""
    (one, *_), (other, *_) = (step.outs, step.ins) if step.op is STACK else (step.ins, step.outs)
    dim = _cut(one, other)
    return one.dims.index(dim), dim


def _side_by_side(count: Callable[[Step], int]) -> dict[str, Any]:
    """What both are: `count` says how many values there are."""
    return dict(rule=lambda s: Rule(linear=(tuple(range(len(s.ins))),), whole=_lone(s)[1].names),
                lengths=lambda s: (_lone(s)[1], (), count(s)))


def _one_of(d: Dims, x: Tensor, i: int) -> Tensor:
    """x where the lone dim is at i, 0 elsewhere."""
    return torch.where(d.index(*_lone(d.step)[1].names) == i, x, 0).to(x.dtype)


def _stack_vjp(b: Steps, step: Step, ct: Sequence[str]) -> list[str]:
    return _several(b.call(UNBIND, ct, outs=tuple(s.owing() for s in step.ins)))


STACK = Op("stack", **_side_by_side(lambda s: len(s.ins)),
           emit=lambda e, s, a: f"torch.stack(({', '.join(a)},), {_lone(s)[0]})",
           reference=lambda d, *xs: reduce(torch.add, (_one_of(d, x, i) for i, x in enumerate(xs))),
           vjp=_stack_vjp)
UNBIND = Op("unbind", **_side_by_side(lambda s: len(s.outs)),
            emit=lambda e, s, a: f"{a[0]}.unbind({_lone(s)[0]}){'[0]' * (len(s.outs) == 1)}",
            reference=lambda d, x: tuple(d.sum(_one_of(d, x, i), *_lone(d.step)[1].names).to(x.dtype)
                                        for i in range(len(d.step.outs))),
            vjp=lambda b, s, ct: [b.call(STACK, ct, outs=(s.ins[0].owing(),))])


# -- pad and slice -------------------------------------------------------------------------------------------

def _within(e: LocalCode, step: Step, long: Dim, short: Dim, start: int) -> int:
    """How much of `long` is behind `short`, which begins at `start` of it. SpecError where it is less."""
    if (rest := e.count(long) - start - e.count(short)) < 0:
        raise SpecError(f"{step.op.name}: {short.label} is {start} to {start + e.count(short)} of "
                        f"{long.label}, and that is {e.count(long)}")
    return rest


def _pad_code(e: LocalCode, step: Step, args: list[str]) -> str:
    ((old,), (new,)), before = apart(step), step.options["before"]
    behind = len(step.ins[0].dims) - 1 - _at(step)
    return f"F.pad({args[0]}, {(*[0] * (2 * behind), before, _within(e, step, new, old, before))})"


def _slice_code(e: LocalCode, step: Step, args: list[str]) -> str:
    ((old,), (new,)), start = apart(step), step.options["start"]
    _within(e, step, old, new, start)
    return f"{args[0]}.narrow({_at(step)}, {start}, {e.count(new)})"


def _pad_lengths(step: Step) -> tuple[Dim, tuple[Dim, ...], int] | None:
    (taken, (made,)), after = apart(step), step.options.get("after")
    return None if after is None else (made, taken, step.options["before"] + after)


def _slice_lengths(step: Step) -> tuple[Dim, tuple[Dim, ...], int] | None:
    ((taken,), made), o = apart(step), step.options
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


PAD = Op("pad", keywords={"before": length, "after": _maybe}, emit=_pad_code, lengths=_pad_lengths,
         rule=lambda s: Rule(linear=((0,),), whole=all_of_both(s)),
         vjp=_pad_vjp,
         reference=lambda d, x: _moved(d, x, *_pair(d), d.options["before"]))
SLICE = Op("slice", keywords={"start": length, "stop": _maybe, "after": _maybe}, emit=_slice_code,
           rule=lambda s: Rule(linear=((0,),), whole=all_of_both(s)), lengths=_slice_lengths,
           vjp=_slice_vjp,
           reference=lambda d, x: _sliced(d, x, d.options["start"]))


def _sliced(d: Dims, x: Tensor, start: int) -> Tensor:
    taken, made = _pair(d)
    if start + d.count(*made.names) > d.count(*taken.names):
        raise IndexError("more than there is")
    return _moved(d, x, taken, made, -start)


def _pair(d: Dims) -> tuple[Dim, Dim]:
    (taken,), (made,) = apart(d.step)
    return taken, made


# -- what one calls ------------------------------------------------------------------------------------------

MORE = "one value has one dim more, the others are alike"


def alike_but_one(op: Op, text: str, meant: str, ins: int,
                  outs: int) -> tuple[tuple[Spec, ...], tuple[Spec, ...]]:
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
    alike_but_one(CONCAT, text, "B T D, B S D -> B N D", 0, 1)
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
    alike_but_one(SPLIT, text, "B N D -> B T D, B S D", 1, 0)
    return apply(SPLIT, (x,), text)


def _beside(op: Op, text: str, meant: str, single: str) -> None:
    """SpecError unless one spec, on the `single` side, has one dim more than the others, which are alike."""
    said = f'{op.name} "{text}": the specs are those of "{meant}": {MORE}'
    sides = parse_specs(text, said)
    one, others = sides if single == "left" else sides[::-1]
    if (len(one) != 1 or not others or len({s.labels for s in others}) > 1
        or [n for n in one[0].labels if n in others[0].labels] != [*others[0].labels]
        or [len(d.factors) for d in one[0].dims if d.label not in others[0].labels] != [1]):
        raise SpecError(said)


def stack(text: str, *xs: Operand) -> Value:
    """Values of the same dims side by side along a dim that is new, as long as there are values.

    A sum may be owed, by all of them. The new dim is whole.

    >>> import torch
    >>> from shardlib import sharded
    >>> f = sharded("B, B -> B S")(lambda x, y: stack("B, B -> B S", x, y))
    >>> f(torch.tensor([1, 2]), torch.tensor([3, 4]))
    tensor([[1, 3],
            [2, 4]])
    """
    _beside(STACK, text, "B D, B D -> B S D", "right")
    return apply(STACK, xs, text)


def unbind(text: str, x: Operand) -> Value | tuple[Value, ...]:
    """A value taken apart along a dim, one value for each place of it: what `stack` puts together.

    A sum may be owed. The dim is whole.

    >>> import torch
    >>> from shardlib import sharded
    >>> f = sharded("B S -> B, B")(lambda x: unbind("B S -> B, B", x))
    >>> f(torch.tensor([[1, 3], [2, 4]]))
    (tensor([1, 2]), tensor([3, 4]))
    """
    _beside(UNBIND, text, "B S D -> B D, B D", "left")
    return apply(UNBIND, (x,), text)


def pad(text: str, x: Operand, *, before: int = 0, after: int = 0) -> Value:
    """A value with zeros before and after it along a dim, which gets a name of its own. The dim is whole.

    >>> import torch
    >>> from shardlib import sharded
    >>> f = sharded("B T -> B S")(lambda x: pad("B T -> B S", x, before=1, after=2))
    >>> f(torch.tensor([[1.0, 2.0]]))
    tensor([[0., 1., 2., 0., 0.]])
    """
    for name, count in (("before", before), ("after", after)):
        if not length(count):
            raise SpecError(f"pad: {name} is {count!r}; it is a whole number, 0 or more")
    alike_but_one(PAD, text, "B T D -> B S D", 1, 1)
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
    if not length(start):
        raise SpecError(f"slice: start is {start!r}; it is a whole number, 0 or more")
    if stop is not None and (not number(stop) or not isinstance(stop, int) or 0 <= stop < start):
        raise SpecError(f"slice: stop is {stop!r}; it is a whole number, not before start, which is {start}")
    alike_but_one(SLICE, text, "B T D -> B S D", 1, 1)
    end: dict[str, Any] = {"after": 0} if stop is None else {"after": -stop} if stop < 0 else {"stop": stop}
    return apply(SLICE, (x,), text, start=start, **end)


TABLE = {op.name: op for op in (CONCAT, SPLIT, STACK, UNBIND, PAD, SLICE)}
