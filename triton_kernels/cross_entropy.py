"""Cross entropy of rows of logits, which are read once forward and once backward; as large as they are is
the gradient alone, in their dtype.

A thread goes through its columns with a maximum of its own, and puts right what it has added up where that
grows. Labels are noted as `lookup` notes them. A row whose label is `ignored`, or outside of 0 to `last`, has
loss and gradient 0, whatever its logits are.
"""
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from shardlib.triton_kernels.launching import Grid, launch
from shardlib.triton_kernels.lookup import note_one

WARPS = 8
WAYS = 16               # bytes of a row that a thread has at once


class Labels(NamedTuple):
    """A row's label each, (rows,), int64, contiguous; the logits are those of the columns from `start` on.

    last: the greatest label that there may be.  ignored: a label that stands for none.  seen: as in `note`.
    """
    index: Tensor
    start: int
    last: int
    ignored: int | None = None
    seen: Tensor | None = None

    @property
    def numbers(self) -> tuple[int, int, int]:
        return self.start, self.last, 0 if self.ignored is None else self.ignored

    @property
    def key(self) -> tuple[object, ...]:
        return (self.ignored is None, self.seen is None, self.index.data_ptr() % 16,
                *(n.bit_length() > 31 for n in self.numbers))


def label_sums_reference(x: Tensor, labels: Labels, top: Tensor, first: bool) -> tuple[Tensor, Tensor]:
    """Of each row the sum of exp(x - top), and x - top at the label, 0 where that is no column of these.
    Without a label: 1 where these columns are the `first`, and 0."""
    above = x.to(torch.promote_types(x.dtype, torch.float32)) - top[:, None]
    counts, here = _labelled(labels), labels.index - labels.start
    inside = counts & (here >= 0) & (here < x.shape[1])
    label = above.gather(1, here.clamp(0, x.shape[1] - 1)[:, None])[:, 0]
    return torch.where(counts, above.exp().sum(1), int(first)), torch.where(inside, label, 0)


def token_losses_reference(x: Tensor, labels: Labels) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row the loss, the greatest logit, and the sum of exp of what logits are above it."""
    top = x.amax(1).to(torch.promote_types(x.dtype, torch.float32))
    total, label = label_sums_reference(x, labels, top, True)
    return total.log() - label, top, total


def label_sums_vjp_reference(x: Tensor, labels: Labels, top: Tensor, total: Tensor, label: Tensor) -> Tensor:
    """exp(x - top) total, and label at the label."""
    made = (x.to(top.dtype) - top[:, None]).exp() * total[:, None]
    at = torch.arange(x.shape[1], device=x.device) == (labels.index - labels.start)[:, None]
    return torch.where(_labelled(labels)[:, None], made + torch.where(at, label[:, None], 0), 0).to(x.dtype)


def _labelled(labels: Labels) -> Tensor:
    return ((labels.index >= 0) & (labels.index <= labels.last)
            & (labels.index != (-1 if labels.ignored is None else labels.ignored)))


@triton.jit
def _label_of(labels_ptr, seen_ptr, row, last, ignored, IGNORES: tl.constexpr, NOTES: tl.constexpr):
    """The row's label, and whether it has one."""
    one = tl.arange(0, 1)
    labels = tl.load(labels_ptr + row + one)
    if NOTES:
        note_one(seen_ptr, labels, (one == 0) & (labels != ignored) if IGNORES else one == 0)
    label = tl.sum(labels, 0)
    counts = (label >= 0) & (label <= last)
    if IGNORES:
        counts = counts & (label != ignored)
    return label, counts


