"""Ops along dims: sum, mean, max, softmax, logsumexp, argmax.

Their spec string says the dims that remain: `mean("B T -> ()", x)`. A split dim that is summed leaves a sum owed, one
that is maxed leaves a max owed. softmax, logsumexp and argmax need their dim whole, or take the distributed form: the
same over the pieces, joined by small reductions, each of them a step of the program.
"""
from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Sequence

import torch
from torch import Tensor

from shardlib.errors import SpecError
from shardlib.program import Op, Step
from shardlib.rules import Rule
from shardlib.spec import Spec, nameable, parse_signature
from shardlib.trace import apply

if TYPE_CHECKING:
    from shardlib.emit import Emitter
    from shardlib.reference import Dims


def _gone(step: Step) -> tuple[str, ...]:
    return tuple(n for n in step.ins[0].names if n not in step.outs[0].names)


def _dims(step: Step) -> tuple[int, ...]:
    return tuple(i for i, label in enumerate(step.ins[0].labels) if label not in step.outs[0].labels)


def _sum(e: Emitter, step: Step, args: list[str]) -> str:
    return f"{args[0]}.sum({_dims(step)})" if _dims(step) else f"{args[0]}.clone()"


def _mean(e: Emitter, step: Step, args: list[str]) -> str:
    return f"{_sum(e, step, args)} / {_count(e, step)}" if _count(e, step) else f"{_sum(e, step, args)} * float('nan')"


def _made(step: Step) -> tuple[str, ...]:
    return tuple(n for n in step.outs[0].names if n not in step.ins[0].names)


def _count(e: Emitter, step: Step) -> int:
    n = 1
    for name in _gone(step):
        n *= e.sizes[name]
    return n


def _mean_vjp(b: Any, step: Step, ct: Sequence[str]) -> list[str]:
    return [b.spread(ct[0], step.ins[0], mean=True)]


def _spread(e: Emitter, step: Step, args: list[str]) -> str:
    (have,), (want,) = step.ins, step.outs
    index = ", ".join(":" if n in have.labels else "None" for n in want.labels)
    text = f"{args[0]}[{index}].expand({e.shape(want)})" if len(have.labels) < len(want.labels) else args[0]
    if not step.options.get("mean"):
        return text
    count = 1
    for name in want.names:
        count *= 1 if name in have.names else e.sizes[name]
    return f"{text} / {count or 1}"


def _max(e: Emitter, step: Step, args: list[str]) -> str:
    return e.use(amax) + f"({args[0]}, {_dims(step)})"


def amax(x: Any, dims: tuple[int, ...]) -> Any:
    """The maximum over `dims`; -inf (the least integer, False) where there is nothing, NaN where there is one."""
    if any(x.shape[d] == 0 for d in dims):
        shape = [n for i, n in enumerate(x.shape) if i not in dims]
        if x.dtype == torch.bool:
            return x.new_zeros(shape)
        return x.new_full(shape, float("-inf") if x.is_floating_point() else torch.iinfo(x.dtype).min)
    return x.amax(dims) if dims else x.clone()


def _fold_max(d: Dims, x: Tensor) -> Tensor:
    low = float("-inf") if x.is_floating_point() else False if x.dtype == torch.bool else torch.iinfo(x.dtype).min
    return d.fold(torch.maximum, low, x)


SUM = Op("sum", rule=lambda s: Rule(linear=((0,),), sums=_gone(s)), emit=_sum, vjp=lambda b, s, ct: [b.spread(ct[0], s.ins[0])],
         reference=lambda d, x: d.sum(x))
MEAN = Op("mean", rule=lambda s: Rule(linear=((0,),), sums=_gone(s)), emit=_mean, vjp=_mean_vjp,
          reference=lambda d, x: d.sum(x) / d.count(*d.gone))
SPREAD = Op("spread", keywords={"mean": lambda v: v in (None, True)}, rule=lambda s: Rule(linear=((0,),)), emit=_spread, vjp=None,
            reference=lambda d, x: x / d.count(*_made(d.step)) if d.options.get("mean") else x)
MAX = Op("max", rule=lambda s: Rule(maxes=_gone(s)), emit=_max,
         reference=_fold_max)


def _along(step: Step) -> str:
    return step.options["along"]


def _softmax(d: Dims, x: Tensor) -> Tensor:
    return math.e ** (x - d.fold(torch.logaddexp, float("-inf"), x, _along(d.step)))


def _softmax_vjp(b: Any, step: Step, ct: Sequence[str]) -> list[str]:
    return [b.call(SOFTMAX_VJP, [step.outputs[0], ct[0]], along=_along(step))]


