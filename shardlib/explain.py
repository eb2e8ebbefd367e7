"""explain: where the traffic comes from. A table for a person, and the same as JSON.

One row a collective of the program: the user's line, the spec before and after, the group, bytes a rank receives, the
predicted time, and why it is there; then what each rank holds, and how unevenly.
"""
from __future__ import annotations

import io
import json
from dataclasses import asdict, dataclass
from math import prod
from typing import Any, Iterator, Mapping

from rich.console import Console
from rich.table import Table

from shardlib.cond import COND
from shardlib.errors import bytes_text
from shardlib.mesh import Mesh
from shardlib.moves import COLLECTIVES
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
        for name in ("line", "collective", "before", "after", "ranks", "times", "bytes", "µs", "why"):
            table.add_column(name, justify="right" if name in ("ranks", "times", "bytes", "µs") else "left", overflow="fold")
        for t in self.traffic:
            table.add_row(t.where, t.op, t.before, t.after, f"{'/'.join(t.axes)}={t.group_size}", str(t.times), bytes_text(t.bytes),
                          f"{t.predicted_us:.0f}", t.why)
        console.print(table)
        console.print(f"{self.collectives} collectives, {bytes_text(self.bytes)} received per rank and run; times {self.cost_source}")
        console.print(f"arguments: {bytes_text(max(self.argument_bytes))} on the fullest rank, {self.imbalance:.2f} x the mean")
        for line in self.unmet:
            console.print(line)
        return out.getvalue()


def explain(program: Program, mesh: Mesh, sizes: Mapping[str, int], dtypes: Mapping[str, str] | None = None, default: str = "float32",
            cost: CostModel = CostModel()) -> Explanation:
    """Every collective of an explicit program, with its cost at these sizes, and what each rank holds."""
    kinds = value_dtypes(program, dtypes or {}, default)
    held = tuple(sum(prod(mesh.local_shape(spec, sizes, c)) * ITEMSIZE[kinds[path]] for path, spec in program.arg_leaves())
                 for c in mesh.coordinates())
    traffic = tuple(_traffic(program, mesh, sizes, kinds, default, cost, 1))
    return Explanation(program.name, str(mesh), traffic, held, cost.source, _unmet(program))


def _unmet(program: Program) -> tuple[str, ...]:
    """Entries of the layout that some ops could not follow, a line for each dim and axis."""
    places: dict[tuple[str, str], list[str]] = {}
    for dim, axis, where in (u for p in (program, *program.bodies()) for u in p.unmet):
        places.setdefault((dim, axis), []).append(where)
    return tuple(f"{dim} is not split over {axis} at {', '.join(dict.fromkeys(found))}: there another dim has it" for (dim, axis), found in places.items())


def _traffic(program: Program, mesh: Mesh, sizes: Mapping[str, int], kinds: dict[str, str], default: str, cost: CostModel, times: int) -> Iterator[Traffic]:
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
            yield _row(step, program, mesh, sizes, ITEMSIZE[kinds[step.inputs[0]]], cost, times)


def _row(step: Step, program: Program, mesh: Mesh, sizes: Mapping[str, int], itemsize: int, cost: CostModel, times: int) -> Traffic:
    n = max(received(step, mesh, sizes, rank) for rank in range(mesh.world_size)) * itemsize
    axes = axes_of(step)
    return Traffic(step.op.name, str(step.where or ""), program.name, str(step.ins[0]), str(step.outs[0]), axes, mesh.size(axes), times, n,
                   cost.latency_us + n / cost.bytes_per_us, step.why)