@triton.jit(do_not_specialize=["start", "last", "ignored", "first"])
def cross_entropy_kernel(x_ptr, labels_ptr, loss_ptr, top_ptr, total_ptr, label_ptr, seen_ptr, V, start, last,
                         ignored, first, PIECE: tl.constexpr, IGNORES: tl.constexpr, NOTES: tl.constexpr,
                         THREADS: tl.constexpr, EACH: tl.constexpr):
    """A block has a row. PIECE: the greatest logits are known, and the logits are some of the columns."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * V
    label, counts = _label_of(labels_ptr, seen_ptr, row, last, ignored, IGNORES, NOTES)
    lane = tl.arange(0, THREADS)[:, None] * EACH + tl.arange(0, EACH)[None, :]
    total, most = tl.zeros((THREADS,), tl.float32), tl.full((THREADS,), float("-inf"), tl.float32)
    if PIECE:
        top = tl.load(top_ptr + row)
        for at in range(0, V, THREADS * EACH):
            x = tl.load(x_ptr + at + lane, mask=at + lane < V, other=float("-inf")).to(tl.float32)
            total += tl.sum(tl.where(at + lane < V, tl.exp(x - top), 0), 1)
        whole = tl.sum(total, 0)
    else:
        for at in range(0, V, THREADS * EACH):
            x = tl.load(x_ptr + at + lane, mask=at + lane < V, other=float("-inf")).to(tl.float32)
            more = tl.maximum(most, tl.max(x, 1))
            base = tl.where(more == float("-inf"), 0.0, more)       # nothing yet: no difference of infinities
            total = total * tl.exp(most - base) + tl.sum(tl.exp(x - base[:, None]), 1)
            most = more
        top = tl.max(most, 0)
        whole = tl.sum(total * tl.exp(most - tl.where(top == float("-inf"), 0.0, top)), 0)
        top = tl.where((whole != whole) & (top < float("inf")), whole, top)     # a maximum passes NaN over
    here = label - start
    inside = counts & (here >= 0) & (here < V)
    above = tl.where(inside, tl.load(x_ptr + here, mask=inside, other=0).to(tl.float32) - top, 0.0)
    if PIECE:
        tl.store(total_ptr + row, tl.where(counts, whole, first.to(tl.float32)))
        tl.store(label_ptr + row, above)
    else:
        tl.store(loss_ptr + row, tl.where(counts, tl.log(whole) - above, 0.0))
        tl.store(top_ptr + row, top)
        tl.store(total_ptr + row, tl.where(counts, whole, 1.0))


@triton.jit(do_not_specialize=["start", "last", "ignored", "parts"])
def label_sums_vjp_kernel(x_ptr, labels_ptr, top_ptr, total_ptr, label_ptr, out_ptr, seen_ptr, V, start, last,
                          ignored, parts, IGNORES: tl.constexpr, NOTES: tl.constexpr, LANES: tl.constexpr):
    """A block has one of the `parts` of a row."""
    row, part = (tl.program_id(0) // parts).to(tl.int64), tl.program_id(0) % parts
    label, counts = _label_of(labels_ptr, seen_ptr, row, last, ignored, IGNORES, NOTES)
    top, total, at_label = tl.load(top_ptr + row), tl.load(total_ptr + row), tl.load(label_ptr + row)
    column = part * LANES + tl.arange(0, LANES)
    x = tl.load(x_ptr + row * V + column, mask=column < V, other=0).to(tl.float32)
    made = tl.exp(x - top) * total + tl.where(column == label - start, at_label, 0.0)
    tl.store(out_ptr + row * V + column, tl.where(counts, made, 0.0).to(out_ptr.dtype.element_ty),
             mask=column < V)


def token_losses(x: Tensor, labels: Labels) -> tuple[Tensor, Tensor, Tensor]:
    """(rows,) each, float32: losses, the greatest logits, the sums of exp of what is above these. x: (rows,
    V), contiguous, of 16 or 32 bits, with columns."""
    loss, top, total = (torch.empty(len(x), dtype=torch.float32, device=x.device) for _ in range(3))
    _forward(x, labels, (loss, top, total, total), False, False)
    return loss, top, total


def label_sums(x: Tensor, labels: Labels, top: Tensor, first: bool) -> tuple[Tensor, Tensor]:
    """(rows,) each, float32, of columns of the rows. top: (rows,), float32, contiguous."""
    assert top.shape == (len(x),) and top.dtype == torch.float32 and top.is_contiguous()
    total, label = torch.empty_like(top), torch.empty_like(top)
    _forward(x, labels, (label, top, total, label), True, first)
    return total, label


def _forward(x: Tensor, labels: Labels, of_rows: tuple[Tensor, ...], piece: bool, first: bool) -> None:
    _check(x, labels)
    if len(x):
        ways = WAYS // x.itemsize
        key = (x.dtype, x.device, piece, x.shape[1] % 16 == 0, x.shape[1] == 1, x.data_ptr() % 16,
               of_rows[1].data_ptr() % 16, *labels.key)
        launch(cross_entropy_kernel, key, Grid(len(x), WARPS),
               (x, labels.index, *of_rows, labels.index if labels.seen is None else labels.seen, x.shape[1],
                *labels.numbers, int(first)),
               lambda: dict(PIECE=piece, **_constants(labels), THREADS=32 * WARPS, EACH=ways),
               x.device.type == "cpu")


def label_sums_vjp(x: Tensor, labels: Labels, top: Tensor, total: Tensor, label: Tensor) -> Tensor:
    """(rows, V), in x's dtype. top, total, label: (rows,), float32, contiguous."""
    _check(x, labels)
    assert all(y.shape == (len(x),) and y.dtype == torch.float32 and y.is_contiguous()
               for y in (top, total, label))
    out, columns = torch.empty_like(x), x.shape[1]
    lanes = 32 * WARPS * WAYS // x.itemsize
    parts = triton.cdiv(columns, lanes)
    if len(x):
        key = (x.dtype, x.device, columns % 16 == 0, columns == 1,
               *(t.data_ptr() % 16 for t in (x, top, total, label)), *labels.key)
        launch(label_sums_vjp_kernel, key, Grid(len(x) * parts, WARPS),
               (x, labels.index, top, total, label, out, labels.index if labels.seen is None else labels.seen,
                columns, *labels.numbers, parts), lambda: dict(**_constants(labels), LANES=lanes),
               x.device.type == "cpu")
    return out


def _constants(labels: Labels) -> dict[str, bool]:
    return dict(IGNORES=labels.ignored is not None, NOTES=labels.seen is not None)


def _check(x: Tensor, labels: Labels) -> None:
    assert (x.dim() == 2 and x.is_contiguous() and 0 < x.shape[1] < 2**31 and x.dtype.itemsize <= 4
            and labels.index.shape == (len(x),) and labels.index.dtype == torch.int64
            and labels.index.is_contiguous())
