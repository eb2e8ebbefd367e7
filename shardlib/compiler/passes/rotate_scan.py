"""rotate_scan: the sum at the end of a scan's round is paid at the head of the next.

    def block(x, w):                                  |   def block(residual, owed, w):
        ...                                           |       v = all_reduce("B T D +tp -> B T D", owed)
        v = all_reduce("B T D +tp -> B T D", y)       |       x = residual + v
        return h + v                                  |       ...
                                                      |       return h, y
    x = all_reduce("B T D +tp -> B T D", e)           |   r = zeros_like(e)
    x2 = scan(block, x, (w.layers,))                  |   r2, y2 = scan(block, (r, e), (w.layers,))
                                                      |   v2 = all_reduce("B T D +tp -> B T D", y2)
                                                      |   x2 = r2 + v2

So a sum, the addition to the residual and the norm that follows stand beside each other in every round, where
a kernel can take them together. As many collectives as before, no weight is shifted, and a scan of no layers
is no case of its own.

Side condition: what goes into the scan is just such a sum (an embedding's, say), nothing else uses the values
that move, and no gradient is wanted: a backward scan would keep other values.
"""
from __future__ import annotations

from dataclasses import replace

from shardlib.compiler.builder import Builder
from shardlib.compiler.grad import ZEROS_LIKE
from shardlib.compiler.passes.rewrite import Pass, use_counts
from shardlib.dtypes import value_dtypes
from shardlib.language.arithmetic import ADD
from shardlib.language.scan import SCAN
from shardlib.language.trace import fresh
from shardlib.mesh import Mesh
from shardlib.program import Program, Result, Scan, Step


def rotate_scan(program: Program, mesh: Mesh) -> Program:
    """The program with every scan rotated that can be."""
    program = replace(program,
                      steps=tuple(s.rewritten(lambda body: rotate_scan(body, mesh)) for s in program.steps))
    for step in program.steps:
        if step.op is SCAN and (tail := _tail(program, step)):
            program = _rotated(program, step, *tail, mesh)
    return program


def _tail(program: Program, scan: Step) -> tuple[Step, Step, Step] | None:
    """The move that pays at the end of each round, the addition after it, and the move that feeds the scan.

    None where it does not end so.
    """
    parts, body = Scan.of(scan), scan.body
    made, before = ({o: s for s in steps for o in s.outputs} for steps in (body.steps, program.steps))
    if len(parts.carries) != 1:
        return None
    add = made.get(parts.carried[0][0])
    pays = (next((made[i] for i in add.inputs if i in made and _pays(made[i])), None) if add and add.op is ADD
            else None)
    first = before.get(parts.carries[0][1])
    if pays is None or first is None or (first.op, first.ins, first.outs) != (pays.op, pays.ins, pays.outs):
        return None
    inner, outer = use_counts(body), use_counts(program)
    alone = inner[add.outputs[0]] == inner[pays.outputs[0]] == outer[first.outputs[0]] == 1
    return (pays, add, first) if alone and _of_one_dtype(program, scan, first, pays) else None


def _pays(step: Step) -> bool:
    return (step.op.moves and step.op.wire is not None and step.op.wire.reduces
            and all(o.kind == "+" for o in step.ins[0].owed))


def _of_one_dtype(program: Program, scan: Step, first: Step, pays: Step) -> bool:
    """Whether what is owed may have one dtype in all rounds, as far as it is known."""
    outside = value_dtypes(program, {}, None)
    inside = value_dtypes(scan.body, {path: outside[value] for path, value in scan.passed(scan.body)}, None)
    known = {outside[first.inputs[0]], inside[pays.inputs[0]]} - {None}
    return len(known) < 2


def _rotated(program: Program, scan: Step, pays: Step, add: Step, first: Step, mesh: Mesh) -> Program:
    before, after = program.steps[:program.steps.index(scan)], program.steps[program.steps.index(scan) + 1:]
    b = Builder(mesh, program.names())
    b.types.update(program.types())
    b.where = scan.where
    zero = b.move(b.call(ZEROS_LIKE, [first.inputs[0]]), pays.outs[0], "nothing is added yet")
    residual, owed = (fresh(base, b.taken) for base in ("residual", "owed"))
    parts = Scan.of(scan)
    attrs = Scan.attrs(parts.dim, len(parts.stacked), 2, parts.reverse)
    ins, outs = (pays.outs[0], pays.ins[0], *scan.ins[1:]), (pays.outs[0], pays.ins[0], *scan.outs[1:])
    turned = replace(scan, ins=ins, outs=outs, inputs=(zero, first.inputs[0], *scan.inputs[1:]),
                     outputs=(residual, owed, *scan.outputs[1:]), attrs=attrs,
                     body=_turned_body(scan.body, pays, add), said=())
    end = _paid(pays, add, residual, owed, fresh("", b.taken), scan.outputs[0])
    return replace(program, steps=(*(s for s in before if s is not first), *b.steps, turned, *end, *after))


def _turned_body(body: Program, pays: Step, add: Step) -> Program:
    """The body that begins with what it ended with."""
    (carry, _), *args = body.args
    taken = body.names()
    residual, owed = (fresh(base, taken) for base in ("residual", "owed"))
    head = _paid(pays, add, residual, owed, fresh("", taken), carry)
    (kept,) = (i for i in add.inputs if i != pays.outputs[0])           # the sum is used once
    results = (Result(pays.outs[0], (kept,)), Result(pays.ins[0], pays.inputs), *body.results[1:])
    steps = (*head, *(s for s in body.steps if s is not pays and s is not add))
    return replace(body, args=((residual, pays.outs[0]), (owed, pays.ins[0]), *args), steps=steps,
                   results=results)


def _paid(pays: Step, add: Step, residual: str, owed: str, between: str, made: str) -> tuple[Step, Step]:
    """What is owed, paid and added to the residual, as the round did: the operands in their order."""
    operands = tuple(between if i in pays.outputs else residual for i in add.inputs)
    return (replace(pays, inputs=(owed,), outputs=(between,), said=()),
            replace(add, inputs=operands, outputs=(made,), said=()))


ROTATE_SCAN = Pass("rotate_scan", rotate_scan, before_grad=False, after_grad=False)
