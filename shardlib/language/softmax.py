"""softmax and logsumexp along a dim.

Both need it whole, or take the distributed form: a maximum over the pieces, then a sum of what is above it,
each a step of the program. Of bfloat16 and float16, what is summed up is summed in
float32, and rounded once.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shardlib.dtypes import as_they_come, narrow
from shardlib.errors import SpecError
from shardlib.language.arithmetic import MUL, same
from shardlib.language.casts import CAST_LIKE, WIDEN
from shardlib.language.extremes import MAX
from shardlib.language.local_code import LocalCode
from shardlib.language.reductions import beside, dims_gone, names_gone, reduce_call, rounding, widened
from shardlib.language.steps import Steps
from shardlib.language.value import Operand, Value, apply
from shardlib.program import Op, Step
from shardlib.reference import Dims
from shardlib.rules import Rule
from shardlib.spec import Spec, nameable


def _along(step: Step) -> str:
    return step.options["along"]


def _softmax(d: Dims, x: Tensor) -> Tensor:
    return math.e ** (x - d.fold(torch.logaddexp, float("-inf"), x, _along(d.step)))


def _softmax_vjp(b: Steps, step: Step, ct: Sequence[str]) -> list[str]:
    return [b.call(SOFTMAX_VJP, [step.outputs[0], ct[0]], along=_along(step))]


def _softmax_backward(e: LocalCode, step: Step, args: list[str]) -> str:
    y, g = args
    i = step.ins[0].labels.index(_along(step))
    if rounding(e, step):
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


def _top_and_total(b: Steps, x: str, small: Spec) -> tuple[str, str]:
    """Over a split dim, not rounded: the max of all, then the sum of the exps of what is above it."""
    top = b.call(FINITE, [b.settle(b.call(MAX, [x], outs=(small,)))])
    return top, b.settle(b.call(SUM_EXP, [b.call(WIDEN, [x]), top], outs=(small,)))


def _spread_softmax(b: Steps, step: Step) -> list[str]:
    """softmax over a split dim. (exp of what is above a logsumexp would be off where that is large.)"""
    (x,), (wide,) = step.inputs, step.ins
    small = Spec(tuple(d for d in wide.dims if d.label != _along(step)))
    return [b.call(SHARE, [x, *_top_and_total(b, x, small)])]


SOFTMAX = Op("softmax", takes=("float",), keywords={"along": nameable},
             rule=lambda s: Rule(whole=(_along(s),)), infer=_has_dim, vjp=_softmax_vjp,
             distribute=_spread_softmax,
             emit=lambda e, s, a: f"{a[0]}.softmax({s.ins[0].labels.index(_along(s))})",
             reference=lambda d, x: _softmax(d, x))
SOFTMAX_VJP = Op("softmax_vjp", keywords={"along": nameable},
                 rule=lambda s: Rule(linear=((1,),), whole=(_along(s),)), infer=_has_dim,
                 emit=_softmax_backward, takes=("float",),
                 reference=lambda d, y, g: d.vjp(_softmax, (y.log(),), g, d.step.ins[0]))


def _logsumexp_vjp(b: Steps, step: Step, ct: Sequence[str]) -> list[str]:
    return [b.call(EXP_MINUS, [step.inputs[0], step.outputs[0], ct[0]])]


def _exp_minus(e: LocalCode, step: Step, args: list[str]) -> str:
    x, m, g = args
    wide = step.ins[0]
    text = (f"({widened(e, step, x)} - {beside(m, step.ins[1], wide)}).exp() * "
            f"{beside(g, step.ins[2], wide)}")
    return f"({text}){end}" if (end := rounding(e, step)) else text


def _sum_exp(e: LocalCode, step: Step, args: list[str]) -> str:
    x, m = args
    return (f"({widened(e, step, x)} - "
            f"{beside(m, step.ins[1], step.ins[0])}).exp().sum({dims_gone(step)}){rounding(e, step)}")


def _logsumexp(e: LocalCode, step: Step, args: list[str]) -> str:
    return f"{widened(e, step, args[0])}.logsumexp({dims_gone(step)}){rounding(e, step)}"


def _log_plus(e: LocalCode, step: Step, args: list[str]) -> str:
    text = f"{widened(e, step, args[0])}.log() + {args[1]}"
    return f"({text}){end}" if (end := rounding(e, step)) else text


def _spread_logsumexp(b: Steps, step: Step) -> list[str]:
    """logsumexp over a split dim."""
    (x,) = step.inputs
    top, total = _top_and_total(b, x, step.outs[0])
    return [b.call(CAST_LIKE, [b.call(LOG_PLUS, [total, top]), x])]


def _share(e: LocalCode, step: Step, args: list[str]) -> str:
    top, total = (beside(arg, spec, step.ins[0]) for arg, spec in zip(args[1:], step.ins[1:]))
    kinds = [e.dtypes[n] for n in step.inputs]
    end = f".to(torch.{kinds[0]})" if narrow(kinds[0]) or len({*kinds}) > 1 else ""
    return f"(({widened(e, step, args[0])} - {top}).exp() / {total}){end}"


def _share_vjp(b: Steps, step: Step, ct: Sequence[str]) -> list[str | None]:
    """That of x is g y; the total's is the sum of these, less than 0, over it. The top has no slope."""
    mine = b.call(MUL, [step.outputs[0], ct[0]])
    of_all = b.einsum_to(step.ins[2], [b.call(WIDEN, [mine])])
    return [mine, None, b.scale(b.quotient(of_all, step.inputs[2]), -1.0)]


