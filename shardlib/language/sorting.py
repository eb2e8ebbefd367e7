"""The order of what is along a dim, which is whole. sort is stable, and gives the places that its values had;
what comes back goes there.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shardlib.language.along import FLAG, call_along, flags, place_of, same_dims
from shardlib.language.local_code import LocalCode
from shardlib.language.steps import Steps
from shardlib.language.value import Operand, Value
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
    rank = (rank[..., None, :] == index[:, None]).long().argmax(-1) if len(index) else rank
    return rank.movedim(-1, at)


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


TABLE = {op.name: op for op in (SORT, SORT_VJP)}
