"""The exchanges of a step that is no move: calls of wires between what it computes.

An op that has `Exchanges` says of one call of it over which axes its ranks communicate, and what each of them
brings to each wire, and gets. Projection, proof and explanation ask this; code is a generator of requests,
`(group, method, operand, *more)`, which is sent what came: the simulator performs them, `carried_out` makes
them calls of the group's coordinator.

    def _halves(group, x):
        got = yield group, "all_gather", x, 0, (1, 1)
        return got.sum(0)

What computes before it needs what came says so, `coming = yield Early((group, ...))`, and `arrived(coming)`
later: on GPUs it travels meanwhile.

Over axes of one rank, or none, nothing is asked, and the op's code is local.
"""
from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

from shardlib.language.moves import axes_of
from shardlib.mesh import Mesh
from shardlib.program import Step
from shardlib.spec import Dim, Spec
from shardlib.wires import Part, Wire

Requests = Generator[tuple, Any, Any]


class Early(tuple):
    """A request whose answer is taken later, by `arrived`; whoever performs it may leave it under way."""


def arrived(answer: Any) -> Any:
    """What came of an `Early` request."""
    return answer.arrived() if hasattr(answer, "arrived") else answer


@dataclass(frozen=True)
class Exchange:
    """One call of a wire: a type that tells what goes over it, its dtype, and the part of each member, in
    elements."""
    wire: Wire
    of: Spec
    dtype: str
    parts: tuple[Part, ...]
    why: str


@dataclass(frozen=True)
class Site:
    """A step as the rank at `here` runs it. dtypes: of its operands."""
    step: Step
    axes: tuple[str, ...]
    mesh: Mesh
    sizes: Mapping[str, int]
    here: Mapping[str, int]
    dtypes: tuple[str | None, ...]

    @cached_property
    def members(self) -> list[Mapping[str, int]]:
        return [{**self.here, **dict(zip(self.axes, at))}
                for at in product(*(range(self.mesh.axes[a]) for a in self.axes))]

    @property
    def me(self) -> int:
        """Which member this rank is."""
        return self.mesh.number(self.axes, self.here)

    def shape(self, spec: Spec) -> tuple[int, ...]:
        return self.mesh.local_shape(spec, self.sizes, self.here)

    def pieces(self, dim: Dim) -> tuple[tuple[int, int], ...]:
        """(start, size) of what each member has of a dim."""
        return tuple(self.mesh.rows(dim, self.sizes, at) for at in self.members)


@dataclass(frozen=True)
class Exchanges:
    """over(step): the axes over which its ranks communicate, as their group has them; of types.
    calls(site): its exchanges, in order."""
    over: Callable[[Step], tuple[str, ...]]
    calls: Callable[[Site], Sequence[Exchange]]


def meets_over(step: Step) -> tuple[str, ...]:
    """The axes of a step's exchanges; none of a step that has none."""
    return step.op.exchanges.over(step) if step.op.exchanges else ()


def communicates_over(step: Step, mesh: Mesh) -> tuple[str, ...]:
    """The axes over which the ranks of a step communicate, be it a move or not."""
    return axes_of(step, mesh) if step.op.wire else meets_over(step)


def exchanges(step: Step, mesh: Mesh, sizes: Mapping[str, int], here: Mapping[str, int],
              dtypes: Mapping[str, str | None]) -> Sequence[Exchange]:
    """Those of a step, `dtypes` being of the program's values."""
    axes = meets_over(step)
    if mesh.size(axes) == 1:
        return ()
    return step.op.exchanges.calls(Site(step, axes, mesh, sizes, here, tuple(map(dtypes.get, step.inputs))))


def alike(n: int, elements: int) -> tuple[Part, ...]:
    """The parts of a gathering to which all bring as much."""
    return tuple(Part(n, m, elements, n * elements) for m in range(n))


def received(of: Exchange, m: int) -> int:
    """Elements that a member receives."""
    return of.wire.received(of.parts[m])


def carried_out(requests: Requests, at: object = None) -> Any:
    """The result of a generator of requests, each a call of a group's coordinator.

    at: the step of the plan that they are of.
    """
    answer = None
    while True:
        try:
            request = requests.send(answer)
        except StopIteration as end:
            return end.value
        group, method, *more = request
        answer = (group.begin(method, *more, at=at) if isinstance(request, Early)
                  else getattr(group, method)(*more, at=at))
