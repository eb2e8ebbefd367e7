"""Where a pipeline is cut: a stage that has more besides, as a head or an embedding, has fewer layers."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations

from shardlib.compiler.microbatches import Cut, cut
from shardlib.errors import SpecError
from shardlib.mesh import Mesh
from shardlib.program import Program
from shardlib.reports.project import check_given
from shardlib.reports.timetable import Stage, held
from shardlib.schedules.clock import run
from shardlib.schedules.folding import STAGES, Fold
from shardlib.schedules.schedule import Action, Schedule


def balance(program: Program, mesh: Mesh, sizes: Mapping[str, int], schedule: Schedule,
            dtypes: Mapping[str, str] | None = None, *, default: str = "float32",
            memory: int | None = None) -> Schedule:
    """`schedule` with as many layers on each stage as let it end first, by work as `explain` counts it.

    memory: the bytes that a rank may hold, by the `peak` of `explain`; where no cut is within it, the one
    that is least above. One layer is moved at a time, as long as that is better.
    program: lowered for the schedule.  sizes: of every dim.

    >>> from shardlib import Layout, Params, einsum, lower, param, scan, sharded, stacked, value_and_grad
    >>> from shardlib.functions import sum
    >>> from shardlib.schedules.generators import one_f_one_b
    >>> from torch import Tensor
    >>> class Layer(Params):
    ...     w: Tensor = param("D E")
    >>> class Net(Params):
    ...     layers: Layer = stacked("L", Layer)
    ...     head: Tensor = param("D V")
    >>> @sharded("B D, * -> B D")
    ... def layer(x, w: Layer):
    ...     return einsum("B E, D E -> B D", einsum("B D, D E -> B E", x, w.w), w.w)
    >>> @sharded("B D, * -> ()")
    ... def loss(x, w: Net):
    ...     return sum("B V -> ()", einsum("B D, D V -> B V", scan(layer, x, w.layers), w.head))
    >>> mesh, schedule = Mesh(pp=2), one_f_one_b(2, 4)
    >>> program = lower(value_and_grad(loss), Layout(L="pp", B="mb"), mesh=mesh, schedule=schedule)
    >>> balance(program, mesh, dict(L=8, B=8, D=16, E=16, V=64), schedule).layers
    (5, 3)
    """
    fold = Fold(schedule, mesh)
    sizes = check_given(program, fold.whole, sizes, dtypes or {}, default)
    dims = [d for _, spec in program.arg_leaves() for d in spec.dims if STAGES in d.axes]
    split = {d.label: sizes[d.label] for d in dims}
    if len({*split.values()}) != 1:
        said = ", ".join(f"{n}={many}" for n, many in split.items()) or "nothing"
        raise SpecError(f"balance: {program.name} has {said} over {STAGES}; a cut is of one number of layers")
    (layers,), stages = {*split.values()}, schedule.stages
    parts = cut(program, fold.whole, dtypes or {}, schedule.kinds, default)
    costs = _Costs(mesh, schedule, parts, sizes, memory)
    best = tuple(layers // stages + (s < layers % stages) for s in range(stages))
    found = costs.of(best)
    while better := min(((costs.of(other), other) for other in _beside(best)), default=None):
        if better[0] >= found:
            break
        found, best = better
    return schedule.cut(*best)


def _beside(layers: Sequence[int]) -> list[tuple[int, ...]]:
    """The cuts with one layer elsewhere."""
    return [tuple(n + (s == b) - (s == a) for s, n in enumerate(layers))
            for a, b in permutations(range(len(layers)), 2) if layers[a]]


@dataclass
class _Costs:
    """What is to be least: bytes too many; then the time of all; then how uneven ranks are."""
    mesh: Mesh
    schedule: Schedule
    parts: Cut
    sizes: Mapping[str, int]
    memory: int | None
    known: dict[tuple[int, int, str, int], float] = field(default_factory=dict)

    def of(self, layers: tuple[int, ...]) -> tuple[float, float, float]:
        fold = Fold(self.schedule.cut(*layers), self.mesh)

        def work(a: Action) -> float:
            key = a.stage, layers[a.stage], a.kind, a.microbatch
            if key not in self.known:
                self.known[key] = Stage(fold, self.parts, self.sizes, a.stage).work(a)
            return self.known[key]
        length = run(fold.schedule, duration=lambda kind: 0.0, delay=work).length
        spent = [sum(map(work, actions)) for actions in fold.schedule.ranks]
        most = 0 if self.memory is None else max(
            held(fold, self.parts, self.sizes, fold.at(r))[-1] for r in range(len(spent)))
        return max(0, most - (self.memory or 0)), length, sum(w * w for w in spent)
