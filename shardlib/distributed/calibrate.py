"""Measures this machine, and writes the table by which calls are routed and `explain` predicts.

    torchrun --nproc-per-node 4 -m shardlib.distributed.calibrate

measures every collective of every communicator, in groups of all ranks and of some of their divisors
(`axes_of`), from 2 kB to 64 MB: on GPUs eager and in CUDA graphs. The table goes to the user's cache, where
`connect` finds it, or to `--out FILE`. What an earlier run with another number of processes has measured
stays in it. Times are medians of the slowest member, in µs a call.

Refused before anything is measured: a FILE that cannot be written, or is there and no table. A damaged table
in the cache is replaced.
"""
from __future__ import annotations

import argparse
import datetime
import importlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from shardlib.distributed.communicators.protocol import Call, Communicator, Factory
from shardlib.distributed.graph_capture import capture_stream
from shardlib.distributed.group_coordinator import GroupCoordinator
from shardlib.distributed.launch import Launch
from shardlib.distributed.routing import Curve, Table, hardware, own_file
from shardlib.distributed.runtime import Runtime, connect
from shardlib.errors import SpecError, bytes_text
from shardlib.mesh import Mesh

COLLECTIVES = ("all_reduce", "reduce_scatter", "all_gather", "all_to_all", "broadcast")
SIZES = tuple(2 ** k for k in range(11, 27))
ROUNDS = 7
QUAD = 16
"""Every member's piece is a multiple of so many bytes: the sizes of groups of 3 are a little smaller."""
TO_COME = Table("hardware that is being measured", {})
"""Routes meanwhile: what is measured needs no table, and one that is damaged must not keep it
from being replaced."""
_WHILE = 1_000_000
"""Cycles: some 500 µs."""


def call_of(name: str, communicator: Communicator, group: GroupCoordinator,
            x: torch.Tensor) -> Callable[[], Any]:
    """The collective `name` of x, whole: what all_gather gives, and the others take."""
    n, piece = group.world_size, x.numel() // group.world_size
    even = (piece,) * n
    if name == "all_reduce":
        return partial(communicator.all_reduce, x, "sum")
    if name == "reduce_scatter":
        return partial(communicator.reduce_scatter, x, even, "sum")
    if name == "all_gather":
        return partial(communicator.all_gather, x[:piece].clone(), even)
    if name == "all_to_all":
        return partial(communicator.all_to_all, x, even, even)
    return partial(communicator.broadcast, x, 0)


def slowest(seconds: Sequence[float], group: GroupCoordinator) -> float:
    """µs: the median over the rounds of the slowest member's time."""
    times = group.all_gather(torch.tensor(seconds, dtype=torch.float64, device="cpu"), 0,
                             (len(seconds),) * group.world_size)
    return statistics.median(times.view(group.world_size, -1).amax(0).tolist()) * 1e6


def time_on_cpu(call: Callable[[], Any], group: GroupCoordinator, calls: int) -> float:
    """µs a call, of calls one after another."""
    call()
    rounds = []
    for _ in range(ROUNDS):
        group.barrier()
        begun = time.perf_counter()
        for _ in range(calls):
            call()
        rounds.append((time.perf_counter() - begun) / calls)
    return slowest(rounds, group)


def time_on_gpu(call: Callable[[], Any], group: GroupCoordinator, calls: int, capturing: bool) -> float:
    """µs a call, of calls one after another on the device, from a graph or eager."""
    if capturing:
        side = capture_stream(group.device)
        with torch.cuda.stream(side):
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            for _ in range(calls):
                call()
        run = graph.replay
    else:
        def run() -> None:
            for _ in range(calls):
                call()
    rounds = []
    for _ in range(ROUNDS + 2):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        group.barrier()
        if capturing:
            # while the device waits, what it is to do is enqueued; then one call, untimed, in
            torch.cuda._sleep(_WHILE)
        call()                                  # which the devices meet
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        rounds.append(begin.elapsed_time(end) / 1e3 / calls)
    return slowest(rounds[2:], group)


