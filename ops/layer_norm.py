"""layer_norm: (x - mean(x)) / sqrt(var(x) + eps) * w + b, over the last dim (Ba, Kiros and Hinton 2016).

The result has x's dtype: what is computed, in at least float32 and the widest of all, is rounded once.

On one axis: the last dim is whole, or the op takes its distributed form, which joins the mean, then the
variance; `x` owes nothing; other dims may be split; `w` and `b`, both owed, give an owed result.
`norm_vjp` is the derivative of all norms that take the mean away.
"""
from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from shardlib.dtypes import as_they_come, widest
from shardlib.errors import SpecError
from shardlib.language.arithmetic import ADD, MUL, SHIFT, SUB
from shardlib.language.casts import CAST_LIKE, WIDEN
from shardlib.language.local_code import LocalCode
from shardlib.language.reductions import beside
from shardlib.language.steps import Steps
from shardlib.language.unary import OPS as UNARY
from shardlib.language.value import Operand, Value, apply
from shardlib.language.variance import mean_and_var
from shardlib.program import Op, Step, number
from shardlib.reference import Dims
from shardlib.rules import Rule
from shardlib.spec import Spec, parse


def _infer(ins: Sequence[Spec], attrs: dict[str, Any]) -> tuple[Spec, ...]:
    for name, spec in zip(("weight", "bias"), ins[1:]):
        if len(spec.labels) != 1 or ins[0].labels[-1:] != spec.labels:
            raise SpecError(f"layer_norm: the {name} has dims {spec}, x ends with "
                            f"{' '.join(ins[0].labels[-1:]) or 'nothing'}; they must be the same dim")
    return (ins[0],)


def _emit(e: LocalCode, step: Step, args: list[str]) -> str:
    kinds, shape = [e.dtypes[n] for n in step.inputs], f"({e.shape(step.ins[1])[0]},)"
    wide = "" if len({*kinds}) == 1 else f".to(torch.{widest(*kinds, 'float32')})"
    x, *affine = (f"{arg}{wide}" for arg in args)
    bias = affine[1] if len(affine) == 2 else None
    return (f"F.layer_norm({x}, {shape}, {affine[0]}, {bias}, {step.options['eps']!r})"
            + (f".to(torch.{kinds[0]})" if wide else ""))


def affine(step: Step) -> tuple[tuple[int, ...], ...]:
    """The operands in which a norm is linear: the weight, and the bias with it."""
    return (tuple(range(1, len(step.ins))),)


def norm_reference(d: Dims, over: Sequence[str], x: Tensor, w: Tensor, b: Tensor | float = 0) -> Tensor:
    """x, normalised to mean 0 and variance 1 over the names `over`, times w, plus b."""
    off = x - d.sum(x, *over) / d.count(*over)
    return off * w * (d.sum(off * off, *over) / d.count(*over) + d.options["eps"]) ** -0.5 + b


def over_pieces(over: Sequence[str], b: Steps, step: Step) -> list[str]:
    """The norm over dims `over` of which some are split: two numbers a row are joined."""
    (x, w, *bias), (wide, *_) = step.inputs, step.ins
    rows = Spec(tuple(d for d in wide.dims if d.label not in over))
    x32 = b.call(WIDEN, [x])
    mean, var = mean_and_var(b, x32, rows)
    scale = b.call(UNARY["rsqrt"], [b.call(SHIFT, [var], by=step.options["eps"])])
    made = b.call(MUL, [b.call(MUL, [b.call(SUB, [x32, mean]), scale]), w])
    return [b.call(CAST_LIKE, [b.call(ADD, [made, *bias]) if bias else made, x])]


def backward(over: str, step: Step, b: Steps, ct: Sequence[str]) -> list[str]:
    """The cotangents of x, w and, where there is one, b."""
    return list(b.call(NORM_VJP, [*step.inputs, ct[0]], over=over, eps=step.options["eps"]))


