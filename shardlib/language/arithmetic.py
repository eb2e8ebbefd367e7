"""The ops behind `+ - * /`: dims are matched by name, and a Python number is a literal. The
result has all dims of both, in the one order in which each keeps its own.

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


def broadcast(op: str, ins: Sequence[Spec], names: Sequence[str] = ("x", "y", "z")) -> Spec:
    """The dims of the result: all there are, in the one order in which every operand keeps its own.

    SpecError where there are two, or none: it names two dims and writes the call with a text.
    """
    if all(s.labels == ins[0].labels for s in ins):
        return ins[0]
    left, made, unclear = [list(s.whole().dims) for s in ins], [], None
    while heads := list(dict.fromkeys(dims[0] for dims in left if dims)):
        free = [d for d in heads if all(d not in dims[1:] for dims in left)]
        if len(free) != 1:
            unclear = unclear or ((free or heads)[:2], bool(free))
        made.append((free or heads)[0])
        left = [[d for d in dims if d != made[-1]] for dims in left]
    names_made = [n for d in made for n in d.names]
    if twice := next((n for n in names_made if names_made.count(n) > 1), None):
        raise SpecError(f"{op}: {twice} is a dim of one operand and in a group of another; rearrange makes "
                        "them alike")
    if unclear and (i := next((i for i, s in enumerate(ins) if "1" in s.labels), None)) is not None:
        kept = Spec(tuple(d for d in ins[i].whole().dims if d.label != "1"))
        raise SpecError(f'{op}: 1 is a dim beside the others, and none that meets them; '
                        f'rearrange("{ins[i].whole()} -> {kept}", {names[i]}) drops it')
    if unclear:
        (one, other), either = unclear
        how = (f"either of {one.label} and {other.label} may come first" if either else
               f"{one.label} comes before {other.label} in one operand, and behind it in another")
        text = f"{', '.join(str(s.whole()) for s in ins)} -> {Spec(tuple(made))}"
        raise SpecError(f'{op}: {how}; {op}("{text}", {", ".join(names[:len(ins)])}) says the order')
    return Spec(tuple(made))


def align(arg: str, spec: Spec, out: Spec) -> str:
    """`arg`, of dims `spec`, indexed so that it broadcasts to dims `out`."""
    if out.labels[len(out.labels) - len(spec.labels):] == spec.labels:
        return arg
    return f"{arg}[{', '.join(':' if n in spec.labels else 'None' for n in out.labels)}]"


def aligned(step: Step, args: Sequence[str]) -> list[str]:
    """A step's operands, indexed so that they broadcast to its result."""
    return [align(a, s, step.outs[0]) for a, s in zip(args, step.ins)]


def broadcasting(op: str, *names: str) -> Callable[..., tuple[Spec, ...]]:
    """`Op.infer` of an op whose operands meet by the names of their dims; messages call them `names`."""
    return lambda ins, attrs: (broadcast(op, ins, names or ("x", "y")),)


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
