"""What runs along one dim and keeps it: cumsum and sort. The dim is whole.

cumsum is linear, so a sum may be owed; its derivative is the same from the other end. sort is stable, and
gives the places that its values had; what comes back goes there.
"""
from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from shardlib.dtypes import counted, narrow, reading
from shardlib.errors import SpecError
from shardlib.language.local_code import LocalCode
from shardlib.language.steps import Steps
from shardlib.language.value import Operand, Value, apply
from shardlib.program import Op, Step
from shardlib.reference import Dims
from shardlib.rules import Rule
from shardlib.spec import Spec, nameable

FLAG = (None, True)


def _place(step: Step) -> int:
    return step.ins[0].labels.index(step.options["along"])


def _same_dims(name: str, count: int) -> Any:
    def infer(ins: Sequence[Spec], attrs: dict[str, Any]) -> tuple[Spec, ...]:
        if attrs["along"] not in ins[0].labels:
            raise SpecError(f"{name}: {attrs['along']} is no dim of {ins[0]}")
        return (ins[0],) * count
    return infer


def _cumsum(e: LocalCode, step: Step, args: list[str]) -> str:
    """Of narrow floats in float32, rounded once."""
    at, kind = _place(step), e.dtypes[step.outputs[0]]
    dtype, end = (", dtype=torch.float32", f".to(torch.{kind})") if narrow(kind) else ("", "")
    turned = f".flip({at})" if step.options.get("reverse") else ""
    return f"{args[0]}{turned}.cumsum({at}{dtype}){turned}{end}"


def _sums(d: Dims, x: Tensor) -> Tensor:
    """Each one, and what is before it."""
    at, turn = d.names.index(d.options["along"]), -1 if d.options.get("reverse") else 1
    x = x if x.is_floating_point() else x.long()
    made = list(accumulate(list(x.split(1, at))[::turn])) if x.shape[at] else []
    return torch.cat(made[::turn], at) if made else x


def _from_the_other_end(b: Steps, step: Step, ct: Sequence[str]) -> list[str]:
    turned: dict[str, Any] = {} if step.options.get("reverse") else {"reverse": True}
    return [b.call(CUMSUM, [ct[0]], along=step.options["along"], **turned)]


CUMSUM = Op("cumsum", keywords={"along": nameable, "reverse": lambda v: v in FLAG}, emit=_cumsum,
            rule=lambda s: Rule(linear=((0,),), whole=(s.options["along"],)), infer=_same_dims("cumsum", 1),
            reads=reading(counted), reference=_sums,
            vjp=_from_the_other_end)


def _sort(e: LocalCode, step: Step, args: list[str]) -> str:
    descending = bool(step.options.get("descending"))
    return f"torch.sort({args[0]}, dim={_place(step)}, descending={descending}, stable=True)"


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
          rule=lambda s: Rule(whole=(s.options["along"],)), infer=_same_dims("sort", 2), emit=_sort,
          vjp=_sort_vjp, takes=("number",), dtype=lambda d, o: [d[0], "int64"], reference=_sorted)
SORT_VJP = Op("sort_vjp", keywords={"along": nameable}, infer=_same_dims("sort_vjp", 1), index=(0,),
              rule=lambda s: Rule(linear=((1,),), whole=(s.options["along"],)), takes=("index", "float"),
              emit=lambda e, s, a: f"torch.empty_like({a[1]}).scatter_({_place(s)}, {a[0]}, {a[1]})",
              dtype=lambda d, o: [d[1]],
              reference=lambda d, places, g: _placed(d.names.index(d.options["along"]), places, g))


def _placed(at: int, places: Tensor, g: Tensor) -> Tensor:
    """g at `places` along dim `at`, as a sum over where each comes from."""
    rows, index = g.movedim(at, -1), torch.arange(g.shape[at])
    here = places.movedim(at, -1)[..., None, :] == index[:, None]
    return (here * rows[..., None, :]).sum(-1).movedim(-1, at)


def _along(op: Op, x: Operand, along: str, **flags: Any) -> Any:
    if isinstance(x, Value) and along not in x.spec.labels:
        raise SpecError(f"{op.name}: {along} is no dim of {x.spec}")
    given: dict[str, Any] = {name: True for name, value in flags.items() if value}
    return apply(op, (x,), along=along, **given)


def cumsum(x: Operand, along: str, *, reverse: bool = False) -> Value:
    """The sum of each element and those before it along one dim, or behind it; int64 of integers and masks.

    A sum may be owed. Refused where that dim is split: say that it is whole, as in `T/1`.

    >>> import torch
    >>> from shardlib import Layout, Mesh, sharded, simulate
    >>> place = sharded("B T/1 -> B T/1")(lambda mask: cumsum(mask, along="T") - 1)
    >>> mask = torch.tensor([[False, True, True], [True, False, True]])
    >>> simulate(place, Layout(B="dp"), mask, mesh=Mesh(dp=2))
    tensor([[-1,  0,  1],
            [ 0,  0,  1]])
    """
    return _along(CUMSUM, x, along, reverse=reverse)


def sort(x: Operand, along: str, *, descending: bool = False) -> tuple[Value, Value]:
    """The elements along one dim in order, and the places (int64) that they had; equal ones keep theirs.

    NaN is the largest. Refused where that dim is split, and of a sum that is still owed.

    >>> import torch
    >>> from shardlib import sharded
    >>> f = sharded("V -> V, V")(lambda x: sort(x, along="V", descending=True))
    >>> f(torch.tensor([1.0, 3.0, 3.0, 2.0]))
    (tensor([3., 3., 2., 1.]), tensor([1, 2, 3, 0]))
    """
    return _along(SORT, x, along, descending=descending)


TABLE = {op.name: op for op in (CUMSUM, SORT, SORT_VJP)}
