"""What is largest along dims: max, and argmax, where it is.

Over a split dim a max is owed. argmax needs its dim whole, or takes the distributed form: a max over the
pieces, then the least index that has it, each a step of the program.
"""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shardlib.errors import SpecError
from shardlib.language.arithmetic import same
from shardlib.language.local_code import LocalCode
from shardlib.language.reductions import beside, dims_gone, names_gone, reduce_call
from shardlib.language.steps import Steps
from shardlib.language.value import Operand, Value
from shardlib.program import Op, Step
from shardlib.reference import Dims
from shardlib.rules import Rule


def _max(e: LocalCode, step: Step, args: list[str]) -> str:
    return e.use(amax) + f"({args[0]}, {dims_gone(step)})"


def amax(x: Any, dims: tuple[int, ...]) -> Any:
    """The maximum over `dims`; the least of its dtype (-inf, False) where there is nothing,
    NaN where there is one."""
    if any(x.shape[d] == 0 for d in dims):
        shape = [n for i, n in enumerate(x.shape) if i not in dims]
        low = (float("-inf") if x.is_floating_point() else False if x.dtype == torch.bool
               else torch.iinfo(x.dtype).min)
        return x.new_full(shape, low)
    return x.amax(dims) if dims else x.clone()


def _fold_max(d: Dims, x: Tensor) -> Tensor:
    low = (float("-inf") if x.is_floating_point() else False if x.dtype == torch.bool
           else torch.iinfo(x.dtype).min)
    return d.fold(torch.maximum, low, x)


MAX = Op("max", rule=lambda s: Rule(maxes=names_gone(s)), emit=_max,
         reference=_fold_max)


def _spread_argmax(b: Steps, step: Step, x: str) -> str:
    """argmax over a split dim: the max of all, then the least index that has it."""
    small = step.outs[0]
    top = b.settle(b.call(MAX, [x], outs=(small,)))
    back = b.settle(b.call(RANK_OF, [x, top], outs=(small,)))
    return b.call(FROM_RANK, [back])


def _rank_of(e: LocalCode, step: Step, args: list[str]) -> str:
    (i,) = dims_gone(step)
    start, _ = e.rows(step.ins[0].dims[i])
    x, top = args
    return (f"{e.use(rank_of)}({x}, {beside(top, step.ins[1], step.ins[0])}, {i}, {start}, "
            f"{_not_empty(e, step)})")


def rank_of(x: Any, top: Any, dim: int, start: int, n: int) -> Any:
    """-i for the first i of n with x[i] = top (NaN equals NaN), i counted from `start`;
    -n where there is none."""
    index = torch.arange(start, start + x.shape[dim],
                         device=x.device).view([-1 if i == dim else 1 for i in range(x.ndim)])
    return amax(torch.where((x == top) | (x.isnan() & top.isnan()), -index, -n), (dim,))


def _first_of(d: Dims, x: Tensor, top: Tensor) -> Tensor:
    """The first index at which x is `top`; the size of the dim where there is none."""
    here = (x == top) | (x != x) & (top != top)
    return d.fold(torch.minimum, d.count(*d.gone), torch.where(here, d.index(*d.gone), d.count(*d.gone)))


def _argmax_reference(d: Dims, x: Tensor) -> Tensor:
    if not d.count(*d.gone):
        raise IndexError("nothing is the largest of nothing")
    return _first_of(d, x, _fold_max(d, x))


def _not_empty(e: LocalCode, step: Step) -> int:
    """The size of the dim that argmax runs over. SpecError for 0."""
    dim = step.ins[0].dims[dims_gone(step)[0]]
    if not e.count(dim):
        raise SpecError(f"argmax: {dim.label} is 0; nothing is the largest of nothing")
    return e.count(dim)


def _argmax(e: LocalCode, step: Step, args: list[str]) -> str:
    _not_empty(e, step)
    return f"{args[0]}.argmax({dims_gone(step)[0]})"


ARGMAX = Op("argmax", rule=lambda s: Rule(whole=names_gone(s)), emit=_argmax, distribute=_spread_argmax,
            takes=("number",), dtype=lambda d, o: ["int64"], reference=_argmax_reference)
RANK_OF = Op("rank_of", rule=lambda s: Rule(maxes=names_gone(s)), emit=_rank_of, takes=("number",),
             dtype=lambda d, o: ["int64"], reference=lambda d, x, top: -_first_of(d, x, top))
FROM_RANK = Op("from_rank", takes=("number",), rule=lambda s: Rule(linear=((0,),)), infer=same,
               emit=lambda e, s, a: f"-{a[0]}", reference=lambda d, x: x * -1)


def max(text: str, x: Operand) -> Value:      # noqa: A001
    """The maximum over the dims that the result lacks; NaN if there is one. It has no gradient.

    Over a split dim it is owed as a maximum, which is a type of its own: nothing but a reduction takes it.

    >>> import torch
    >>> from shardlib import EXPLICIT, Mesh, all_reduce, sharded, simulate
    >>> @sharded("B V/tp -> B", layout=EXPLICIT)
    ... def largest(x):
    ...     return all_reduce("B max:tp -> B", max("B V/tp -> B max:tp", x))
    >>> simulate(largest, None, torch.tensor([[1.0, 3.0, 2.0], [-5.0, -4.0, -6.0]]), mesh=Mesh(tp=2))
    tensor([ 3., -4.])
    """
    return reduce_call(MAX, text, x)


def argmax(text: str, x: Operand) -> Value:
    """The first index (int64) of the maximum over the one dim that the result lacks; a NaN is the maximum.

    Indices count over the whole dim, wherever it is split. Refused: a dim of size 0.

    >>> import torch
    >>> from shardlib import Layout, Mesh, sharded, simulate
    >>> f = sharded("B V -> B")(lambda logits: argmax("B V -> B", logits))
    >>> simulate(f, Layout(V="tp"), torch.tensor([[0.0, 1.0, 2.0, 9.0, 9.0]]), mesh=Mesh(tp=2))
    tensor([3])
    """
    return reduce_call(ARGMAX, text, x, lost=1)


TABLE = {op.name: op for op in (MAX, ARGMAX, RANK_OF, FROM_RANK)}
