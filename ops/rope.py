"""Rotary position embedding (Su et al. 2021), in the half-rotated order of Hugging Face,
with Llama 3's scaling.

`rope_table("B -> B T/1 H", start, ...)` makes cosines (first half of H) and sines (second half) of the
positions start[b] + t. `rope("B T K G H, B T H -> B T K G H", q, table)` turns each pair (i, i + H/2) by its
angle. rope is linear in its first operand; H is whole. The table has the dtype that it is asked for; the
result has x's, computed in the wider of both.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shardlib.dtypes import FLOATS, as_they_come, widest
from shardlib.errors import SpecError
from shardlib.language.local_code import LocalCode
from shardlib.language.steps import Steps
from shardlib.language.value import Operand, Value, apply
from shardlib.program import Op, Step, number
from shardlib.reference import Dims
from shardlib.rules import Rule


def frequencies(head_dim: int, theta: float, scaling: tuple[float, float, float, int] | None) -> Tensor:
    """Radians per position of each pair, float32.

    `scaling`: (factor, low_freq_factor, high_freq_factor, original_context).
    """
    inv = 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64, device="cpu").float() / head_dim))
    if scaling is None:
        return inv
    factor, low, high, context = scaling
    wavelength = 2 * math.pi / inv
    smooth = (context / wavelength - low) / (high - low)
    blended = (1 - smooth) * inv / factor + smooth * inv
    slow = torch.where(wavelength > context / low, inv / factor, inv)
    middle = ~(wavelength < context / high) & ~(wavelength > context / low)
    return torch.where(middle, blended, slow)


def positions(start: Tensor, offset: int, length: int) -> Tensor:
    """(b, t): start[b] + offset + t."""
    if length == 1:
        return start[:, None] + offset if offset else start[:, None]
    return start[:, None] + torch.arange(offset, offset + length, device=start.device)


def rope_angles(start: Tensor, offset: int, length: int, inv: Tensor, dtype: torch.dtype) -> Tensor:
    """(b, t, h): cosines, then sines, of (start[b] + offset + t) * inv."""
    angle = positions(start, offset, length)[..., None].float() * inv
    return torch.cat((angle.cos(), angle.sin()), -1).to(dtype)


def turns(table: Tensor) -> tuple[Tensor, Tensor]:
    """From cosines | sines to what `rotate` multiplies with:
    cosines twice, and sines, the first half negative."""
    cos, sin = table.chunk(2, -1)
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def back_turns(table: Tensor) -> tuple[Tensor, Tensor]:
    """The same for the negative angle: the transpose."""
    cos, sin = turns(table)
    return cos, -sin


def rotate(x: Tensor, turn: tuple[Tensor, Tensor], half: int) -> Tensor:
    """Each pair (i, i + half) of the last dim, turned by its angle."""
    return torch.addcmul(x * turn[0], x.roll(half, -1), turn[1])


def _table(e: LocalCode, step: Step, args: list[str]) -> str:
    (out,) = step.outs
    if e.sizes[out.labels[2]] % 2:
        raise SpecError(f"rope_table: {out.labels[2]} is {e.sizes[out.labels[2]]}; its halves are turned in "
                        "pairs, so it is even")
    name = f"inv{len(e.constants)}"
    e.constants[name] = frequencies(e.sizes[out.labels[2]], step.options["theta"], step.options["scaling"])
    offset, length = e.rows(out.dims[1])
    return (f"{e.use(rope_angles)}({args[0]}, {offset}, {length}, {name}, "
            f"torch.{step.options.get('dtype') or 'float32'})")


def _rope(prepare: Any) -> Any:
    def emit(e: LocalCode, step: Step, args: list[str]) -> str:
        x, table = step.ins
        index = ", ".join(":" if n in table.labels else "None" for n in x.labels)
        turn, half = e.hoist(args[1], f"{e.use(prepare)}({{x}}[{index}])", parts=2), e.shape(x)[-1] // 2
        cos, _, sin = turn.partition(", ")
        (have, wide) = e.dtypes[step.inputs[0]], widest(*(e.dtypes[n] for n in step.inputs))
        end = "" if have == wide else f".to(torch.{have})"
        if args[0].isidentifier() and cos.isidentifier():
            # `rotate`, in place of a call
            return f"torch.addcmul({args[0]} * {cos}, {args[0]}.roll({half}, -1), {sin}){end}"
        return f"{e.use(rotate)}({args[0]}, ({turn}), {half}){end}"
    return emit


def _vjp(b: Steps, step: Step, ct: Sequence[str]) -> list[str | None]:
    return [b.call(ROPE_VJP, [ct[0], step.inputs[1]], outs=(step.ins[0].owing(),)), None]


def _rule(step: Step) -> Rule:
    return Rule(linear=((0,),), whole=step.ins[0].names[-1:])


def _scaling(value: object) -> bool:
    return value is None or isinstance(value, tuple) and len(value) == 4 and all(map(number, value))


def _table_reference(d: Dims, start: Tensor) -> Tensor:
    """Radians of a pair by its wavelength: long ones (by Llama 3) turn `factor` times slower,
    short ones as they did, blended between."""
    _, time, name = d.step.outs[0].names
    half, odd = divmod(d.count(name), 2)
    if odd:
        raise ValueError(f"{name} is not made of two halves")
    pair = d.index(name).double() % half
    radians = d.options["theta"] ** (-pair / half)
    if d.options["scaling"] is not None:
        factor, low, high, context = d.options["scaling"]
        turns_in_context = context * radians / (2 * math.pi)
        short = ((turns_in_context - low) / (high - low)).clamp(0, 1)
        radians = radians * (short + (1 - short) / factor)
    angle = (start + d.index(time)) * radians
    return torch.where(d.index(name) < half, angle.cos(), angle.sin())


def _rope_reference(d: Dims, x: Tensor, table: Tensor) -> Tensor:
    """Each pair is a complex number, multiplied by cos + i sin. The table is a constant."""
    at = d.names.index(d.step.ins[1].names[-1])
    x, table = (torch.complex(*t.unflatten(at, (2, d.sizes[d.names[at]] // 2)).unbind(at))
                for t in (x, table.detach()))
    turned = x * table
    return torch.cat((turned.real, turned.imag), at)


def _of_x(dtypes: Sequence[str | None], attrs: dict[str, Any]) -> list[str | None]:
    return [dtypes[0]]


ROPE_TABLE = Op("rope_table",
                keywords={"theta": number, "scaling": _scaling, "dtype": lambda v: v is None or v in FLOATS},
                rule=lambda s: Rule(whole=s.outs[0].names[2:]), emit=_table, index=(0,),
                dtype=lambda d, o: [o.get("dtype") or "float32"], reference=_table_reference)
ROPE = Op("rope", rule=_rule, emit=_rope(turns), vjp=_vjp, index=(1,), joins=True, takes=("float",),
          reads=as_they_come, dtype=_of_x, reference=_rope_reference)
ROPE_VJP = Op("rope_vjp", rule=_rule, emit=_rope(back_turns), index=(1,), takes=("float",),
              reads=as_they_come, dtype=_of_x, reference=lambda d, g, table: d.vjp(
                  lambda d, x: _rope_reference(d, x, table), (torch.zeros_like(g),), g, d.step.ins[0]))


def rope_table(text: str, start: Operand, *, theta: float,
               scaling: tuple[float, float, float, int] | None = None, dtype: str = "float32") -> Value:
    """Cosines (first half of H), then sines, of the angles of positions start[b] + t (Su et al. 2021).

    Pair i turns by theta^(-2i/H) radians a position. scaling: (factor, low_freq_factor, high_freq_factor,
    original_context) of Llama 3, which turns the slow pairs `factor` times slower. Computed in
    float32, rounded to `dtype`. Refused: an odd H.

    >>> import torch
    >>> from shardlib import Layout, Mesh, sharded, simulate
    >>> @sharded("B, B T H -> B T H")
    ... def times(start, x):
    ...     return x * rope_table("B -> B T H", start, theta=1e4)
    >>> simulate(times, Layout(T="cp"), torch.tensor([0]), torch.ones(1, 2, 4), mesh=Mesh(cp=2))
    tensor([[[1.0000, 1.0000, 0.0000, 0.0000],
             [0.5403, 0.9999, 0.8415, 0.0100]]])
    """
    return apply(ROPE_TABLE, (start,), text, theta=float(theta), scaling=scaling, dtype=dtype)


def rope(text: str, x: Operand, table: Operand) -> Value:
    """`x` with each pair (i, i + H/2) of its last dim turned by its position's angle, from `rope_table`.

    H is whole; x may owe a sum.

    >>> import torch
    >>> from shardlib import sharded
    >>> turn = sharded("T H, T H -> T H")(lambda x, table: rope("T H, T H -> T H", x, table))
    >>> cos, sin = torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0], [1.0]])
    >>> turn(torch.tensor([[3.0, 4.0], [3.0, 4.0]]), torch.cat((cos, sin), -1))   # by nothing, by a quarter
    tensor([[ 3.,  4.],
            [-4.,  3.]])
    """
    if not isinstance(text, str) or text.count(",") != 1:
        raise SpecError(
            f'rope "{text}": specs of x, the table, and the result, as in "B T K H, B T H -> B T K H"')
    return apply(ROPE, (x, table), text)


TABLE = {op.name: op for op in (ROPE_TABLE, ROPE, ROPE_VJP)}