def measure(group: GroupCoordinator, name: str, communicator: Communicator, dtype: torch.dtype,
            capturing: bool, sizes: Sequence[int] = SIZES) -> Curve | None:
    """The curve of one collective of one communicator; None where it takes none of the sizes."""
    points = []
    for nbytes in sizes:
        count = nbytes // (QUAD * group.world_size) * group.world_size * QUAD // dtype.itemsize
        op = "sum" if name in ("all_reduce", "reduce_scatter") else None
        call = Call(name, op, dtype, group.device.type, count * dtype.itemsize, True, capturing)
        if not count or communicator.supports(call) is not None:
            continue
        x = torch.randn(count, device=group.device).to(dtype)
        run = call_of(name, communicator, group, x)
        if group.device.type == "cuda":
            us = time_on_gpu(run, group, 20 if nbytes <= 1 << 22 else 5, capturing)
        else:
            us = time_on_cpu(run, group, 20 if nbytes <= 1 << 16 else 3)
        points.append((call.nbytes, round(us, 2)))
    return (Curve(name, group.world_size, str(dtype)[6:], capturing, communicator.name, tuple(points))
            if points else None)


def curves(group: GroupCoordinator, sizes: Sequence[int] = SIZES) -> Iterator[Curve]:
    """Everything that is measured of one group."""
    on_gpu = group.device.type == "cuda"
    communicators = {c.name: c for c in reversed(group.communicators)}
    for name in COLLECTIVES:
        for communicator in reversed(communicators.values()):
            for capturing in (False, True) if on_gpu else (False,):
                curve = measure(group, name, communicator, torch.bfloat16 if on_gpu else torch.float32,
                                capturing, sizes)
                if curve is not None:
                    yield curve


def merged(old: Table | None, new: Table) -> Table:
    """The new table, with what only the old one, of the same hardware, has."""
    def key(c: Curve) -> tuple:
        return c.name, c.size, c.dtype, c.capturing, c.communicator
    if old is None or old.hardware != new.hardware:
        return new
    fresh = {key(c) for c in new.curves}
    return Table(new.hardware, new.provenance, (*(c for c in old.curves if key(c) not in fresh), *new.curves))


def provenance(device: torch.device) -> dict[str, str]:
    """Versions, date and commit of a measurement."""
    versions = [f"torch {torch.__version__}"]
    if device.type == "cuda":
        versions += [f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}", f"Triton {_version('triton')}"]
    return {"versions": ", ".join(versions), "date": datetime.date.today().isoformat(),
            "commit": _commit() or f"shardlib {_version('shardlib')}"}


def _commit() -> str:
    """The commit of the checkout that this file is in; "" where it is in none."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""
    try:
        return subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True,
                              text=True).stdout.strip()
    except OSError:
        return ""


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def axes_of(ranks: int) -> dict[str, int]:
    """A mesh of so many ranks with an axis for each prime factor, small ones last:
    the last axes make the groups that are measured.

    >>> axes_of(12)
    {'a': 3, 'b': 2, 'c': 2}
    """
    factors = []
    for prime in range(2, ranks + 1):
        while ranks % prime == 0:
            factors.append(prime)
            ranks //= prime
    return {chr(ord("a") + i): factor for i, factor in enumerate(reversed(factors))}


def calibrate(runtime: Runtime, sizes: Sequence[int] = SIZES,
              say: Callable[[str], None] = lambda text: None) -> Table:
    """The table of this machine, measured by all ranks together, in the groups over the last axis,
    the last two, and so on.

    It is rank 0's: of groups that were measured at the same time, its own.
    """
    axes = tuple(runtime.mesh.axes)
    groups = [axes[i:] for i in reversed(range(len(axes)))]
    runtime.create_groups(groups)
    found = []
    for curve in (c for g in groups for c in curves(runtime.group(g), sizes)):
        found.append(curve)
        (small, fast), (large, slow) = curve.points[0], curve.points[-1]
        say(f"{curve.name} of {curve.size} by "
            f"{curve.communicator}{' in a graph' if curve.capturing else ''}: "
            f"{fast:g} µs for {bytes_text(small)}, {slow:g} µs for {bytes_text(large)}")
    made = Table(hardware(runtime.device), provenance(runtime.device), tuple(found))
    return Table.decode(runtime.group(axes).broadcast_message(made.encode(), 0, bytes), "of rank 0")


def target(out: Path | None, device: torch.device) -> tuple[Path, Table | None]:
    """The file that the table goes to, `out` or the user's own, and the table that is there. SpecError where
    it cannot be written, and where `out` is damaged; a damaged table of the user's own is none."""
    named = out or own_file(device)
    if named is None:
        raise SpecError(
            "calibrate: this user has no home to keep the table in; set XDG_CACHE_HOME, or pass --out FILE")
    path = Path(os.path.realpath(named))
    try:
        if path.exists() and not path.is_file():
            raise SpecError(f"routing table {path}: it is there, and no file")
        path.parent.mkdir(parents=True, exist_ok=True)
        beside(path).touch()
        beside(path).unlink()
        text = path.read_bytes() if path.exists() else None
    except OSError as error:
        raise SpecError(f"routing table {path}: {error.strerror}") from None
    try:
        return path, None if text is None else Table.decode(text, str(path))
    except SpecError as error:
        if out is not None:
            raise
        print(f"{error}; it is replaced", file=sys.stderr)
        return path, None


