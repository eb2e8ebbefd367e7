"""Random numbers: uniform, normal and dropout, drawn by (seed, step, layer, index in the whole).

The index counts the elements of the whole value in row-major order, in 64 bits: each rank draws its piece,
nothing is sent, and results are the same bits under every layout. `step` and `layer` are operands, integers
without dims: a program is made once for all steps, and the body of a scan once for all layers; with `layer`
from `arange("L")`, which the scan slices, each draws its own.

What follows the bits is integers, and the exactly rounded + - * / and sqrt of float64: no logarithm or cosine
of a library, which differ by a bit between vector and scalar code, and between CPUs and GPUs.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from shardlib.dtypes import FLOATS, as_they_come
from shardlib.errors import SpecError
from shardlib.language.arithmetic import same
from shardlib.language.constants import full
from shardlib.language.local_code import LocalCode
from shardlib.language.steps import Steps
from shardlib.language.value import Operand, Value, apply
from shardlib.params import GOLDEN, mixed
from shardlib.program import Op, Step, number
from shardlib.reference import Dims
from shardlib.rules import Rule
from shardlib.spec import Spec, parse

Rows = Sequence[tuple[int, int, int]]
BITS = {"float64": 53, "float32": 24, "float16": 11, "bfloat16": 8}     # of a fraction that a dtype holds


def bits(step: Tensor, layer: Tensor, seed: int, rows: Rows) -> Tensor:
    """64 bits for each element of a piece; of each dim, where it starts, how long it is, and the whole."""
    index = torch.zeros((), dtype=torch.int64, device=step.device)
    for start, size, whole in rows:
        index = index[..., None] * whole + torch.arange(start, start + size, device=step.device)
    return hashed(index, step, layer, seed)


def hashed(index: Tensor, step: Tensor, layer: Tensor, seed: int) -> Tensor:
    """64 bits for each index: a hash of (seed, step, layer) moves the stream that the index counts."""
    stream = torch.full_like(step, seed, dtype=torch.int64)
    for part in (step, layer):
        stream = mixed(mixed(stream * GOLDEN) + part)
    return mixed((index + 1) * GOLDEN + stream)


def top(drawn: Tensor, count: int) -> Tensor:
    """The first `count` bits, as an integer of at least 0."""
    return (drawn >> (64 - count)) & ((1 << count) - 1)


def fractions(drawn: Tensor, dtype: torch.dtype) -> Tensor:
    """In [0, 1), of as many bits as the dtype holds: none is rounded, to 1 or otherwise."""
    count = BITS[str(dtype).removeprefix("torch.")]
    return top(drawn, count).to(dtype) * 2.0 ** -count


def normals(drawn: Tensor, dtype: torch.dtype) -> Tensor:
    """Standard normal numbers by Box and Muller (1958), rounded once to the dtype."""
    radius = (-2 * logarithm((top(drawn, 53).double() + 0.5) * 2.0 ** -53)).sqrt()
    return (radius * cosine(top(mixed(drawn + GOLDEN), 53).double() * 2.0 ** -53)).to(dtype)


def logarithm(x: Tensor) -> Tensor:
    """log x: of x = m 2^e with m in [1/sqrt 2, sqrt 2], by the series of 2 artanh((m - 1) / (m + 1))."""
    m, e = torch.frexp(x)
    small = m < math.sqrt(0.5)
    m, e = torch.where(small, 2 * m, m), e - small.to(e.dtype)
    s = (m - 1) / (m + 1)
    return 2 * s * _series(s * s, [1 / (2 * k + 1) for k in range(12)]) + e.double() * math.log(2)


def cosine(turns: Tensor) -> Tensor:
    """cos(2 pi turns), of turns in [0, 1), by Taylor's series around a zero, of half a turn."""
    to_quarter = 0.25 - torch.minimum(turns, 1 - turns)             # cos(2 pi t) = sin(2 pi (1/4 - t))
    x = 2 * math.pi * to_quarter
    return x * _series(x * x, [(-1) ** k / math.factorial(2 * k + 1) for k in range(13)])