def _softmax_backward(e: Emitter, step: Step, args: list[str]) -> str:
    y, g = args
    i = step.ins[0].labels.index(_along(step))
    return f"{y} * ({g} - ({g} * {y}).sum({i}, keepdim=True))"


def _first(ins: Sequence[Spec], attrs: dict[str, Any]) -> tuple[Spec, ...]:
    return (ins[0],)


def _has_dim(ins: Sequence[Spec], attrs: dict[str, Any]) -> tuple[Spec, ...]:
    if attrs["along"] not in ins[0].labels:
        raise SpecError(f"softmax: {attrs['along']} is no dim of {ins[0]}")
    return (ins[0],)


SOFTMAX = Op("softmax", keywords={"along": nameable}, rule=lambda s: Rule(whole=(_along(s),)), infer=_has_dim, vjp=_softmax_vjp,
             emit=lambda e, s, a: f"{a[0]}.softmax({s.ins[0].labels.index(_along(s))})",
             reference=lambda d, x: _softmax(d, x))
SOFTMAX_VJP = Op("softmax_vjp", keywords={"along": nameable}, rule=lambda s: Rule(linear=((1,),), whole=(_along(s),)), infer=_has_dim,
                 emit=_softmax_backward,
                 reference=lambda d, y, g: d.vjp(_softmax, (y.log(),), g, d.step.ins[0]))


def _logsumexp_vjp(b: Any, step: Step, ct: Sequence[str]) -> list[str]:
    return [b.call(EXP_MINUS, [step.inputs[0], step.outputs[0], ct[0]])]


def _narrow_to_wide(arg: str, narrow: Spec, wide: Spec) -> str:
    return f"{arg}[{', '.join(':' if n in narrow.labels else 'None' for n in wide.labels)}]"


def _exp_minus(e: Emitter, step: Step, args: list[str]) -> str:
    x, m, g = args
    wide = step.ins[0]
    return f"({x} - {_narrow_to_wide(m, step.ins[1], wide)}).exp() * {_narrow_to_wide(g, step.ins[2], wide)}"


def _sum_exp(e: Emitter, step: Step, args: list[str]) -> str:
    x, m = args
    return f"({x} - {_narrow_to_wide(m, step.ins[1], step.ins[0])}).exp().sum({_dims(step)})"


def _spread_logsumexp(b: Any, step: Step, x: str) -> str:
    """logsumexp over a split dim: the max of all, then the sum of what is above it."""
    small = step.outs[0]
    top = b.settle(b.call(MAX, [x], outs=(small,)))
    top = b.call(FINITE, [top])
    total = b.settle(b.call(SUM_EXP, [x, top], outs=(small,)))
    return b.call(LOG_PLUS, [total, top])


LOGSUMEXP = Op("logsumexp", rule=lambda s: Rule(whole=_gone(s)), vjp=_logsumexp_vjp,
               emit=lambda e, s, a: f"{a[0]}.logsumexp({_dims(s)})", distribute=_spread_logsumexp,
               reference=lambda d, x: d.fold(torch.logaddexp, float("-inf"), x))
EXP_MINUS = Op("exp_minus", rule=lambda s: Rule(linear=((2,),)), infer=_first, emit=_exp_minus,
               reference=lambda d, x, m, g: g * math.e ** (x - m))
FINITE = Op("finite", rule=lambda s: Rule(), infer=_first, emit=lambda e, s, a: f"{a[0]}.masked_fill({a[0]}.isinf(), 0)",
            reference=lambda d, x: torch.where(x.abs() == float("inf"), 0, x))
SUM_EXP = Op("sum_exp", rule=lambda s: Rule(sums=_gone(s)), emit=_sum_exp,
             vjp=lambda b, s, ct: [b.call(EXP_MINUS, [s.inputs[0], s.inputs[1], ct[0]]), None],
             reference=lambda d, x, m: d.sum(math.e ** (x - m)))
LOG_PLUS = Op("log_plus", rule=lambda s: Rule(), infer=_first, emit=lambda e, s, a: f"{a[0]}.log() + {a[1]}",
              vjp=lambda b, s, ct: [b.quotient(ct[0], s.inputs[0]), None],
              reference=lambda d, x, m: m + torch.log2(x) * math.log(2))


def _spread_argmax(b: Any, step: Step, x: str) -> str:
    """argmax over a split dim: the max of all, then the least index that has it."""
    small = step.outs[0]
    top = b.settle(b.call(MAX, [x], outs=(small,)))
    back = b.settle(b.call(RANK_OF, [x, top], outs=(small,)))
    return b.call(FROM_RANK, [back], of=_gone(step)[0])