LOGSUMEXP = Op("logsumexp", rule=lambda s: Rule(whole=names_gone(s)), vjp=_logsumexp_vjp,
               emit=_logsumexp, distribute=_spread_logsumexp, takes=("float",),
               reference=lambda d, x: d.fold(torch.logaddexp, float("-inf"), x))
EXP_MINUS = Op("exp_minus", rule=lambda s: Rule(linear=((2,),)), infer=same, emit=_exp_minus,
               takes=("float",), reference=lambda d, x, m, g: g * math.e ** (x - m))
SHARE = Op("share", rule=lambda s: Rule(), infer=same, emit=_share, takes=("float",), vjp=_share_vjp,
           reads=as_they_come, dtype=lambda d, o: d[:1],
           reference=lambda d, x, top, total: math.e ** (x - top) / total)
FINITE = Op("finite", rule=lambda s: Rule(), infer=same, takes=("float",),
            emit=lambda e, s, a: f"{a[0]}.masked_fill({a[0]}.isinf(), 0)",
            reference=lambda d, x: torch.where(x.abs() == float("inf"), 0, x))
SUM_EXP = Op("sum_exp", rule=lambda s: Rule(sums=names_gone(s)), emit=_sum_exp, takes=("float",),
             vjp=lambda b, s, ct: [b.call(EXP_MINUS, [s.inputs[0], s.inputs[1], ct[0]]), None],
             reference=lambda d, x, m: d.sum(math.e ** (x - m)))
LOG_PLUS = Op("log_plus", rule=lambda s: Rule(), infer=same, emit=_log_plus, takes=("float",),
              vjp=lambda b, s, ct: [b.quotient(ct[0], s.inputs[0]), None],
              reference=lambda d, x, m: m + torch.log2(x) * math.log(2))


def softmax(x: Operand, along: str) -> Value:
    """exp(x) over its sum along one dim; where that is split, ranks join a maximum and a sum for each row.

    >>> import torch
    >>> from shardlib import Layout, Mesh, sharded, simulate
    >>> route = sharded("T E -> T E")(lambda x: softmax(x, along="E"))
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
    return reduce_call(LOGSUMEXP, text, x, lost=1)


TABLE = {op.name: op for op in (SOFTMAX, SOFTMAX_VJP, LOGSUMEXP, EXP_MINUS, SHARE, FINITE,
                                SUM_EXP, LOG_PLUS)}
