"""The order of what is along a dim: sort, and topk, the first of it. The dim is whole.

sort is stable, and gives the places that its values had; what comes back goes there.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shardlib.errors import SpecError
from shardlib.language.along import FLAG, call_along, flags, place_of, same_dims
from shardlib.language.local_code import LocalCode
from shardlib.language.pieces import alike_but_one, all_of_both, apart, length
from shardlib.language.steps import Steps
from shardlib.language.value import Operand, Value, apply
from shardlib.program import Op, Step
from shardlib.reference import Dims
from shardlib.rules import Rule
from shardlib.spec import nameable


def _sort(e: LocalCode, step: Step, args: list[str]) -> str:
    descending = bool(step.options.get("descending"))
    return f"torch.sort({args[0]}, dim={place_of(step)}, descending={descending}, stable=True)"


def order(x: Tensor, at: int, descending: bool) -> Tensor:
    """Which element comes first, second ... along dim `at`: the one that so many come before."""
    row, index = x.movedim(at, -1), torch.arange(x.shape[at])
    mine, other = row[..., :, None], row[..., None, :]
    before = (other > mine) if descending else (other < mine)
    rank = (before | (other == mine) & (index < index[:, None])).sum(-1)
    return (rank[..., None, :] == index[:, None]).long().argmax(-1).movedim(-1, at) if len(index) else rank


def _sorted(d: Dims, x: Tensor) -> tuple[Tensor, Tensor]:
    at = d.names.index(d.options["along"])
    places = order(x.detach(), at, bool(d.options.get("descending")))
    return torch.take_along_dim(x, places, at), places


def _sort_vjp(b: Steps, step: Step, ct: Sequence[str]) -> list[str]:
    return [b.call(SORT_VJP, [step.outputs[1], ct[0]], along=step.options["along"])]


SORT = Op("sort", keywords={"along": nameable, "descending": lambda v: v in FLAG},
          rule=lambda s: Rule(whole=(s.options["along"],)), infer=same_dims("sort", 2), emit=_sort,
          vjp=_sort_vjp, takes=("number",), dtype=lambda d, o: [d[0], "int64"], reference=_sorted)
SORT_VJP = Op("sort_vjp", keywords={"along": nameable}, infer=same_dims("sort_vjp", 1), index=(0,),
              rule=lambda s: Rule(linear=((1,),), whole=(s.options["along"],)), takes=("index", "float"),
              emit=lambda e, s, a: f"torch.empty_like({a[1]}).scatter_({place_of(s)}, {a[0]}, {a[1]})",
              dtype=lambda d, o: [d[1]],
              reference=lambda d, places, g: _placed(d.names.index(d.options["along"]), places, g))


def _placed(at: int, places: Tensor, g: Tensor) -> Tensor:
    """g at `places` along dim `at`, as a sum over where each comes from."""
    rows, index = g.movedim(at, -1), torch.arange(g.shape[at])
    here = places.movedim(at, -1)[..., None, :] == index[:, None]
    return (here * rows[..., None, :]).sum(-1).movedim(-1, at)


# -- topk ----------------------------------------------------------------------------------------------------

def _topk_code(e: LocalCode, step: Step, args: list[str]) -> str:
    (taken,), (made, _) = apart(step)
    if e.count(made) > e.count(taken):
        raise SpecError(f"topk: k is {e.count(made)}, and {taken.label} is {e.count(taken)}")
    return f"{e.use(largest)}({args[0]}, {step.ins[0].dims.index(taken)}, {e.count(made)})"


def largest(x: Tensor, dim: int, k: int) -> tuple[Tensor, Tensor]:
    """The k largest along a dim, and where they are: among equals, the first ones."""
    values, places = torch.sort(x, dim=dim, descending=True, stable=True)
    return values.narrow(dim, 0, k), places.narrow(dim, 0, k)


def _topk(d: Dims, x: Tensor) -> tuple[Tensor, Tensor]:
    (taken,), (made, _) = apart(d.step)
    if d.count(*made.names) > d.count(*taken.names):
        raise ValueError("more than there are")
    old, new = d.names.index(taken.label), d.names.index(made.label)
    places = order(x.detach(), old, descending=True).narrow(old, 0, d.count(*made.names))
    return torch.take_along_dim(x, places, old).transpose(old, new), places.transpose(old, new)


def _put_rule(step: Step) -> Rule:
    """Of those that a rank has, each to its place: what is split is summed up."""
    (taken, *_), (made,) = apart(step)
    return Rule(linear=((1,),), whole=made.names, sums=taken.names)


def _put(d: Dims, places: Tensor, g: Tensor) -> Tensor:
    """g at its places."""
    (taken, *_), (made,) = apart(d.step)
    return d.sum(torch.where(d.index(*made.names) == places, g, 0), *taken.names)


TOPK_VJP = Op("topk_vjp", rule=_put_rule, index=(0,),
              takes=("index", "float"), dtype=lambda d, o: [d[1]], reference=_put,
              emit=lambda e, s, a: f"{a[1]}.new_zeros({e.shape(s.outs[0])})"
                                   f".scatter_({s.outs[0].dims.index(apart(s)[1][0])}, {a[0]}, {a[1]})")
TOPK = Op("topk", keywords={"k": length}, rule=lambda s: Rule(whole=all_of_both(s)), emit=_topk_code,
          reference=_topk, takes=("number",), dtype=lambda d, o: [d[0], "int64"],
          vjp=lambda b, s, ct: [b.call(TOPK_VJP, [s.outputs[1], ct[0]], outs=(s.ins[0].owing(),))],
          lengths=lambda s: (apart(s)[1][0], (), s.options["k"]))


# -- what one calls ------------------------------------------------------------------------------------------

def sort(x: Operand, along: str, *, descending: bool = False) -> tuple[Value, Value]:
    """The elements along one dim in order, and the places (int64) that they had; equal ones keep theirs.

    NaN is the largest. The dim is whole. Refused of a sum that is still owed.

    >>> import torch
    >>> from shardlib import sharded
    >>> f = sharded("V -> V, V")(lambda x: sort(x, along="V", descending=True))
    >>> f(torch.tensor([1.0, 3.0, 3.0, 2.0]))
    (tensor([3., 3., 2., 1.]), tensor([1, 2, 3, 0]))
    """
    return call_along(SORT, x, along, **flags(descending=descending))


def topk(text: str, x: Operand, *, k: int) -> tuple[Value, Value]:
    """The k largest along a dim, the largest first, and their places (int64): among equals, the first ones.

    NaN is the largest. The dim is whole. Refused of a sum that is still owed, and more than there are.

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


TABLE = {op.name: op for op in (SORT, SORT_VJP, TOPK, TOPK_VJP)}
