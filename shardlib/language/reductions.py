"""Ops along dims: sum, mean, max, softmax, logsumexp, argmax.

Their spec string says the dims that remain: `mean("B T -> ()", x)`. A split dim that is summed leaves a sum
owed, one that is maxed leaves a max owed. softmax, logsumexp and argmax need their dim whole, or take the
distributed form: the same over the pieces, joined by small reductions, each of them a step of the program. Of
bfloat16 and float16, what is summed up inside of an op is summed in float32, and rounded once.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shardlib.dtypes import counted, fractional, narrow, reading
from shardlib.errors import SpecError
from shardlib.language.arithmetic import same
from shardlib.language.casts import CAST_LIKE, WIDEN
from shardlib.language.local_code import LocalCode
from shardlib.language.steps import Steps
from shardlib.language.value import Operand, Value, apply
from shardlib.program import Op, Step
from shardlib.reference import Dims
from shardlib.rules import Rule
from shardlib.spec import Spec, nameable, parse_specs


def _gone(step: Step) -> tuple[str, ...]:
    return tuple(n for n in step.ins[0].names if n not in step.outs[0].names)


def _dims(step: Step) -> tuple[int, ...]:
    return tuple(i for i, label in enumerate(step.ins[0].labels) if label not in step.outs[0].labels)


def _sum(e: LocalCode, step: Step, args: list[str]) -> str:
    return f"{args[0]}.sum({_dims(step)})" if _dims(step) else f"{args[0]}.clone()"


def _rounded(e: LocalCode, step: Step) -> str:
    """The end of an expression in float32: its rounding to the step's dtype;
    nothing where that is not narrow."""
    kind = e.dtypes[step.outputs[0]]
    return f".to(torch.{kind})" if narrow(kind) else ""


def _wide(e: LocalCode, step: Step, arg: str) -> str:
    """An operand in float32, where it is narrow."""
    return f"{arg}.to(torch.float32)" if _rounded(e, step) else arg


def _mean(e: LocalCode, step: Step, args: list[str]) -> str:
    if (end := _rounded(e, step)) and _dims(step) and _count(e, step):
        return f"({args[0]}.sum({_dims(step)}, dtype=torch.float32) / {_count(e, step)}){end}"
    return (f"{_sum(e, step, args)} / {_count(e, step)}" if _count(e, step)
            else f"{_sum(e, step, args)} * float('nan')")


def _made(step: Step) -> tuple[str, ...]:
    return tuple(n for n in step.outs[0].names if n not in step.ins[0].names)


def _count(e: LocalCode, step: Step) -> int:
    n = 1
    for name in _gone(step):
        n *= e.sizes[name]
    return n


def _mean_vjp(b: Steps, step: Step, ct: Sequence[str]) -> list[str]:
    return [b.spread(ct[0], step.ins[0], mean=True)]


def _spread(e: LocalCode, step: Step, args: list[str]) -> str:
    (have,), (want,) = step.ins, step.outs
    index = ", ".join(":" if n in have.labels else "None" for n in want.labels)
    text = f"{args[0]}[{index}].expand({e.shape(want)})" if len(have.labels) < len(want.labels) else args[0]
    if not step.options.get("mean"):
        return text
    count = 1
    for name in want.names:
        count *= 1 if name in have.names else e.sizes[name]
    return f"{text} / {count or 1}"


def _max(e: LocalCode, step: Step, args: list[str]) -> str:
    return e.use(amax) + f"({args[0]}, {_dims(step)})"


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


SUM = Op("sum", rule=lambda s: Rule(linear=((0,),), sums=_gone(s)), emit=_sum,
         vjp=lambda b, s, ct: [b.spread(ct[0], s.ins[0])], reads=reading(counted),
         reference=lambda d, x: d.sum(x))
MEAN = Op("mean", rule=lambda s: Rule(linear=((0,),), sums=_gone(s)), emit=_mean, vjp=_mean_vjp,
          reads=reading(fractional), statistic=True, reference=lambda d, x: d.sum(x) / d.count(*d.gone))
SPREAD = Op("spread", keywords={"mean": lambda v: v in (None, True)}, rule=lambda s: Rule(linear=((0,),)),
            emit=_spread, vjp=None, reads=lambda d, o: [fractional(d[0]) if o.get("mean") else d[0]],
            reference=lambda d, x: x / d.count(*_made(d.step)) if d.options.get("mean") else x)
MAX = Op("max", rule=lambda s: Rule(maxes=_gone(s)), emit=_max,
         reference=_fold_max)


def _along(step: Step) -> str:
    return step.options["along"]


def _softmax(d: Dims, x: Tensor) -> Tensor:
    return math.e ** (x - d.fold(torch.logaddexp, float("-inf"), x, _along(d.step)))


def _softmax_vjp(b: Steps, step: Step, ct: Sequence[str]) -> list[str]:
    return [b.call(SOFTMAX_VJP, [step.outputs[0], ct[0]], along=_along(step))]


def _softmax_backward(e: LocalCode, step: Step, args: list[str]) -> str:
    y, g = args
    i = step.ins[0].labels.index(_along(step))
    if _rounded(e, step):
        return f"{e.use(softmax_vjp)}({y}, {g}, {i})"
    return f"{y} * ({g} - ({g} * {y}).sum({i}, keepdim=True))"


def softmax_vjp(y: Any, g: Any, dim: int) -> Any:
    """The cotangent of what softmax made y of, computed in float32."""
    wide, g = y.float(), g.float()
    return (wide * (g - (g * wide).sum(dim, keepdim=True))).to(y.dtype)


def _has_dim(ins: Sequence[Spec], attrs: dict[str, Any]) -> tuple[Spec, ...]:
    if attrs["along"] not in ins[0].labels:
        raise SpecError(f"softmax: {attrs['along']} is no dim of {ins[0]}")
    return (ins[0],)


SOFTMAX = Op("softmax", takes=("float",), keywords={"along": nameable},
             rule=lambda s: Rule(whole=(_along(s),)), infer=_has_dim, vjp=_softmax_vjp,
             emit=lambda e, s, a: f"{a[0]}.softmax({s.ins[0].labels.index(_along(s))})",
             reference=lambda d, x: _softmax(d, x))
SOFTMAX_VJP = Op("softmax_vjp", keywords={"along": nameable},
                 rule=lambda s: Rule(linear=((1,),), whole=(_along(s),)), infer=_has_dim,
                 emit=_softmax_backward, takes=("float",),
                 reference=lambda d, y, g: d.vjp(_softmax, (y.log(),), g, d.step.ins[0]))


def _logsumexp_vjp(b: Steps, step: Step, ct: Sequence[str]) -> list[str]:
    return [b.call(EXP_MINUS, [step.inputs[0], step.outputs[0], ct[0]])]


def _narrow_to_wide(arg: str, narrow: Spec, wide: Spec) -> str:
    return f"{arg}[{', '.join(':' if n in narrow.labels else 'None' for n in wide.labels)}]"


def _exp_minus(e: LocalCode, step: Step, args: list[str]) -> str:
    x, m, g = args
    wide = step.ins[0]
    text = (f"({_wide(e, step, x)} - {_narrow_to_wide(m, step.ins[1], wide)}).exp() * "
            f"{_narrow_to_wide(g, step.ins[2], wide)}")
    return f"({text}){end}" if (end := _rounded(e, step)) else text


def _sum_exp(e: LocalCode, step: Step, args: list[str]) -> str:
    x, m = args
    return (f"({_wide(e, step, x)} - "
            f"{_narrow_to_wide(m, step.ins[1], step.ins[0])}).exp().sum({_dims(step)}){_rounded(e, step)}")


def _logsumexp(e: LocalCode, step: Step, args: list[str]) -> str:
    return f"{_wide(e, step, args[0])}.logsumexp({_dims(step)}){_rounded(e, step)}"


def _log_plus(e: LocalCode, step: Step, args: list[str]) -> str:
    text = f"{_wide(e, step, args[0])}.log() + {args[1]}"
    return f"({text}){end}" if (end := _rounded(e, step)) else text


def _spread_logsumexp(b: Steps, step: Step, x: str) -> str:
    """logsumexp over a split dim: the max of all, then the sum of what is above it."""
    small = step.outs[0]
    top = b.settle(b.call(MAX, [x], outs=(small,)))
    top = b.call(FINITE, [top])
    total = b.settle(b.call(SUM_EXP, [b.call(WIDEN, [x]), top], outs=(small,)))
    return b.call(CAST_LIKE, [b.call(LOG_PLUS, [total, top]), x])


LOGSUMEXP = Op("logsumexp", rule=lambda s: Rule(whole=_gone(s)), vjp=_logsumexp_vjp,
               emit=_logsumexp, distribute=_spread_logsumexp, takes=("float",),
               reference=lambda d, x: d.fold(torch.logaddexp, float("-inf"), x))
EXP_MINUS = Op("exp_minus", rule=lambda s: Rule(linear=((2,),)), infer=same, emit=_exp_minus,
               takes=("float",), reference=lambda d, x, m, g: g * math.e ** (x - m))
FINITE = Op("finite", rule=lambda s: Rule(), infer=same, takes=("float",),
            emit=lambda e, s, a: f"{a[0]}.masked_fill({a[0]}.isinf(), 0)",
            reference=lambda d, x: torch.where(x.abs() == float("inf"), 0, x))
SUM_EXP = Op("sum_exp", rule=lambda s: Rule(sums=_gone(s)), emit=_sum_exp, takes=("float",),
             vjp=lambda b, s, ct: [b.call(EXP_MINUS, [s.inputs[0], s.inputs[1], ct[0]]), None],
             reference=lambda d, x, m: d.sum(math.e ** (x - m)))
LOG_PLUS = Op("log_plus", rule=lambda s: Rule(), infer=same, emit=_log_plus, takes=("float",),
              vjp=lambda b, s, ct: [b.quotient(ct[0], s.inputs[0]), None],
              reference=lambda d, x, m: m + torch.log2(x) * math.log(2))


def _spread_argmax(b: Steps, step: Step, x: str) -> str:
    """argmax over a split dim: the max of all, then the least index that has it."""
    small = step.outs[0]
    top = b.settle(b.call(MAX, [x], outs=(small,)))
    back = b.settle(b.call(RANK_OF, [x, top], outs=(small,)))
    return b.call(FROM_RANK, [back])


def _rank_of(e: LocalCode, step: Step, args: list[str]) -> str:
    (i,) = _dims(step)
    start, _ = e.rows(step.ins[0].dims[i])
    x, top = args
    return (f"{e.use(rank_of)}({x}, {_narrow_to_wide(top, step.ins[1], step.ins[0])}, {i}, {start}, "
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
    dim = step.ins[0].dims[_dims(step)[0]]
    if not e.count(dim):
        raise SpecError(f"argmax: {dim.label} is 0; nothing is the largest of nothing")
    return e.count(dim)


def _argmax(e: LocalCode, step: Step, args: list[str]) -> str:
    _not_empty(e, step)
    return f"{args[0]}.argmax({_dims(step)[0]})"


ARGMAX = Op("argmax", rule=lambda s: Rule(whole=_gone(s)), emit=_argmax, distribute=_spread_argmax,
            takes=("number",), dtype=lambda d, o: ["int64"], reference=_argmax_reference)
RANK_OF = Op("rank_of", rule=lambda s: Rule(maxes=_gone(s)), emit=_rank_of, takes=("number",),
             dtype=lambda d, o: ["int64"], reference=lambda d, x, top: -_first_of(d, x, top))
FROM_RANK = Op("from_rank", takes=("number",), rule=lambda s: Rule(linear=((0,),)), infer=same,
               emit=lambda e, s, a: f"-{a[0]}", reference=lambda d, x: x * -1)


def _call(op: Op, text: str, x: Operand, lost: int | None = None) -> Value:
    meant = f'{op.name} "{text}": one spec on each side, the right one with some of the dims of the left one'
    ins, outs = parse_specs(text, meant)
    if len(ins) != 1 or len(outs) != 1 or any(n not in ins[0].labels for n in outs[0].labels):
        raise SpecError(meant)
    if lost is not None and len(ins[0].labels) - len(outs[0].labels) != lost:
        raise SpecError(f'{op.name} "{text}": it runs over {lost} dim, the spec drops '
                        f'{len(ins[0].labels) - len(outs[0].labels)}')
    if [n for n in ins[0].labels if n in outs[0].labels] != list(outs[0].labels):
        raise SpecError(f'{op.name} "{text}": the dims that remain keep their order')
    return apply(op, (x,), text)


def sum(text: str, x: Operand) -> Value:
    """The sum over the dims that the result lacks; int64 of integers and masks.

    Over a split dim it is owed; a sum may be owed before.

    >>> from shardlib import Layout, Mesh, lower, sharded
    >>> f = sharded("B T D -> D")(lambda x: sum("B T D -> D", x))
    >>> lower(f, Layout(B="dp"), mesh=Mesh(dp=4))
    @sharded("B/dp T D -> D", layout=EXPLICIT)
    def f(x):
        v1 = sum("B/dp T D -> D +dp", x)
        v = all_reduce("D +dp -> D", v1)
        return v
    """
    return _call(SUM, text, x)


def mean(text: str, x: Operand) -> Value:
    """The mean over the dims that the result lacks, by their global sizes.

    What is split may be uneven, and a sum may be owed.

    >>> import torch
    >>> from shardlib import Layout, Mesh, sharded, simulate
    >>> f = sharded("B -> ()")(lambda x: mean("B -> ()", x))
    >>> x = torch.tensor([0.0, 0.0, 6.0])                               # ranks have 0 0 and 6
    >>> simulate(f, Layout(B="dp"), x, mesh=Mesh(dp=2))
    tensor(2.)
    """
    return _call(MEAN, text, x)


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
    return _call(MAX, text, x)


def softmax(x: Operand, along: str) -> Value:
    """exp(x) over its sum along one dim. Refused where that dim is split: say that it is whole, as in `E/1`.

    >>> import torch
    >>> from shardlib import Layout, Mesh, sharded, simulate
    >>> route = sharded("T E/1 -> T E/1")(lambda x: softmax(x, along="E"))
    >>> scores = torch.tensor([[0.0, 0.0], [1.0, 1000.0]])
    >>> simulate(route, Layout(E="ep", T="dp"), scores, mesh=Mesh(dp=2, ep=2))
    tensor([[0.5000, 0.5000],
            [0.0000, 1.0000]])
    """
    if isinstance(x, Value) and along not in x.spec.labels:
        raise SpecError(f"softmax: {along} is no dim of {x.spec}")
    return apply(SOFTMAX, (x,), along=along)


def logsumexp(text: str, x: Operand) -> Value:
    """log of the sum of exp over the one dim that the result lacks, without overflow.

    Where that dim is split, no logits move: ranks join a maximum, then a sum, each as large as the result.

    >>> import torch
    >>> from shardlib import Layout, Mesh, sharded, simulate
    >>> log, f = [], sharded("B V -> B")(lambda x: logsumexp("B V -> B", x))
    >>> simulate(f, Layout(V="tp"), torch.tensor([[100.0, 100.0, 0.0]]), mesh=Mesh(tp=2), log=log)
    tensor([100.6931])
    >>> log                                                             # ranks, collective, elements
    [((0, 1), 'all_reduce', 1), ((0, 1), 'all_reduce', 1)]
    """
    return _call(LOGSUMEXP, text, x, lost=1)


def argmax(text: str, x: Operand) -> Value:
    """The first index (int64) of the maximum over the one dim that the result lacks; a NaN is the maximum.

    Indices count over the whole dim, wherever it is split. Refused: a dim of size 0.

    >>> import torch
    >>> from shardlib import Layout, Mesh, sharded, simulate
    >>> f = sharded("B V -> B")(lambda logits: argmax("B V -> B", logits))
    >>> simulate(f, Layout(V="tp"), torch.tensor([[0.0, 1.0, 2.0, 9.0, 9.0]]), mesh=Mesh(tp=2))
    tensor([3])
    """
    return _call(ARGMAX, text, x, lost=1)


TABLE = {op.name: op for op in (SUM, MEAN, SPREAD, MAX, SOFTMAX, SOFTMAX_VJP, LOGSUMEXP, EXP_MINUS, FINITE,
                                SUM_EXP, LOG_PLUS, ARGMAX, RANK_OF, FROM_RANK)}
