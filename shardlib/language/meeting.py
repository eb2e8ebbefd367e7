"""Ops whose operands meet by the names of their dims, called with a text in front.

    add("B D, T D -> B T D", x, y)

Without one, the result's dims stand in the one order in which all operands keep theirs; where there are two,
or none, the text says it. An operand that the text turns is rearranged, and where the order still does not
follow, one is repeated along what it lacks (`spread`, a view): both are steps of the program.
"""
from __future__ import annotations

from typing import Any

from shardlib.errors import SpecError
from shardlib.language.arithmetic import BINARY, broadcast
from shardlib.language.moves import RESHARD
from shardlib.language.rearrange import REARRANGE
from shardlib.language.reductions import SPREAD
from shardlib.language.value import Operand, Value, apply, bind
from shardlib.program import Op
from shardlib.spec import Spec


def meet(name: str, op: Op, *given: Any, **attrs: Any) -> Value:
    """The call `name(*given)`, which is one of `op`, with a text in front or without."""
    if not given or not isinstance(given[0], str):
        return apply(op, given, **attrs)
    text, *operands = given
    ins, outs = bind(name, text, operands, [""] * len(operands))
    labels = [label for spec in ins for label in spec.labels]
    if len(outs) != 1 or sorted(outs[0].labels) != sorted({*labels}):
        raise SpecError(f'{name} "{text}": the result has the dims of all operands, each once')
    placed = [_turned(_as(x, said), said, outs[0]) for x, said in zip(operands, ins)]
    if not _follows(name, placed, outs[0]):
        last = _among(ins[-1], outs[0])
        placed[-1] = apply(SPREAD, placed[-1:], ins=(last,), outs=(outs[0].owing(*last.owed),))
    return _as(apply(op, placed, **attrs), outs[0])


def _as(x: Value, said: Spec) -> Value:
    """x as what its text says."""
    return apply(RESHARD, (x,), ins=(said,), outs=(said,))


def _among(said: Spec, out: Spec) -> Spec:
    """The dims of an operand in the order of the result."""
    return Spec(tuple(said.dim(label) for label in out.labels if label in said.labels), said.owed)


def _turned(x: Value, said: Spec, out: Spec) -> Value:
    there = _among(said, out)
    return x if there.labels == said.labels else apply(REARRANGE, (x,), ins=(said,), outs=(there,))


def _follows(name: str, operands: list[Value], out: Spec) -> bool:
    try:
        return broadcast(name, [x.spec for x in operands]).labels == out.labels
    except SpecError:
        return False


def add(x: Operand | str, y: Operand, *more: Operand) -> Value:
    """x + y; with a text in front, which says the order of the result's dims where they do not.

    >>> import torch
    >>> from shardlib import Layout, Mesh, sharded, simulate
    >>> f = sharded("B D, T D -> B T D")(lambda x, y: add("B D, T D -> B T D", x, y))
    >>> x, y = torch.tensor([[1.0], [2.0]]), torch.tensor([[10.0], [20.0]])
    >>> simulate(f, Layout(B="dp"), x, y, mesh=Mesh(dp=2)).flatten()
    tensor([11., 21., 12., 22.])
    """
    return meet("add", BINARY["add"], x, y, *more)


def sub(x: Operand | str, y: Operand, *more: Operand) -> Value:
    """x - y; with a text in front, as `add`.

    >>> import torch
    >>> from shardlib import sharded
    >>> distances = sharded("T, S -> T S")(lambda x, y: sub("T, S -> T S", x, y))
    >>> distances(torch.tensor([3, 5]), torch.tensor([1, 2]))
    tensor([[2, 1],
            [4, 3]])
    """
    return meet("sub", BINARY["sub"], x, y, *more)


def mul(x: Operand | str, y: Operand, *more: Operand) -> Value:
    """x * y; with a text in front, as `add`.

    >>> import torch
    >>> from shardlib import sharded
    >>> angles = sharded("T, H -> T H")(lambda t, h: mul("T, H -> T H", t, h))
    >>> angles(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.5]))
    tensor([[1.0000, 0.5000],
            [2.0000, 1.0000]])
    """
    return meet("mul", BINARY["mul"], x, y, *more)


def div(x: Operand | str, y: Operand, *more: Operand) -> Value:
    """x / y; with a text in front, as `add`.

    >>> import torch
    >>> from shardlib import sharded
    >>> f = sharded("T, H -> T H")(lambda t, h: div("T, H -> T H", t, h))
    >>> f(torch.tensor([1.0, 2.0]), torch.tensor([4.0]))
    tensor([[0.2500],
            [0.5000]])
    """
    return meet("div", BINARY["div"], x, y, *more)
