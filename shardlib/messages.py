"""What a refusal says: the rule broken, the specs aligned by dim name, a caret, and code to paste with its cost."""
from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Sequence

from shardlib.convert import Move, plan
from shardlib.errors import SpecError, aligned, bytes_text
from shardlib.program import Step
from shardlib.rules import RuleError
from shardlib.spec import Spec

if TYPE_CHECKING:
    from shardlib.complete import Completer

BYTES = 4       # an element in messages: float32


def headline(message: str, where: object) -> str:
    return f"{message}          {where}" if where else message


def refusal(error: RuleError, step: Step, placed: Sequence[str], at: Completer) -> SpecError:
    """A step whose rule refuses its operands."""
    kinds = [at.types[p] for p in placed]
    rows = [(name, kind, _note(p, kind, at)) for name, kind, p in zip(step.inputs, kinds, placed)]
    lines = [headline(str(error), step.where), "", aligned(rows, caret=error.item)]
    i = error.operand
    if i is not None and (offers := _offers(step.inputs[i], kinds[i], error, kinds, at)):
        lines += ["", *offers]
    return SpecError("\n".join(lines))


def unlike(op: str, name: str, have: Spec, want: Spec, at: Completer, natural_result: bool = False) -> SpecError:
    """A value whose type is not what explicit text says."""
    says = "is written as" if natural_result else "takes it as"
    lines = [headline(f"{op}: {name} is {have}; the text {says} {want}", at.where), "",
             aligned([("is", have, _note(name, have, at)), ("text", want, "")], caret=_first_difference(have, want))]
    try:
        offers = [_offer(m, name, at) for m in plan(have, want, at.mesh)]
    except SpecError as no_way:
        offers = [f"  {no_way}"]
    return SpecError("\n".join([*lines, "", *offers]))


def wrong_move(step: Step, have: Spec, at: Completer, problem: str | None = None) -> SpecError:
    """A written conversion whose operand is something else, or which does not lead where it says."""
    name = step.inputs[0]
    if problem is None:
        owes = any(o not in have.owed for o in step.ins[0].owed)
        problem = (f"{name} owes no sum; it is {have}, and reducing it would count it once for every rank" if owes and not have.owed
                   else f"{name} is {have}, the text says {step.ins[0]}")
    return SpecError("\n".join([headline(f"{step.op.name}: {problem}", step.where), "",
                                aligned([("is", have, _note(name, have, at)), ("text", step.ins[0], ""), ("to", step.outs[0], "")],
                                        caret=_first_difference(have, step.ins[0]))]))


def _first_difference(a: Spec, b: Spec) -> str | None:
    for x in a.dims:
        if x.label in b.labels and b.dim(x.label).axes != x.axes:
            return x.label
    return next((str(o) for o in (*a.owed, *b.owed) if o not in a.owed or o not in b.owed), None)


def _note(name: str, kind: Spec, at: Completer) -> str:
    return next((at.notes[name, o.axis] for o in kind.owed if (name, o.axis) in at.notes), "")


def _offers(name: str, kind: Spec, error: RuleError, kinds: Sequence[Spec], at: Completer) -> list[str]:
    """Conversions of the operand that the rule would take, cheapest first."""
    wants: list[tuple[Spec, str]] = []
    if error.axis and error.item and error.item[0] in "+m":
        paid = kind.owing(*(o for o in kind.owed if o.axis != error.axis))
        wants.append((paid, ""))
        if error.item[0] == "+" and (dim := next((d for d in kind.dims[:-1] if d.factors and not d.ragged), None)):
            axes = {d.label: d.axes for d in kind.dims} | {dim.label: (*dim.axes, error.axis)}
            wants.append((paid.split(axes), f", then shard the others on {dim.label}: free" if len(kinds) > 1 else ""))
    elif error.item in kind.labels:
        whole = kind.split({d.label: d.axes for d in kind.dims if d.label != error.item})
        wants.append((whole, ""))
        for other in kinds:
            if error.item in other.labels and other.axes(error.item) != kind.axes(error.item):
                wants.append((kind.split({**{d.label: d.axes for d in kind.dims}, error.item: other.axes(error.item)}), ""))
    plans = []
    for want, tail in wants:
        try:
            moves = plan(kind, want, at.mesh)
        except SpecError:
            continue
        if moves:
            plans.append((sum(m.received for m in moves), [_offer(m, name, at) for m in moves[:-1]] + [_offer(moves[-1], name, at) + tail]))
    return [line for _, lines in sorted(plans, key=lambda p: p[0]) for line in lines]


def _offer(move: Move, name: str, at: Completer) -> str:
    text = f'  {move.op.name}("{move.have} -> {move.want}", {name})'
    if not move.received:
        return f"{text}     free"
    sizes = [at.sizes.get(n) for n in move.have.names]
    cost = f"{move.received:.3g} x its size" if None in sizes else bytes_text(move.received * prod(sizes) * BYTES)
    return f"{text}     {cost} per rank"
