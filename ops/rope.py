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
from shardlib.ops.few_rows import starts_early
from shardlib.ops.rope_scaling import Scaling, amplitude, dynamic_frequencies, frequencies, is_scaling, named
from shardlib.program import Op, Step, number
from shardlib.reference import Dims
from shardlib.rules import Rule
from shardlib.spec import Dim


def positions(start: Tensor, offset: int, length: int) -> Tensor:
    """(b, t): start[b] + offset + t."""
    if length == 1:
        return start[:, None] + offset if offset else start[:, None]
    return start[:, None] + torch.arange(offset, offset + length, device=start.device)


def rope_angles(start: Tensor, offset: int, length: int, inv: Tensor, dtype: torch.dtype,
                amplitude: float = 1.0) -> Tensor:
    """(b, t, h): cosines, then sines, of (start[b] + offset + t) * inv."""
    if (start.is_cuda and inv.dim() == 1 and start.is_contiguous() and not start.dtype.is_floating_point
        and (dtype, amplitude) == (torch.float32, 1)):
        from shardlib.triton_kernels import rope_angles as kernels
        return kernels.rope_angles(start, offset, length, inv, starts_early(start.device, start.numel()))
    angle = positions(start, offset, length)[..., None].float() * inv
    made = torch.cat((angle.cos(), angle.sin()), -1)
    return (made if amplitude == 1 else made * amplitude).to(dtype)


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


def neighbours(x: Tensor) -> Tensor:
    """Each pair (2i, 2i + 1) of the last dim the other way round."""
    return x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)


def between(table: Tensor) -> tuple[Tensor, Tensor]:
    """As `turns`, for pairs of neighbours."""
    cos, sin = table.chunk(2, -1)
    return cos.repeat_interleave(2, -1), torch.stack((-sin, sin), -1).flatten(-2)


