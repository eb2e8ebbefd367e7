"""group_norm: layer_norm over any dims, those of a group of channels taken apart (Wu and He 2018).

Channels are two dims, groups and what is in one: `B G C Y X` normalised over `C Y X`, its weight `G C`. The
result has x's dtype: what is computed, in at least float32 and the widest of all, is rounded once.

On one axis: the dims `over` are whole, or the op takes its distributed form, as layer_norm does; `x` owes
nothing; other dims may be split; `w` and `b`, both owed, give an owed result.
"""
from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from shardlib.dtypes import as_they_come
from shardlib.errors import SpecError
from shardlib.language.arithmetic import align
from shardlib.language.local_code import LocalCode
from shardlib.language.value import Operand, Value, apply
from shardlib.ops.layer_norm import affine, backward, norm_reference, over_pieces
from shardlib.program import Op, Step, number
from shardlib.rules import Rule
from shardlib.spec import Spec, parse


def _infer(ins: Sequence[Spec], attrs: dict[str, Any]) -> tuple[Spec, ...]:
    x, over = ins[0], parse(attrs["over"])
    if not over.dims or over != over.whole().owing() or over.ellipsis or {*over.labels} - {*x.labels}:
        raise SpecError(f'group_norm: over is "{attrs["over"]}"; it is some of the dims of x, {x.whole()}')
    for name, spec in zip(("weight", "bias"), ins[1:]):
        if spec.labels != tuple(n for n in x.labels if n in ins[1].labels):
            raise SpecError(f"group_norm: the {name} has dims {spec}, x has {x}; weight and bias have the "
                            "same ones of them, in order")
    return (x,)


def _emit(e: LocalCode, step: Step, args: list[str]) -> str:
    over = tuple(step.ins[0].labels.index(n) for n in parse(step.options["over"]).labels)
    placed = [align(arg, spec, step.ins[0]) for arg, spec in zip(args, step.ins)]
    return f"{e.use(normalised)}({over}, {step.options['eps']!r}, {', '.join(placed)})"


def normalised(over: tuple[int, ...], eps: float, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """x at mean 0 and variance 1 over its dims `over`, times w, plus b, in at least float32, rounded once."""
    wide = reduce(torch.promote_types, (y.dtype for y in (x, w, b) if y is not None), torch.float32)
    off = x.to(wide) - x.to(wide).mean(over, keepdim=True)
    y = off * torch.rsqrt(off.square().mean(over, keepdim=True) + eps) * w
    return (y if b is None else y + b).to(x.dtype)


def _over(step: Step) -> Spec:
    return parse(step.options["over"])


GROUP_NORM = Op("group_norm", keywords={"eps": number, "over": lambda v: isinstance(v, str)}, infer=_infer,
                rule=lambda s: Rule(linear=affine(s), whole=_over(s).names), emit=_emit,
                distribute=lambda b, s: over_pieces(_over(s).labels, b, s),
                vjp=lambda b, s, ct: backward(s.options["over"], s, b, ct), takes=("float",),
                reads=as_they_come, dtype=lambda d, o: d[:1],
                reference=lambda d, x, w, b=0: norm_reference(d, parse(d.options["over"]).names, x, w, b))


def group_norm(x: Operand, w: Operand, b: Operand | None = None, *, over: str, eps: float = 1e-5) -> Value:
    """`x` normalised to mean 0 and variance 1 over the dims `over`, times `w`, plus `b` where there is one.

    w and b have some of x's dims, in order. What torch.nn.GroupNorm(G, ...) does to channels, which rearrange
    takes apart as `B (G C) Y X -> B G C Y X`: groups may be split, over ranks. Where
    one of `over` is, ranks join two sums for each group. Refused: an x that owes a sum.

    >>> import torch
    >>> from shardlib import Layout, Mesh, sharded, simulate
    >>> norm = sharded("B G C X, G C -> B G C X")(lambda x, w: group_norm(x, w, over="C X", eps=0.0))
    >>> x = torch.tensor([[[[1.0, 3.0]], [[5.0, 9.0]]]])                # two groups, of one channel each
    >>> simulate(norm, Layout(G="tp"), x, torch.tensor([[1.0], [10.0]]), mesh=Mesh(tp=2))
    tensor([[[[ -1.,   1.]],
    <BLANKLINE>
             [[-10.,  10.]]]])
    """
    if not isinstance(over, str):
        raise SpecError(f'group_norm: over is {over!r}; it is a text of dims, as in "C Y X"')
    return apply(GROUP_NORM, (x, w) if b is None else (x, w, b), over=over, eps=float(eps))


TABLE = {"group_norm": GROUP_NORM}
