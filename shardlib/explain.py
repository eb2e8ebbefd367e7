"""explain: where the traffic comes from. A table for a person, and the same as JSON.

One row a collective of the program: the user's line, the spec before and after, the group, bytes a rank receives, the
predicted time, and why it is there; then what each rank holds, and how unevenly. With a runtime, also the communicator that takes
it on this machine, and its time as measured there.
"""
from __future__ import annotations

import io
import json
from dataclasses import asdict, dataclass, replace
from math import prod
from typing import Any, Iterator, Mapping, Sequence

import torch
from rich.console import Console
from rich.table import Table

from shardlib.cond import COND
from shardlib.distributed.communicators.protocol import Call
from shardlib.distributed.runtime import Runtime
from shardlib.errors import bytes_text
from shardlib.mesh import Mesh
from shardlib.moves import ALL_GATHER, ALL_REDUCE, ALL_TO_ALL, COLLECTIVES, PERMUTE, REDUCE_SCATTER, exchanged
from shardlib.program import Program, Step
from shardlib.project import ITEMSIZE, axes_of, received, value_dtypes
from shardlib.scan import SCAN


@dataclass(frozen=True)
class CostModel:
    """A collective takes `latency_us` and `bytes / bytes_per_us`. `source` says where the numbers come from."""
    latency_us: float = 20.0
    bytes_per_us: float = 100_000.0
    source: str = "assumed, not measured: 20 µs a collective, 100 GB/s"


@dataclass(frozen=True)
class Traffic:
    """One collective of a program. times: how often it runs (scan); bytes: received by the busiest rank, each time."""
    op: str
    where: str
    function: str
    before: str
    after: str
    axes: tuple[str, ...]
    group_size: int
    times: int
    bytes: int
    predicted_us: float
    why: str
    communicator: str = ""
    choice: str = ""


@dataclass(frozen=True)
class Explanation:
    """What `explain` found. `print` it, or take `to_json()`."""
    program: str
    mesh: str
    traffic: tuple[Traffic, ...]
    argument_bytes: tuple[int, ...]
    cost_source: str
    unmet: tuple[str, ...] = ()

    @property
    def collectives(self) -> int:
        """How many collectives one run makes."""
        return sum(t.times for t in self.traffic)

    @property
    def bytes(self) -> int:
        """Bytes that the busiest rank receives in one run."""
        return sum(t.times * t.bytes for t in self.traffic)

    @property
    def imbalance(self) -> float:
        """What the fullest rank holds of the arguments, over the mean."""
        mean = sum(self.argument_bytes) / len(self.argument_bytes)
        return max(self.argument_bytes) / mean if mean else 1.0

    def to_json(self) -> dict[str, Any]:
        """The same as plain data."""
        return {**json.loads(json.dumps(asdict(self))), "collectives": self.collectives, "bytes": self.bytes, "imbalance": self.imbalance}

    def __str__(self) -> str:
        out = io.StringIO()
        console = Console(file=out, width=150, force_terminal=False)
        table = Table(title=f"{self.program} on mesh {self.mesh or '(one rank)'}", title_justify="left", box=None, pad_edge=False)
        routed = any(t.communicator for t in self.traffic)
        for name in ("line", "collective", "before", "after", "ranks", "times", "bytes", "µs", *(["by"] if routed else []), "why"):
            table.add_column(name, justify="right" if name in ("ranks", "times", "bytes", "µs") else "left", overflow="fold")
        for t in self.traffic:
            table.add_row(t.where, t.op, t.before, t.after, f"{'/'.join(t.axes)}={t.group_size}", str(t.times), bytes_text(t.bytes),
                          f"{t.predicted_us:.3g}", *([t.communicator] if routed else []), t.why)
        console.print(table)
        for choice in dict.fromkeys(t.choice for t in self.traffic if t.choice):
            console.print(choice)
        console.print(f"{self.collectives} collectives, {bytes_text(self.bytes)} received per rank and run; times {self.cost_source}")
        console.print(f"arguments: {bytes_text(max(self.argument_bytes))} on the fullest rank, {self.imbalance:.2f} x the mean")
        for line in self.unmet:
            console.print(line)
        return out.getvalue()


def explain(program: Program, mesh: Mesh, sizes: Mapping[str, int], dtypes: Mapping[str, str] | None = None, default: str = "float32",
            cost: CostModel = CostModel(), runtime: Runtime | None = None) -> Explanation:
    """Every collective of an explicit program, with its cost at these sizes, and what each rank holds.

    runtime: says who takes each collective and how long that took when it was measured; all ranks then call this.
    """
    kinds = value_dtypes(program, dtypes or {}, default)
    held = tuple(sum(prod(mesh.local_shape(spec, sizes, c)) * ITEMSIZE[kinds[path]] for path, spec in program.arg_leaves())
                 for c in mesh.coordinates())
    traffic = tuple(_traffic(program, mesh, sizes, kinds, default, cost, 1))
    source = cost.source
    if runtime is not None:
        traffic, source = _routed(traffic, runtime, cost)
    return Explanation(program.name, str(mesh), tuple(t for t, _ in traffic), held, source, _unmet(program))


