"""Cross entropy: for each row of logits the log of the sum of their exps, less the logit at the row's label.

`cross_entropy("B T V, B T -> B T", logits, labels)`, in nats. One op, which computes in float32 where the
logits have 16 bits, and whose result is float32 then: losses are there to be added up, and one rounded to
bfloat16 is off by up to 1/512 of itself before the first addition. Its gradient has the dtype of the logits
and is rounded once. Rows whose label is `ignore_index` have loss 0 and gradient 0, whatever their logits are;
the mean over the others divides by their number:

    losses = cross_entropy("B T V, B T -> B T", logits, labels, ignore_index=-100)
    count = sum("B T -> ()", cast(greater(labels, -1), "float32"))
    loss = sum("B T -> ()", losses) / count

Where V is split, no logits move. Ranks join a maximum and two sums of the size of the losses, in float32:

    top = max("B T V/tp -> B T max:tp", logits)                       # then all_reduce
    total, label = label_sums("B T V/tp, B T, B T -> B T +tp, B T +tp", logits, labels, top)     # all_reduce
    loss = log(total) - label

and its derivative reads the logits once, without anything of their size being kept for it. So it does where
V is whole: `cross_entropy_sums`, which runs where a gradient is made, gives the maximum and the sum besides.
On GPUs each of these is a kernel.
"""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from shardlib.dtypes import Dtypes, widest
from shardlib.errors import SpecError
from shardlib.language.arithmetic import SUB
from shardlib.language.extremes import MAX, amax
from shardlib.language.local_code import LocalCode
from shardlib.language.steps import Steps
from shardlib.language.unary import OPS as UNARY
from shardlib.language.value import Operand, Value, apply
from shardlib.lowering.index_check import IndexSite
from shardlib.ops.few_rows import FLOATS, differentiated
from shardlib.ops.take import along, lacks_one, local, pick
from shardlib.program import Op, Step
from shardlib.reference import Dims
from shardlib.rules import Rule
from shardlib.spec import Dim, Spec, parse_specs


def wide(x: Tensor) -> Tensor:
    """x, in float32 where it has 16 bits."""
    return x.to(_wide(x.dtype))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.itemsize < 4 else dtype


def token_losses(x: Tensor, labels: Tensor, dim: int, site: IndexSite) -> Tensor:
    """-log softmax(x) at the label; `labels` has the dims of x, with 1 at `dim` and where it has none."""
    return token_sums(x, labels, dim, site)[0]


def token_sums(x: Tensor, labels: Tensor, dim: int, site: IndexSite) -> tuple[Tensor, Tensor, Tensor]:
    """The same, the greatest logit, and the sum of exp of what the logits are above it."""
    if kernel_takes(x, dim):
        from shardlib.triton_kernels.cross_entropy import token_losses
        loss, top, total = token_losses(x.view(-1, x.shape[dim]), _rows(x, labels, 0, site))
        return loss.view(x.shape[:-1]), top.view(x.shape[:-1]), total.view(x.shape[:-1])
    top = wide(amax(x, (dim,)))
    total, label = label_sums(x, labels, top, dim, 0, True, site)
    return total.log() - label, top, total


def kernel_takes(x: Tensor, dim: int) -> bool:
    """Whether kernels take these logits."""
    return x.is_cuda and of_rows(x, dim)


def of_rows(x: Tensor, dim: int) -> bool:
    """Whether these are rows side by side, of which nobody wants a derivative but ours."""
    return (dim == x.dim() - 1 and x.dtype in FLOATS and x.numel() > 0 and x.is_contiguous()
            and not differentiated(x))


def _rows(x: Tensor, labels: Tensor, start: int, site: IndexSite) -> Any:
    """The labels as kernels take them, which note them where that is for later."""
    from shardlib.triton_kernels.cross_entropy import Labels
    if site.seen is None:
        site.look(labels)
    return Labels(labels.expand(*x.shape[:-1], 1).reshape(-1), start, site.last, site.ignored, site.seen)


def label_sums(x: Tensor, labels: Tensor, top: Tensor, dim: int, start: int, first: bool,
               site: IndexSite) -> tuple[Tensor, Tensor]:
    """Of the own logits: the sum of exp(x - top), and x - top at the label,
    zero where that is another rank's.

    Over all ranks a row without a label has the sums 1 and 0, whose loss is 0. first: whether this rank is
    the one that holds the 1.
    """
    if kernel_takes(x, dim):
        from shardlib.triton_kernels import cross_entropy as kernels
        rows = _rows(x, labels, start, site)
        made = kernels.label_sums(x.view(-1, x.shape[dim]), rows, _numbers(top, x), first)
        return made[0].view(x.shape[:-1]), made[1].view(x.shape[:-1])
    above, without = wide(x) - wide(top).unsqueeze(dim), site.without(labels.squeeze(dim))
    return (_filled(above.exp().sum(dim), without, int(first)),
            _filled(pick(above, labels, dim, start, site), without, 0))


