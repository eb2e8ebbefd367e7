"""Pointwise functions of one tensor, and `where`.

Each row of `UNARY` is an op: the plain-torch expression of its value, and of its derivative in terms of the cotangent
`g`, the operand `x` and the result `y`. All are nonlinear: of a sum that is still owed they are refused. Their
derivatives are linear in `g`, so a cotangent may be owed. `relu` and `square` take integers, too.
"""
from __future__ import annotations

import math
from typing import Any, Callable, Sequence

import torch
from torch import Tensor

from shardlib.dtypes import FLOATS, as_they_come, widest
from shardlib.errors import SpecError
from shardlib.language.arithmetic import align, broadcast
from shardlib.language.steps import Steps
from shardlib.language.trace import apply
from shardlib.local_code import LocalCode
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
    forward = Op(name, rule=lambda s: Rule(), infer=_infer, vjp=vjp, emit=lambda e, s, a: value.format(x=a[0]),
                 takes=("number" if name in OF_INTEGERS else "float",),
                 reference=lambda d, x: function(x))
    return forward, backward


OPS: dict[str, Op] = {op.name: op for name, row in UNARY.items() for op in _unary(name, *row)}


def _function(name: str) -> Callable[[Any], Any]:
    def function(x: Any) -> Any:
        return apply(OPS[name], (x,))
    function.__name__ = function.__qualname__ = name
    function.__doc__ = f"{name} of every element; refused of a sum that is still owed."
    return function


silu, gelu, relu, tanh, sigmoid, exp, log, rsqrt, square = (_function(n) for n in UNARY)

def _cast_vjp(b: Steps, step: Step, ct: Sequence[str]) -> list[str | None]:
    return [b.like(ct[0], step.inputs[0]), *[None] * (len(step.inputs) - 1)]


def _to(e: LocalCode, step: Step, args: list[str]) -> str:
    """The first operand in the dtype of the result."""
    have, want = e.dtypes[step.inputs[0]], e.dtypes[step.outputs[0]]
    return args[0] if have == want else f"{args[0]}.to(torch.{want})"


CAST = Op("cast", keywords={"dtype": lambda v: v in FLOATS}, rule=lambda s: Rule(linear=((0,),)), infer=_infer, vjp=_cast_vjp,
          emit=lambda e, s, a: f"{a[0]}.to(torch.{s.options['dtype']})", dtype=lambda d, o: [o["dtype"]],
          reference=lambda d, x: x)
CAST_LIKE = Op("cast_like", rule=lambda s: Rule(linear=((0,),), uses=((0,),)), infer=_infer, vjp=_cast_vjp, index=(1,), emit=_to,
               takes=("any",), reads=as_they_come, dtype=lambda d, o: [d[1] if d[1] in FLOATS else d[1] and d[0]],
               reference=lambda d, x, like: x)
WIDEN = Op("widen", rule=lambda s: Rule(linear=((0,),)), infer=_infer, vjp=_cast_vjp, emit=_to, reads=as_they_come,
           dtype=lambda d, o: [widest(d[0], "float32")],
           reference=lambda d, x: x)


def cast(x: Any, dtype: str) -> Any:
    """`x` in another floating-point dtype: "float32", "bfloat16", "float16" or "float64". A sum may be owed."""
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


WHERE = Op("where", rule=lambda s: Rule(linear=((1, 2),)), infer=_where_infer, emit=_where_emit, vjp=_where_vjp, index=(0,),
           takes=("mask", "any"), promotes=True,
           reference=lambda d, mask, a, b: a.masked_fill(~mask, 0) + b.masked_fill(mask, 0))


def where(mask: Any, a: Any, b: Steps) -> Any:
    """`a` where `mask`, else `b`. Both owe a sum, or neither does."""
    return apply(WHERE, (mask, a, b))


STOP_GRADIENT = Op("stop_gradient", rule=lambda s: Rule(linear=((0,),)), infer=_infer, emit=lambda e, s, a: f"{a[0]}.detach()", constant=True,
                   reference=lambda d, x: x.detach())


def stop_gradient(x: Any) -> Any:
    """`x`, as a constant to `value_and_grad`."""
    return apply(STOP_GRADIENT, (x,))


COMPARE = {name: Op(name, keywords={"than": number}, rule=lambda s: Rule(), infer=_infer, constant=True, takes=("number",), dtype=lambda d, o: ["bool"],
                    emit=lambda e, s, a, sign=sign: f"({a[0]} {sign} {s.options['than']!r})",
                    reference=lambda d, x, side=side: (x - d.options["than"]).sign() == side)
           for name, sign, side in (("greater", ">", 1), ("less", "<", -1))}


def greater(x: Any, than: float) -> Any:
    """Whether each element is above a number: a mask, or the predicate of a cond."""
    return apply(COMPARE["greater"], (x,), than=than)


def less(x: Any, than: float) -> Any:
    """Whether each element is below a number."""
    return apply(COMPARE["less"], (x,), than=than)


TABLE = {**OPS, **COMPARE, "cast": CAST, "cast_like": CAST_LIKE, "widen": WIDEN, "where": WHERE, "stop_gradient": STOP_GRADIENT}
