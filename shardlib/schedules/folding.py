"""A schedule over a mesh: many ranks of a larger mesh are one, at different times.

A program is typed on the larger mesh, `whole`: its axis `pp` has a coordinate for each stage, and its axis
`mb`, the last one, one for each microbatch. What these ranks would do at once, a rank of the real mesh does
one after another, in the order of its list.

>>> from shardlib.schedules.generators import interleaved
>>> fold = Fold(interleaved(2, 4, chunks=2), Mesh(dp=2, pp=2))
>>> fold.whole, fold.still, fold.stages(1)
(Mesh.parse('dp=2,pp=4,mb=4'), Mesh.parse('dp=2,pp=4'), (1, 3))
>>> fold.place(dict(dp=1, pp=1), stage=3, microbatch=2)
{'dp': 1, 'pp': 3, 'mb': 2}
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from shardlib.errors import SpecError
from shardlib.mesh import Mesh
from shardlib.placement import join, place, shard_of
from shardlib.schedules.schedule import Schedule
from shardlib.spec import Dim, Spec

STAGES, TIME = "pp", "mb"


def timeless(spec: Spec) -> Spec:
    """The type once all microbatches are over: what was split over them is together, what was owed is paid.

    >>> from shardlib.spec import parse
    >>> timeless(parse("B/dp/mb D")), timeless(parse("D F +dp +mb"))
    (B/dp D, D F +dp)
    """
    def still(dim: Dim) -> Dim:
        return dim._replace(factors=tuple(
            f._replace(axes=tuple(a for a in f.axes if a != TIME)) for f in dim.factors))
    return Spec(tuple(map(still, spec.dims)), tuple(o for o in spec.owed if o.axis != TIME), spec.ellipsis)


def timed(spec: Spec) -> bool:
    """Whether each microbatch has a part of its own of a value of this type."""
    return TIME in spec.split_axes or any(o.axis == TIME for o in spec.owed)


@dataclass(frozen=True)
class Fold:
    """`schedule` on the ranks of `mesh`, whose axis `pp` has one for each list of the schedule."""
    schedule: Schedule
    mesh: Mesh

    def __post_init__(self) -> None:
        if not isinstance(self.schedule, Schedule):
            raise SpecError(f"schedule: it is a {type(self.schedule).__name__}; it is a Schedule, as "
                            "one_f_one_b(stages, microbatches) makes it")
        ranks, here = len(self.schedule.ranks), self.mesh.axes.get(STAGES, 1)
        if TIME in self.mesh.axes or TIME in self.mesh.aliases:
            raise SpecError(f"schedule: {TIME} is its axis of time, and the mesh {self.mesh} has one of that "
                            "name")
        if STAGES in self.mesh.cuts:
            raise SpecError(f"schedule: the mesh {self.mesh} cuts {STAGES}; under a schedule that says it: "
                            f"schedule.cut({', '.join(map(str, self.mesh.cuts[STAGES]))})")
        if ranks != here:
            raise SpecError(f"schedule: it has {ranks} ranks, and the axis {STAGES} of the mesh "
                            f"{self.mesh or '(one rank)'} has {here}")
        if self.schedule.after:
            raise SpecError("schedule: one of decoding is what generate does; a program is run by one whose "
                            "microbatches do not follow each other")

    def __str__(self) -> str:
        return f"{self.mesh}\n{self.schedule}"

    @cached_property
    def still(self) -> Mesh:
        """The mesh of all stages, once."""
        stages = self.schedule.layers or self.schedule.stages
        return Mesh(self.mesh.given | ({STAGES: stages} if STAGES in self.mesh.axes else {}))

    @cached_property
    def whole(self) -> Mesh:
        """The mesh on which programs are typed: of all stages, and all microbatches."""
        return Mesh(self.still.given | {TIME: self.schedule.microbatches})

    def stages(self, index: int) -> tuple[int, ...]:
        """Those of the coordinate `index` of the stages' axis, in order."""
        return tuple(s for s in range(self.schedule.stages) if self.schedule.rank_of[s] == index)

    def place(self, coordinate: Mapping[str, int], stage: int, microbatch: int) -> dict[str, int]:
        """Where in `whole` a rank stands while it is at a stage and a microbatch."""
        at = {**coordinate, TIME: microbatch}
        return at | {STAGES: stage} if STAGES in coordinate else at

    def at(self, index: int) -> dict[str, int]:
        """The first rank of a coordinate of the stages' axis; none beside it holds more."""
        return {axis: index if axis == STAGES else 0 for axis in self.mesh.axes}

    def line(self, coordinate: Mapping[str, int]) -> int:
        """Of the ranks that are stages of one pipeline, the first: it tells pipelines side by side apart."""
        return self.mesh.rank({**coordinate, STAGES: 0} if STAGES in coordinate else coordinate)

    # -- what a rank holds: the pieces of all its stages, together -------------------------------------------

    def pieces(self, x: Tensor, kind: Spec, sizes: Mapping[str, int],
               coordinate: Mapping[str, int]) -> dict[int, Tensor]:
        """Of what a rank holds of an argument, what each of its stages has."""
        stages = self.stages(coordinate.get(STAGES, 0))
        at = _stacked(kind)
        if at is None or len(stages) == 1:
            return dict.fromkeys(stages, x)
        rows = [self.still.rows(timeless(kind).dims[at], sizes, {**coordinate, STAGES: s})[1] for s in stages]
        return dict(zip(stages, x.split(rows, at)))

    def together(self, found: Mapping[int, Tensor], kind: Spec) -> Tensor:
        """What a rank holds, of what its stages have."""
        at = _stacked(kind)
        held = next((o.at for o in kind.owed if o.axis == STAGES and o.kind == "@"), None)
        if held is not None:
            return found[int(held)] if held in found else next(iter(found.values()))
        return (next(iter(found.values())) if at is None or len(found) == 1
                else torch.cat([found[s] for s in sorted(found)], at))

    def place_all(self, x: Tensor, kind: Spec, sizes: Mapping[str, int]) -> list[Tensor]:
        """What each rank of the mesh holds of the global tensor `x` as type `kind`."""
        parts = place(x, timeless(kind), sizes, self.still)
        return [self.together({s: parts[self._still(c, s)] for s in self.stages(c.get(STAGES, 0))}, kind)
                for c in self.mesh.coordinates()]

    def shard(self, x: Tensor, kind: Spec, coordinate: Mapping[str, int]) -> Tensor:
        """What a rank holds of the global tensor `x`; on the meta device, where only others' stages do.

        >>> from shardlib.schedules.generators import one_f_one_b
        >>> from shardlib.spec import parse
        >>> fold = Fold(one_f_one_b(2, 4), Mesh(pp=2, tp=2))
        >>> fold.shard(torch.ones(5, 3), parse("V/tp D @pp:0"), dict(pp=1, tp=0))
        tensor(..., device='meta', size=(3, 3))
        """
        at = {s: self.place(coordinate, s, 0) for s in self.stages(coordinate.get(STAGES, 0))}
        held = [o for o in kind.owed if o.kind == "@"]
        mine = {s: shard_of(x, timeless(kind), self.still, c) for s, c in at.items()
                if all(c[o.axis] == o.at for o in held)}
        return self.together(mine, kind) if mine else shard_of(
            x.to("meta"), timeless(kind), self.still, next(iter(at.values())))

    def join_all(self, found: Sequence[Tensor], kind: Spec, sizes: Mapping[str, int]) -> Tensor:
        """What the pieces of all ranks denote."""
        parts = {self._still(c, s): piece for c, x in zip(self.mesh.coordinates(), found)
                 for s, piece in self.pieces(x, kind, sizes, c).items()}
        return join([parts[i] for i in range(len(parts))], timeless(kind), sizes, self.still, tolerance=1e-4)

    def _still(self, coordinate: Mapping[str, int], stage: int) -> int:
        return self.still.rank({**coordinate, **({STAGES: stage} if STAGES in coordinate else {})})


def _stacked(kind: Spec) -> int | None:
    """The dim that is split over the stages, if one is."""
    return next((i for i, dim in enumerate(kind.dims) if STAGES in dim.axes), None)