def label_sums_vjp(x: Tensor, labels: Tensor, top: Tensor, total: Tensor, label: Tensor, dim: int, start: int,
                   first: bool, site: IndexSite) -> Tensor:
    """The cotangent of the own logits, of those of `label_sums`:
    exp(x - top) total, and label at the label."""
    if kernel_takes(x, dim):
        from shardlib.triton_kernels import cross_entropy as kernels
        of_each = (_numbers(y, x) for y in (top, total, label))
        return kernels.label_sums_vjp(x.view(-1, x.shape[dim]), _rows(x, labels, start, site),
                                      *of_each).view(x.shape)
    above = wide(x) - wide(top).unsqueeze(dim)
    return _add_at(above.exp_() * total.unsqueeze(dim), labels, label.unsqueeze(dim), dim, start,
                   site).to(x.dtype)


def _numbers(y: Tensor, x: Tensor) -> Tensor:
    """One of each row of x, in float32."""
    return y.to(torch.float32).expand(x.shape[:-1]).reshape(-1)


def _filled(x: Tensor, mask: Tensor | None, value: int) -> Tensor:
    return x if mask is None else x.masked_fill(mask, value)


def _add_at(x: Tensor, labels: Tensor, g: Tensor, dim: int, start: int, site: IndexSite) -> Tensor:
    """x, to which g is added, in place, at the own labels; zero in rows without a label."""
    here, inside = local(labels, start, x.shape[dim], site)
    if x.shape[dim]:
        here = here.expand(g.shape)
        x.scatter_(dim, here, x.gather(dim, here) + torch.where(inside, g, 0).to(x.dtype))
    without = site.without(labels)
    return x if without is None else x.masked_fill_(without, 0)


# -- as ops --------------------------------------------------------------------------------------------------

def _over(step: Step) -> Dim:
    """The dim of the logits, the first operand, that labels, the second one, run over."""
    small = step.outs[0] if len(step.outs[0].dims) < len(step.ins[0].dims) else step.ins[-1]
    return next(d for d in step.ins[0].dims if d.label not in small.labels)


def _over_logits(helper: Any, pieces: bool) -> Any:
    """Code of a helper that takes logits and labels; and, where V may be split, where this rank's piece
    begins and whether it is the first."""
    def emit(e: LocalCode, step: Step, args: list[str]) -> str:
        (x, labels, *_), (logits, index, *rest), dim = step.ins, args, _over(step)
        ignored = step.options.get("ignore_index")
        site = e.index_site(step, 1, index, dim, "labels", op="cross_entropy", ignored=ignored,
                            hint="; ignore_index={value} leaves such rows out" if ignored is None else "")
        place = [e.rows(dim)[0], not any(e.coordinate[a] for a in dim.axes)] if pieces else []
        given = [logits, along(index, labels, x), *rest, x.dims.index(dim), *place, site]
        return f"{e.use(helper)}({', '.join(map(str, given))})"
    return emit


def _reads(dtypes: Dtypes, attrs: Mapping[str, Any]) -> Dtypes:
    return [dtypes[0], dtypes[1] and "int64", *dtypes[2:]]


def _as_logits(dtypes: Dtypes, attrs: Mapping[str, Any]) -> Dtypes:
    return dtypes[:1]


def _keeps(step: Step) -> tuple[Op, tuple[Spec, ...]]:
    return CROSS_ENTROPY_SUMS, (step.outs[0].whole(),) * 2


def _vjp(b: Steps, step: Step, ct: Sequence[str]) -> list[str | None]:
    """That of the sums of a piece which is all there is."""
    op, more = _keeps(step)
    _, top, total = step.outputs if step.op is op else b.call(op, step.inputs, outs=(*step.outs, *more),
                                                              **step.options)
    of_sums = [b.quotient(ct[0], total), b.scale(ct[0], -1.0)]
    return [b.call(LABEL_SUMS_VJP, [*step.inputs, top, *of_sums], outs=(step.ins[0].owing(),),
                   **step.options), None]


def _label_sums_vjp(b: Steps, step: Step, ct: Sequence[str]) -> list[str | None]:
    return [b.call(LABEL_SUMS_VJP, [*step.inputs, *ct], outs=(step.ins[0].owing(),), **step.options), None,
            None]


def _over_pieces(b: Steps, step: Step) -> list[str]:
    """Cross entropy over a split V."""
    (x, labels), (small,) = step.inputs, step.outs
    top = b.settle(b.call(MAX, [x], outs=(small,)))
    total, label = map(b.settle, b.call(LABEL_SUMS, [x, labels, top], outs=(small, small), **step.options))
    return [b.call(SUB, [b.call(UNARY["log"], [total]), label])]


