"""drop_dead_steps: what no result needs is not computed, and not communicated."""
from __future__ import annotations

from dataclasses import replace

from shardlib.compiler.passes.rewrite import Pass
from shardlib.program import Program


def drop_dead_steps(program: Program) -> Program:
    """The program without the steps whose results nothing uses."""
    needed = {name for name, _ in program.result_leaves()}
    kept = []
    for step in reversed(program.steps):
        if needed.intersection(step.outputs):
            needed.update(step.inputs)
            kept.append(step.rewritten(drop_dead_steps))
    return replace(program, steps=tuple(reversed(kept)))


DROP_DEAD_STEPS = Pass("drop_dead_steps", lambda program, mesh: drop_dead_steps(program))