def back_between(table: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = between(table)
    return cos, -sin


def rotate_some(x: Tensor, turn: tuple[Tensor, Tensor], interleaved: bool) -> Tensor:
    """The first elements of the last dim, as many as `turn` has, in pairs of neighbours or of halves."""
    first, rest = x.tensor_split((turn[0].shape[-1],), -1)
    turned = (torch.addcmul(first * turn[0], neighbours(first), turn[1]) if interleaved
              else rotate(first, turn, first.shape[-1] // 2))
    return torch.cat((turned, rest.to(turned.dtype)), -1) if rest.shape[-1] else turned


def _table(e: LocalCode, step: Step, args: list[str]) -> str:
    (out,) = step.outs
    if e.sizes[out.labels[2]] % 2:
        raise SpecError(f"rope_table: {out.labels[2]} is {e.sizes[out.labels[2]]}; its halves are turned in "
                        "pairs, so it is even")
    head, theta, scaling = e.sizes[out.labels[2]], step.options["theta"], step.options["scaling"]
    offset, length = e.rows(out.dims[1])
    if named(scaling)[0] == "dynamic":
        total = e.count(out.dims[1])
        inv = f"{e.use(dynamic_frequencies)}({args[0]}, {total}, {head}, {theta}, {scaling[1]}, {scaling[2]})"
    else:
        inv = f"inv{len(e.constants)}"
        e.constants[inv] = frequencies(head, theta, scaling)
    more = f", {amplitude(scaling)}" if amplitude(scaling) != 1 else ""
    return (f"{e.use(rope_angles)}({args[0]}, {offset}, {length}, {inv}, "
            f"torch.{step.options.get('dtype') or 'float32'}{more})")


def _rope(halves: Any, neighbours: Any) -> Any:
    def emit(e: LocalCode, step: Step, args: list[str]) -> str:
        x, table = step.ins
        interleaved = bool(step.options.get("interleaved"))
        prepare, part = neighbours if interleaved else halves, step.options.get("part")
        _check_pairs(e, step, part)
        index = ", ".join(":" if n in table.labels else "None" for n in x.labels[:-1]) + ", :"
        turn, half = e.hoist(args[1], f"{e.use(prepare)}({{x}}[{index}])", parts=2), e.shape(x)[-1] // 2
        cos, _, sin = turn.partition(", ")
        (have, wide) = e.dtypes[step.inputs[0]], widest(*(e.dtypes[n] for n in step.inputs))
        end = "" if have == wide else f".to(torch.{have})"
        if interleaved or part:
            return f"{e.use(rotate_some)}({args[0]}, ({turn}), {interleaved}){end}"
        if args[0].isidentifier() and cos.isidentifier():
            # `rotate`, in place of a call
            return f"torch.addcmul({args[0]} * {cos}, {args[0]}.roll({half}, -1), {sin}){end}"
        return f"{e.use(rotate)}({args[0]}, ({turn}), {half}){end}"
    return emit


def _vjp(b: Steps, step: Step, ct: Sequence[str]) -> list[str | None]:
    return [b.call(ROPE_VJP, [ct[0], step.inputs[1]], outs=(step.ins[0].owing(),), **step.options), None]


def _rule(step: Step) -> Rule:
    return Rule(linear=((0,),), whole=tuple(dict.fromkeys(s.names[-1] for s in step.ins)))


def _lengths(step: Step) -> tuple[Dim, tuple[Dim, ...], int] | None:
    """The table is as long as the part that is turned."""
    part = step.options.get("part")
    return None if part is None else (step.ins[1].dims[-1], (), part)


def _check_pairs(e: LocalCode, step: Step, part: int | None) -> None:
    """SpecError where there are no pairs in the part that is turned, or not so many elements."""
    x, table = (s.labels[-1] for s in step.ins)
    if (part is None) != (x == table):
        raise SpecError(f"rope: the table's last dim is {table}, that of x is {x}; they are one, or part= "
                        "says how many elements are turned")
    if part is not None and part > e.sizes[x]:
        raise SpecError(f"rope: part is {part}, and {x} is {e.sizes[x]}")


def _table_reference(d: Dims, start: Tensor) -> Tensor:
    """Radians of a pair by its wavelength: long ones (by Llama 3) turn `factor` times slower,
    short ones as they did, blended between."""
    _, time, name = d.step.outs[0].names
    half, odd = divmod(d.count(name), 2)
    if odd:
        raise ValueError(f"{name} is not made of two halves")
    pair = d.index(name).double() % half
    radians = d.options["theta"] ** (-pair / half)
    kind, numbers = named(d.options["scaling"])
    if kind == "llama3":
        factor, low, high, context = numbers
        turns_in_context = context * radians / (2 * math.pi)
        short = ((turns_in_context - low) / (high - low)).clamp(0, 1)
        radians = radians * (short + (1 - short) / factor)
    elif kind == "linear":
        radians = radians / numbers[0]
    elif kind == "dynamic":
        factor, context = numbers
        more = factor * (start + d.count(time)).clamp(min=int(context)) / context - (factor - 1)
        radians = radians * more.double() ** (-2 * pair / max(1, 2 * half - 2))
    elif kind == "yarn":
        factor, context, fast, slow, _ = numbers
        # the pairs that turn so often in a context
        base = math.log(d.options["theta"])
        ends = [half * math.log(context / (2 * math.pi * n)) / base for n in (fast, slow)]
        low, high = max(math.floor(ends[0]), 0), min(math.ceil(ends[1]), 2 * half - 1)
        slower = ((pair - low) / max(high - low, 1e-3)).clamp(0, 1)
        radians = radians * (1 - slower + slower / factor)
    angle = (start + d.index(time)) * radians
    return torch.where(d.index(name) < half, angle.cos(), angle.sin()) * amplitude(d.options["scaling"])


def _rope_reference(d: Dims, x: Tensor, table: Tensor) -> Tensor:
    """Each pair is a complex number, multiplied by cos + i sin. The table is a constant."""
    at, of_table = (d.names.index(s.names[-1]) for s in d.step.ins)
    part, near = d.count(d.names[of_table]), bool(d.options.get("interleaved"))
    x, rest = x.split((part, d.count(d.names[at]) - part), at)

    def pairs(t: Tensor, near: bool) -> Tensor:
        halves = t.unflatten(at, (part // 2, 2) if near else (2, part // 2))
        return torch.complex(*halves.unbind(at + 1 if near else at))
    turned = pairs(x, near) * pairs(table.detach().transpose(at, of_table), False)
    parts = (turned.real, turned.imag)
    made = torch.stack(parts, at + 1).flatten(at, at + 1) if near else torch.cat(parts, at)
    return torch.cat((made, rest), at)


def _of_x(dtypes: Sequence[str | None], attrs: dict[str, Any]) -> list[str | None]:
    return [dtypes[0]]


ROPE_TABLE = Op("rope_table",
                keywords={"theta": number, "scaling": is_scaling,
                          "dtype": lambda v: v is None or v in FLOATS},
                rule=lambda s: Rule(whole=s.outs[0].names[2:]), emit=_table, index=(0,),
                dtype=lambda d, o: [o.get("dtype") or "float32"], reference=_table_reference)
_PAIRS = {"interleaved": lambda v: v in (None, True),
          "part": lambda v: v is None or isinstance(v, int) and v > 0 and v % 2 == 0}
ROPE = Op("rope", rule=_rule, emit=_rope(turns, between), vjp=_vjp, keywords=_PAIRS, lengths=_lengths,
          index=(1,), joins=True, takes=("float",),
          reads=as_they_come, dtype=_of_x, reference=_rope_reference)
ROPE_VJP = Op("rope_vjp", rule=_rule, emit=_rope(back_turns, back_between), keywords=_PAIRS,
              lengths=_lengths, index=(1,), takes=("float",),
              reads=as_they_come, dtype=_of_x, reference=lambda d, g, table: d.vjp(
                  lambda d, x: _rope_reference(d, x, table), (torch.zeros_like(g),), g, d.step.ins[0]))


def rope_table(text: str, start: Operand, *, theta: float,
               scaling: Scaling = None, dtype: str = "float32") -> Value:
    """Cosines (first half of H), then sines, of the angles of positions start[b] + t (Su et al. 2021).

    Pair i turns by theta^(-2i/H) radians a position, or slower, by a `scaling` for longer contexts:
    ("linear", factor), ("dynamic", factor, context), ("yarn", factor, context, fast, slow, attention), or
    Llama 3's (factor, low_freq_factor, high_freq_factor, original_context); see `rope_scaling`. Computed in
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


def rope(text: str, x: Operand, table: Operand, *, interleaved: bool = False,
         part: int | None = None) -> Value:
    """`x` with each pair (i, i + H/2) of its last dim turned by its position's angle, from `rope_table`.

    H is whole; x may owe a sum. interleaved: pairs are (2i, 2i + 1), as in GPT-J, or in Llama's own files.
    part: so many elements, the first ones, are turned, and the others stay (GPT-NeoX, Phi); the table's last
    dim has a name of its own then, "B T K H, B T R -> B T K H".

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
    options: dict[str, Any] = {"interleaved": True} if interleaved else {}
    if part is not None:
        options["part"] = part
    return apply(ROPE, (x, table), text, **options)


TABLE = {op.name: op for op in (ROPE_TABLE, ROPE, ROPE_VJP)}