def _rank_of(e: Emitter, step: Step, args: list[str]) -> str:
    (name,) = _gone(step)
    start, _ = e.extent(name, step.ins[0].axes(name))
    x, top = args
    return f"{e.use(rank_of)}({x}, {_narrow_to_wide(top, step.ins[1], step.ins[0])}, {_dims(step)[0]}, {start}, {e.sizes[name]})"


def rank_of(x: Any, top: Any, dim: int, start: int, n: int) -> Any:
    """n - 1 - i for the first i with x[i] = top (NaN equals NaN), i counted from `start`; -1 where there is none."""
    index = torch.arange(start, start + x.shape[dim], device=x.device).view([-1 if i == dim else 1 for i in range(x.ndim)])
    return amax(torch.where((x == top) | (x.isnan() & top.isnan()), n - 1 - index, -1), (dim,))


def _first_of(d: Dims, x: Tensor, top: Tensor) -> Tensor:
    """The first index at which x is `top`; the size of the dim where there is none."""
    here = (x == top) | (x != x) & (top != top)
    return d.fold(torch.minimum, d.count(*d.gone), torch.where(here, d.index(*d.gone), d.count(*d.gone)))


def _argmax_reference(d: Dims, x: Tensor) -> Tensor:
    if not d.count(*d.gone):
        raise IndexError("nothing is the largest of nothing")
    return _first_of(d, x, _fold_max(d, x))


ARGMAX = Op("argmax", rule=lambda s: Rule(whole=_gone(s)), emit=lambda e, s, a: f"{a[0]}.argmax({_dims(s)[0]})",
            distribute=_spread_argmax, dtype=lambda d, o: ["int64"],
            reference=_argmax_reference)
RANK_OF = Op("rank_of", rule=lambda s: Rule(maxes=_gone(s)), emit=_rank_of, dtype=lambda d, o: ["int64"],
             reference=lambda d, x, top: d.count(*d.gone) - 1 - _first_of(d, x, top))
FROM_RANK = Op("from_rank", keywords={"of": nameable}, rule=lambda s: Rule(), infer=_first, emit=lambda e, s, a: f"{e.sizes[s.options['of']] - 1} - {a[0]}",
               reference=lambda d, x: d.count(d.options["of"]) - 1 - x)


def _call(op: Op, text: str, x: Any, lost: int | None = None) -> Any:
    ins, outs = parse_signature(text)
    if len(ins) != 1 or len(outs) != 1 or None in (*ins, *outs) or any(n not in ins[0].labels for n in outs[0].labels):
        raise SpecError(f'{op.name} "{text}": one spec on each side, the right one with some of the dims of the left one')
    if lost is not None and len(ins[0].labels) - len(outs[0].labels) != lost:
        raise SpecError(f'{op.name} "{text}": it runs over {lost} dim, the spec drops {len(ins[0].labels) - len(outs[0].labels)}')
    if [n for n in ins[0].labels if n in outs[0].labels] != list(outs[0].labels):
        raise SpecError(f'{op.name} "{text}": the dims that remain keep their order')
    return apply(op, (x,), text)


def sum(text: str, x: Any) -> Any:
    """The sum over the dims that the result lacks: sum("B T D -> B T", x)."""
    return _call(SUM, text, x)


def mean(text: str, x: Any) -> Any:
    """The mean over the dims that the result lacks, by their global sizes."""
    return _call(MEAN, text, x)


def max(text: str, x: Any) -> Any:      # noqa: A001
    """The maximum over the dims that the result lacks; NaN if there is one. It has no gradient."""
    return _call(MAX, text, x)


def softmax(x: Any, along: str) -> Any:
    """softmax over the dim `along`, which is whole."""
    if along not in x.spec.labels:
        raise SpecError(f"softmax: {along} is no dim of {x.spec}")
    return apply(SOFTMAX, (x,), along=along)


def logsumexp(text: str, x: Any) -> Any:
    """log of the sum of exp over the one dim that the result lacks: logsumexp("B V -> B", x)."""
    return _call(LOGSUMEXP, text, x, lost=1)


def argmax(text: str, x: Any) -> Any:
    """The first index (int64) of the maximum over the one dim that the result lacks; a NaN is the maximum."""
    return _call(ARGMAX, text, x, lost=1)


TABLE = {op.name: op for op in (SUM, MEAN, SPREAD, MAX, SOFTMAX, SOFTMAX_VJP, LOGSUMEXP, EXP_MINUS, FINITE, SUM_EXP, LOG_PLUS,
                                ARGMAX, RANK_OF, FROM_RANK)}
