"""Masks: comparisons make them, `where` chooses by one, and so do `maximum` and `minimum`.

A text in front says the order of the result's dims, where the operands' leave it open:
`where("T, S, S -> T S", mask, a, b)`.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shardlib.dtypes import fits, fractional
from shardlib.errors import SpecError
from shardlib.language.arithmetic import aligned, broadcasting
from shardlib.language.comparison import COMPARE, LOGICAL, NOT, SIGNS
from shardlib.language.local_code import LocalCode
from shardlib.language.meeting import meet
from shardlib.language.steps import Steps
from shardlib.language.value import Operand, Value, apply, compare
from shardlib.program import Op, Step, number
from shardlib.rules import Rule


def _compared(name: str, x: Operand | str, other: Operand | float, *more: Operand) -> Value:
    return (meet(name, COMPARE, x, other, *more, sign=SIGNS[name]) if isinstance(x, str)
            else compare(name, x, other))


def greater(x: Operand | str, than: Operand | float, *more: Operand) -> Value:
    """Whether each element is above a number, or another value's: a mask, or the predicate of a cond.
    `x > than` says the same.

    Refused of a sum that is still owed. How many labels count, where -100 says that one does not:

    >>> import torch
    >>> from shardlib import Layout, Mesh, sharded, simulate
    >>> from shardlib.functions import sum
    >>> count = sharded("B T -> B")(lambda labels: sum("B T -> B", greater(labels, -1)))
    >>> simulate(count, Layout(T="cp"), torch.tensor([[5, 0, -100], [3, -100, -100]]), mesh=Mesh(cp=2))
    tensor([2, 1])
    """
    return _compared("greater", x, than, *more)


def less(x: Operand | str, than: Operand | float, *more: Operand) -> Value:
    """Whether each element is below a number or another value's, which NaN is not. `x < than` says the same.

    Refused of a sum that is still owed.

    >>> import torch
    >>> from shardlib import sharded
    >>> sharded("D -> D")(lambda x: less(x, 0.5))(torch.tensor([0.0, 0.5, float("nan")]))
    tensor([ True, False, False])
    """
    return _compared("less", x, than, *more)


def greater_equal(x: Operand | str, than: Operand | float, *more: Operand) -> Value:
    """Whether each element is at least a number, or another value's. `x >= than` says the same.

    >>> import torch
    >>> from shardlib import sharded
    >>> kept = sharded("T S, T -> T S")(lambda score, bar: greater_equal(score, bar))
    >>> kept(torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([2.0, 1.0]))
    tensor([[False,  True],
            [ True, False]])
    """
    return _compared("greater_equal", x, than, *more)


def less_equal(x: Operand | str, than: Operand | float, *more: Operand) -> Value:
    """Whether each element is at most a number, or another value's. `x <= than` says the same.

    >>> import torch
    >>> from shardlib import sharded
    >>> sharded("D -> D")(lambda x: less_equal(x, 1))(torch.tensor([0, 1, 2]))
    tensor([ True,  True, False])
    """
    return _compared("less_equal", x, than, *more)


def equal(x: Operand | str, to: Operand | float, *more: Operand) -> Value:
    """Whether each element is a number, or another value's. There is no `==`: Python asks that of its own.

    Padding, by its id:

    >>> import torch
    >>> from shardlib import sharded
    >>> sharded("B T -> B T")(lambda ids: equal(ids, 0))(torch.tensor([[5, 7, 0, 0]]))
    tensor([[False, False,  True,  True]])
    """
    return _compared("equal", x, to, *more)


def not_equal(x: Operand | str, to: Operand | float, *more: Operand) -> Value:
    """Whether each element is another than a number, or than another value's; NaN is, than anything.

    >>> import torch
    >>> from shardlib import sharded
    >>> sharded("D -> D")(lambda x: not_equal(x, x))(torch.tensor([1.0, float("nan")]))
    tensor([False,  True])
    """
    return _compared("not_equal", x, to, *more)


def logical_and(x: Operand | str, y: Operand, *more: Operand) -> Value:
    """Where both masks are true. `x & y` says the same. Dims that one lacks are broadcast.

    >>> import torch
    >>> from shardlib import sharded
    >>> seen = sharded("T S, S -> T S")(lambda causal, real: logical_and(causal, real))
    >>> seen(torch.tensor([[True, False], [True, True]]), torch.tensor([True, False]))
    tensor([[ True, False],
            [ True, False]])
    """
    return meet("logical_and", LOGICAL["logical_and"], x, y, *more)


def logical_or(x: Operand | str, y: Operand, *more: Operand) -> Value:
    """Where one mask at least is true. `x | y` says the same. Dims that one lacks are broadcast.

    >>> import torch
    >>> from shardlib import sharded
    >>> outside = sharded("D -> D")(lambda x: logical_or(x < -1, x > 1))
    >>> outside(torch.tensor([-2.0, 0.0, 2.0]))
    tensor([ True, False,  True])
    """
    return meet("logical_or", LOGICAL["logical_or"], x, y, *more)


def logical_not(x: Operand) -> Value:
    """Where a mask is false. `~x` says the same.

    >>> import torch
    >>> from shardlib import sharded
    >>> sharded("B -> B")(lambda done: logical_not(done))(torch.tensor([True, False]))
    tensor([False,  True])
    """
    return apply(NOT, (x,))


def _masked_vjp(b: Steps, step: Step, ct: Sequence[str]) -> list[str | None]:
    return [None, b.call(MASKED, [step.inputs[0], ct[0]])]


MASKED = Op("masked", rule=lambda s: Rule(linear=((1,),)),
            infer=broadcasting("masked"), index=(0,), takes=("mask", "float"),
            reference=lambda d, mask, x: x.masked_fill(~mask, 0),
            emit=lambda e, s, a: f"torch.where({', '.join(aligned(s, a))}, 0)",
            vjp=_masked_vjp)
"""An operand where a mask is true, 0 where it is not, whatever is there: 0 times infinity would be NaN."""


def _where_vjp(b: Steps, step: Step, ct: Sequence[str]) -> list[str | None]:
    mask = step.inputs[0]
    return [None, b.einsum_to(step.ins[1], [b.call(MASKED, [mask, ct[0]])]),
            b.einsum_to(step.ins[2], [b.call(MASKED, [b.call(NOT, [mask]), ct[0]])])]


WHERE = Op("where", rule=lambda s: Rule(linear=((1, 2),)), infer=broadcasting("where", "mask", "a", "b"),
           emit=lambda e, s, a: f"torch.where({', '.join(aligned(s, a))})",
           vjp=_where_vjp, index=(0,), takes=("mask", "any"), promotes=True,
           reference=lambda d, mask, a, b: a.masked_fill(~mask, 0) + b.masked_fill(mask, 0))


def _filled_reads(dtypes: Sequence[str | None], attrs: dict[str, Any]) -> list[str | None]:
    mask, x = dtypes
    return [mask, fractional(x) if isinstance(attrs["value"], float) else x]


def _filled(e: LocalCode, step: Step, args: list[str]) -> str:
    """SpecError where x's dtype does not hold the number."""
    if not fits(kind := e.dtypes[step.outputs[0]], value := step.options["value"]):
        raise SpecError(f"where: the number is {value}, and the tensor is {kind}, which does not hold it")
    return f"torch.where({', '.join(aligned(step, args))}, {value!r})"


