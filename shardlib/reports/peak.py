"""What the code of an action holds at once beside what it is given: values that steps make, until the last
step that takes them. What an op holds for itself is not in it, but for operands read in a wider dtype.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from shardlib.dtypes import ITEMSIZE, inner_dtypes, read_dtypes
from shardlib.language.held import here, runs
from shardlib.language.moves import Coordinate
from shardlib.language.rearrange import REARRANGE, RENAME
from shardlib.language.scan import SCAN
from shardlib.mesh import Mesh
from shardlib.program import Program, Scan, Step
from shardlib.reports.project import rounds
from shardlib.spec import Spec

VIEWS = ("spread", "stop_gradient")


@dataclass(frozen=True)
class AtWork:
    """Of the code of the rank at `place`."""
    mesh: Mesh
    sizes: Mapping[str, int]
    place: Coordinate

    def most(self, program: Program, kinds: Mapping[str, str]) -> int:
        """The most bytes at once. kinds: the dtypes of the program's values."""
        steps = [s for s in program.steps if runs(s, self.place)]
        roots: dict[str, str] = {}
        for step in filter(_is_view, steps):
            roots[step.outputs[0]] = roots.get(step.inputs[0], step.inputs[0])
        last = {roots.get(n, n): i for i, step in enumerate(steps) for n in step.inputs}
        last |= {roots.get(n, n): len(steps) for n, _ in program.result_leaves()}
        live: dict[str, int] = {}
        most = 0
        for i, step in enumerate(steps):
            made = {} if _is_view(step) else {
                name: self.bytes(spec, kinds[name]) for name, spec in zip(step.outputs, step.outs)}
            most = max(most, sum(live.values()) + sum(made.values()) + self._inside(step, kinds))
            live = {n: size for n, size in {**live, **made}.items() if last.get(n, -1) > i}
        return most

    def bytes(self, spec: Spec, kind: str) -> int:
        """Of a value, as the rank has it."""
        there = here(spec, self.place)
        return prod(self.mesh.local_shape(spec, self.sizes, self.place)) * ITEMSIZE[kind] if there else 0

    def _inside(self, step: Step, kinds: Mapping[str, str]) -> int:
        """What a step holds beside its results: copies in other dtypes, or what its body does. The results of
        the last of a scan's rounds are among its own."""
        if not step.bodies:
            have = [kinds[n] for n in step.inputs]
            reads = zip(step.ins, have, read_dtypes(step, have))
            return sum([self.bytes(spec, want) for spec, kind, want in reads
                        if want and want != kind and not _is_view(step)])
        most = max(self.most(body, inner_dtypes(step, body, kinds)) for body in step.bodies)
        if step.op is not SCAN:
            return most
        many = rounds(step, self.mesh, self.sizes, self.place)
        stacked = {name for _, name in Scan.of(step).made}
        own = sum(self.bytes(spec, kinds[n]) for n, spec in zip(step.outputs, step.outs) if n in stacked)
        return most - own // many if many else 0


def _is_view(step: Step) -> bool:
    """Whether its result lies where its operand does."""
    return (step.op in (RENAME, REARRANGE) or step.op.name in VIEWS or step.op.moves and step.op.wire is None)
