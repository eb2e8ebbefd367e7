"""What is largest or smallest along dims: max, min, any and all; and where it is: argmax and argmin.

Over a split dim a max is owed, and `any` as the max of masks. A minimum is nothing that can be owed: min and
all take the distributed form, the max of opposites, which is joined and turned back; so do argmax and argmin,
with an extreme of the pieces, and then the least index that has it. Each of these is a step of the program.
Equal ones share the gradient of max and min: their number over all ranks is a second small sum, in backward
alone.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from shardlib.dtypes import FLOATS, as_they_come
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


def _min(e: LocalCode, step: Step, args: list[str]) -> str:
    return e.use(amin) + f"({args[0]}, {dims_gone(step)})"


def bounds(x: Tensor) -> tuple[Any, Any]:
    """The least and the greatest that the dtype of x has."""
    if x.is_floating_point():
        return float("-inf"), float("inf")
    return (False, True) if x.dtype == torch.bool else (torch.iinfo(x.dtype).min, torch.iinfo(x.dtype).max)


def amax(x: Any, dims: tuple[int, ...]) -> Any:
    """The maximum over `dims`; the least of its dtype (-inf, False) where there is nothing,
    NaN where there is one."""
    return _extreme(x, dims, "amax", bounds(x)[0])


def amin(x: Any, dims: tuple[int, ...]) -> Any:
    """The minimum over `dims`; the greatest of its dtype where there is nothing, NaN where there is one."""
    return _extreme(x, dims, "amin", bounds(x)[1])


def _extreme(x: Any, dims: tuple[int, ...], name: str, of_nothing: Any) -> Any:
    if 0 in [x.shape[d] for d in dims]:
        return x.new_full([n for i, n in enumerate(x.shape) if i not in dims], of_nothing)
    return getattr(x, name)(dims) if dims else x.clone()


def _turn(e: LocalCode, step: Step) -> str:
    """The sign before an operand that turns its order round, exactly: -x of floats;
    ~x of integers, whose least one has no negative, and of masks."""
    return "-" if e.dtypes[step.inputs[0]] in FLOATS else "~"


def _shared(d: Dims, x: Tensor, extreme: Tensor) -> Tensor:
    """The mean of those that are `extreme`, so that these share its gradient."""
    here = x == extreme
    count = d.sum(here)
    return (torch.where(count > 0, d.sum(torch.where(here, x, 0)) / count, extreme)
            if x.is_floating_point() else extreme)


def _largest(d: Dims, x: Tensor) -> Tensor:
    return _shared(d, x, d.fold(torch.maximum, bounds(x)[0], x.detach()))


def _smallest(d: Dims, x: Tensor) -> Tensor:
    return _shared(d, x, d.fold(torch.minimum, bounds(x)[1], x.detach()))


def _opposite(x: Tensor) -> Tensor:
    return x * -1 if x.is_floating_point() else x == x.new_zeros(()) if x.dtype == torch.bool else -1 - x


def _back(b: Steps, x: str, extreme: str, g: str) -> list[str]:
    """g to all of x that are `extreme`, in equal shares."""
    count = b.settle(b.call(TIES, [x, extreme], outs=(b.types[extreme],)))
    return [b.call(EXTREME_VJP, [x, extreme, count, g])]


def _max_opposite_vjp(b: Steps, step: Step, ct: Sequence[str]) -> list[str]:
    low = b.call(OPPOSITE, [b.settle(step.outputs[0])])
    return _back(b, step.inputs[0], low, b.scale(ct[0], -1.0))


def _spread_min(b: Steps, step: Step) -> list[str]:
    """A minimum over a split dim: the opposite of the max of opposites."""
    return [b.call(OPPOSITE, [b.settle(b.call(MAX_OPPOSITE, step.inputs, outs=step.outs))])]


def _ties(e: LocalCode, step: Step, args: list[str]) -> str:
    here = f"({args[0]} == {beside(args[1], step.ins[1], step.ins[0])})"
    return f"{here}.sum({dims_gone(step)})" if dims_gone(step) else f"{here}.long()"


def _extreme_vjp(e: LocalCode, step: Step, args: list[str]) -> str:
    placed = [beside(arg, spec, step.ins[0]) for arg, spec in zip(args[1:], step.ins[1:])]
    return f"{e.use(extreme_vjp)}({', '.join([args[0], *placed])})"


def extreme_vjp(x: Any, extreme: Any, count: Any, g: Any) -> Any:
    """g over `count` where x is `extreme`, rounded once; NaN all along what has one, as torch.amax has it."""
    share = g.to(torch.promote_types(torch.promote_types(x.dtype, g.dtype), torch.float32)) / count
    other = torch.where(count > 0, 0.0, float("nan"))
    return torch.where(x == extreme, share.to(x.dtype), other.to(x.dtype))


MAX = Op("max", rule=lambda s: Rule(maxes=names_gone(s)), emit=_max, reference=_largest,
         vjp=lambda b, s, ct: _back(b, s.inputs[0], b.settle(s.outputs[0]), ct[0]))
MIN = Op("min", rule=lambda s: Rule(whole=names_gone(s)), emit=_min, distribute=_spread_min,
         reference=_smallest, vjp=lambda b, s, ct: _back(b, s.inputs[0], s.outputs[0], ct[0]))
MAX_OPPOSITE = Op("max_opposite", rule=lambda s: Rule(maxes=names_gone(s)), vjp=_max_opposite_vjp,
                  emit=lambda e, s, a: _turn(e, s) + _min(e, s, a),
                  reference=lambda d, x: _largest(d, _opposite(x)))
OPPOSITE = Op("opposite", rule=lambda s: Rule(), infer=same, emit=lambda e, s, a: _turn(e, s) + a[0],
              vjp=lambda b, s, ct: [b.scale(ct[0], -1.0)], reference=lambda d, x: _opposite(x))
TIES = Op("ties", rule=lambda s: Rule(sums=names_gone(s)), emit=_ties, takes=("number",),
          dtype=lambda d, o: ["int64"], reference=lambda d, x, top: d.sum((x == top).long()))
EXTREME_VJP = Op("extreme_vjp", rule=lambda s: Rule(linear=((3,),)), infer=same, emit=_extreme_vjp,
                 takes=("float", "float", "index", "float"), index=(2,), reads=as_they_come,
                 dtype=lambda d, o: d[:1],
                 reference=lambda d, x, top, count, g: d.vjp(_largest, (x,), g, d.step.ins[1]))


def _of_masks(name: str, like: Op, fold: Callable) -> Op:
    """`like` of masks, which are no part of a gradient."""
    return Op(name, rule=like.rule, emit=like.emit, distribute=like.distribute, constant=True, index=(0,),
              takes=("mask",), dtype=lambda d, o: ["bool"], reference=fold)


ANY = _of_masks("any", MAX, lambda d, x: d.sum(x.long()) > 0)
ALL = _of_masks("all", MIN, lambda d, x: d.sum((x == x.new_zeros(())).long()) == 0)


def _spread_argmax(b: Steps, step: Step) -> list[str]:
    """argmax over a split dim: the max of all, then the least index that has it."""
    (x,) = step.inputs
    top = b.settle(b.call(MAX, [x], outs=step.outs))
    back = b.settle(b.call(RANK_OF, [x, top], outs=step.outs))
    return [b.call(FROM_RANK, [back])]


def _spread_argmin(b: Steps, step: Step) -> list[str]:
    """argmin over a split dim: the min of all, then the least index that has it."""
    (x,), (low,) = step.inputs, _spread_min(b, step)
    back = b.settle(b.call(RANK_OF, [x, low], outs=step.outs, least=True))
    return [b.call(FROM_RANK, [back])]


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


def _arg_reference(d: Dims, x: Tensor) -> Tensor:
    if not d.count(*d.gone):
        raise IndexError("nothing is the largest of nothing")
    return _first_of(d, x, (_smallest if d.step.op is ARGMIN else _largest)(d, x))


def _not_empty(e: LocalCode, step: Step) -> int:
    """The size of the dim that argmax or argmin runs over. SpecError for 0."""
    dim = step.ins[0].dims[dims_gone(step)[0]]
    if not e.count(dim):
        name, most = (("argmin", "smallest") if step.op is ARGMIN or step.options.get("least")
                      else ("argmax", "largest"))
        raise SpecError(f"{name}: {dim.label} is 0; nothing is the {most} of nothing")
    return e.count(dim)


def _argmax(e: LocalCode, step: Step, args: list[str]) -> str:
    _not_empty(e, step)
    return f"{args[0]}.{step.op.name}({dims_gone(step)[0]})"


ARGMAX, ARGMIN = (Op(name, rule=lambda s: Rule(whole=names_gone(s)), emit=_argmax, distribute=pieces,
                     takes=("number",), dtype=lambda d, o: ["int64"], reference=_arg_reference)
                  for name, pieces in (("argmax", _spread_argmax), ("argmin", _spread_argmin)))
RANK_OF = Op("rank_of", keywords={"least": lambda v: v in (None, True)},
             rule=lambda s: Rule(maxes=names_gone(s)), emit=_rank_of, takes=("number",),
             dtype=lambda d, o: ["int64"], reference=lambda d, x, top: -_first_of(d, x, top))
FROM_RANK = Op("from_rank", takes=("number",), rule=lambda s: Rule(linear=((0,),)), infer=same,
               emit=lambda e, s, a: f"-{a[0]}", reference=lambda d, x: x * -1)


def max(text: str, x: Operand) -> Value:      # noqa: A001
    """The maximum over the dims that the result lacks; NaN if there is one, -inf of nothing.

    Equal ones share the gradient. Over a split dim it is owed as a maximum, which is a type of its own:
    nothing but a reduction takes it.

    >>> import torch
    >>> from shardlib import EXPLICIT, Mesh, all_reduce, sharded, simulate
    >>> @sharded("B V/tp -> B", layout=EXPLICIT)
    ... def largest(x):
    ...     return all_reduce("B max:tp -> B", max("B V/tp -> B max:tp", x))
    >>> simulate(largest, None, torch.tensor([[1.0, 3.0, 2.0], [-5.0, -4.0, -6.0]]), mesh=Mesh(tp=2))
    tensor([ 3., -4.])
    """
    return reduce_call(MAX, text, x)


def min(text: str, x: Operand) -> Value:      # noqa: A001
    """The minimum over the dims that the result lacks; NaN if there is one, inf of nothing.

    Equal ones share the gradient. Where a dim is split, ranks join the max of opposites, as large as the
    result.

    >>> import torch
    >>> from shardlib import Layout, Mesh, sharded, simulate, value_and_grad
    >>> f = sharded("V -> ()")(lambda x: min("V -> ()", x))
    >>> simulate(value_and_grad(f, wrt="x"), Layout(V="tp"), torch.tensor([2.0, 1.0, 1.0]), mesh=Mesh(tp=2))
    (tensor(1.), tensor([0.0000, 0.5000, 0.5000]))
    """
    return reduce_call(MIN, text, x)


def any(text: str, x: Operand) -> Value:      # noqa: A001
    """Whether a mask is true anywhere along the dims that the result lacks. Over a split dim a max is owed.

    >>> import torch
    >>> from shardlib import Layout, Mesh, sharded, simulate
    >>> ended = sharded("B T -> B")(lambda ids: any("B T -> B", ids < 0))
    >>> simulate(ended, Layout(T="cp"), torch.tensor([[3, 5, -1], [7, 0, 2]]), mesh=Mesh(cp=2))
    tensor([ True, False])
    """
    return reduce_call(ANY, text, x)


def all(text: str, x: Operand) -> Value:      # noqa: A001
    """Whether a mask is true everywhere along the dims that the result lacks.

    As the predicate of a cond it is the same on all ranks, whatever is split:

    >>> import torch
    >>> from shardlib import Layout, Mesh, sharded, simulate
    >>> finite = sharded("B D -> ()")(lambda x: all("B D -> ()", x < float(2 ** 100)))
    >>> simulate(finite, Layout(B="dp"), torch.tensor([[1.0], [float("inf")]]), mesh=Mesh(dp=2))
    tensor(False)
    """
    return reduce_call(ALL, text, x)


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


def argmin(text: str, x: Operand) -> Value:
    """The first index (int64) of the minimum over the one dim that the result lacks; a NaN is the minimum.

    Indices count over the whole dim, wherever it is split. Refused: a dim of size 0.

    >>> import torch
    >>> from shardlib import Layout, Mesh, sharded, simulate
    >>> nearest = sharded("B V -> B")(lambda distance: argmin("B V -> B", distance))
    >>> simulate(nearest, Layout(V="tp"), torch.tensor([[3.0, 2.0, 1.0, 1.0]]), mesh=Mesh(tp=2))
    tensor([2])
    """
    return reduce_call(ARGMIN, text, x, lost=1)


TABLE = {op.name: op for op in (MAX, MIN, MAX_OPPOSITE, OPPOSITE, TIES, EXTREME_VJP, ANY, ALL, ARGMAX,
                                ARGMIN, RANK_OF, FROM_RANK)}
