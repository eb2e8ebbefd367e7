"""The ops behind the pointwise functions of one tensor.

Each row of `UNARY` is an op: the plain-torch expression of its value, and of its derivative in terms of the
cotangent `g`, the operand `x` and the result `y`. All are nonlinear: of a sum that is still owed they are
refused. Their derivatives are linear in `g`, so a cotangent may be owed. `relu`, `square` and `abs` take
integers, too.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from shardlib.dtypes import Dtypes, fits, fractional
from shardlib.errors import SpecError
from shardlib.language.arithmetic import same
from shardlib.language.local_code import LocalCode
from shardlib.language.steps import Steps
from shardlib.program import Op, Step, number
from shardlib.reference import Dims
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
    "abs": ("torch.abs({x})", "{g} * torch.sgn({x})"),
    "sqrt": ("torch.sqrt({x})", "{g} / (2 * {y})"),
    "sin": ("torch.sin({x})", "{g} * torch.cos({x})"),
    "cos": ("torch.cos({x})", "-{g} * torch.sin({x})"),
    "erf": ("torch.erf({x})", f"{{g}} * ({2 / math.sqrt(math.pi)!r} * torch.exp(-{{x}} * {{x}}))"),
    "log1p": ("torch.log1p({x})", "{g} / ({x} + 1)"),
    "expm1": ("torch.expm1({x})", "{g} * ({y} + 1)"),
    "softplus": ("F.softplus({x})", "torch.ops.aten.softplus_backward({g}, {x}, 1, 20)"),
    "log_sigmoid": ("F.logsigmoid({x})", "{g} * torch.sigmoid(-{x})"),
    "gelu_tanh": ("F.gelu({x}, approximate='tanh')",
                  "torch.ops.aten.gelu_backward({g}, {x}, approximate='tanh')"),
}
OF_INTEGERS = ("relu", "square", "abs")
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
    "abs": lambda x: torch.where(x < 0, -x, torch.where(x > 0, x, 0)),
    "sqrt": lambda x: x ** 0.5,
    "sin": lambda x: 2 * torch.sin(x / 2) * torch.cos(x / 2),
    "cos": lambda x: 1 - 2 * torch.sin(x / 2) ** 2,
    "erf": lambda x: 2 * torch.special.ndtr(x * math.sqrt(2)) - 1,
    "log1p": lambda x: torch.log(1 + x),
    "expm1": lambda x: torch.exp(x) - 1,
    "softplus": lambda x: torch.logaddexp(x, torch.zeros_like(x)),
    "log_sigmoid": lambda x: -torch.logaddexp(torch.zeros_like(x), -x),
    "gelu_tanh": lambda x: x * torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x * x * x)),
}
INVERSES: dict[str, Callable[[Tensor], Tensor]] = {         # of those whose derivative is told the result
    "tanh": torch.atanh, "sigmoid": torch.logit, "exp": torch.log, "rsqrt": lambda y: y ** -2,
    "sqrt": lambda y: y * y, "expm1": torch.log1p}


def _unary(name: str, value: str, slope: str) -> tuple[Op, Op]:
    from_result, function = "{y}" in slope, REFERENCES[name]
    operand = INVERSES.get(name, lambda x: x)
    linear = ((0,), (1,)) if name in PRODUCTS else ((1,),)
    backward = Op(f"{name}_vjp", rule=lambda s: Rule(linear=linear), infer=same,
                  emit=lambda e, s, a: "(" + slope.format(x=a[0], y=a[0], g=a[1]) + ")", takes=("float",),
                  reference=lambda d, x, g: d.vjp(lambda d, x: function(x), (operand(x),), g, d.step.ins[0]))

    def vjp(b: Steps, step: Step, ct: Sequence[str]) -> list[str]:
        return [b.call(backward, [step.outputs[0] if from_result else step.inputs[0], ct[0]])]
    forward = Op(name, rule=lambda s: Rule(), infer=same, vjp=vjp,
                 emit=lambda e, s, a: value.format(x=a[0]),
                 takes=("number" if name in OF_INTEGERS else "float",),
                 reference=lambda d, x: function(x))
    return forward, backward


OPS: dict[str, Op] = {op.name: op for name, row in UNARY.items() for op in _unary(name, *row)}


def _pow_vjp(b: Steps, step: Step, ct: Sequence[str]) -> list[str | None]:
    by = step.options["by"]
    if by in (0, 1):
        return [ct[0] if by else None]
    slope = b.call(POW, step.inputs, by=by - 1) if by != 2 else step.inputs[0]
    return [b.scale(b.einsum_to(step.ins[0], [ct[0], slope]), by)]


def _power(x: Tensor, by: float) -> Tensor:
    if by == 0:
        return torch.ones_like(x)
    size = torch.exp2(by * torch.log2(x.abs() if by % 1 == 0 else x))
    return torch.where((x < 0) & (by % 2 == 1), -size, size)


POW = Op("pow", keywords={"by": number}, rule=lambda s: Rule(), infer=same, takes=("float",), vjp=_pow_vjp,
         emit=lambda e, s, a: f"{a[0]} ** {s.options['by']!r}",
         reference=lambda d, x: _power(x, d.options["by"]))


def power(by: float) -> tuple[Op, dict[str, Any]]:
    """The step that `x ** by` is. SpecError unless `by` is a number."""
    if not number(by):
        raise SpecError(f"**: the exponent is {by!r}; it is a finite number")
    return (OPS["square"], {}) if by == 2 else (OPS["sqrt"], {}) if by == 0.5 else (POW, {"by": by})


def _bound(value: Any) -> bool:
    return value is None or number(value)


def _clamp_infer(ins: Sequence[Spec], attrs: dict[str, Any]) -> tuple[Spec, ...]:
    if attrs.get("min") is None and attrs.get("max") is None:
        raise SpecError("clamp: neither min nor max is given")
    return same(ins, attrs)


def _clamp_reads(dtypes: Dtypes, attrs: Mapping[str, Any]) -> Dtypes:
    """Integers stay integers between whole numbers."""
    halves = any(isinstance(value, float) for value in attrs.values())
    return [fractional(kind) if halves else kind for kind in dtypes]


def _inside(step: Step, x: str) -> str:
    """Code of the mask of what clamp lets through."""
    return " & ".join(f"({x} {sign} {step.options[name]!r})" for name, sign in (("min", ">="), ("max", "<="))
                      if step.options.get(name) is not None)


def _clamp(d: Dims, x: Tensor) -> Tensor:
    low, high = (d.options.get(name) for name in ("min", "max"))
    x = x if low is None else torch.where(x < low, low, x)
    return x if high is None else torch.where(x > high, high, x)


def _clamped(e: LocalCode, step: Step, args: list[str]) -> str:
    """Bounds that x's dtype does not reach are none; SpecError where they are on the wrong side."""
    kind, kept = e.dtypes[step.outputs[0]], {}
    for name in ("min", "max"):
        if (bound := step.options.get(name)) is not None and not fits(kind, bound):
            if (bound > 0) == (name == "min"):
                raise SpecError(f"clamp: {name} is {bound}, and x is {kind}, which does not hold it")
        elif bound is not None:
            kept[name] = bound
    bounds = ", ".join(f"{name}={bound!r}" for name, bound in kept.items())
    return f"torch.clamp({args[0]}, {bounds})" if kept else f"{args[0]}.clone()"


_BOUNDS = {"min": _bound, "max": _bound}
CLAMP_VJP = Op("clamp_vjp", keywords=_BOUNDS, rule=lambda s: Rule(linear=((1,),)), infer=_clamp_infer,
               emit=lambda e, s, a: f"torch.where({_inside(s, a[0])}, {a[1]}, 0)", takes=("float",),
               reference=lambda d, x, g: d.vjp(_clamp, (x,), g, d.step.ins[0]))
CLAMP = Op("clamp", keywords=_BOUNDS, rule=lambda s: Rule(), infer=_clamp_infer, takes=("number",),
           reads=_clamp_reads, reference=_clamp, emit=_clamped,
           vjp=lambda b, s, ct: [b.call(CLAMP_VJP, [*s.inputs, ct[0]], **s.options)])

TABLE = {**OPS, "pow": POW, "clamp": CLAMP, "clamp_vjp": CLAMP_VJP}
