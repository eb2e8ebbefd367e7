"""What one rank's code is written with: names, sizes, calls of groups. What ops ask for is here.

`Emitter` beside it writes programs with it.
"""
from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import product
from math import prod
from typing import Any

import torch

from shardlib.compiler.fusion import Kernels
from shardlib.compiler.passes.pack import Packing
from shardlib.language.exchanges import carried_out
from shardlib.lowering.index_check import IndexSite, RoomSite
from shardlib.lowering.plan_step import PlanStep
from shardlib.mesh import Mesh
from shardlib.program import Step
from shardlib.spec import Dim, Spec
from shardlib.wires import SEND, Wire

_VIEW = re.compile(r"\.view\([0-9, ]+\)$")


class Answers:
    """Writes one rank's code.

    sizes: the global size of every dim.  yields: collectives become requests (the simulator).
    donate: arguments whose buffers the results may reuse.  given: the dtypes of arguments, where they are not
    float32, int64 or bool.
    prepared: arguments that come as `Compiled.prepare` made them: weights packed, stacked ones as a sequence
    of layers.
    layered: values that are sequences of layers in place of stacked ones.
    kernels: asked what takes a fused step, or a matmul; without it, or where it says None, the body is
    written, or the library's call.
    """

    def __init__(self, mesh: Mesh, rank: int, sizes: Mapping[str, int], yields: bool = False,
                 donate: Sequence[str] = (), given: Mapping[str, str] | None = None,
                 prepared: Sequence[str] = (), kernels: Kernels | None = None,
                 layered: Collection[str] = ()) -> None:
        self.mesh, self.rank, self.sizes, self.yields, self.donate = (mesh, rank, sizes, yields,
                                                                      frozenset(donate))
        self.coordinate = mesh.coordinate(rank)
        self.groups: dict[tuple[str, ...], str] = {}
        self.wires: dict[str, Wire] = {}                    # by the method that the code calls
        self.helpers: dict[str, Callable | IndexSite] = {}  # what generated code has by name
        self.constants: dict[str, torch.Tensor] = {}
        self.plan: dict[str, PlanStep] = {}  # name in the code -> the collective that is called there
        self._where: tuple[str, Step] | None = None         # the program and the step that is being written
        # the names of the branches that are being written, outermost first
        self._branch: tuple[str, ...] = ()
        # (op, variable that is an index, dim, ..) -> its site's name in the code
        self.sites: dict[tuple, str] = {}
        self.given = dict(given or {})
        self.dtypes: dict[str, Any] = dict(self.given)  # of the values of the program that is being written
        self.makers: dict[str, Step] = {}  # of the values of the program that is being written
        self._written: list[Step | None] = []               # the steps that have lines
        self.lines: tuple[Step | None, ...] = ()  # of each line of the source, the step that it is of
        self.variables = 0
        self.in_place: set[str] = set()
        self.prepared, self.kernels, self.layered = frozenset(prepared), kernels, frozenset(layered)
        self.packs: list[Packing] = []
        self.returned: tuple[str | None, ...] = ()  # the argument that each result leaf is, updated in place
        # variables that are the same in every round of the current loop
        self.invariant: frozenset[str] = frozenset()
        self.hoisted: dict[tuple[str, str], str] = {}  # (variable, template) -> what it is before the loop
        self._hoisting: dict[str, Step | None] = {}  # by what is hoisted, the step that asked for it

    # -- what ops ask for ------------------------------------------------------------------------------------

    def shape(self, spec: Spec) -> tuple[int, ...]:
        """The local shape of a value of type `spec`."""
        return self.mesh.local_shape(spec, self.sizes, self.coordinate)

    def opened_shape(self, spec: Spec) -> tuple[int, ...]:
        """The local shape with groups taken apart."""
        return tuple(self.rows(Dim((f,)))[1] for d in spec.dims for f in d.factors)

    def rows(self, dim: Dim) -> tuple[int, int]:
        """(start, size) of this rank's piece of `dim`, a group's in rows of the group."""
        return self.mesh.rows(dim, self.sizes, self.coordinate)

    def pieces(self, dim: Dim) -> tuple[tuple[int, int], ...]:
        """The same of each member along the dim's axes, in their order."""
        at = [{**self.coordinate, **dict(zip(dim.axes, c))}
              for c in product(*(range(self.mesh.axes[a]) for a in dim.axes))]
        return tuple(self.mesh.rows(dim, self.sizes, c) for c in at)

    def count(self, *dims: Dim) -> int:
        """The global size of `dims` together."""
        return prod(self.sizes[n] for d in dims for n in d.names)

    def use(self, helper: Callable) -> str:
        """The name under which generated code calls `helper`; a user's function gets one of ours."""
        known = next((n for n, h in self.helpers.items() if h is helper), None)
        name = known or (helper.__name__ if helper.__module__.startswith("shardlib.")
                         else f"u{len(self.helpers)}")
        self.helpers[name] = helper
        return name

    def index_site(self, step: Step, operand: int, variable: str, dim: Dim, argument: str, *, op: str = "",
                   rows: Dim | None = None, ignored: int | None = None, hint: str = "") -> str:
        """The name in generated code of the place where `variable`, an operand of the step,
        is an index into `dim`.

        argument: what it is called where the user has no name for it.  op: what the user has called, if not
        the step's own.
        rows, ignored, hint: as an `IndexSite` has them.
        """
        key = op or step.op.name, variable, dim, rows, ignored, self._branch
        if key not in self.sites:
            said, name = step.said[operand] if step.said else "", f"i{len(self.sites)}"
            site = IndexSite(key[0], said or argument, dim.label, self.count(dim),
                             (rows.label, self.count(rows)) if rows else ("", 1), ignored,
                             step.where, hint, self.mesh.size(step.ins[operand].split_axes) == 1)
            self.sites[key], self.helpers[name] = name, site
        return self.sites[key]

    def room_site(self, step: Step, dim: Dim) -> str | None:
        """The name in generated code of the place where rows of the ragged `dim` come to this rank; None
        where there is room for all that may."""
        room, name = self.rows(dim)[1], f"i{len(self.sites)}"
        if room == self.mesh.most_rows(dim, self.sizes, self.coordinate):
            return None
        self.helpers[name] = RoomSite(step.op.name, "", dim.label, room + 1, where=step.where)
        self.sites[step.op.name, step.outputs, dim, self._branch] = name
        return name

    def index_sites(self) -> list[IndexSite]:
        """The places of the program where something is looked up by an index."""
        return [self.helpers[name] for name in self.sites.values()]

    def maker(self, value: str) -> Step | None:
        """The step of the program that is being written which makes `value`; None of an argument."""
        return self.makers.get(value)

    def hoist(self, variable: str, template: str, parts: int = 1) -> str:
        """`template` applied to `variable`: once before the loop,
        where the variable is the same in every layer.

        There, the result is a variable's name; or several, "v1, v2", where the template makes a tuple of
        `parts`.
        """
        if variable not in self.invariant:
            return template.format(x=variable)
        if (variable, template) not in self.hoisted:
            self.hoisted[variable, template] = made = ", ".join(self.variable() for _ in range(parts))
            self._hoisting[made] = self._where[1] if self._where else None
        return self.hoisted[variable, template]

    def view(self, text: str, shape: Sequence[int]) -> str:
        """`text` viewed as `shape`: a view of a view is one view.

        Its sizes are separate arguments: torch reads a tuple slower.
        """
        return f"{_VIEW.sub('', text)}.view({', '.join(map(str, shape)) or '()'})"

    def collective(self, wire: Wire, axes: Sequence[str], pieces: Sequence[str], more: tuple) -> str:
        """A call of the coordinator of the group over `axes`, which says where in the plan it is;
        over one rank, nothing is left of it."""
        operand = f"({', '.join(pieces)},)" if wire.many else pieces[0]
        if self.mesh.size(axes) == 1:
            return operand
        group, extra = self.groups.setdefault(tuple(axes), f"g{len(self.groups)}"), ", ".join(map(repr, more))
        self.wires[wire.name] = wire
        if self.yields:
            return f"(yield ({group}, {wire.name!r}, {operand}, {extra}))"
        return f"{group}.{wire.name}({operand}, {extra}{self._here()})"

    def exchanging(self, helper: Callable, axes: Sequence[str], wires: Sequence[Wire], args: str) -> str:
        """What `helper` gives, a generator of requests to the group over `axes`, its first argument."""
        group = self.groups.setdefault(tuple(axes), f"g{len(self.groups)}")
        self.wires.update((wire.name, wire) for wire in wires)
        requests = f"{self.use(helper)}({group}, {args})"
        if self.yields:
            return f"(yield from {requests})"
        return f"{self.use(carried_out)}({requests}{self._here()})"

    def send(self, axis: str, source: int, target: int, x: str) -> str:
        """A call that hands `x`, which this coordinate of the axis has, to `target`."""
        group = self._pair(axis)
        return (f"(yield ({group}, 'send', {x}, {source}, {target}))" if self.yields
                else f"{group}.send({x}, {target})")

    def recv(self, axis: str, source: int, target: int, shape: Sequence[int], dtype: str) -> str:
        """What coordinate `source` of the axis sends here."""
        group, kind = self._pair(axis), f"torch.{dtype}"
        room = f"torch.empty({tuple(shape)}, dtype={kind}, device='meta')"
        return (f"(yield ({group}, 'send', {room}, {source}, {target}))" if self.yields
                else f"{group}.recv({tuple(shape)}, {kind}, {source})")

    def _pair(self, axis: str) -> str:
        self.wires["send"] = SEND
        return self.groups.setdefault((axis,), f"g{len(self.groups)}")

    def room(self, spec: Spec, dtype: str) -> str:
        """A tensor of this type that nobody has filled: what a rank brings that has nothing."""
        self.constants["here"] = torch.empty(0, device="cpu")
        return f"torch.empty({self.shape(spec)}, dtype=torch.{dtype}, device=here.device)"

    def _here(self) -> str:
        if self._where is None:
            return ""
        title, step = self._where
        name = f"s{len(self.plan) + 1}"
        self.plan[name] = PlanStep(len(self.plan) + 1, title, str(step.where or ""), step.text)
        return f", at={name}"

    def space(self, device: torch.device) -> dict[str, Any]:
        """What the code names beside its groups, on `device` once and for all:
        a copy in each step would stop a capture, and wait."""
        return {**self.helpers, **{name: made.to(device) for name, made in self.constants.items()},
                **self.plan}
