"""rearrange: transpose, merge and split dims, in einops' notation. rename: give a dim another letter.

A merged dim keeps its factors in its type: `rearrange("B T K/tp G H -> B T (K/tp G H)", q)` is split in whole
units of K, and taking it apart again is its inverse; both are free, and both pass a sum that is owed.
Refused: a group whose later factor is split (its rows on a rank would be strided), dims lost or made.

A rename is free where both sides have as many factors, each taking the next one's name. Between a group and a
name (or a constant) it is one of products, and the dim is whole: (K/a G) of 3 x 4 is 8 and 4 rows on two
ranks, N/a would be 6 and 6.
"""
from __future__ import annotations

from collections.abc import Sequence

from shardlib.errors import SpecError
from shardlib.language.local_code import LocalCode
from shardlib.language.steps import Steps
from shardlib.language.value import Operand, Value, apply
from shardlib.program import Op, Step
from shardlib.rules import Rule, RuleError
from shardlib.spec import Dim, Spec, parse_specs


def _emit(e: LocalCode, step: Step, args: list[str]) -> str:
    (have,), (want,) = step.ins, step.outs
    text = args[0]
    if any(len(d.factors) != 1 for d in have.dims):
        text = f"{text}.reshape({e.opened_shape(Spec(tuple(d for d in have.dims if d.factors)))})"
    order = tuple(have.names.index(n) for n in want.names)
    if order != tuple(range(len(order))):
        text = f"{text}.permute({order})"
    return f"{text}.reshape({e.shape(want)})" if any(len(d.factors) != 1 for d in want.dims) else text


def _vjp(b: Steps, step: Step, ct: Sequence[str]) -> list[str]:
    """Back, with what becomes a later factor of a group whole."""
    inner = {(n,) for d in step.ins[0].dims for n in d.names[1:]}
    have = b.types[ct[0]]
    ready = b.move(ct[0], have.split({d.label: d.axes for d in have.dims if d.names[:1] not in inner}))
    return [b.call(REARRANGE, [ready], outs=(step.ins[0].owing(),))]


def by_factor(old: Dim, new: Dim) -> bool:
    """Whether a rename of `old` to `new` names each factor anew;
    else what is named is the product, and the dim is whole."""
    return len(old.factors) == len(new.factors) > 0


def whole_in_rename(old: Spec, new: Spec) -> tuple[Dim, ...]:
    """The dims of `new` that are whole where `old` is renamed to it."""
    return tuple(d for was, d in zip(old.dims, new.dims) if not by_factor(was, d))


def renamed(have: Spec, named: Spec) -> Spec:
    """The type of a value of type `have` under the names of `named`.

    RuleError for a split dim whose pieces it would change.
    """
    for old, new in zip(have.dims, named.dims):
        if old.axes and not by_factor(old, new):
            raise RuleError(f"rename: {old} is split over {'/'.join(old.axes)}; its pieces are not those of "
                            f"{new.label}", 0, old.label)
    return Spec(tuple(new.split(old.axes) for old, new in zip(have.dims, named.dims)), have.owed)


def _rename_vjp(b: Steps, step: Step, ct: Sequence[str]) -> list[str]:
    have, back = b.types[ct[0]], step.ins[0]
    whole = whole_in_rename(back, have)
    ready = b.move(ct[0], have.split({d.label: d.axes for d in have.dims if d not in whole}))
    return list(b.add(RENAME, [ready], [renamed(b.types[ready], back)]))


REARRANGE = Op("rearrange", rule=lambda s: Rule(linear=((0,),)), emit=_emit, vjp=_vjp,
               reference=lambda d, x: x)
RENAME = Op("rename", rule=lambda s: Rule(linear=((0,),)), emit=lambda e, s, a: a[0], vjp=_rename_vjp,
            reference=lambda d, x: d.open(d.close(x, d.step.ins[0]), d.step.outs[0]))


def rearrange(text: str, x: Operand) -> Value:
    """The same elements with dims transposed, merged or taken apart, in the notation of einops. Free.

    A sum may be owed. Dims of size 1 come and go, as in "B D -> B 1 D".
    Refused: other dims that do, a group whose later factor is split. Wherever K is
    split, ranks hold whole heads:

    >>> from shardlib import Layout, Mesh, lower, sharded
    >>> f = sharded("T K H -> (K H) T")(lambda q: rearrange("T K H -> (K H) T", q))
    >>> lower(f, Layout(K="tp"), mesh=Mesh(tp=2))
    @sharded("T K/tp H -> (K/tp H) T", layout=EXPLICIT)
    def f(q):
        v1 = rearrange("T K/tp H -> (K/tp H) T", q)
        return v1
    """
    meant = f'rearrange "{text}": one spec on each side, with the same names'
    ins, outs = parse_specs(text, meant)
    if len(ins) != 1 or len(outs) != 1 or sorted(ins[0].names) != sorted(outs[0].names) \
            or any(not d.factors and d.size != 1 for s in (ins[0], outs[0]) for d in s.dims):
        raise SpecError(meant)
    return apply(REARRANGE, (x,), text)


def rename(text: str, x: Operand) -> Value:
    """The same tensor, its dims under other names, by position. A sum may be owed.

    Between a group and one name the dim is whole: rename("B (Y X) D -> B N D", x). Keys get a letter for
    their time, so that scores can have both times:

    >>> import torch
    >>> from shardlib import einsum, sharded
    >>> @sharded("T H -> T S")
    ... def scores(x):
    ...     return einsum("T H, S H -> T S", x, rename("T H -> S H", x))
    >>> scores(torch.tensor([[1.0, 0.0], [2.0, 3.0]]))
    tensor([[ 1.,  2.],
            [ 2., 13.]])
    """
    meant = f'rename "{text}": one spec on each side, with as many dims'
    ins, outs = parse_specs(text, meant)
    if len(ins) != 1 or len(outs) != 1 or len(ins[0].dims) != len(outs[0].dims):
        raise SpecError(meant)
    return apply(RENAME, (x,), text)


TABLE = {"rearrange": REARRANGE, "rename": RENAME}
