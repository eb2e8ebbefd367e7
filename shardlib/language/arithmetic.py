"""The ops behind `+ - * /`: dims are matched by name, and a Python number is a literal.

On one axis: `+` and `-` take two sums that are both owed, or two values that owe nothing; `*` is multilinear;
`/` is linear in its numerator. A number added counts as whole, except 0.

A number of Python widens no dtype: integers stay integers under whole numbers, and become float32 under
fractions and `/`.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from shardlib.dtypes import fractional, reading
from shardlib.errors import SpecError
from shardlib.language.local_code import LocalCode
from shardlib.language.steps import Steps
from shardlib.program import Op, Step, number
from shardlib.rules import Rule
from shardlib.spec import Spec

_SIGN = {"add": "+", "sub": "-", "mul": "*", "div": "/"}


def broadcast(op: str, ins: Sequence[Spec]) -> Spec:
    """The dims of the result: those of the operand that has all the names. SpecError where none has."""
    widest = max(ins, key=lambda s: len(s.dims))
    for spec in ins:
        order = [widest.labels.index(n) for n in spec.labels if n in widest.labels]
        if len(order) < len(spec.dims):
            raise SpecError(
                f'{op}: "{spec}" has dims that "{widest}" lacks; einsum or rearrange says what is meant')
        if order != sorted(order):
            raise SpecError(
                f'{op}: "{spec}" has the dims of "{widest}" in another order; rearrange one of them')
    return widest


def align(arg: str, spec: Spec, out: Spec) -> str:
    """`arg`, of dims `spec`, indexed so that it broadcasts to dims `out`."""
    if out.labels[len(out.labels) - len(spec.labels):] == spec.labels:
        return arg
    return f"{arg}[{', '.join(':' if n in spec.labels else 'None' for n in out.labels)}]"


def aligned(step: Step, args: Sequence[str]) -> list[str]:
    """A step's operands, indexed so that they broadcast to its result."""
    return [align(a, s, step.outs[0]) for a, s in zip(args, step.ins)]


def broadcasting(op: str) -> Callable[..., tuple[Spec, ...]]:
    """`Op.infer` of an op whose operands meet by the names of their dims."""
    return lambda ins, attrs: (broadcast(op, ins),)


def same(ins: Sequence[Spec], attrs: dict[str, Any]) -> tuple[Spec, ...]:
    """`Op.infer` of an op whose result has the dims of its first operand."""
    return (ins[0],)


def _emit(e: LocalCode, step: Step, args: list[str]) -> str:
    return f" {_SIGN[step.op.name]} ".join(aligned(step, args))


def _add_vjp(b: Steps, step: Step, ct: Sequence[str]) -> list[str]:
    right = ct[0] if step.op is ADD else b.scale(ct[0], -1.0)
    return [b.einsum_to(step.ins[0], [ct[0]]), b.einsum_to(step.ins[1], [right])]


def _mul_vjp(b: Steps, step: Step, ct: Sequence[str]) -> list[str]:
    x, y = step.inputs
    return [b.einsum_to(step.ins[0], [ct[0], y]), b.einsum_to(step.ins[1], [ct[0], x])]


def _div_vjp(b: Steps, step: Step, ct: Sequence[str]) -> list[str]:
    x, y = step.inputs
    by = b.call(DIV, [ct[0], y])
    down = b.call(DIV, [b.call(MUL, [by, x]), y])
    return [b.einsum_to(step.ins[0], [by]), b.einsum_to(step.ins[1], [b.scale(down, -1.0)])]


_BOTH = Rule(linear=((0, 1),))
ADD = Op("add", rule=lambda s: _BOTH, emit=_emit, infer=broadcasting("add"), vjp=_add_vjp, promotes=True,
         reference=lambda d, x, y: x + y)
SUB = Op("sub", rule=lambda s: _BOTH, emit=_emit, infer=broadcasting("sub"), vjp=_add_vjp, takes=("number",),
         promotes=True, reference=lambda d, x, y: -y + x)
MUL = Op("mul", rule=lambda s: Rule(linear=((0,), (1,))), emit=_emit, infer=broadcasting("mul"), vjp=_mul_vjp,
         promotes=True, reference=lambda d, x, y: x * y)
DIV = Op("div", rule=lambda s: Rule(linear=((0,),)), emit=_emit, infer=broadcasting("div"), vjp=_div_vjp,
         reads=reading(fractional), promotes=True, reference=lambda d, x, y: x * y ** -1)


def _reads(dtypes: Sequence[str | None], attrs: dict[str, Any]) -> list[str | None]:
    return [fractional(dtypes[0]) if isinstance(attrs["by"], float) else "int64" if dtypes[0] == "bool"
            else dtypes[0]]


SCALE = Op("scale", keywords={"by": number}, rule=lambda s: Rule(linear=((0,),)), infer=same,
           emit=lambda e, s, a: f"{a[0]} * {s.options['by']!r}", reads=_reads,
           vjp=lambda b, s, ct: [b.scale(ct[0], s.options["by"])],
           reference=lambda d, x: d.options["by"] * x)
SHIFT = Op("shift", keywords={"by": number},
           rule=lambda s: Rule(linear=((0,),) if s.options["by"] == 0 else ()), infer=same,
           emit=lambda e, s, a: f"{a[0]} + {s.options['by']!r}", reads=_reads,
           vjp=lambda b, s, ct: [ct[0]],
           reference=lambda d, x: d.options["by"] + x)
RECIPROCAL = Op("reciprocal", rule=lambda s: Rule(), infer=same,
                emit=lambda e, s, a: f"torch.reciprocal({a[0]})", reads=reading(fractional),
                vjp=lambda b, s, ct: [
                    b.scale(b.call(MUL, [ct[0], b.call(MUL, [s.outputs[0], s.outputs[0]])]), -1.0)],
                reference=lambda d, x: 1 / x)


def with_number(name: str, by: float, left: bool) -> list[tuple[Op, dict[str, Any]]]:
    """The unary steps that `value <name> by` is made of; `left`: the number stands on the left."""
    if isinstance(by, bool) or not isinstance(by, (int, float)):
        raise SpecError(f"{name}: the other operand is a {type(by).__name__}, no traced value; make it an "
                        "argument of the @sharded function")
    by = float(by) if isinstance(by, float) else int(by)
    if not number(by) or name == "div" and not left and by and not number(1.0 / by):
        raise SpecError(f"{name}: {by if isinstance(by, float) else 'an integer of more than 64 bits'}; the "
                        "numbers of a program are finite")
    if name == "add":
        return [(SHIFT, {"by": by})]
    if name == "sub":
        return [(SCALE, {"by": -1}), (SHIFT, {"by": by})] if left else [(SHIFT, {"by": -by})]
    if name == "mul":
        return [(SCALE, {"by": by})]
    if left:
        return [(RECIPROCAL, {}), (SCALE, {"by": by})]
    if by == 0:
        raise SpecError("div: by the number 0")
    return [(SCALE, {"by": 1.0 / by})]


BINARY = {"add": ADD, "sub": SUB, "mul": MUL, "div": DIV}
