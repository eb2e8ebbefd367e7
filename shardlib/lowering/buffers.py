"""Which buffers of a program's arguments its results may reuse."""
from __future__ import annotations

from shardlib.compiler.passes.rewrite import use_counts
from shardlib.language.scan import SCAN
from shardlib.program import Program, Scan


def updates_of(program: Program, name: str) -> str | None:
    """The argument whose buffer `name` is an update of, if it is one,
    and nothing else uses the argument or an update on the way."""
    made, uses, chain = {out: s for s in program.steps for out in s.outputs}, use_counts(program), [name]
    while chain[-1] in made:
        step = made[chain[-1]]
        if step.op.updates is None:
            return None
        chain.append(step.inputs[step.op.updates])
    return chain[-1] if all(uses[n] == 1 for n in chain[1:] or chain) else None


def updated_arguments(program: Program) -> set[str]:
    """The arguments that the program may update in place once they are its own."""
    out: set[str] = set()
    for step in program.steps:
        if step.op.updates is not None:
            out.add(step.inputs[step.op.updates])
        if step.op is SCAN:
            outer = dict(step.passed(step.body))
            out |= {outer[path] for made, _ in Scan.of(step).made
                    if (path := updates_of(step.body, made)) in outer}
    return {p for p, _ in program.arg_leaves()} & out