def _series(x: Tensor, factors: Sequence[float]) -> Tensor:
    """The polynomial by Horner's rule."""
    total = torch.full_like(x, factors[-1])
    for factor in factors[-2::-1]:
        total = total * x + factor
    return total


def dropped(x: Tensor, step: Tensor, layer: Tensor, seed: int, rate: float, rows: Rows) -> Tensor:
    """x / (1 - rate), but 0 where the fraction drawn is below the rate."""
    kept = fractions(bits(step, layer, seed, rows), torch.float64) >= rate
    return torch.where(kept, x / (1 - rate) if rate < 1 else 0.0, 0).to(x.dtype)


# -- as ops --------------------------------------------------------------------------------------------------

def _rows(e: LocalCode, spec: Spec) -> tuple[tuple[int, int, int], ...]:
    return tuple((*e.rows(d), e.count(d) if d.factors else e.rows(d)[1]) for d in spec.dims)


def _drawn(helper: Callable) -> Callable:
    def emit(e: LocalCode, step: Step, args: list[str]) -> str:
        made = f"{e.use(bits)}({', '.join(args)}, {step.options['seed']}, {_rows(e, step.outs[0])})"
        return f"{e.use(helper)}({made}, torch.{step.options['dtype']})"
    return emit


def _hashed(d: Dims, step: Tensor, layer: Tensor) -> Tensor:
    return hashed(d.index(*d.step.outs[0].names), step, layer, d.options["seed"])


def _uniform(d: Dims, step: Tensor, layer: Tensor) -> Tensor:
    """By halves: the first bit counts 1/2, the second 1/4 ..."""
    drawn = _hashed(d, step, layer)
    return sum((((drawn >> (63 - i)) & 1).double() * 0.5 ** (i + 1) for i in range(BITS[d.options["dtype"]])),
               start=torch.zeros(drawn.shape, dtype=torch.float64))


def _normal(d: Dims, step: Tensor, layer: Tensor) -> Tensor:
    """By torch's logarithm and cosine."""
    drawn = _hashed(d, step, layer)
    radius = torch.sqrt(-2 * torch.log((top(drawn, 53).double() + 0.5) / 2 ** 53))
    return radius * torch.cos(2 * math.pi * (top(mixed(drawn + GOLDEN), 53).double() / 2 ** 53))


def _dropped(d: Dims, x: Tensor, step: Tensor, layer: Tensor) -> Tensor:
    kept = top(_hashed(d, step, layer), 53) >= math.ceil(d.options["rate"] * 2 ** 53)
    return x * kept / max(1 - d.options["rate"], 2.0 ** -60)


def _integer(value: Any) -> bool:
    return number(value) and isinstance(value, int)


def _rate(value: Any) -> bool:
    return number(value) and 0 <= value <= 1


UNIFORM, NORMAL = (Op(name, keywords={"seed": _integer, "dtype": lambda v: v in FLOATS}, index=(0, 1),
                      rule=lambda s: Rule(), emit=_drawn(helper), constant=True, reads=as_they_come,
                      dtype=lambda d, o: [o["dtype"]], reference=reference)
                   for name, helper, reference in (("uniform", fractions, _uniform),
                                                   ("normal", normals, _normal)))


def _dropout(e: LocalCode, step: Step, args: list[str]) -> str:
    o = step.options
    return f"{e.use(dropped)}({', '.join(args)}, {o['seed']}, {o['rate']!r}, {_rows(e, step.ins[0])})"


def _dropout_vjp(b: Steps, step: Step, ct: Sequence[str]) -> list[str | None]:
    return [b.call(DROPOUT, [ct[0], *step.inputs[1:]], **step.options), None, None]


DROPOUT = Op("dropout", keywords={"seed": _integer, "rate": _rate}, rule=lambda s: Rule(linear=((0,),)),
             infer=same, emit=_dropout, vjp=_dropout_vjp, index=(1, 2), takes=("float", "index", "index"),
             dtype=lambda d, o: d[:1], reference=_dropped)


