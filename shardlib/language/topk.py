"""The k largest along a dim, and their places; over pieces of it, the k largest of each rank's k largest.

Where the dim is split, each rank takes those of its own piece, one gather brings (value, place) of all of
them, and of these each takes the k largest: the dim does not move. A piece that is shorter than k brings
fewer; what pads them is cut off. Candidates come in the order of the pieces, so the first of equals is the
one of the least place. What comes back goes to its place, on the rank that has it.
"""
from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from shardlib.dtypes import ITEMSIZE
from shardlib.errors import SpecError
from shardlib.language.exchanges import Exchange, Exchanges, Requests, Site, alike
from shardlib.language.local_code import LocalCode
from shardlib.language.pieces import alike_but_one, apart, length
from shardlib.language.sorting import order
from shardlib.language.steps import Steps
from shardlib.language.value import Operand, Value, apply
from shardlib.program import Op, Step
from shardlib.reference import Dims
from shardlib.rules import Rule
from shardlib.wires import ALL_GATHER

PLACE = ITEMSIZE["int64"]


def largest(x: Tensor, dim: int, k: int) -> tuple[Tensor, Tensor]:
    """The k largest along a dim, and where they are: among equals, the first ones."""
    values, places = torch.sort(x, dim=dim, descending=True, stable=True)
    return values.narrow(dim, 0, k), places.narrow(dim, 0, k)


def largest_of_pieces(group: object, pieces: Sequence[tuple[int, int]], start: int, x: Tensor, dim: int,
                      k: int) -> Requests:
    """The same over the pieces of all members, (start, size) each; this one's begins at `start`."""
    counts, x = [min(k, size) for _, size in pieces], x.movedim(dim, -1)
    mine = min(k, x.shape[-1])
    values, places = (F.pad(y, (0, k - mine)) for y in largest(x, -1, mine))
    row = torch.cat([_as_bytes(places + start), _as_bytes(values)])
    got = yield group, "all_gather", row[None], 0, (1,) * len(pieces)
    ends = 0, places.numel() * PLACE, row.numel()
    (places, values) = (
        torch.cat([y[..., :n] for y, n in zip(_from_bytes(got[:, a:b], like), counts)], -1)
        for a, b, like in zip(ends, ends[1:], (places, values)))
    values, first = largest(values, -1, k)
    return values.movedim(-1, dim), places.gather(-1, first).movedim(-1, dim)


def _as_bytes(x: Tensor) -> Tensor:
    """Copied: one element of a strided view counts as contiguous, and has no bytes."""
    return x.reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8)


def _from_bytes(rows: Tensor, like: Tensor) -> Tensor:
    """Of each member what it has packed, one behind the other."""
    return rows.reshape(-1).view(like.dtype).view(len(rows), *like.shape)


def placed(places: Tensor, g: Tensor, dim: int, start: int, size: int) -> Tensor:
    """g at its places, of which a rank has `size` from `start` on."""
    here = (places >= start) & (places < start + size)
    shape = [size + 1 if i == dim else n for i, n in enumerate(g.shape)]        # one more: what is elsewhere
    out = g.new_zeros(shape).scatter_(dim, torch.where(here, places - start, size), g)
    return out.narrow(dim, 0, size)


# -- the ops -------------------------------------------------------------------------------------------------

def _code(e: LocalCode, step: Step, args: list[str]) -> str:
    (taken,), (made, _) = apart(step)
    if e.count(made) > e.count(taken):
        raise SpecError(f"topk: k is {e.count(made)}, and {taken.label} is {e.count(taken)}")
    text = f"{args[0]}, {step.ins[0].dims.index(taken)}, {e.count(made)}"
    if e.mesh.size(taken.axes) == 1:
        return f"{e.use(largest)}({text})"
    pieces = e.pieces(taken)
    return e.exchanging(largest_of_pieces, taken.axes, [ALL_GATHER], f"{pieces}, {e.rows(taken)[0]}, {text}")


def _over(step: Step) -> tuple[str, ...]:
    return apart(step)[0][0].axes


def _exchanges(at: Site) -> list[Exchange]:
    size = prod(at.shape(at.step.outs[0])) * (PLACE + ITEMSIZE[at.dtypes[0] or "float32"])
    return [Exchange(ALL_GATHER, at.step.ins[0], "uint8", alike(len(at.members), size),
                     "the largest of each piece, and their places")]


def _rule(step: Step) -> Rule:
    (taken,), (made, _) = apart(step)
    return Rule(whole=made.names, met=taken.names)


def _reference(d: Dims, x: Tensor) -> tuple[Tensor, Tensor]:
    (taken,), (made, _) = apart(d.step)
    if d.count(*made.names) > d.count(*taken.names):
        raise ValueError("more than there are")
    old, new = d.names.index(taken.label), d.names.index(made.label)
    places = order(x.detach(), old, descending=True).narrow(old, 0, d.count(*made.names))
    return torch.take_along_dim(x, places, old).transpose(old, new), places.transpose(old, new)


def _vjp(b: Steps, step: Step, ct: Sequence[str]) -> list[str]:
    kind = b.types[ct[0]]
    g = b.move(ct[0], kind.owing(*(o for o in kind.owed if o.axis not in _over(step))), "each piece gets it")
    return [b.call(TOPK_VJP, [step.outputs[1], g], outs=(step.ins[0].owing(),))]


def _put_code(e: LocalCode, step: Step, args: list[str]) -> str:
    made = apart(step)[1][0]
    return (f"{e.use(placed)}({args[0]}, {args[1]}, {step.outs[0].dims.index(made)}, "
            f"{', '.join(map(str, e.rows(made)))})")


def _put(d: Dims, places: Tensor, g: Tensor) -> Tensor:
    """g at its places."""
    (taken, *_), (made,) = apart(d.step)
    return d.sum(torch.where(d.index(*made.names) == places, g, 0), *taken.names)


TOPK = Op("topk", keywords={"k": length}, rule=_rule, emit=_code, vjp=_vjp, reference=_reference,
          exchanges=Exchanges(_over, _exchanges), takes=("number",), dtype=lambda d, o: [d[0], "int64"],
          lengths=lambda s: (apart(s)[1][0], (), s.options["k"]))
TOPK_VJP = Op("topk_vjp", rule=lambda s: Rule(linear=((1,),), sums=apart(s)[0][0].names), emit=_put_code,
              index=(0,), takes=("index", "float"), dtype=lambda d, o: [d[1]], reference=_put)


def topk(text: str, x: Operand, *, k: int) -> tuple[Value, Value]:
    """The k largest along a dim, the largest first, and their places (int64): among equals, the first ones.

    NaN is the largest. Where the dim is split, k (value, place) of each rank are gathered, and no more.
    Refused of a sum that is still owed, and more than there are.

    >>> import torch
    >>> from shardlib import sharded
    >>> route = sharded("T E -> T K, T K")(lambda scores: topk("T E -> T K", scores, k=2))
    >>> route(torch.tensor([[1.0, 3.0, 2.0, 3.0]]))
    (tensor([[3., 3.]]), tensor([[1, 3]]))
    """
    if not length(k):
        raise SpecError(f"topk: k is {k!r}; it is a whole number, 0 or more")
    (taken,), (made,) = alike_but_one(TOPK, text, "B V -> B K", 1, 1)
    return apply(TOPK, (x,), f"{taken} -> {made}, {made}", k=k)


TABLE = {op.name: op for op in (TOPK, TOPK_VJP)}
