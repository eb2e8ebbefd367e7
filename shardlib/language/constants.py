"""Values made of nothing: zeros, ones, full, arange, tril.

Each rank makes its own piece, so they are split as the layout has it, never owe, and send nothing; the dtype
is an argument. Their text says what is made, `zeros("B T")`. They exist in @sharded functions alone; a size
that no argument has is said by `sizes=` of `simulate`, `compile` and `step`.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from shardlib.dtypes import FLOATS, ITEMSIZE, fits
from shardlib.errors import SpecError
from shardlib.language.local_code import LocalCode
from shardlib.language.value import Value, apply
from shardlib.program import Op, Step, number
from shardlib.reference import Dims
from shardlib.rules import Rule
from shardlib.spec import parse


def _like(e: LocalCode) -> str:
    """The name of a tensor on the device on which the code runs."""
    e.constants["here"] = torch.empty(0, device="cpu")      # whatever the default device is now
    return "here"


def _filled(value: Callable[[Step], Any]) -> Callable:
    def emit(e: LocalCode, step: Step, args: list[str]) -> str:
        (out,), kind = step.outs, step.options["dtype"]
        return f"{_like(e)}.new_full({e.shape(out)}, {value(step)!r}, dtype=torch.{kind})"
    return emit


def _arange(e: LocalCode, step: Step, args: list[str]) -> str:
    """SpecError where the dtype does not reach the last one."""
    (dim,), kind = step.outs[0].dims, step.options["dtype"]
    if not fits(kind, last := max(e.count(dim) - 1, 0)) or kind == "bool":
        raise SpecError(f"arange: {dim.label} counts to {last}, and {kind} does not hold that")
    start, size = e.rows(dim)
    return f"torch.arange({start}, {start + size}, device={_like(e)}.device).to(torch.{kind})"


def _tril(e: LocalCode, step: Step, args: list[str]) -> str:
    (first, rows), (left, columns) = map(e.rows, step.outs[0].dims)
    return (f"{_like(e)}.new_ones({(rows, columns)}, dtype=torch.{step.options['dtype']})"
            f".tril({first - left + step.options['diagonal']})")


def typed(x: Tensor, d: Dims) -> Tensor:
    """What a reference gives: float64 for floats."""
    kind = d.options["dtype"]
    return x.double() if kind in FLOATS else x.to(getattr(torch, kind))


def _same_everywhere(value: Callable[[Step], Any]) -> Callable:
    return lambda d: typed(torch.tensor(value(d.step)), d).view([1] * len(d.names))


def _lower(d: Dims) -> Tensor:
    rows, columns = d.step.outs[0].names
    return d.index(columns) - d.index(rows) <= d.options["diagonal"]


def _made(name: str, emit: Callable, reference: Callable, **keywords: Callable) -> Op:
    return Op(name, keywords={"dtype": lambda v: v in ITEMSIZE, **keywords}, rule=lambda s: Rule(), emit=emit,
              dtype=lambda d, o: [o["dtype"]], constant=True, reference=reference)


def _of_value(value: Callable[[Step], Any]) -> tuple[Callable, Callable]:
    return _filled(value), _same_everywhere(value)


def _whole_number(value: Any) -> bool:
    return number(value) and isinstance(value, int)


ZEROS, ONES = _made("zeros", *_of_value(lambda s: 0)), _made("ones", *_of_value(lambda s: 1))
FULL = _made("full", *_of_value(lambda s: s.options["value"]),
             value=lambda v: number(v) or isinstance(v, bool))
ARANGE = _made("arange", _arange, lambda d: typed(d.index(*d.names), d))
TRIL = _made("tril", _tril, lambda d: typed(_lower(d), d), diagonal=_whole_number)


def _call(op: Op, text: str, dtype: str, dims: int | None = None, **attrs: Any) -> Value:
    spec = parse(text)
    if spec.ellipsis or spec.owed or dims is not None and [len(d.factors) for d in spec.dims] != [1] * dims:
        takes = {None: "dims", 1: "one dim", 2: "two dims"}[dims]
        raise SpecError(f'{op.name} "{text}": the text is {takes} of what is made; it owes nothing')
    if dtype not in ITEMSIZE:
        raise SpecError(f"{op.name}: dtype is {dtype!r}; it is one of {', '.join(ITEMSIZE)}")
    return apply(op, (), text, dtype=dtype, **attrs)


def zeros(text: str, *, dtype: str = "float32") -> Value:
    """Zeros with the dims of `text`.

    A cache to begin with, of which each rank makes its part:

    >>> from shardlib import Layout, Mesh, lower, sharded
    >>> f = sharded("B D -> B S D")(lambda x: zeros("B S D", dtype="bfloat16"))
    >>> lower(f, Layout(B="dp"), mesh=Mesh(dp=2))
    @sharded("B/dp D -> B/dp S D", layout=EXPLICIT)
    def f(x):
        v1 = zeros("B/dp S D", dtype='bfloat16')
        return v1
    """
    return _call(ZEROS, text, dtype)


def ones(text: str, *, dtype: str = "float32") -> Value:
    """Ones with the dims of `text`.

    >>> import torch
    >>> from shardlib import sharded
    >>> from shardlib.functions import sum
    >>> count = sharded("B T -> B")(lambda x: sum("B T -> B", ones("B T", dtype="int64")))
    >>> count(torch.zeros(2, 3))
    tensor([3, 3])
    """
    return _call(ONES, text, dtype)


def full(text: str, value: float, *, dtype: str = "float32") -> Value:
    """A finite number, or for a mask True or False, with the dims of `text`.

    >>> import torch
    >>> from shardlib import sharded
    >>> sharded("D -> D")(lambda x: x * full("D", 0.5))(torch.tensor([1.0, 2.0]))
    tensor([0.5000, 1.0000])
    """
    if not number(value) and not isinstance(value, bool):
        raise SpecError(f"full: the value is {value!r}; it is a finite number, True or False")
    if dtype in ITEMSIZE and ((dtype == "bool") != isinstance(value, bool) or not fits(dtype, value)
                              or dtype not in FLOATS and isinstance(value, float)):
        raise SpecError(f"full: the value is {value!r}, and {dtype} does not hold that")
    return _call(FULL, text, dtype, value=value)


def arange(text: str, *, dtype: str = "int64") -> Value:
    """0, 1, 2 ... along one dim, counted over the whole of it, wherever it is split.

    Refused: a dtype that does not hold the last one.

    >>> import torch
    >>> from shardlib import Layout, Mesh, sharded, simulate
    >>> positions = sharded("B T -> T")(lambda ids: arange("T"))
    >>> simulate(positions, Layout(T="cp"), torch.zeros(1, 5), mesh=Mesh(cp=2))
    tensor([0, 1, 2, 3, 4])
    """
    return _call(ARANGE, text, dtype, 1)


def tril(text: str, *, diagonal: int = 0, dtype: str = "bool") -> Value:
    """The lower triangle of two dims: of "T S", where s <= t + diagonal. A mask, or ones and zeros.

    >>> import torch
    >>> from shardlib import Layout, Mesh, sharded, simulate
    >>> from shardlib.functions import where
    >>> past = sharded("T S -> T S")(lambda scores: where(tril("T S"), scores, full("S", -9.0)))
    >>> simulate(past, Layout(T="cp"), torch.zeros(2, 3), mesh=Mesh(cp=2))
    tensor([[ 0., -9., -9.],
            [ 0.,  0., -9.]])
    """
    if not _whole_number(diagonal):
        raise SpecError(f"tril: diagonal is {diagonal!r}; it is a whole number")
    return _call(TRIL, text, dtype, 2, diagonal=diagonal)


TABLE = {op.name: op for op in (ZEROS, ONES, FULL, ARANGE, TRIL)}
