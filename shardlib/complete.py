"""Completion as callers see it: from a program as written, and a layout, to the explicit program."""
from __future__ import annotations

from typing import Mapping

from shardlib.completer import Completer
from shardlib.layout import Layout
from shardlib.mesh import Mesh
from shardlib.program import Program


def complete(program: Program, layout: Layout, mesh: Mesh, sizes: Mapping[str, int] | None = None) -> Program:
    """The explicit program. `sizes` let messages say bytes. SpecError, at the user's line, for what does not type."""
    return Completer(program, layout.on(mesh), mesh, sizes).run()
