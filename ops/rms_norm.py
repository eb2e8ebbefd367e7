"""rms_norm: x / sqrt(mean(x^2) + eps) * w, over the last dim (Zhang and Sennrich 2019).

The result has x's dtype: what is computed, in at least float32 and the widest of both, is rounded once.

On one axis: the last dim is whole, or the op takes its distributed form, which joins the mean of squares; `x`
owes nothing; other dims may be split; an owed `w` gives an owed result.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shardlib.dtypes import as_they_come, widest
from shardlib.errors import SpecError
from shardlib.language.arithmetic import MUL, SHIFT
from shardlib.language.casts import CAST_LIKE, WIDEN
from shardlib.language.local_code import LocalCode
from shardlib.language.reductions import MEAN
from shardlib.language.steps import Steps
from shardlib.language.unary import OPS as UNARY
from shardlib.language.value import Operand, Value, apply
from shardlib.program import Op, Step, number
from shardlib.reference import Dims
from shardlib.rules import Rule
from shardlib.spec import Spec


def _infer(ins: Sequence[Spec], attrs: dict[str, Any]) -> tuple[Spec, ...]:
    if len(ins[1].labels) != 1 or ins[0].labels[-1:] != ins[1].labels:
        raise SpecError(f"rms_norm: the weight has dims {ins[1]}, x ends with "
                        f"{' '.join(ins[0].labels[-1:]) or 'nothing'}; they must be the same dim")
    return (ins[0],)


def _emit(e: LocalCode, step: Step, args: list[str]) -> str:
    (x, w), shape = (e.dtypes[n] for n in step.inputs), f"({e.shape(step.ins[1])[0]},)"
    if x == w:
        return f"F.rms_norm({args[0]}, {shape}, {args[1]}, {step.options['eps']!r})"
    wide = f".to(torch.{widest(x, w, 'float32')})"
    return f"F.rms_norm({args[0]}{wide}, {shape}, {args[1]}{wide}, {step.options['eps']!r}).to(torch.{x})"


def _vjp(b: Steps, step: Step, ct: Sequence[str]) -> list[str]:
    return list(b.call(RMS_NORM_VJP, [*step.inputs, ct[0]], eps=step.options["eps"]))


def _over_pieces(b: Steps, step: Step) -> list[str]:
    """The same over a split last dim: the mean of squares of all is joined, a number a row."""
    (x, w), rows = step.inputs, Spec(step.ins[0].dims[:-1])
    wide = b.call(WIDEN, [x])
    mean = b.settle(b.call(MEAN, [b.call(UNARY["square"], [wide])], outs=(rows,)))
    scale = b.call(UNARY["rsqrt"], [b.call(SHIFT, [mean], by=step.options["eps"])])
    return [b.call(CAST_LIKE, [b.call(MUL, [b.call(MUL, [wide, scale]), w]), x])]


def rms_norm_vjp(x: Tensor, w: Tensor, g: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The cotangents of x and w; sums in at least float32."""
    if x.is_cuda and x.dtype == w.dtype == g.dtype and x.numel() and x.dtype != torch.float64:
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = torch.rsqrt(size.square() / x.shape[-1] + eps)
        return torch.ops.aten._fused_rms_norm_backward(g.contiguous(), x.contiguous(), w.shape, scale, w,
                                                       [True, True])
    wide = torch.promote_types(torch.promote_types(x.dtype, w.dtype), torch.float32)
    xw, gw = x.to(wide), g.to(wide)
    scale = torch.rsqrt(xw.pow(2).mean(-1, keepdim=True) + eps)
    normed, gx = xw * scale, gw * w.to(wide)
    dx = scale * (gx - normed * (gx * normed).mean(-1, keepdim=True))
    return dx.to(x.dtype), (gw * normed)[None].flatten(0, -2).sum(0).to(w.dtype)


def _reference(d: Dims, x: Tensor, w: Tensor) -> Tensor:
    (name,) = d.step.ins[1].names
    return x * w / torch.sqrt(d.sum(x * x, name) / d.count(name) + d.options["eps"])


RMS_NORM = (Op("rms_norm", keywords={"eps": number},
               rule=lambda s: Rule(linear=((1,),), whole=s.ins[1].names), infer=_infer, emit=_emit, vjp=_vjp,
               distribute=_over_pieces,
               takes=("float",), reads=as_they_come, dtype=lambda d, o: d[:1],
               reference=_reference))
RMS_NORM_VJP = Op("rms_norm_vjp", keywords={"eps": number}, infer=lambda ins, attrs: (ins[0], ins[1]),
                  rule=lambda s: Rule(linear=((1,), (2,)), whole=s.ins[1].names, sums=s.ins[0].names[:-1],
                                      uses=((0, 1, 2), (0, 2))),
                  emit=lambda e, s, a: f"{e.use(rms_norm_vjp)}({', '.join(a)}, {s.options['eps']!r})",
                  takes=("float",), reads=as_they_come, dtype=lambda d, o: [d[0], d[1]],
                  reference=lambda d, x, w, g: d.vjp(_reference, (x, w), g, d.step.ins[2]))


def rms_norm(x: Operand, w: Operand, eps: float = 1e-6) -> Value:
    """`x` normalised to mean square 1 along its last dim, times `w` (Zhang and Sennrich 2019).

    x / sqrt(mean(x^2) + eps) * w, in x's dtype. Over a split last dim, ranks join a sum for each row.
    Refused: an x that owes a sum.

    >>> import torch
    >>> from shardlib import Layout, Mesh, sharded, simulate
    >>> norm = sharded("B D, D -> B D")(lambda x, w: rms_norm(x, w, eps=0.0))
    >>> x, w = torch.tensor([[1.0, 7.0], [5.0, 5.0]]), torch.tensor([1.0, 10.0])
    >>> simulate(norm, Layout(B="dp"), x, w, mesh=Mesh(dp=2))
    tensor([[ 0.2000, 14.0000],
            [ 1.0000, 10.0000]])
    """
    return apply(RMS_NORM, (x, w), eps=float(eps))


TABLE = {op.name: op for op in (RMS_NORM, RMS_NORM_VJP)}