def _routed(traffic: Sequence[tuple[Traffic, Call]], runtime: Runtime, cost: CostModel) -> tuple[tuple[tuple[Traffic, Call], ...], str]:
    """The same with who takes each, and µs by the routing table where it has them; and where the times come from."""
    runtime.create_groups(dict.fromkeys(t.axes for t, _ in traffic))
    made, measured = [], 0
    for t, call in traffic:
        call = call._replace(device=runtime.device.type)
        choice = runtime.group(t.axes).router.choice(call)
        measured += choice.us is not None
        made.append((replace(t, communicator=choice.communicator, choice=f"{t.op} of {bytes_text(max(call.nbytes, 0))}: {choice.why}",
                             predicted_us=t.predicted_us if choice.us is None else choice.us), call))
    assumed = f"; {len(made) - measured} of {len(made)}: {cost.source}" if measured < len(made) else ""
    return tuple(made), f"{runtime.table.source}{assumed}" if measured else cost.source


def _unmet(program: Program) -> tuple[str, ...]:
    """Entries of the layout that some ops could not follow, a line for each dim and axis."""
    places: dict[tuple[str, str], list[str]] = {}
    for dim, axis, where in (u for p in (program, *program.bodies()) for u in p.unmet):
        places.setdefault((dim, axis), []).append(where)
    return tuple(f"{dim} is not split over {axis} at {', '.join(dict.fromkeys(found))}: there another dim has it" for (dim, axis), found in places.items())


def _traffic(program: Program, mesh: Mesh, sizes: Mapping[str, int], kinds: dict[str, str], default: str, cost: CostModel,
             times: int) -> Iterator[tuple[Traffic, Call]]:
    for step in program.steps:
        if step.op is SCAN:
            paths = [p for p, _ in step.body.arg_leaves()]
            inner = value_dtypes(step.body, {p: kinds[n] for p, n in zip(paths, step.inputs)}, default)
            yield from _traffic(step.body, mesh, sizes, inner, default, cost, times * sizes[step.options["dim"]])
        elif step.op is COND:
            for body in step.bodies:
                paths = [p for p, _ in body.arg_leaves()]
                inner = value_dtypes(body, {p: kinds[n] for p, n in zip(paths, step.inputs[1:])}, default)
                yield from _traffic(body, mesh, sizes, inner, default, cost, times)
        elif step.op in COLLECTIVES and mesh.size(axes_of(step)) > 1:
            dtype = kinds[step.inputs[0]]
            yield _row(step, program, mesh, sizes, ITEMSIZE[dtype], cost, times), _call(step, mesh, sizes, dtype)


def _call(step: Step, mesh: Mesh, sizes: Mapping[str, int], dtype: str) -> Call:
    """What the step asks of a GroupCoordinator, as rank 0 does."""
    (have,), (want,) = step.ins, step.outs
    members = [mesh.coordinate(r) for r in mesh.group(axes_of(step), 0)]
    exchange = step.op in (ALL_TO_ALL, PERMUTE)
    parts = {exchanged(mesh, sizes, have, want, a, b) for a in members for b in members} if exchange else \
        {prod(mesh.local_shape(want if step.op is REDUCE_SCATTER else have, sizes, c)) for c in members}
    whole = prod(mesh.local_shape(want if step.op is ALL_GATHER else have, sizes, members[0])) * ITEMSIZE[dtype]
    op = ("max" if any(o.kind == "max" for o in have.owed) else "sum") if step.op in (ALL_REDUCE, REDUCE_SCATTER) else None
    even = len(parts) == 1
    return Call("all_to_all" if exchange else step.op.name, op, getattr(torch, dtype), "cpu", whole if even or not exchange else -1, even)


def _row(step: Step, program: Program, mesh: Mesh, sizes: Mapping[str, int], itemsize: int, cost: CostModel, times: int) -> Traffic:
    n = max(received(step, mesh, sizes, rank) for rank in range(mesh.world_size)) * itemsize
    axes = axes_of(step)
    return Traffic(step.op.name, str(step.where or ""), program.name, str(step.ins[0]), str(step.outs[0]), axes, mesh.size(axes), times, n,
                   cost.latency_us + n / cost.bytes_per_us, step.why)
