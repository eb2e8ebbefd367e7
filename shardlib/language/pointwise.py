"""Pointwise functions of one tensor, and `where`.

Each row of `UNARY` is an op: the plain-torch expression of its value, and of its derivative in terms of the
cotangent `g`, the operand `x` and the result `y`. All are nonlinear: of a sum that is still owed they are
refused. Their derivatives are linear in `g`, so a cotangent may be owed. `relu` and `square` take integers,
too.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from shardlib.dtypes import FLOATS, as_they_come, widest
from shardlib.errors import SpecError
from shardlib.language.arithmetic import align, broadcast
from shardlib.language.local_code import LocalCode
from shardlib.language.steps import Steps
from shardlib.language.value import Operand, Value, apply
from shardlib.program import Op, Step, number
from shardlib.rules import Rule
from shardlib.spec import Spec

UNARY: dict[str, tuple[str, str]] = {
    "silu": ("F.silu({x})", "torch.ops.aten.silu_backward({g}, {x})"),
    "gelu": ("F.gelu({x})", "torch.ops.aten.gelu_backward({g}, {x})"),
    "relu": ("F.relu({x})", "torch.ops.aten.threshold_backward({g}, {x}, 0)"),
    "tanh": ("torch.tanh({x})", "torch.ops.aten.tanh_backward({g}, {y})"),
    "sigmoid": ("torch.sigmoid({x})", "torch.ops.aten.sigmoid_backward({g}, {y})"),
    "exp": ("torch.exp({x})", "{g} * {y}"),
    "log": ("torch.log({x})", "{g} / {x}"),
    "rsqrt": ("torch.rsqrt({x})", "-0.5 * {g} * {y} ** 3"),
    "square": ("torch.square({x})", "2 * {g} * {x}"),
}
OF_INTEGERS = ("relu", "square")
PRODUCTS = ("exp", "square")        # their derivative is linear in its first operand, too
REFERENCES: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": lambda x: x * (1 + torch.tanh(x / 2)) / 2,
    "gelu": lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2,
    "relu": lambda x: torch.where(x <= 0, 0, x),
    "tanh": lambda x: 2 * torch.sigmoid(2 * x) - 1,
    "sigmoid": lambda x: (1 + torch.tanh(x / 2)) / 2,
    "exp": lambda x: math.e ** x,
    "log": lambda x: torch.log2(x) * math.log(2),
    "rsqrt": lambda x: x ** -0.5,
    "square": lambda x: x * x,
}
INVERSES: dict[str, Callable[[Tensor], Tensor]] = {         # of those whose derivative is told the result
    "tanh": torch.atanh, "sigmoid": torch.logit, "exp": torch.log, "rsqrt": lambda y: y ** -2}


def _infer(ins: Sequence[Spec], attrs: dict[str, Any]) -> tuple[Spec, ...]:
    return (ins[0],)


def _unary(name: str, value: str, slope: str) -> tuple[Op, Op]:
    from_result, function = "{y}" in slope, REFERENCES[name]
    operand = INVERSES.get(name, lambda x: x)
    linear = ((0,), (1,)) if name in PRODUCTS else ((1,),)
    backward = Op(f"{name}_vjp", rule=lambda s: Rule(linear=linear), infer=_infer,
                  emit=lambda e, s, a: "(" + slope.format(x=a[0], y=a[0], g=a[1]) + ")", takes=("float",),
                  reference=lambda d, x, g: d.vjp(lambda d, x: function(x), (operand(x),), g, d.step.ins[0]))

    def vjp(b: Steps, step: Step, ct: Sequence[str]) -> list[str]:
        return [b.call(backward, [step.outputs[0] if from_result else step.inputs[0], ct[0]])]
    forward = Op(name, rule=lambda s: Rule(), infer=_infer, vjp=vjp,
                 emit=lambda e, s, a: value.format(x=a[0]),
                 takes=("number" if name in OF_INTEGERS else "float",),
                 reference=lambda d, x: function(x))
    return forward, backward


OPS: dict[str, Op] = {op.name: op for name, row in UNARY.items() for op in _unary(name, *row)}


def silu(x: Operand) -> Value:
    """x sigmoid(x), of every element. Refused of a sum that is still owed.

    >>> import torch
    >>> from shardlib import sharded
    >>> sharded("D -> D")(silu)(torch.tensor([-1.0, 0.0, 1.0]))
    tensor([-0.2689,  0.0000,  0.7311])
    """
    return apply(OPS["silu"], (x,))


def gelu(x: Operand) -> Value:
    """x times the cumulative normal distribution at x (Hendrycks and Gimpel 2016), exactly: no tanh.

    Refused of a sum that is still owed.

    >>> import torch
    >>> from shardlib import sharded
    >>> sharded("D -> D")(gelu)(torch.tensor([-1.0, 0.0, 1.0]))
    tensor([-0.1587,  0.0000,  0.8413])
    """
    return apply(OPS["gelu"], (x,))


def relu(x: Operand) -> Value:
    """max(x, 0), of floats and of integers. Refused of a sum that is still owed: its terms have any sign.

    >>> from shardlib import EXPLICIT, Mesh, einsum, lower, sharded
    >>> @sharded("F/tp, F/tp D -> D +tp", layout=EXPLICIT)
    ... def f(x, w):
    ...     return relu(einsum("F/tp, F/tp D -> D +tp", x, w))
    >>> lower(f, mesh=Mesh(tp=2))                                       # doctest: +ELLIPSIS
    Traceback (most recent call last):
    shardlib.errors.SpecError: relu: einsum(...) owes a sum over tp, and relu of a sum is not the sum ...
    """
    return apply(OPS["relu"], (x,))


def tanh(x: Operand) -> Value:
    """The hyperbolic tangent, between -1 and 1. Refused of a sum that is still owed.

    To cap logits at 30 without a corner, whatever V is split over:

    >>> import torch
    >>> from shardlib import Layout, Mesh, sharded, simulate
    >>> capped = sharded("V -> V")(lambda logits: 30 * tanh(logits / 30))
    >>> simulate(capped, Layout(V="tp"), torch.tensor([-1.0, 10.0, 1000.0]), mesh=Mesh(tp=2))
    tensor([-0.9996,  9.6454, 30.0000])
    """
    return apply(OPS["tanh"], (x,))


def sigmoid(x: Operand) -> Value:
    """1 / (1 + exp(-x)): a probability from its log odds. Refused of a sum that is still owed.

    >>> import torch
    >>> from shardlib import sharded
    >>> log_odds = torch.tensor([1 / 4, 1.0, 3.0]).log()
    >>> sharded("E -> E")(sigmoid)(log_odds)
    tensor([0.2000, 0.5000, 0.7500])
    """
    return apply(OPS["sigmoid"], (x,))


def exp(x: Operand) -> Value:
    """e to the power of every element. Refused of a sum that is still owed. See also `logsumexp`.

    >>> import torch
    >>> from shardlib import sharded
    >>> sharded("D -> D")(exp)(torch.tensor([0.0, 1.0]))
    tensor([1.0000, 2.7183])
    """
    return apply(OPS["exp"], (x,))


def log(x: Operand) -> Value:
    """The natural logarithm, -inf of 0, NaN of what is negative. Refused of a sum that is still owed.

    Perplexity per token, from how likely each was:

    >>> import torch
    >>> from shardlib import Layout, Mesh, sharded, simulate
    >>> from shardlib.functions import mean
    >>> perplexity = sharded("T -> ()")(lambda p: exp(-mean("T -> ()", log(p))))
    >>> simulate(perplexity, Layout(T="cp"), torch.tensor([0.5, 0.5, 0.25, 0.25]), mesh=Mesh(cp=2))
    tensor(2.8284)
    """
    return apply(OPS["log"], (x,))


def rsqrt(x: Operand) -> Value:
    """1 / sqrt(x). Refused of a sum that is still owed.

    A norm over a split dim, which `rms_norm` refuses: of each row one number is sent.

    >>> import torch
    >>> from shardlib import Layout, Mesh, sharded, simulate
    >>> from shardlib.functions import mean
    >>> norm = sharded("B D -> B D")(lambda x: x * rsqrt(mean("B D -> B", square(x))))
    >>> simulate(norm, Layout(D="tp"), torch.tensor([[3.0, 4.0, 0.0, 0.0]]), mesh=Mesh(tp=2))
    tensor([[1.2000, 1.6000, 0.0000, 0.0000]])
    """
    return apply(OPS["rsqrt"], (x,))


def square(x: Operand) -> Value:
    """x * x, of floats and of integers: there is no `**`. Refused of a sum that is still owed.

    >>> import torch
    >>> from shardlib import sharded
    >>> sharded("D -> D")(square)(torch.tensor([-3, 2]))
    tensor([9, 4])
    """
    return apply(OPS["square"], (x,))


def _cast_vjp(b: Steps, step: Step, ct: Sequence[str]) -> list[str | None]:
    return [b.like(ct[0], step.inputs[0]), *[None] * (len(step.inputs) - 1)]


def _to(e: LocalCode, step: Step, args: list[str]) -> str:
    """The first operand in the dtype of the result."""
    have, want = e.dtypes[step.inputs[0]], e.dtypes[step.outputs[0]]
    return args[0] if have == want else f"{args[0]}.to(torch.{want})"


CAST = Op("cast", keywords={"dtype": lambda v: v in FLOATS}, rule=lambda s: Rule(linear=((0,),)),
          infer=_infer, vjp=_cast_vjp, emit=lambda e, s, a: f"{a[0]}.to(torch.{s.options['dtype']})",
          dtype=lambda d, o: [o["dtype"]], reference=lambda d, x: x)
CAST_LIKE = Op("cast_like", rule=lambda s: Rule(linear=((0,),), uses=((0,),)), infer=_infer, vjp=_cast_vjp,
               index=(1,), emit=_to, takes=("any",), reads=as_they_come,
               dtype=lambda d, o: [d[1] if d[1] in FLOATS else d[1] and d[0]], reference=lambda d, x, like: x)
WIDEN = Op("widen", rule=lambda s: Rule(linear=((0,),)), infer=_infer, vjp=_cast_vjp, emit=_to,
           reads=as_they_come, dtype=lambda d, o: [widest(d[0], "float32")], reference=lambda d, x: x)


def cast(x: Operand, dtype: str) -> Value:
    """`x` in another floating-point dtype: "float32", "bfloat16", "float16" or "float64". A sum may be owed.

    >>> import torch
    >>> from shardlib import sharded
    >>> half = sharded("D -> D")(lambda x: cast(x, "bfloat16"))
    >>> half(torch.tensor([1.0, 1.01]))
    tensor([1.0000, 1.0078], dtype=torch.bfloat16)
    """
    if dtype not in FLOATS:
        raise SpecError(f"cast: {dtype!r} is not one of {', '.join(FLOATS)}")
    return apply(CAST, (x,), dtype=dtype)


def _where_infer(ins: Sequence[Spec], attrs: dict[str, Any]) -> tuple[Spec, ...]:
    return (broadcast("where", ins),)


def _where_emit(e: LocalCode, step: Step, args: list[str]) -> str:
    return f"torch.where({', '.join(align(a, s, step.outs[0]) for a, s in zip(args, step.ins))})"


def _where_vjp(b: Steps, step: Step, ct: Sequence[str]) -> list[str | None]:
    mask = step.inputs[0]
    zero = b.scale(ct[0], 0.0)
    return [None, b.einsum_to(step.ins[1], [b.call(WHERE, [mask, ct[0], zero])]),
            b.einsum_to(step.ins[2], [b.call(WHERE, [mask, zero, ct[0]])])]


WHERE = Op("where", rule=lambda s: Rule(linear=((1, 2),)), infer=_where_infer, emit=_where_emit,
           vjp=_where_vjp, index=(0,), takes=("mask", "any"), promotes=True,
           reference=lambda d, mask, a, b: a.masked_fill(~mask, 0) + b.masked_fill(mask, 0))


def where(mask: Operand, a: Operand, b: Operand) -> Value:
    """`a` where `mask`, else `b`; dims that one of them lacks are broadcast. Both owe a sum, or neither does.

    >>> import torch
    >>> from shardlib import Layout, Mesh, sharded, simulate
    >>> @sharded("B T, B T D, D -> B T D")
    ... def padded(real, x, filler):
    ...     return where(real, x, filler)
    >>> real, x = torch.tensor([[True, False]]), torch.ones(1, 2, 3)
    >>> simulate(padded, Layout(T="cp"), real, x, torch.tensor([7.0, 8.0, 9.0]), mesh=Mesh(cp=2))
    tensor([[[1., 1., 1.],
             [7., 8., 9.]]])
    """
    return apply(WHERE, (mask, a, b))


STOP_GRADIENT = Op("stop_gradient", rule=lambda s: Rule(linear=((0,),)), infer=_infer,
                   emit=lambda e, s, a: f"{a[0]}.detach()", constant=True, reference=lambda d, x: x.detach())


def stop_gradient(x: Operand) -> Value:
    """`x`, as a constant to `value_and_grad`. A sum may be owed.

    >>> import torch
    >>> from shardlib import sharded, value_and_grad
    >>> f = sharded("() -> ()")(lambda x: x * x + stop_gradient(x * x * x))
    >>> value_and_grad(f, wrt="x")(torch.tensor(3.0))                   # the slope of x * x alone
    (tensor(36.), tensor(6.))
    """
    return apply(STOP_GRADIENT, (x,))


COMPARE = {name: Op(name, keywords={"than": number}, rule=lambda s: Rule(), infer=_infer, constant=True,
                    takes=("number",), dtype=lambda d, o: ["bool"],
                    emit=lambda e, s, a, sign=sign: f"({a[0]} {sign} {s.options['than']!r})",
                    reference=lambda d, x, side=side: (x - d.options["than"]).sign() == side)
           for name, sign, side in (("greater", ">", 1), ("less", "<", -1))}


def greater(x: Operand, than: float) -> Value:
    """Whether each element is above a number: a mask, or the predicate of a cond.

    Refused of a sum that is still owed. How many labels count, where -100 says that one does not:

    >>> import torch
    >>> from shardlib import Layout, Mesh, sharded, simulate
    >>> from shardlib.functions import sum
    >>> count = sharded("B T -> B")(lambda labels: sum("B T -> B", greater(labels, -1)))
    >>> simulate(count, Layout(T="cp"), torch.tensor([[5, 0, -100], [3, -100, -100]]), mesh=Mesh(cp=2))
    tensor([2, 1])
    """
    return apply(COMPARE["greater"], (x,), than=than)


def less(x: Operand, than: float) -> Value:
    """Whether each element is below a number, which NaN is not. Refused of a sum that is still owed.

    >>> import torch
    >>> from shardlib import sharded
    >>> sharded("D -> D")(lambda x: less(x, 0.5))(torch.tensor([0.0, 0.5, float("nan")]))
    tensor([ True, False, False])
    """
    return apply(COMPARE["less"], (x,), than=than)


TABLE = {**OPS, **COMPARE, "cast": CAST, "cast_like": CAST_LIKE, "widen": WIDEN, "where": WHERE,
         "stop_gradient": STOP_GRADIENT}
