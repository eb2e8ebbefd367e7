"""What runs along one dim and keeps it: cumsum, flip and roll. The dim is whole.

They are linear, so a sum may be owed. The derivative of cumsum is the same from the other end, flip is its
own, and that of roll goes the other way round.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from shardlib.dtypes import counted, narrow, reading
from shardlib.errors import SpecError
from shardlib.language.local_code import LocalCode
from shardlib.language.steps import Steps
from shardlib.language.value import Operand, Value, apply
from shardlib.program import Op, Step, number
from shardlib.reference import Dims
from shardlib.rules import Rule
from shardlib.spec import Spec, nameable

FLAG = (None, True)


def place_of(step: Step) -> int:
    return step.ins[0].labels.index(step.options["along"])


def same_dims(name: str, count: int) -> Any:
    def infer(ins: Sequence[Spec], attrs: dict[str, Any]) -> tuple[Spec, ...]:
        if attrs["along"] not in ins[0].labels:
            raise SpecError(f"{name}: {attrs['along']} is no dim of {ins[0]}")
        return (ins[0],) * count
    return infer


def _cumsum(e: LocalCode, step: Step, args: list[str]) -> str:
    """Of narrow floats in float32, rounded once."""
    at, kind = place_of(step), e.dtypes[step.outputs[0]]
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
            rule=lambda s: Rule(linear=((0,),), whole=(s.options["along"],)), infer=same_dims("cumsum", 1),
            reads=reading(counted), reference=_sums,
            vjp=_from_the_other_end)


# -- flip and roll -------------------------------------------------------------------------------------------

def _integer(value: Any) -> bool:
    return number(value) and isinstance(value, int)


def _picked(d: Dims, x: Tensor, place: Callable[[Tensor, int], Tensor]) -> Tensor:
    """x along its dim, at the place that `place` says of each element and their number."""
    at = d.names.index(d.options["along"])
    return x.index_select(at, place(torch.arange(x.shape[at]), x.shape[at]))


def _flip_vjp(b: Steps, step: Step, ct: Sequence[str]) -> list[str]:
    return [b.call(FLIP, ct, along=step.options["along"])]


def _roll_vjp(b: Steps, step: Step, ct: Sequence[str]) -> list[str]:
    return [b.call(ROLL, ct, along=step.options["along"], by=-step.options["by"])]


FLIP = Op("flip", keywords={"along": nameable}, infer=same_dims("flip", 1),
          rule=lambda s: Rule(linear=((0,),), whole=(s.options["along"],)),
          emit=lambda e, s, a: f"{a[0]}.flip({place_of(s)})", takes=("any",),
          vjp=_flip_vjp,
          reference=lambda d, x: _picked(d, x, lambda i, n: n - 1 - i))
ROLL = Op("roll", keywords={"along": nameable, "by": _integer}, infer=same_dims("roll", 1),
          rule=lambda s: Rule(linear=((0,),), whole=(s.options["along"],)),
          emit=lambda e, s, a: f"{a[0]}.roll({s.options['by']}, {place_of(s)})", takes=("any",),
          vjp=_roll_vjp,
          reference=lambda d, x: _picked(d, x, lambda i, n: (i - d.options["by"]) % max(n, 1)))


# -- what one calls ------------------------------------------------------------------------------------------

def call_along(op: Op, x: Operand, along: str, **attrs: Any) -> Any:
    if isinstance(x, Value) and along not in x.spec.labels:
        raise SpecError(f"{op.name}: {along} is no dim of {x.spec}")
    return apply(op, (x,), along=along, **attrs)


def flags(**given: bool) -> dict[str, bool]:
    """Those that are set: a program says no others."""
    return {name: True for name, value in given.items() if value}


def cumsum(x: Operand, along: str, *, reverse: bool = False) -> Value:
    """The sum of each element and those before it along one dim, or behind it; int64 of integers and masks.

    A sum may be owed. The dim is whole: where a layout splits it, another dim is split meanwhile, or it is
    gathered.

    >>> import torch
    >>> from shardlib import Layout, Mesh, sharded, simulate
    >>> place = sharded("B T -> B T")(lambda mask: cumsum(mask, along="T") - 1)
    >>> mask = torch.tensor([[False, True, True], [True, False, True]])
    >>> simulate(place, Layout(B="dp"), mask, mesh=Mesh(dp=2))
    tensor([[-1,  0,  1],
            [ 0,  0,  1]])
    """
    return call_along(CUMSUM, x, along, **flags(reverse=reverse))


def flip(x: Operand, along: str) -> Value:
    """The elements along one dim, the last one first. The dim is whole; a sum may be owed.

    >>> import torch
    >>> from shardlib import sharded
    >>> f = sharded("B T -> B T")(lambda x: flip(x, along="T"))
    >>> f(torch.tensor([[1, 2, 3]]))
    tensor([[3, 2, 1]])
    """
    return call_along(FLIP, x, along)


def roll(x: Operand, along: str, *, by: int) -> Value:
    """The elements along one dim, each `by` places further on; those beyond the end come in at the beginning.

    The dim is whole; a sum may be owed.

    >>> import torch
    >>> from shardlib import sharded
    >>> f = sharded("B T -> B T, B T")(lambda x: (roll(x, along="T", by=1), roll(x, along="T", by=-1)))
    >>> f(torch.tensor([[1, 2, 3]]))
    (tensor([[3, 1, 2]]), tensor([[2, 3, 1]]))
    """
    if not _integer(by):
        raise SpecError(f"roll: by is {by!r}; it is a whole number")
    return call_along(ROLL, x, along, by=by)


TABLE = {op.name: op for op in (CUMSUM, FLIP, ROLL)}
