"""What a device has noted of indices, copied out behind a call, and read before a later one,
once it has arrived."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import isgeneratorfunction
from typing import Any

import torch

from shardlib.distributed.streams import passed
from shardlib.errors import SpecError
from shardlib.lowering.index_check import IndexSite


class IndexFlags:
    """What a device has noted of the indices of one function's calls. Only `check` waits for it.

    On the CPU, and where tensors hold nothing, there are none.

    tell: hears of an error before it is raised.
    """

    def __init__(self, device: torch.device, tell: Callable[[SpecError], None]) -> None:
        self.device, self.tell, self.at_once = device, tell, device.type in ("cpu", "meta")
        self._flags: list[_Flag] = []

    def around(self, run: Callable, sites: Sequence[IndexSite]) -> Callable:
        """`run`, before which earlier calls' notes are read as far as they have come,
        and behind which its own are sent."""
        for site in sites:
            site.tell = self.tell
        if self.at_once or not sites:
            return run
        flag = _Flag(sites, self.device)
        self._flags.append(flag)
        if isgeneratorfunction(run):
            def asking(*args: Any) -> Any:
                self.look()
                out = yield from run(*args)
                flag.send()
                return out
            return asking

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
    """The notes of one program's sites: on the device, and their copy.

    One copy at a time is under way; notes are kept until they are read.
    """

    def __init__(self, sites: Sequence[IndexSite], device: torch.device) -> None:
        # where no index may be, none is waited with
        self.sites = tuple(site for site in sites if site.last >= 0)
        self.device, self.sent = device, False
        with torch.inference_mode(False):               # calls of any mode write here
            self.noted = torch.zeros(len(self.sites), 2, dtype=torch.int64, device=device)
            self.copy = torch.zeros(len(self.sites), 2, dtype=torch.int64, device="cpu",
                                    pin_memory=device.type == "cuda")
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