def agreed_target(runtime: Runtime, out: Path | None) -> tuple[Path, Table | None] | None:
    """`target` on rank 0, None elsewhere; SpecError on every rank where there is none."""
    axes, found, wrong = tuple(runtime.mesh.axes), None, None
    runtime.create_groups([axes])
    if runtime.rank == 0:
        try:
            found = target(out, runtime.device)
        except SpecError as error:
            wrong = str(error)
    wrong = runtime.group(axes).broadcast_message(wrong, 0, str | None)
    if wrong is not None:
        raise SpecError(wrong)
    return found


def beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.{os.getpid()}")


def write(table: Table, path: Path) -> None:
    """All of it or nothing: it goes to a file beside `path`, which then takes its place."""
    try:
        beside(path).write_bytes(table.encode())
        os.replace(beside(path), path)
    except OSError as error:
        raise SpecError(f"routing table {path}: {error.strerror}") from None
    finally:
        beside(path).unlink(missing_ok=True)


def maker(text: str) -> Factory:
    """What MODULE:FUNCTION names."""
    module, _, name = text.partition(":")
    if not module or not name:
        raise argparse.ArgumentTypeError(f"{text!r} is no MODULE:FUNCTION")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except (ImportError, TypeError) as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from None
    if not callable(found):
        raise argparse.ArgumentTypeError(f"{text}: module {module} has no function {name}")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m shardlib.distributed.calibrate", description="Measure "
                                     "this machine's collectives; start it with torchrun.")
    parser.add_argument("--out", type=Path, help="where to write the table; by default the user's cache")
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--max-bytes", type=int, default=SIZES[-1], help="the largest tensor")
    parser.add_argument("--communicators", nargs="*", default=[], type=maker, metavar="MODULE:FUNCTION",
                        help="further makers of communicators")
    options = parser.parse_args(arguments)
    sizes = [s for s in SIZES if s <= options.max_bytes]
    if not sizes:
        parser.error(f"argument --max-bytes: {options.max_bytes}: the smallest tensor that is measured has "
                     f"{SIZES[0]} bytes")
    launch = Launch.current()
    if launch.world_size == 1:
        print("calibrate measures what processes say to each other: start it with torchrun --nproc-per-node "
              "N", file=sys.stderr)
        return 2
    try:
        with connect(Mesh(**axes_of(launch.world_size)), options.device, communicators=options.communicators,
                     table=TO_COME) as runtime:
            found = agreed_target(runtime, options.out)
            table = calibrate(runtime, sizes,
                              lambda text: print(text, flush=True) if launch.rank == 0 else None)
        if found is not None:
            path, old = found
            write(merged(old, table), path)
            print(f"written to {path}")
    except SpecError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
