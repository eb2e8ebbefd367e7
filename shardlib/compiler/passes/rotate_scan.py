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
is no case of its own. Where nothing is owed, neither in the round's last product nor in what goes into the
scan, the addition alone moves.

Side condition: what goes into the scan is just such a sum (an embedding's, say), or such a value, nothing
else uses the values that move, and no gradient is wanted: a backward scan would keep other values.
"""
from __future__ import annotations

from dataclasses import dataclass, replace

from shardlib.compiler.builder import Builder
from shardlib.compiler.grad import ZEROS_LIKE
from shardlib.compiler.passes.rewrite import Pass, use_counts
from shardlib.dtypes import value_dtypes
from shardlib.language.arithmetic import ADD
from shardlib.language.einsum import EINSUM
from shardlib.language.scan import SCAN
from shardlib.language.trace import fresh
from shardlib.mesh import Mesh
from shardlib.program import Program, Result, Scan, Step
from shardlib.spec import Spec


@dataclass(frozen=True)
class Tail:
    """How a round ends: with `add`, of the residual and of what the step `adds` makes. pays: the move that
    pays the sum in between, if there is one. first: the step that makes what goes into the scan, where it is
    still owed if that is paid; `feeds` is its value."""
    add: Step
    adds: Step
    pays: Step | None
    first: Step

    @property
    def feeds(self) -> str:
        return self.first.inputs[0] if self.pays else self.first.outputs[0]

    @property
    def added(self) -> str:
        """The operand of the addition that is no residual."""
        return (self.pays or self.adds).outputs[0]

    @property
    def types(self) -> tuple[Spec, Spec]:
        """Of the residual, and of what is added to it."""
        return self.add.outs[0], self.adds.outs[0]


def rotate_scan(program: Program, mesh: Mesh) -> Program:
    """The program with every scan rotated that can be."""
    program = replace(program,
                      steps=tuple(s.rewritten(lambda body: rotate_scan(body, mesh)) for s in program.steps))
    for step in program.steps:
        if step.op is SCAN and (tail := _tail(program, step)):
            program = _rotated(program, step, tail, mesh)
    return program


def _tail(program: Program, scan: Step) -> Tail | None:
    """None where it does not end so."""
    parts, body = Scan.of(scan), scan.body
    made, before = ({o: s for s in steps for o in s.outputs} for steps in (body.steps, program.steps))
    add, first = made.get(parts.carried[0][0]), before.get(parts.carries[0][1])
    if len(parts.carries) != 1 or first is None or add is None or add.op is not ADD:
        return None
    operands = [made[i] for i in add.inputs if i in made]
    pays = next((s for s in operands if _pays(s)), None)
    adds = made.get(pays.inputs[0]) if pays else next((s for s in operands if s.op is EINSUM), None)
    if adds is None or len({*add.ins, *add.outs, *first.outs}) > 1 or len(adds.outputs) > 1:
        return None
    alike = (first.op, first.ins) == (pays.op, pays.ins) if pays else not _pays(first)
    tail, inner, outer = Tail(add, adds, pays, first), use_counts(body), use_counts(program)
    alone = inner[add.outputs[0]] == inner[tail.added] == outer[first.outputs[0]] == 1
    return tail if alike and alone and _of_one_dtype(program, scan, tail) else None


def _pays(step: Step) -> bool:
    return (step.op.moves and step.op.wire is not None and step.op.wire.reduces
            and all(o.kind == "+" for o in step.ins[0].owed))


def _of_one_dtype(program: Program, scan: Step, tail: Tail) -> bool:
    """Whether what is added has one dtype in all rounds: as far as it is known, and where it is not, the
    residual's if that is wider than all else."""
    outside = value_dtypes(program, {}, None)
    passed = scan.passed(scan.body)
    inside = value_dtypes(scan.body, {path: outside[value] for path, value in passed}, None)
    known = {outside[tail.feeds], inside[tail.adds.outputs[0]]}
    if None not in known:
        return len(known) == 1
    carry = passed[0][0]
    wide = value_dtypes(scan.body, {p: d for p, d in inside.items() if d is not None} | {carry: "float32"},
                        "bfloat16")
    return wide[tail.adds.outputs[0]] == "float32"


def _rotated(program: Program, scan: Step, tail: Tail, mesh: Mesh) -> Program:
    before, after = program.steps[:program.steps.index(scan)], program.steps[program.steps.index(scan) + 1:]
    b = Builder(mesh, program.names())
    b.types.update(program.types())
    b.where = scan.where
    zero = b.move(b.call(ZEROS_LIKE, [tail.feeds]), tail.types[0], "nothing is added yet")
    residual, added = (fresh(base, b.taken) for base in ("residual", "owed" if tail.pays else "added"))
    parts = Scan.of(scan)
    attrs = Scan.attrs(parts.dim, len(parts.stacked), 2, parts.reverse, parts.stages)
    turned = replace(scan, ins=(*tail.types, *scan.ins[1:]), outs=(*tail.types, *scan.outs[1:]),
                     inputs=(zero, tail.feeds, *scan.inputs[1:]),
                     outputs=(residual, added, *scan.outputs[1:]), attrs=attrs,
                     body=_turned_body(scan.body, tail), said=())
    end = _paid(tail, residual, added, b.taken, scan.outputs[0])
    kept = (s for s in before if s is not tail.first or not tail.pays)
    return replace(program, steps=(*kept, *b.steps, turned, *end, *after))


def _turned_body(body: Program, tail: Tail) -> Program:
    """The body that begins with what it ended with."""
    (carry, _), *args = body.args
    taken, types = body.names(), tail.types
    residual, added = (fresh(base, taken) for base in ("residual", "owed" if tail.pays else "added"))
    head = _paid(tail, residual, added, taken, carry)
    (kept,) = (i for i in tail.add.inputs if i != tail.added)           # what is added is used once
    results = (Result(types[0], (kept,)), Result(types[1], tail.adds.outputs), *body.results[1:])
    steps = (*head, *(s for s in body.steps if s is not tail.pays and s is not tail.add))
    return replace(body, args=((residual, types[0]), (added, types[1]), *args), steps=steps, results=results)


def _paid(tail: Tail, residual: str, added: str, taken: set[str], made: str) -> tuple[Step, ...]:
    """What is owed, paid and added to the residual, as the round did: the operands in their order."""
    between = fresh("", taken) if tail.pays else added
    operands = tuple(between if i == tail.added else residual for i in tail.add.inputs)
    add = replace(tail.add, inputs=operands, outputs=(made,), said=())
    return (replace(tail.pays, inputs=(added,), outputs=(between,), said=()), add) if tail.pays else (add,)


ROTATE_SCAN = Pass("rotate_scan", rotate_scan, before_grad=False, after_grad=False)
