"""Rewrites of explicit programs: one file each, from a program to one that denotes the same.

A pass is a value. What `lower` and `compile` are handed is run in order, by value or by name: `lower(f,
layout, passes=("drop_dead_steps",))`. Without them every line of the text has the collectives that its own
operands and result need, and nothing else.

>>> from shardlib import Mesh, sharded
>>> from shardlib.api import lower
>>> DROP_NOTHING = Pass("drop_nothing", lambda program, mesh: program)
>>> @sharded("D -> D")
... def twice(x):
...     return 2 * x
>>> rewritten = lower(twice, passes=(DROP_NOTHING, "drop_dead_steps"), mesh=Mesh())
>>> rewritten == lower(twice, passes=(), mesh=Mesh())
True
"""
from __future__ import annotations

from collections.abc import Sequence

from shardlib.compiler.passes.dead_steps import DROP_DEAD_STEPS
from shardlib.compiler.passes.hoist_sums import HOIST_SUMS
from shardlib.compiler.passes.replan_moves import REPLAN_MOVES
from shardlib.compiler.passes.rewrite import Pass
from shardlib.compiler.passes.rotate_scan import ROTATE_SCAN
from shardlib.errors import SpecError
from shardlib.mesh import Mesh
from shardlib.program import Program

DEFAULT = (HOIST_SUMS, REPLAN_MOVES, DROP_DEAD_STEPS)
PASSES = {each.name: each for each in (*DEFAULT, ROTATE_SCAN)}


def chosen(passes: Sequence[Pass | str]) -> tuple[Pass, ...]:
    """The passes that are given, by value or by name. SpecError for what is neither."""
    wrong = ([passes] if isinstance(passes, str)
             else [p for p in passes if not isinstance(p, Pass) and p not in PASSES])
    if wrong:
        raise SpecError(f"passes: {wrong[0]!r} is not one of {', '.join(PASSES)}")
    return tuple(p if isinstance(p, Pass) else PASSES[p] for p in passes)


def rewrite(program: Program, mesh: Mesh, passes: Sequence[Pass] = DEFAULT) -> Program:
    """The program after `passes`, in order."""
    for each in passes:
        program = each.run(program, mesh)
    return program
