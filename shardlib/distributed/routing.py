"""Routing: which communicator takes a call, and how long it should take, by measurement.

A `Table` is what was measured on one machine: per collective, group size, dtype and way of calling (eager, or
in a CUDA graph), the µs of every communicator at some sizes. A call goes to the one that is fastest at its
size; between two measured sizes the µs run on a straight line of log against log. A communicator that was not
measured gets what no measured one supports; where none was, the first takes the call.

>>> def curve(by, *points):
...     return Curve("all_reduce", 2, "float32", False, by, points)
>>> table = Table("a machine", {}, (curve("shared memory", (1024, 30.0), (1048576, 900.0)),
...                                 curve("gloo", (1024, 700.0), (1048576, 800.0))))
>>> call = Call("all_reduce", "sum", torch.float32, "cpu", 1024)
>>> table.order(call, 2, ("gloo", "shared memory"))
['shared memory', 'gloo']
>>> table.order(call._replace(nbytes=2**20), 2, ("gloo", "shared memory"))
['gloo', 'shared memory']
"""
from __future__ import annotations

import hashlib
import math
import os
import platform
from bisect import bisect
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Annotated

import msgspec
import torch

from shardlib.distributed.communicators.protocol import Call
from shardlib.errors import SpecError

SHIPPED = Path(__file__).parent / "tables"
Count = Annotated[int, msgspec.Meta(ge=1, lt=1 << 60)]
Microseconds = Annotated[float, msgspec.Meta(gt=0, le=1e12)]


class Curve(msgspec.Struct, frozen=True):
    """µs of one communicator, at some bytes (rising), of the slowest member of a group of `size`."""
    name: str
    size: Count
    dtype: str
    capturing: bool
    communicator: str
    points: Annotated[tuple[tuple[Count, Microseconds], ...], msgspec.Meta(min_length=1)]

    def us(self, nbytes: int) -> float:
        """µs at `nbytes`: a line of log against log between two measured sizes; before the first, its own;
        beyond the last, the line through the last two, which neither falls nor rises faster than the
        bytes."""
        (first, us), points = self.points[0], self.points
        if nbytes <= first or len(points) == 1:
            return us
        at = min(bisect([n for n, _ in points], nbytes), len(points) - 1)
        (a, ta), (b, tb) = points[at - 1:at + 1]
        if nbytes > b:
            return tb * (nbytes / b) ** min(1.0, max(0.0, (math.log(tb) - math.log(ta)) / _log(b, a)))
        x = _log(nbytes, a) / _log(b, a)
        return ta ** (1 - x) * tb ** x


def _log(n: int, a: int) -> float:
    """log(n / a), above 0 for any n > a."""
    return math.log1p((n - a) / a)


class Table(msgspec.Struct, frozen=True):
    """What was measured on `hardware`.

    provenance: versions, date, commit, and whatever else says where it comes from.
    """
    hardware: str
    provenance: dict[str, str]
    curves: tuple[Curve, ...] = ()

    def curve(self, call: Call, size: int, communicator: str) -> Curve | None:
        """The curve for a call: of its dtype if there is one, else of any other."""
        dtype = str(call.dtype).removeprefix("torch.")
        found = [c for c in self.curves if (c.name, c.size, c.capturing, c.communicator)
                 == (call.name, size, call.capturing, communicator)]
        return next((c for c in found if c.dtype == dtype), found[0] if found else None)

    def us(self, call: Call, size: int, communicator: str) -> float | None:
        """The µs that the call should take; None where nothing like it was measured:
        of reductions, sums are."""
        curve = self.curve(call, size, communicator)
        return (None if curve is None or call.nbytes < 0 or call.op not in (None, "sum")
                else curve.us(call.nbytes))

    def order(self, call: Call, size: int, communicators: Sequence[str]) -> list[str]:
        """The communicators, fastest first; those that were not measured come after, in the order given."""
        us = {c: self.us(call, size, c) for c in communicators}
        return sorted(communicators, key=lambda c: math.inf if us[c] is None else us[c])

    @property
    def source(self) -> str:
        """Where the figures come from, in a line."""
        return (f"measured on {self.hardware}, {', '.join(self.provenance.values())}" if self.curves
                else "nothing was measured here")

    def encode(self) -> bytes:
        return msgspec.json.encode(self)

    @classmethod
    def decode(cls, text: bytes, name: str) -> Table:
        """SpecError where `text` is no table."""
        try:
            table = msgspec.json.decode(text, type=cls)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise SpecError(f"routing table {name}: {error}") from None
        for curve in table.curves:
            if any(b <= a for (a, _), (b, _) in zip(curve.points, curve.points[1:])):
                raise SpecError(f"routing table {name}: {curve.name} by {curve.communicator}: its points are "
                                "sizes that rise")
        return table


UNMEASURED = Table("unknown hardware", {})


def hardware(device: torch.device) -> str:
    """What a table is for: the GPU's name, or the processor's and its count of cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()} cores of {_processor()}"


@cache
def _processor() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
                platform.machine())


def own_file(device: torch.device) -> Path | None:
    """Where `python -m shardlib.distributed.calibrate` keeps the user's own table of this hardware;
    None for a user without a home."""
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return None
    digest = hashlib.sha256(hardware(device).encode()).hexdigest()[:12]
    return cache / "shardlib" / f"routes-{digest}.json"


def find_table(device: torch.device) -> Table:
    """The table of this hardware: the file SHARDLIB_ROUTES names, else the user's own, else a shipped one,
    else an empty one.

    An own table that may not be read is none. SpecError for a file that is damaged, and for a named one that
    may not be read.
    """
    named = os.environ.get("SHARDLIB_ROUTES")
    if named:
        if not os.path.isfile(named):
            raise SpecError(f"SHARDLIB_ROUTES: there is no file {named}")
        return _read(Path(named))
    tables = (_own(device), *map(_read, sorted(SHIPPED.glob("*.json"))))
    return next((t for t in tables if t is not None and t.hardware == hardware(device)), UNMEASURED)


def _own(device: torch.device) -> Table | None:
    file = own_file(device)
    try:
        text = file.read_bytes() if file and os.path.isfile(file) else None
    except OSError:
        return None
    return None if text is None else Table.decode(text, str(file))


def _read(file: Path) -> Table:
    try:
        return Table.decode(file.read_bytes(), str(file))
    except OSError as error:
        raise SpecError(f"routing table {file}: {error.strerror}") from None