FILLED = Op("filled", keywords={"value": number}, infer=broadcasting("where", "mask", "x"), index=(0,),
            rule=lambda s: Rule(linear=((1,),) if s.options["value"] == 0 else ()),
            takes=("mask", "number"), reads=_filled_reads, emit=_filled,
            vjp=lambda b, s, ct: [None, b.einsum_to(s.ins[1], [b.call(MASKED, [s.inputs[0], ct[0]])])],
            reference=lambda d, mask, x: x.masked_fill(~mask, 0) + ~mask * d.options["value"])
"""What is where(mask, x, 0.5): an operand where a mask is true, a number where it is not."""


def where(mask: Operand | str, a: Operand | float, b: Operand | float, *more: Operand | float) -> Value:
    """`a` where `mask`, else `b`; dims that one of them lacks are broadcast. Both owe a sum, or neither does.
    One of the two may be a number, which widens no dtype; what owes a sum stands beside 0 alone.

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
    text, given = ((mask,), [a, b, *more]) if isinstance(mask, str) else ((), [mask, a, b, *more])
    numbers = [i for i, x in enumerate(given) if isinstance(x, int | float)]
    if len(given) != 3 or not numbers:
        return meet("where", WHERE, *text, *given)
    value = given.pop(numbers[0])
    if len(numbers) > 1 or numbers == [0] or not number(value):
        raise SpecError("where: it chooses by a mask, of two tensors, or of one and a finite number; cast "
                        "makes ones and zeros of a mask")
    return meet("where", FILLED, *text, given[0] if numbers == [2] else apply(NOT, given[:1]), given[1],
                value=value)


def _extreme_vjp(b: Steps, step: Step, ct: Sequence[str]) -> list[str | None]:
    """To the one that was taken; where they are equal, half to each."""
    x, y = step.inputs
    share = b.call(WHERE, [b.call(COMPARE, [x, y], sign="=="), b.scale(ct[0], 0.5), ct[0]])
    lost = [b.call(COMPARE, [x, y], sign=sign) for sign in ("<>" if step.op.name == "maximum" else "><")]
    return [b.einsum_to(spec, [b.call(MASKED, [b.call(NOT, [mask]), share])])
            for spec, mask in zip(step.ins, lost)]


def _ordered(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The smaller and the larger one; NaN both where one is."""
    low, high = torch.stack(torch.broadcast_tensors(x, y)).sort(0).values
    return torch.where(high != high, high, low), high


