"""Which buffers of a program's arguments its results may reuse."""
from __future__ import annotations

from shardlib.compiler.passes.rewrite import use_counts
from shardlib.language.fused import FUSED
from shardlib.language.scan import SCAN
from shardlib.program import Program, Scan, Step


def updates_of(program: Program, name: str) -> str | None:
    """The argument whose buffer `name` is an update of, if it is one,
    and nothing else uses the argument or an update on the way."""
    made, uses, chain = {out: s for s in program.steps for out in s.outputs}, use_counts(program), [name]
    while chain[-1] in made:
        if (updated := _updated_by(made[chain[-1]], chain[-1])) is None:
            return None
        chain.append(updated)
    return chain[-1] if all(uses[n] == 1 for n in chain[1:] or chain) else None


def _updated_by(step: Step, out: str) -> str | None:
    """The operand whose buffer the result `out` may reuse."""
    if step.op is FUSED:
        path = updates_of_fused(step).get(out)
        return path and dict(step.passed(step.bodies[0]))[path]
    return None if step.op.updates is None else step.inputs[step.op.updates]


def updates_of_fused(step: Step) -> dict[str, str]:
    """result -> the argument of its body that it is an update of."""
    (body,) = step.bodies
    given = {path for path, _ in body.arg_leaves()}
    return {out: path for out, (name, _) in zip(step.outputs, body.result_leaves())
            if name not in given and (path := updates_of(body, name)) is not None}


def updated_arguments(program: Program) -> set[str]:
    """The arguments that the program may update in place once they are its own."""
    out: set[str] = set()
    for step in program.steps:
        out |= {updated for name in step.outputs if (updated := _updated_by(step, name)) is not None}
        if step.op is SCAN:
            outer = dict(step.passed(step.body))
            out |= {outer[path] for made, _ in Scan.of(step).made
                    if (path := updates_of(step.body, made)) in outer}
    return {p for p, _ in program.arg_leaves()} & out
