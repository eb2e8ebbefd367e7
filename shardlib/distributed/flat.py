"""Tensors of any dims and strides as flat buffers, piece after piece, and back.

Communicators move only such buffers.

>>> x = torch.arange(6).view(2, 3)
>>> cut = Cut.of((2, 3), 1, (1, 2))         # the pieces x[:, :1] and x[:, 1:]
>>> cut.counts, cut.whole, cut.shapes
((2, 4), (2, 3), ((2, 1), (2, 2)))
>>> cut.split(x)
tensor([0, 3, 1, 2, 4, 5])
>>> torch.equal(cut.join(cut.split(x)), x)
True

A Cut is worked out once for each shape, and remembered.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch
from torch import Tensor
from torch.autograd import forward_ad

_UNCOPIED = frozenset(getattr(torch, name) for name in (
    "float4_e2m1fn_x2", *(f"{u}int{n}" for u in ("", "u") for n in range(1, 8))) if hasattr(torch, name))
"""Dtypes of one byte that torch does not copy; it moves them as bytes."""


def plain(x: Tensor) -> Tensor:
    """`x` itself where it is contiguous, else a contiguous copy;
    no gradient, no tangent, no lazy conjugate or negation.

    One element, or none, counts as contiguous whatever its strides, which then forbid a view as bytes:
    copied.
    """
    if x.requires_grad or forward_ad._current_level >= 0:
        x = x.detach()
    if x.dtype in _UNCOPIED:
        return plain(x.view(torch.uint8)).view(x.dtype)
    if x.is_neg() or x.dtype.is_complex and x.is_conj():
        x = x.resolve_conj().resolve_neg()
    return x.contiguous() if x.numel() > 1 else x.clone(memory_format=torch.contiguous_format)


def copy(x: Tensor) -> Tensor:
    """A copy of a contiguous x."""
    return x.view(torch.uint8).clone().view(x.dtype) if x.dtype in _UNCOPIED else x.clone()


def pack(pieces: Sequence[Tensor]) -> Tensor:
    """One flat buffer that holds `pieces` one after another:
    a view of them where they lie so already, else new."""
    flat = [plain(piece).flatten() for piece in pieces]
    return (torch.cat(flat) if len(flat) > 1 and not _lie_in_turn(flat)
            else flat[0].as_strided((sum(map(len, flat)),), (1,)))


def _lie_in_turn(flat: Sequence[Tensor]) -> bool:
    """Whether each begins where the one before it ends, in one storage."""
    at, storage = flat[0].data_ptr(), flat[0].untyped_storage().data_ptr()
    for piece in flat:
        if piece.data_ptr() != at or piece.untyped_storage().data_ptr() != storage:
            return False
        at += piece.nbytes
    return True


@dataclass(frozen=True)
class Cut:
    """How a tensor of shape `whole` is cut along `dim` into `sizes`:
    the shapes of the pieces and their counts of elements."""
    dim: int
    whole: tuple[int, ...]
    sizes: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    counts: tuple[int, ...]
    in_memory_order: bool
    """Whether the pieces, packed, are the whole as it lies in memory."""
    even: bool

    @staticmethod
    @lru_cache(maxsize=4096)
    def of(shape: tuple[int, ...], dim: int, sizes: tuple[int, ...]) -> Cut:
        """The cut of `shape`, whatever it has along `dim`, into `sizes` along `dim`.

        IndexError for a dim it lacks, ValueError for sizes below 0.
        """
        if not -len(shape) <= dim < len(shape):
            raise IndexError(dim)
        if min(sizes) < 0:
            raise ValueError(sizes)
        dim %= len(shape)
        head, tail = tuple(shape[:dim]), tuple(shape[dim + 1:])
        shapes = tuple((*head, size, *tail) for size in sizes)
        even = len(set(sizes)) == 1
        return Cut(dim, (*head, sum(sizes), *tail), sizes, shapes, tuple(map(prod, shapes)), prod(head) <= 1,
                   even)

    def split(self, x: Tensor) -> Tensor:
        """The pieces of `x`, packed; `x` itself, flat, where its memory is in that order already."""
        if self.in_memory_order:
            return plain(x).flatten()
        if self.even:
            return pack([x.unflatten(self.dim, (len(self.sizes), self.sizes[0])).movedim(self.dim, 0)])
        return pack(x.split_with_sizes(self.sizes, self.dim))

    def join(self, flat: Tensor) -> Tensor:
        """The tensor whose pieces are packed in `flat`:
        a view of it where its memory is in that order already."""
        if self.in_memory_order:
            return flat.view(self.whole) if len(self.whole) != 1 else flat
        if flat.dtype in _UNCOPIED:
            return self.join(flat.view(torch.uint8)).view(flat.dtype)
        pieces = flat.split_with_sizes(self.counts)
        return torch.cat([piece.view(shape) for piece, shape in zip(pieces, self.shapes)], self.dim)
