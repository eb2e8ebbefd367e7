"""hoist_sums: a sum that is owed passes through linear ops, and is paid once.

    p = all_reduce("T D +tp -> T D", a)         |   s = a + b
    q = all_reduce("T D +tp -> T D", b)         |   r = all_reduce("T D +tp -> T D", s)
    r = p + q                                   |

    r2 = all_reduce("(E T)~J D +tp -> (E T)~J D", r)   |   y = combine("(E T)~J D +tp, .. -> T D +tp", r, at)
    y = combine("(E T)~J D, .. -> T D", r2, at)        |   y2 = all_reduce("T D +tp -> T D", y)

Side condition: the reductions are the same move, of sums, and their results are used by this op alone. Only
additions are looked at, which turn two collectives into one of the same size, and what brings rows of a
ragged dim home, of which there are fewer; other linear ops would only shift theirs.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from shardlib.compiler.passes.rewrite import Pass, use_counts
from shardlib.language.arithmetic import ADD, SUB
from shardlib.language.moves import ALL_REDUCE
from shardlib.language.trace import fresh
from shardlib.program import Program, Step
from shardlib.rules import RuleError, natural


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
        if home := _home(program, step, made, count):
            return replace(program, steps=(*(s for s in program.steps[:at] if s is not made[step.inputs[0]]),
                                           *home, *program.steps[at + 1:]))
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


def _home(program: Program, step: Step, made: Mapping[str, Step],
          count: Mapping[str, int]) -> tuple[Step, ...]:
    """The step on rows that still owe, and what pays for its result; nothing where no rows come home."""
    paid = made.get(step.inputs[0]) if step.inputs else None
    if (paid is None or paid.op is not ALL_REDUCE or count[step.inputs[0]] != 1 or len(step.outs) != 1
        or not any(d.ragged for d in step.ins[0].dims) or any(d.ragged for d in step.outs[0].dims)):
        return ()
    owing = replace(step, ins=(paid.ins[0], *step.ins[1:]), inputs=(paid.inputs[0], *step.inputs[1:]),
                    outputs=(fresh("", program.names()),))
    try:
        types = natural(step.op.name, step.op.rule(owing), owing.ins, owing.outs)
    except RuleError:
        return ()
    return (replace(owing, outs=types), Step(ALL_REDUCE, types, step.outs, owing.outputs, step.outputs,
                                             where=step.where, why="paid where there are fewer rows"))
