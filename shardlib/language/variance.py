"""var and std along dims: the mean of squares of what is off the mean.

Both need their dims whole, or take the distributed form: the mean of all, then the squares of what is off it,
each joined by a reduction of the size of the result, with the count of all ranks. What is summed up is summed
in float32 at least, and rounded once, at the end.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shardlib.dtypes import fractional, reading
from shardlib.errors import SpecError
from shardlib.language.arithmetic import same
from shardlib.language.casts import CAST_LIKE, WIDEN
from shardlib.language.local_code import LocalCode
from shardlib.language.reductions import MEAN, beside, count_gone, dims_gone, names_gone, reduce_call
from shardlib.language.steps import Steps
from shardlib.language.value import Operand, Value
from shardlib.program import Op, Step
from shardlib.reference import Dims
from shardlib.rules import Rule
from shardlib.spec import Spec

CORRECTION = {"correction": lambda v: type(v) is int and v in (0, 1)}


def _divisor(count: int, step: Step) -> float:
    """What the squares are divided by; NaN where that would be nothing."""
    return count - step.options["correction"] if count > step.options["correction"] else math.nan


def _by(count: int, step: Step) -> str:
    """Code of the divisor."""
    return str(_divisor(count, step)).replace("nan", "float('nan')")


def _emit(e: LocalCode, step: Step, args: list[str]) -> str:
    count, dims = count_gone(e, step), dims_gone(step)
    if math.isnan(_divisor(count, step)) or 0 in e.shape(step.ins[0]):      # of which torch warns
        return f"{args[0]}.sum({dims}) * float('nan')" if dims else f"{args[0]} * float('nan')"
    return (f"torch.{step.op.name}({args[0]}, {dims}, correction={step.options['correction']})" if dims
            else f"{args[0]} - {args[0]}")


def _about(e: LocalCode, step: Step, args: list[str]) -> str:
    squares = f"({args[0]} - {beside(args[1], step.ins[1], step.ins[0])}).square()"
    return (f"{squares}{f'.sum({dims})' if (dims := dims_gone(step)) else ''} / "
            f"{_by(count_gone(e, step), step)}")


def _about_vjp(e: LocalCode, step: Step, args: list[str]) -> str:
    wide, *narrow = step.ins
    mean, g = (beside(arg, spec, wide) for arg, spec in zip(args[1:], narrow))
    count = 1
    for name in (n for n in wide.names if n not in narrow[1].names):
        count *= e.sizes[name]
    return f"({args[0]} - {mean}) * {g} * 2 / {_by(count, step)}"


def _var_vjp(b: Steps, step: Step, ct: Sequence[str]) -> list[str]:
    wide = b.call(WIDEN, [step.inputs[0]])
    mean = b.call(MEAN, [wide], outs=(step.outs[0],))
    return [b.call(VAR_ABOUT_VJP, [wide, mean, ct[0]], **step.options)]


def _std_vjp(b: Steps, step: Step, ct: Sequence[str]) -> list[str]:
    return _var_vjp(b, step, [b.call(ROOT_VJP, [step.outputs[0], ct[0]])])


def mean_and_var(b: Steps, wide: str, small: Spec, correction: int = 0) -> tuple[str, str]:
    """The mean and the variance of `wide` over a split dim: two sums of the size of the result, the second of
    what is off the mean of all."""
    mean = b.settle(b.call(MEAN, [wide], outs=(small,)))
    return mean, b.settle(b.call(VAR_ABOUT, [wide, mean], outs=(small,), correction=correction))


def _about_all(b: Steps, step: Step) -> list[str]:
    """Variance over a split dim: about the mean of all."""
    (x,), (small,) = step.inputs, step.outs
    _, made = mean_and_var(b, b.call(WIDEN, [x]), small, step.options["correction"])
    return [b.call(CAST_LIKE, [b.call(ROOT, [made]) if step.op is STD else made, x])]


def _squares(d: Dims, x: Tensor, mean: Tensor) -> Tensor:
    return d.sum((x - mean) * (x - mean)) / _divisor(d.count(*d.gone), d.step)


def _reference(d: Dims, x: Tensor) -> Tensor:
    return _squares(d, x, d.sum(x) / d.count(*d.gone))


def _root(x: Tensor) -> Tensor:
    """The square root; its slope at 0 is 0, as that of torch.std."""
    return torch.where(x == 0, x.detach(), torch.where(x == 0, 1, x) ** 0.5)


VAR_ABOUT_VJP = Op("var_about_vjp", keywords=CORRECTION, infer=same, emit=_about_vjp,
                   rule=lambda s: Rule(linear=((0, 1), (2,))), takes=("float",),
                   reference=lambda d, x, mean, g: d.vjp(_squares, (x, mean), g, d.step.ins[2])[0])
VAR_ABOUT = Op("var_about", keywords=CORRECTION, rule=lambda s: Rule(sums=names_gone(s)), emit=_about,
               takes=("float",), reference=_squares,
               vjp=lambda b, s, ct: [b.call(VAR_ABOUT_VJP, [*s.inputs, ct[0]], **s.options), None])
"""The mean has no slope of its own: there, what is off it sums to 0."""
ROOT_VJP = Op("root_vjp", rule=lambda s: Rule(linear=((1,),)), infer=same, takes=("float",),
              emit=lambda e, s, a: f"({a[1]} / (2 * {a[0]})).masked_fill({a[0]} == 0, 0)",
              reference=lambda d, y, g: d.vjp(lambda d, x: _root(x), (y * y,), g, d.step.ins[1]))
ROOT = Op("root", rule=lambda s: Rule(), infer=same, takes=("float",),
          emit=lambda e, s, a: f"torch.sqrt({a[0]})", reference=lambda d, x: _root(x),
          vjp=lambda b, s, ct: [b.call(ROOT_VJP, [s.outputs[0], ct[0]])])


def _along(name: str, vjp: Any, reference: Any) -> Op:
    return Op(name, keywords=CORRECTION, rule=lambda s: Rule(whole=names_gone(s)), emit=_emit, vjp=vjp,
              distribute=_about_all, reads=reading(fractional), reference=reference)


VAR, STD = _along("var", _var_vjp, _reference), _along("std", _std_vjp, lambda d, x: _root(_reference(d, x)))


def _call(op: Op, text: str, x: Operand, correction: int) -> Value:
    if not CORRECTION["correction"](correction):
        raise SpecError(f"{op.name}: correction is {correction!r}; it is 0 or 1")
    return reduce_call(op, text, x, correction=correction)


def var(text: str, x: Operand, *, correction: int = 1) -> Value:
    """The variance over the dims that the result lacks: squares of what is off the mean, their sum divided by
    the count less `correction`, 1 as in torch, or 0.

    Where a dim is split, ranks join two sums of the size of the result. NaN where that is to divide by 0.

    >>> import torch
    >>> from shardlib import Layout, Mesh, sharded, simulate
    >>> f = sharded("B D -> B")(lambda x: var("B D -> B", x, correction=0))
    >>> simulate(f, Layout(D="tp"), torch.tensor([[1.0, 2.0, 3.0, 6.0]]), mesh=Mesh(tp=3))
    tensor([3.5000])
    """
    return _call(VAR, text, x, correction)


def std(text: str, x: Operand, *, correction: int = 1) -> Value:
    """The root of the variance, as `var` has it; where that is 0, so is the gradient.

    >>> import torch
    >>> from shardlib import Layout, Mesh, sharded, simulate
    >>> f = sharded("B D -> B")(lambda x: std("B D -> B", x))
    >>> simulate(f, Layout(D="tp"), torch.tensor([[1.0, 2.0, 3.0]]), mesh=Mesh(tp=2))
    tensor([1.])
    """
    return _call(STD, text, x, correction)


TABLE = {op.name: op for op in (VAR, STD, VAR_ABOUT, VAR_ABOUT_VJP, ROOT, ROOT_VJP)}