# -- what one calls ------------------------------------------------------------------------------------------

def _count(value: Operand | int) -> Operand:
    """`step` or `layer`, a number of Python made a value."""
    return full("()", value, dtype="int64") if isinstance(value, int) else value


def _checked(op: str, seed: int) -> None:
    if not _integer(seed):
        raise SpecError(f"{op}: seed is {seed!r}; it is a whole number of at most 64 bits")


def _draw(op: Op, text: str, step: Operand | int, layer: Operand | int, seed: int, dtype: str) -> Value:
    spec = parse(text)
    if spec.ellipsis or spec.owed:
        raise SpecError(f'{op.name} "{text}": the text is dims of what is made; it owes nothing')
    if dtype not in FLOATS:
        raise SpecError(f"{op.name}: dtype is {dtype!r}; it is one of {', '.join(FLOATS)}")
    _checked(op.name, seed)
    return apply(op, (_count(step), _count(layer)), f"(), () -> {text}", seed=seed,
                 dtype=dtype)


def uniform(text: str, step: Operand | int, layer: Operand | int = 0, *, seed: int,
            dtype: str = "float32") -> Value:
    """Uniform numbers in [0, 1) with the dims of `text`, drawn by (seed, step, layer, index in the whole).

    step, layer: integers without dims, or of Python. Each rank draws its piece: the bits are the same under
    every layout. A size that no argument has is said by `sizes=`.

    >>> import torch
    >>> from shardlib import Layout, Mesh, sharded, simulate
    >>> noisy = sharded("B D, () -> B D")(lambda x, step: x + uniform("B D", step, seed=1))
    >>> x, step = torch.zeros(3, 2), torch.tensor(7)
    >>> one = simulate(noisy, None, x, step, mesh=Mesh())
    >>> torch.equal(one, simulate(noisy, Layout(B="dp"), x, step, mesh=Mesh(dp=2)))
    True
    """
    return _draw(UNIFORM, text, step, layer, seed, dtype)


def normal(text: str, step: Operand | int, layer: Operand | int = 0, *, seed: int,
           dtype: str = "float32") -> Value:
    """Standard normal numbers with the dims of `text`, drawn as those of `uniform`.

    >>> import torch
    >>> from shardlib import Layout, Mesh, sharded, simulate
    >>> noise = sharded("B, () -> B")(lambda x, step: normal("B", step, seed=1))
    >>> made = simulate(noise, Layout(B="dp"), torch.zeros(10_000), torch.tensor(0), mesh=Mesh(dp=4))
    >>> bool(made.mean().abs() < 0.03), bool((made.std() - 1).abs() < 0.03)
    (True, True)
    """
    return _draw(NORMAL, text, step, layer, seed, dtype)


def dropout(x: Operand, step: Operand | int, layer: Operand | int = 0, *, rate: float, seed: int) -> Value:
    """x / (1 - rate), but 0 with probability `rate` (Srivastava et al. 2014); drawn as `uniform` is.

    Backward drops the same. A sum may be owed. In a scan, `layer` tells its rounds apart:

    >>> import torch
    >>> from shardlib import Layout, Mesh, scan, sharded, simulate
    >>> from shardlib.functions import arange
    >>> body = sharded("B D, (), () -> B D")(lambda x, layer, step: dropout(x, step, layer, rate=0.5, seed=0))
    >>> f = sharded("B D, L, () -> B D")(lambda x, layers, step: scan(body, x, layers, step))
    >>> simulate(f, Layout(D="tp"), torch.ones(1, 8), torch.arange(2), torch.tensor(3), mesh=Mesh(tp=2))
    tensor([[0., 4., 4., 4., 0., 0., 0., 0.]])
    """
    if not _rate(rate):
        raise SpecError(f"dropout: rate is {rate!r}; it is a number from 0 to 1")
    _checked("dropout", seed)
    return apply(DROPOUT, (x, _count(step), _count(layer)), rate=float(rate), seed=seed)


TABLE = {op.name: op for op in (UNIFORM, NORMAL, DROPOUT)}