def norm_vjp(over: tuple[int, ...], gone: tuple[int, ...], eps: float, x: Tensor, w: Tensor,
             *rest: Tensor) -> tuple[Tensor, ...]:
    """The cotangents of x, w and b; w and b have the dims of x, 1 at `gone`, which these lack.
    Sums in at least float32."""
    *bias, g = rest
    wide = reduce(torch.promote_types, (y.dtype for y in (x, w, *bias)), torch.float32)
    xw, gw = x.to(wide), g.to(wide)
    off = xw - xw.mean(over, keepdim=True)
    scale = torch.rsqrt(off.square().mean(over, keepdim=True) + eps)
    normed, gx = off * scale, gw * w.to(wide)
    dx = scale * (gx - gx.mean(over, keepdim=True) - normed * (gx * normed).mean(over, keepdim=True))
    sums = ((y.sum(gone) if gone else y).to(like.dtype) for y, like in zip((gw * normed, gw), (w, *bias)))
    return (dx.to(x.dtype), *sums)


def _emit_vjp(e: LocalCode, step: Step, args: list[str]) -> str:
    x, w = step.ins[:2]
    over = tuple(x.labels.index(n) for n in _over(step).labels)
    gone = tuple(i for i, n in enumerate(x.labels) if n not in w.labels)
    placed = ", ".join(arg if s.labels == x.labels else beside(arg, s, x) for arg, s in zip(args, step.ins))
    return f"{e.use(norm_vjp)}({over}, {gone}, {step.options['eps']!r}, {placed})"


def _over(step: Step) -> Spec:
    return parse(step.options["over"])


def _vjp_rule(step: Step) -> Rule:
    g = len(step.ins) - 1
    lost = tuple(n for n in step.ins[0].names if n not in step.ins[1].names)
    return Rule(linear=((1,), (g,)), whole=_over(step).names, sums=lost,
                uses=((0, 1, g), (0, g), (g,))[:g])


def _vjp_reference(d: Dims, x: Tensor, w: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    *bias, g = rest
    return d.vjp(lambda d, *xs: norm_reference(d, _over(d.step).names, *xs), (x, w, *bias), g, d.step.ins[0])


LAYER_NORM = Op("layer_norm", keywords={"eps": number}, infer=_infer, emit=_emit,
                rule=lambda s: Rule(linear=affine(s), whole=s.ins[1].names),
                distribute=lambda b, s: over_pieces(s.ins[1].labels, b, s),
                vjp=lambda b, s, ct: backward(str(s.ins[1].whole().owing()), s, b, ct), takes=("float",),
                reads=as_they_come, dtype=lambda d, o: d[:1],
                reference=lambda d, x, w, b=0: norm_reference(d, d.step.ins[1].names, x, w, b))
NORM_VJP = Op("norm_vjp", keywords={"eps": number, "over": lambda v: isinstance(v, str)}, rule=_vjp_rule,
              infer=lambda ins, attrs: ins[:-1], emit=_emit_vjp, takes=("float",), reads=as_they_come,
              dtype=lambda d, o: d[:-1], reference=_vjp_reference)


def layer_norm(x: Operand, w: Operand, b: Operand | None = None, eps: float = 1e-5) -> Value:
    """`x` normalised to mean 0 and variance 1 along its last dim, times `w`, plus `b` where there is one.

    (x - mean(x)) / sqrt(var(x) + eps) * w + b (Ba, Kiros and Hinton 2016), in x's dtype. Over a split last
    dim, ranks join two sums for each row. Refused: an x that owes a sum.

    >>> import torch
    >>> from shardlib import Layout, Mesh, sharded, simulate
    >>> norm = sharded("B D, D, D -> B D")(lambda x, w, b: layer_norm(x, w, b, eps=0.0))
    >>> x, w, b = torch.tensor([[1.0, 3.0], [5.0, 1.0]]), torch.tensor([1.0, 10.0]), torch.tensor([0.0, 0.5])
    >>> simulate(norm, Layout(B="dp"), x, w, b, mesh=Mesh(dp=2))
    tensor([[-1.0000, 10.5000],
            [ 1.0000, -9.5000]])
    """
    return apply(LAYER_NORM, (x, w) if b is None else (x, w, b), eps=float(eps))


TABLE = {op.name: op for op in (LAYER_NORM, NORM_VJP)}