def _extreme(name: str, last: int) -> Op:
    return Op(name, rule=lambda s: Rule(), infer=broadcasting(name),
              takes=("number",), promotes=True, vjp=_extreme_vjp,
              emit=lambda e, s, a: f"torch.{name}({', '.join(aligned(s, a))})",
              reference=lambda d, x, y: _ordered(x, y)[last])


MAXIMUM, MINIMUM = _extreme("maximum", 1), _extreme("minimum", 0)


def _two(name: str, op: Op, x: Operand | str, y: Operand, *more: Operand) -> Value:
    if numbers := [v for v in (x, y, *more) if isinstance(v, int | float)]:
        bound = "min" if op is MAXIMUM else "max"
        raise SpecError(f"{name}: {numbers[0]} is a number; clamp(x, {bound}={numbers[0]}) is bounded by one")
    return meet(name, op, x, y, *more)


def maximum(x: Operand | str, y: Operand, *more: Operand) -> Value:
    """The larger of two values, element by element, NaN where one is; dims that one lacks are broadcast.

    Where they are equal, each gets half of the gradient. Refused of a sum that is still owed.

    >>> import torch
    >>> from shardlib import Layout, Mesh, sharded, simulate
    >>> floor = sharded("B D, D -> B D")(lambda x, least: maximum(x, least))
    >>> x, least = torch.tensor([[1.0, -2.0], [3.0, 4.0]]), torch.tensor([2.0, 0.0])
    >>> simulate(floor, Layout(D="tp"), x, least, mesh=Mesh(tp=2))
    tensor([[2., 0.],
            [3., 4.]])
    """
    return _two("maximum", MAXIMUM, x, y, *more)


def minimum(x: Operand | str, y: Operand, *more: Operand) -> Value:
    """The smaller of two values, element by element, as `maximum` is the larger.

    >>> import torch
    >>> from shardlib import sharded, value_and_grad
    >>> f = sharded("(), () -> ()")(lambda x, y: minimum(x, y))
    >>> value_and_grad(f, wrt=("x", "y"))(torch.tensor(2.0), torch.tensor(2.0))
    (tensor(2.), tensor(0.5000), tensor(0.5000))
    """
    return _two("minimum", MINIMUM, x, y, *more)


TABLE = {op.name: op for op in (MASKED, WHERE, FILLED, MAXIMUM, MINIMUM)}
