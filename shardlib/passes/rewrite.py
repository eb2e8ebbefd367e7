"""What rewrites share: how often values are used, and renaming."""
from __future__ import annotations

from dataclasses import replace
from typing import Mapping

from shardlib.program import Program, Step


def uses(program: Program) -> dict[str, int]:
    """How often each value is used, results included."""
    out = {name: 0 for name in program.types()}
    for name in (*(i for s in program.steps for i in s.inputs), *(n for n, _ in program.result_leaves())):
        out[name] += 1
    return out


def renamed(step: Step, alias: Mapping[str, str]) -> Step:
    """The step, taking other values in place of those in `alias`."""
    return replace(step, inputs=tuple(alias.get(i, i) for i in step.inputs)) if any(i in alias for i in step.inputs) else step
