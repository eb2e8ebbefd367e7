"""Completion as callers see it: the explicit program, or in words what it refuses."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from shardlib.compiler.completer import Completer
from shardlib.compiler.ragged import check_same_rows
from shardlib.compiler.refusal import Refused
from shardlib.compiler.refusals.messages import worded
from shardlib.compiler.stages import sunk
from shardlib.layout import EXPLICIT, Layout
from shardlib.mesh import Mesh
from shardlib.program import Program, Result, Step
from shardlib.spec import Spec


def complete(program: Program, layout: Layout, mesh: Mesh, sizes: Mapping[str, int] | None = None) -> Program:
    """The explicit program. SpecError, at the user's line, if it does not type; `sizes` let it say bytes."""
    check_same_rows(program)
    try:
        made = Completer(program, layout.on(mesh), mesh, sizes).run()
        made = replace(made, unmet=(*made.unmet, *_without_values(made, layout.on(mesh))))
        return made if layout == EXPLICIT else sunk(made)
    except Refused as refused:
        raise worded(refused) from None


def _without_values(program: Program, layout: Layout) -> list[tuple[str, str, str]]:
    """The entries of the layout for a dim that no value has, as `Program.unmet` has them: nowhere."""
    names = {n for p in (program, *program.bodies()) for spec in p.types().values() for n in spec.names}
    return [(dim, "/".join(axes), "") for dim, axes in layout.entries.items() if dim not in names]


def complete_step(step: Step, types: Mapping[str, Spec], texts: Mapping[str, Spec], layout: Layout,
                  mesh: Mesh, sizes: Mapping[str, int] | None = None,
                  constants: Mapping[str, Step] | None = None) -> tuple[Program, tuple[Spec, ...]]:
    """The explicit program of `step` alone, and the texts of its results: their dims, with their pins.

    types, texts: of its operands; `constants` are made by steps that can make them again.
    """
    completer = Completer(Program("step", tuple(texts.items()), (step,), ()), layout, mesh, sizes, types)
    completer.constants.update(constants or {})
    try:
        made = completer.run()
    except Refused as refused:
        raise worded(refused) from None
    names = [completer.now[value] for value in step.outputs]
    results = tuple(Result(completer.types[name], (name,)) for name in names)
    return replace(made, results=results), tuple(completer.texts[value] for value in step.outputs)
