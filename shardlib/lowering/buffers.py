"""Which buffers of a program's arguments its results may reuse."""
from __future__ import annotations

from shardlib.language.scan import SCAN
from shardlib.program import Program, Scan


def use_counts(program: Program) -> dict[str, int]:
    """How often each value is used, results included."""
    out: dict[str, int] = {}
    for name in (*(i for s in program.steps for i in s.inputs), *(n for n, _ in program.result_leaves())):
        out[name] = out.get(name, 0) + 1
    return out


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