def _at_label(d: Dims, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Which logits are at their row's label, and which rows have one."""
    ignored = d.options.get("ignore_index")
    return d.index(*_over(d.step).names) == labels, labels == labels if ignored is None else labels != ignored


def _reference(d: Dims, x: Tensor, labels: Tensor) -> Tensor:
    """The log of how much likelier all indices together are than the label."""
    at, labelled = _at_label(d, labels)
    odds = x - d.sum(torch.where(at, x, 0), *_over(d.step).names)
    return torch.where(labelled, d.fold(torch.logaddexp, float("-inf"), torch.where(labelled, odds, 0)), 0)


def _kept_reference(d: Dims, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    top = d.fold(torch.maximum, float("-inf"), x, *_over(d.step).names)
    return _reference(d, x, labels), top, _sums_reference(d, x, labels, top)[0]


def _sums_reference(d: Dims, x: Tensor, labels: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
    (at, labelled), over = _at_label(d, labels), _over(d.step).names
    above = torch.where(labelled, x - top, 0)
    return (torch.where(labelled, d.sum(math.e ** above, *over), 1),
            d.sum(torch.where(at & labelled, above, 0), *over))


def _sums_reference_vjp(d: Dims, x: Tensor, labels: Tensor, top: Tensor, *g: Tensor) -> tuple[Tensor, ...]:
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        made = [y.expand(c.shape) for y, c in zip(_sums_reference(d, x, labels, top.detach()), g)]
    return torch.autograd.grad(made, [x], g)


IGNORE = {"ignore_index": lambda value: value is None or isinstance(value, int)
          and not isinstance(value, bool)}


def _labelled(name: str, **more: Any) -> Op:
    """An op of logits and labels, which may be told to ignore one."""
    return Op(name, keywords=IGNORE, index=(1,), takes=("float", "index", "float"), reads=_reads, **more)


CROSS_ENTROPY = _labelled(
    "cross_entropy", rule=lambda s: Rule(whole=_over(s).names), emit=_over_logits(token_losses, pieces=False),
    vjp=_vjp, keeps=_keeps, distribute=_over_pieces, dtype=lambda d, o: [widest(d[0], "float32")],
    reference=_reference)
CROSS_ENTROPY_SUMS = _labelled(
    "cross_entropy_sums", rule=lambda s: Rule(whole=_over(s).names),
    emit=_over_logits(token_sums, pieces=False), dtype=lambda d, o: [widest(d[0], "float32")] * 3,
    reference=_kept_reference)
LABEL_SUMS = _labelled(
    "label_sums", rule=lambda s: Rule(sums=_over(s).names), emit=_over_logits(label_sums, pieces=True),
    vjp=_label_sums_vjp, dtype=lambda d, o: [widest(d[0], d[2], "float32")] * 2, reference=_sums_reference)
LABEL_SUMS_VJP = _labelled(
    "label_sums_vjp", rule=lambda s: Rule(linear=((3, 4),)), emit=_over_logits(label_sums_vjp, pieces=True),
    dtype=_as_logits, reference=_sums_reference_vjp)


def cross_entropy(text: str, logits: Operand, labels: Operand, *, ignore_index: int | None = None) -> Value:
    """-log softmax(logits)[label] of every row, in nats; float32 of logits of 16 bits.

    V may be split: no logits move. ignore_index: the label of rows whose loss and gradient are 0; None:
    there are none. Refused, where it runs: another label outside of V.

    >>> import torch
    >>> from shardlib import Layout, Mesh, sharded, simulate
    >>> @sharded("T V, T -> T")
    ... def losses(logits, labels):
    ...     return cross_entropy("T V, T -> T", logits, labels, ignore_index=-100)
    >>> logits, labels = torch.tensor([[2.0, 2.0, 2.0], [9.0, 0.0, 0.0]]), torch.tensor([1, -100])
    >>> simulate(losses, Layout(V="tp"), logits, labels, mesh=Mesh(tp=2))
    tensor([1.0986, 0.0000])
    """
    meant = (f'cross_entropy "{text}": the specs are those of "B T V, B T -> B T": the losses lack one dim '
             'of the logits, and have those of the labels')
    if not lacks_one(*parse_specs(text, meant)):
        raise SpecError(meant)
    if ignore_index is None:
        return apply(CROSS_ENTROPY, (logits, labels), text)
    return apply(CROSS_ENTROPY, (logits, labels), text, ignore_index=ignore_index)


TABLE = {op.name: op for op in (CROSS_ENTROPY, CROSS_ENTROPY_SUMS, LABEL_SUMS, LABEL_SUMS_VJP)}
