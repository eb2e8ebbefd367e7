"""What a convolution sees: for each place along a dim, its neighbours along a new one.

`windows("B Y D -> B Y P D", x, before=1, after=1)` has x[y + p - 1] at (y, p), and 0 beyond the ends; with an
einsum it is a convolution, over several dims one after the other:

    y = einsum("B Y P D, P D F -> B Y F", windows("B Y D -> B Y P D", x, before=1, after=1), kernel)

It is linear, so a sum may be owed. The dim is whole: where a layout splits it, declarative text has another
dim split instead, or gathers. Its derivative adds up what overlaps.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shardlib.errors import SpecError
from shardlib.language.local_code import LocalCode
from shardlib.language.steps import Steps
from shardlib.language.value import Operand, Value, apply
from shardlib.program import Op, Step, number
from shardlib.reference import Dims
from shardlib.rules import Rule
from shardlib.spec import Dim, Spec, parse_specs


def _dims(x: Spec, made: Spec) -> tuple[Dim, Dim, Dim]:
    """The dim that is looked along, what it is called in the result, and the new one behind it."""
    new = [i for i, n in enumerate(made.labels) if n not in x.labels]
    last = new[-1]
    return x.dims[last - 1], made.dims[last - 1], made.dims[last]


def cut(x: Tensor, dim: int, size: int, before: int, after: int, stride: int, dilation: int) -> Tensor:
    """Windows of `size` along `dim`, behind which they are."""
    behind = x.ndim - 1 - dim
    x = F.pad(x, (*[0, 0] * behind, before, after))
    reach = dilation * (size - 1) + 1
    return x.unfold(dim, reach, stride)[..., ::dilation].movedim(-1, dim + 1)


def laid(g: Tensor, dim: int, length: int, before: int, after: int, stride: int, dilation: int) -> Tensor:
    """The transpose: what stands in windows, added up where it was cut."""
    shape = [n for i, n in enumerate(g.shape) if i != dim + 1]
    shape[dim] = before + length + after
    out = g.new_zeros(shape)
    reach = (g.shape[dim] - 1) * stride + 1
    for p, one in enumerate(g.unbind(dim + 1)):
        out.narrow(dim, p * dilation, reach).unfold(dim, 1, stride)[..., 0].add_(one)
    return out.narrow(dim, before, length)


def _number(size: int, length: int, o: dict[str, int]) -> int:
    """How many windows there are."""
    room = o["before"] + length + o["after"] - o["dilation"] * (size - 1) - 1
    return room // o["stride"] + 1 if room >= 0 else 0


def _checked(e: LocalCode, step: Step, x: Spec, made: Spec) -> tuple[int, dict[str, int]]:
    """The place of the dim. SpecError where there are more or fewer windows than the result has."""
    (old, now, new), o = _dims(x, made), step.options
    if not e.count(new) or (n := _number(e.count(new), e.count(old), o)) != e.count(now) or not n:
        raise SpecError(f"windows: {now.label} is {e.count(now)}; of {old.label}={e.count(old)} with "
                        f"{', '.join(f'{k}={v}' for k, v in o.items())} there are "
                        f"{_number(max(e.count(new), 1), e.count(old), o)} windows of "
                        f"{new.label}={e.count(new)}")
    return x.dims.index(old), o


def _code(e: LocalCode, step: Step, args: list[str]) -> str:
    (x,), (made,) = step.ins, step.outs
    at, o = _checked(e, step, x, made)
    return (f"{e.use(cut)}({args[0]}, {at}, {e.count(_dims(x, made)[2])}, {o['before']}, {o['after']}, "
            f"{o['stride']}, {o['dilation']})")


def _code_vjp(e: LocalCode, step: Step, args: list[str]) -> str:
    (made,), (x,) = step.ins, step.outs
    at, o = _checked(e, step, x, made)
    return (f"{e.use(laid)}({args[0]}, {at}, {e.count(_dims(x, made)[0])}, {o['before']}, {o['after']}, "
            f"{o['stride']}, {o['dilation']})")


def _vjp(b: Steps, step: Step, ct: Sequence[str]) -> list[str]:
    return [b.call(WINDOWS_VJP, ct, outs=(step.ins[0].owing(),), **step.options)]


def _rule(step: Step) -> Rule:
    x, made = (step.ins[0], step.outs[0]) if step.op is WINDOWS else (step.outs[0], step.ins[0])
    return Rule(linear=((0,),), whole=tuple(dict.fromkeys(n for d in _dims(x, made) for n in d.names)))


def _slid(d: Dims, x: Tensor, spec: Spec, made: Spec) -> Tensor:
    """For each place in a window, the elements that stand there; the last one, added, is what is outside."""
    (old, now, new), o = (_dims(spec, made), d.options)
    length, count = d.count(*old.names), d.count(*now.names)
    if not count or not d.count(*new.names) or count != _number(d.count(*new.names), length, o):
        raise ValueError("there are more windows, or fewer")
    at, to, behind = (d.names.index(i.label) for i in (old, now, new))
    x, columns = torch.cat((x, torch.zeros_like(x.sum(at, keepdim=True, dtype=x.dtype))), at), []
    for p in range(d.count(*new.names)):
        places = torch.arange(count) * o["stride"] + p * o["dilation"] - o["before"]
        columns.append(x.index_select(at, torch.where((places < 0) | (places >= length), length, places)))
    return torch.cat(columns, behind).transpose(at, to)


def _back(d: Dims, g: Tensor) -> tuple[Tensor, ...]:
    (made,), (spec,) = d.step.ins, d.step.outs
    x = d.open(g.new_zeros([d.count(*i.names) for i in spec.dims]), spec)
    return d.vjp(lambda d, x: _slid(d, x, spec, made), (x,), g, made)


def _count(value: Any, least: int) -> bool:
    return number(value) and isinstance(value, int) and value >= least


KEYWORDS = {"before": lambda v: _count(v, 0), "after": lambda v: _count(v, 0),
            "stride": lambda v: _count(v, 1), "dilation": lambda v: _count(v, 1)}
WINDOWS = Op("windows", keywords=KEYWORDS, rule=_rule, emit=_code, vjp=_vjp,
             reference=lambda d, x: _slid(d, x, d.step.ins[0], d.step.outs[0]))
WINDOWS_VJP = Op("windows_vjp", keywords=KEYWORDS, rule=_rule, emit=_code_vjp, reference=_back)


def windows(text: str, x: Operand, *, before: int = 0, after: int = 0, stride: int = 1,
            dilation: int = 1) -> Value:
    """For each place along a dim its neighbours, along a new dim behind it: what a convolution sees.

    Place p of window y is element stride y + dilation p - before, and 0 beyond the ends. As many windows as
    elements may keep their dim's name, "B Y D -> B Y P D"; else it gets another, "B Y D -> B Z P D", whose
    size `sizes=` says where no argument has it. P is as long as the kernel. The dim is whole; a sum may be
    owed. A causal convolution of two taps:

    >>> import torch
    >>> from shardlib import Layout, Mesh, einsum, sharded, simulate
    >>> @sharded("B T, P -> B T")
    ... def convolved(x, kernel):
    ...     return einsum("B T P, P -> B T", windows("B T -> B T P", x, before=1), kernel)
    >>> simulate(convolved, Layout(B="dp"), torch.tensor([[1.0, 2.0, 5.0]]), torch.tensor([-1.0, 1.0]),
    ...          mesh=Mesh(dp=2))
    tensor([[1., 1., 3.]])
    """
    for name, value, least in (("before", before, 0), ("after", after, 0), ("stride", stride, 1),
                               ("dilation", dilation, 1)):
        if not _count(value, least):
            raise SpecError(f"windows: {name} is {value!r}; it is a whole number, {least} or more")
    said = (f'windows "{text}": the specs are those of "B Y D -> B Y P D", or of "B Y D -> B Z P D": a new '
            'dim behind the one that is looked along')
    ins, outs = parse_specs(text, said)
    if (len(ins), len(outs)) != (1, 1) or not _fits(ins[0], outs[0]):
        raise SpecError(said)
    return apply(WINDOWS, (x,), text, before=before, after=after, stride=stride, dilation=dilation)


def _fits(x: Spec, made: Spec) -> bool:
    new = [i for i, n in enumerate(made.labels) if n not in x.labels]
    if not new or new[-1] == 0 or len(made.dims) != len(x.dims) + 1:
        return False
    kept = [*made.labels[:new[-1]], *made.labels[new[-1] + 1:]]
    unlike = [i for i, (a, b) in enumerate(zip(x.labels, kept)) if a != b]
    return unlike in ([], [new[-1] - 1]) and all(len(d.factors) == 1 for d in _dims(x, made))


TABLE = {op.name: op for op in (WINDOWS, WINDOWS_VJP)}
