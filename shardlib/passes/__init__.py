"""Rewrites of explicit programs: one file each, from a program to one that denotes the same.

They are named and can be chosen: `lower(f, layout, passes=("drop_dead_steps",))`. Without them every line of the text has
the collectives that its own operands and result need, and nothing else.
"""
from __future__ import annotations

from typing import Sequence

from shardlib.errors import SpecError
from shardlib.mesh import Mesh
from shardlib.passes.dead_steps import drop_dead_steps
from shardlib.passes.hoist_sums import hoist_sums
from shardlib.passes.replan_moves import replan_moves
from shardlib.program import Program

DEFAULT = ("hoist_sums", "replan_moves", "drop_dead_steps")
PASSES = {"hoist_sums": lambda program, mesh: hoist_sums(program), "replan_moves": replan_moves,
          "drop_dead_steps": lambda program, mesh: drop_dead_steps(program)}


def rewrite(program: Program, mesh: Mesh, names: Sequence[str] = DEFAULT) -> Program:
    """The program after the passes `names`, in order."""
    for name in names:
        if name not in PASSES:
            raise SpecError(f"passes: {name!r} is not one of {', '.join(PASSES)}")
        program = PASSES[name](program, mesh)
    return program
