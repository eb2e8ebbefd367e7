"""rearrange: transpose, merge and split dims, in einops' notation. rename: give a dim another letter.

A merged dim keeps its factors in its type: `rearrange("B T K/tp G H -> B T (K/tp G H)", q)` is split in whole units of
K, and taking it apart again is its inverse; both are free, and both pass a sum that is owed. Refused: a group whose
later factor is split (its rows on a rank would be strided), dims lost or made.
"""
from __future__ import annotations

from typing import TYPE_CHECKING, Any, Sequence

from shardlib.errors import SpecError
from shardlib.program import Op, Step
from shardlib.rules import Rule
from shardlib.spec import parse_signature
from shardlib.trace import apply

if TYPE_CHECKING:
    from shardlib.emit import Emitter


def _emit(e: Emitter, step: Step, args: list[str]) -> str:
    (have,), (want,) = step.ins, step.outs
    text = args[0]
    if any(len(d.factors) > 1 for d in have.dims):
        text = f"{text}.reshape({e.opened_shape(have)})"
    order = tuple(have.names.index(n) for n in want.names)
    if order != tuple(range(len(order))):
        text = f"{text}.permute({order})"
    return f"{text}.reshape({e.shape(want)})" if any(len(d.factors) > 1 for d in want.dims) else text


def _vjp(b: Any, step: Step, ct: Sequence[str]) -> list[str]:
    return [b.call(REARRANGE, [ct[0]], outs=(step.ins[0].owing(),))]


def _rename_vjp(b: Any, step: Step, ct: Sequence[str]) -> list[str]:
    kind = b.types[ct[0]]
    back = tuple(d.split(k.axes) for d, k in zip(step.ins[0].dims, kind.dims))
    return list(b.add(RENAME, [ct[0]], [type(kind)(back, kind.owed)]))


REARRANGE = Op("rearrange", rule=lambda s: Rule(linear=((0,),)), emit=_emit, vjp=_vjp,
               reference=lambda d, x: x)
RENAME = Op("rename", rule=lambda s: Rule(linear=((0,),)), emit=lambda e, s, a: a[0], vjp=_rename_vjp,
            reference=lambda d, x: d.open(d.close(x, d.step.ins[0]), d.step.outs[0]))


def rearrange(text: str, x: Any) -> Any:
    """The same elements with dims transposed, merged or taken apart: rearrange("B T K G H -> B T (K G H)", q)."""
    ins, outs = parse_signature(text)
    if len(ins) != 1 or len(outs) != 1 or None in (*ins, *outs) or sorted(ins[0].names) != sorted(outs[0].names) \
            or any(not d.factors for s in (ins[0], outs[0]) for d in s.dims):
        raise SpecError(f'rearrange "{text}": one spec on each side, with the same names')
    return apply(REARRANGE, (x,), text)


def rename(text: str, x: Any) -> Any:
    """The same tensor, its dims under other names, by position: rename("B T K H -> B S K H", k)."""
    ins, outs = parse_signature(text)
    if len(ins) != 1 or len(outs) != 1 or None in (*ins, *outs) or len(ins[0].dims) != len(outs[0].dims):
        raise SpecError(f'rename "{text}": one spec on each side, with as many dims')
    return apply(RENAME, (x,), text)


TABLE = {"rearrange": REARRANGE, "rename": RENAME}
