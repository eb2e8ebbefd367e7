"""Indices out of range: one SpecError, which names the op, the user's line, the argument, the value,
and what it may be.

Every place of a program where something is looked up by an index is an `IndexSite`. Generated code hands it
to what looks up:

>>> site = IndexSite("embedding", "ids", "V", 5, where="model.py:12")
>>> site.look(torch.tensor([0, 4, 2]))
>>> site.look(torch.tensor([0, -7, 2]))
Traceback (most recent call last):
shardlib.errors.SpecError: embedding: ids holds -7, outside of 0 to 4 (V=5)          model.py:12

On the CPU a site raises at once. A GPU would have to be waited for: there a site only notes on the device the
least and the greatest index that it has seen (two kernels, which a CUDA graph may hold), and whoever looks up
takes zero for rows that are not there. `IndexFlags` of `run` copies these notes out behind a call and reads
them before a later one, once they have arrived.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from shardlib.errors import SpecError


@dataclass(eq=False)
class IndexSite:
    """A place where `argument` of `op` is an index into the dim `dim` of `size`, all ranks' pieces together.

    rows: of an index from which several rows follow, the dim that counts them and its size.  ignored: an
    index that stands for none.
    hint: ends the message where the value, which {value} stands for, is negative.
    everywhere: every rank has the same index, and refuses it alike.
    tell: hears of an error, that others cannot know of, before it is raised.  seen: the least and the
    greatest index so far, where they are read later.
    """
    op: str
    argument: str
    dim: str
    size: int
    rows: tuple[str, int] = ("", 1)
    ignored: int | None = None
    where: object = None
    hint: str = ""
    everywhere: bool = True
    tell: Callable[[SpecError], None] = field(default=lambda error: None, repr=False)
    seen: Tensor | None = field(default=None, repr=False)

    @property
    def last(self) -> int:
        """The greatest index that there may be."""
        return self.size - self.rows[1]

    def look(self, index: Tensor) -> None:
        """SpecError for an index out of range; where there is `seen`, it is noted there and nothing waits."""
        if index.is_meta or not index.numel():
            return
        if self.seen is None:
            if (error := self._refused(index)) is not None:
                raise error
        else:
            if self.ignored is not None:
                index = index.masked_fill(index == self.ignored, 0)
            torch.aminmax(torch.cat((index.reshape(-1), self.seen)), out=tuple(self.seen.unbind()))

    def without(self, index: Tensor) -> Tensor | None:
        """Which rows have no index: it stands for none or, where the error comes later, is out of range.

        None where all have one.
        """
        ignored = None if self.ignored is None else index == self.ignored
        if self.seen is None:
            return ignored
        out = (index < 0) | (index > self.last)
        return out if ignored is None else out | ignored

    def torch_looks(self, index: Tensor, size: int) -> bool:
        """Whether torch's own lookup in `size` rows refuses what this site does:
        then nothing need be looked at twice."""
        return (0 < size == self.size and self.seen is None and self.ignored is None
                and index.device.type == "cpu")

    def instead_of(self, error: Exception, index: Tensor) -> Exception:
        """The SpecError for what torch's lookup refused with `error`;
        `error` where that was not for an index."""
        return self._refused(index) or error

    def _refused(self, index: Tensor) -> SpecError | None:
        if self.ignored is not None:
            index = index[index != self.ignored]
        return self.refusal(*map(int, index.aminmax())) if index.numel() else None

    def refusal(self, least: int, greatest: int) -> SpecError | None:
        """The error, told already, for indices from `least` to `greatest`; None where these may be."""
        if 0 <= least and greatest <= self.last:
            return None
        value, (counted, rows) = least if least < 0 else greatest, self.rows
        sizes = f"{self.dim}={self.size}" + (f", {counted}={rows}" if counted else "")
        error = SpecError(f"{self.op}: {self.argument} holds {value}, outside of 0 to {self.last} ({sizes})"
                          + (self.hint.format(value=value) if value < 0 else "")).at(self.where)
        if not self.everywhere or self.seen is not None:
            self.tell(error)
        return error


@dataclass(eq=False)
class RoomSite(IndexSite):
    """A place where rows of the ragged dim `dim` come to a rank, which has room for less than `size`.

    >>> site = RoomSite("dispatch", "", "(E T)~J", 11, where="model.py:12")
    >>> site.look(torch.tensor(13))                                     # doctest: +ELLIPSIS
    Traceback (most recent call last):
    shardlib.errors.SpecError: dispatch: 13 rows of (E T)~J come to a rank that has room for ...
    """

    def refusal(self, least: int, greatest: int) -> SpecError | None:
        if greatest <= self.last:
            return None
        error = SpecError(f"{self.op}: {greatest} rows of {self.dim} come to a rank that has room for "
                          f"{self.last}, as sizes say").at(self.where)
        self.tell(error)
        return error
