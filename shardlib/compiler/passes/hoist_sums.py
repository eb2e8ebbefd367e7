"""hoist_sums: a sum that is owed passes through linear ops, and is paid once.

    p = all_reduce("T D +tp -> T D", a)         |   s = a + b
    q = all_reduce("T D +tp -> T D", b)         |   r = all_reduce("T D +tp -> T D", s)
    r = p + q                                   |

Side condition: the reductions are the same move, of sums, and their results are used by this op alone. Only
additions are looked at: they turn two collectives into one of the same size; other linear ops would only
shift theirs.
"""
from __future__ import annotations

from dataclasses import replace

from shardlib.compiler.passes.rewrite import Pass, use_counts
from shardlib.language.arithmetic import ADD, SUB
from shardlib.language.trace import fresh
from shardlib.program import Program, Step


def hoist_sums(program: Program) -> Program:
    """The program with sums of reduced values reduced after the addition; repeated until nothing changes."""
    while (changed := _once(program)) is not program:
        program = changed
    steps = tuple(s.rewritten(hoist_sums) for s in program.steps)
    return replace(program, steps=steps)


def _once(program: Program) -> Program:
    made = {o: s for s in program.steps for o in s.outputs}
    count = use_counts(program)
    for at, step in enumerate(program.steps):
        if step.op not in (ADD, SUB):
            continue
        a, b = (made.get(i) for i in step.inputs)
        if a is None or b is None or a is b or a.op is not b.op or not (a.op.wire and a.op.wire.reduces):
            continue
        if (any(o.kind == "max" for o in a.ins[0].owed) or (a.ins, a.outs) != (b.ins, b.outs)
            or any(count[s.outputs[0]] != 1 for s in (a, b))):
            continue
        total = fresh("", program.names())
        added = Step(step.op, (a.ins[0], b.ins[0]), (a.ins[0],), (a.inputs[0], b.inputs[0]), (total,),
                     where=step.where)
        paid = Step(a.op, a.ins, step.outs, (total,), step.outputs, where=step.where,
                    why="two reductions made one")
        steps = ([s for s in program.steps[:at] if s is not a and s is not b]
                 + [added, paid, *program.steps[at + 1:]])
        return replace(program, steps=tuple(steps))
    return program


HOIST_SUMS = Pass("hoist_sums", lambda program, mesh: hoist_sums(program))
