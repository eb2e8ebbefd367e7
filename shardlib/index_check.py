"""Indices out of range: one SpecError, which names the op, the user's line, the argument, the value, and what it may be.

Every place of a program where something is looked up by an index is an `IndexSite`. Generated code hands it to what looks up:

>>> site = IndexSite("embedding", "ids", "V", 5, where="model.py:12")
>>> site.look(torch.tensor([0, 4, 2]))
>>> site.look(torch.tensor([0, -7, 2]))
Traceback (most recent call last):
shardlib.errors.SpecError: embedding: ids holds -7, outside of 0 to 4 (V=5)          model.py:12

On the CPU a site raises at once. A GPU would have to be waited for: there a site only notes on the device the least and the
greatest index that it has seen (two kernels, which a CUDA graph may hold), and whoever looks up takes zero for rows that are not
there. `IndexFlags` copies these notes out behind a call and reads them before a later one, once they have arrived.
"""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Callable, Sequence

import torch
from torch import Tensor

from shardlib.errors import SpecError
from shardlib.streams import passed


@dataclass(eq=False)
class IndexSite:
    """A place where `argument` of `op` is an index into the dim `dim` of `size`, all ranks' pieces together.

    rows: of an index from which several rows follow, the dim that counts them and its size.  ignored: an index that stands for none.
    hint: ends the message where the value, which {value} stands for, is negative.
    everywhere: every rank has the same index, and refuses it alike.
    tell: hears of an error, that others cannot know of, before it is raised.  seen: the least and the greatest index so far, where they are read later.
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
        """Which rows have no index: it stands for none or, where the error comes later, is out of range. None where all have one."""
        ignored = None if self.ignored is None else index == self.ignored
        if self.seen is None:
            return ignored
        out = (index < 0) | (index > self.last)
        return out if ignored is None else out | ignored

    def torch_looks(self, index: Tensor, size: int) -> bool:
        """Whether torch's own lookup in `size` rows refuses what this site does: then nothing need be looked at twice."""
        return 0 < size == self.size and self.seen is None and self.ignored is None and index.device.type == "cpu"

    def instead_of(self, error: Exception, index: Tensor) -> Exception:
        """The SpecError for what torch's lookup refused with `error`; `error` where that was not for an index."""
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


class IndexFlags:
    """What a device has noted of the indices of one function's calls. Only `check` waits for it. On the CPU, and where tensors hold nothing, there are none.

    tell: hears of an error before it is raised.
    """

    def __init__(self, device: torch.device, tell: Callable[[SpecError], None]) -> None:
        self.device, self.tell, self.at_once = device, tell, device.type in ("cpu", "meta")
        self._flags: list[_Flag] = []

    def around(self, run: Callable, sites: Sequence[IndexSite]) -> Callable:
        """`run`, before which earlier calls' notes are read as far as they have come, and behind which its own are sent."""
        for site in sites:
            site.tell = self.tell
        if self.at_once or not sites:
            return run
        flag = _Flag(sites, self.device)
        self._flags.append(flag)

        def main(*args: Any) -> Any:
            self.look()
            out = run(*args)
            flag.send()
            return out
        return main

    def look(self) -> None:
        """SpecError if an index was out of range, as far as it is known here."""
        for flag in self._flags:
            flag.look()

    def check(self) -> None:
        """SpecError if an index of any call so far was out of range."""
        for flag in self._flags:
            flag.check()


class _Flag:
    """The notes of one program's sites: on the device, and their copy. One copy at a time is under way; notes are kept until they are read."""

    def __init__(self, sites: Sequence[IndexSite], device: torch.device) -> None:
        self.sites = tuple(site for site in sites if site.last >= 0)    # where no index may be, none is waited with
        self.device, self.sent = device, False
        with torch.inference_mode(False):               # calls of any mode write here
            self.noted = torch.zeros(len(self.sites), 2, dtype=torch.int64, device=device)
            self.copy = torch.zeros(len(self.sites), 2, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
        self.event = torch.cuda.Event() if device.type == "cuda" else None
        for site, seen in zip(self.sites, self.noted):
            site.seen = seen

    def send(self) -> None:
        if not self.sent and not self._capturing():
            self.copy.copy_(self.noted, non_blocking=True)
            if self.event is not None:
                self.event.record(torch.cuda.current_stream(self.device))
            self.sent = True

    def look(self) -> None:
        if self.sent and not self._capturing() and (self.event is None or passed(self.event)):
            self._read()

    def check(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.copy.copy_(self.noted)
        self._read()

    def _read(self) -> None:
        self.sent = False
        for site, extremes in zip(self.sites, self.copy.tolist()):
            if (error := site.refusal(*extremes)) is not None:
                self.noted.zero_()
                raise error

    def _capturing(self) -> bool:
        """Whether a CUDA graph is being captured, which must not hold what is meant for this call alone."""
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
