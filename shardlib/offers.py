"""Offers: what to write in place of a call that does not type, cheapest first.

Each operand is given the types it could have on the axes in question: whole, split on another dim, owed. Those that the op's
rule takes are tried: the call is written anew with the conversions around its operands, and the program is typed again with
it. Only what types is offered, so what a message says can be pasted.
"""
from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from math import prod
from typing import TYPE_CHECKING, Iterator, Sequence

from shardlib.convert import Move, plan
from shardlib.errors import SpecError, bytes_text
from shardlib.layout import EXPLICIT, Layout
from shardlib.moves import COLLECTIVES
from shardlib.program import Program, Result, Step
from shardlib.rules import Rule, natural
from shardlib.scan import SCAN
from shardlib.spec import Dim, Factor, Owed, Spec
from shardlib.trace import RESHARD
from shardlib.user_source import label, operand, written

if TYPE_CHECKING:
    from shardlib.completer import Completer

ITEMSIZE = 4        # bytes of an element in messages: float32
SHOWN = 3           # offers in one message
TRIED = 32          # rewritten calls that are typed again
WIDE = 120          # characters of a line of code, where there is a shorter one
GUESS = 64          # rows of a dim of unknown size, for comparing costs


@dataclass(frozen=True)
class Offer:
    """Code for the user, the steps it stands for, and the cost of each of its conversions.

    kind: which conversions, of which operand.  total: elements that the whole program then receives, so that what is put
    off is not free.
    """
    code: str
    steps: tuple[Step, ...]
    costs: tuple[Cost, ...]
    kind: tuple = ()
    total: float = 0.0

    @property
    def own(self) -> float:
        return sum(c.elements for c in self.costs)

    @property
    def paid(self) -> int:
        return sum(c.fraction > 0 for c in self.costs)


@dataclass(frozen=True)
class Cost:
    """Of a conversion of `what`: the fraction of its elements that a rank receives; `known`: its sizes are."""
    what: str
    fraction: float
    elements: float
    known: bool


def cost(offer: Offer, least: float) -> str:
    """What an offer costs; `least`: what the rest of the program costs at least."""
    if offer.code == offer.kind:
        return "free: nothing is owed"
    later = offer.total - offer.own - least
    paid = [c for c in offer.costs if c.fraction]
    if not all(c.known for c in paid):
        text = " and ".join(f"{c.fraction:.3g} x the size of {c.what}" for c in paid) + " per rank"
        return text + (", and more later" if later > 1 else "")
    text = f"{bytes_text(offer.own * ITEMSIZE)} per rank" if paid else "free"
    if later < 1:
        return text
    return f"{text}, then {bytes_text(later * ITEMSIZE)} later" if all(c.known for c in offer.costs) else f"{text}, and more later"


# -- what could stand there instead ------------------------------------------------------------------------------------

def instead(step: Step, axes: Sequence[str], have: Sequence[Spec], at: Completer, rule: Rule, also: Sequence[Spec] | None = None) -> list[str]:
    """Lines of code that type, in place of the call `step` on operands of types `have`. `also`: operand types to try beside those
    that differ from `have` on `axes`."""
    if at.trial:
        return []
    layout = (step.layout or at.layout).on(at.mesh)
    found: list[Offer] = []
    choices = [list(dict.fromkeys([*_variants(kind, axes, have), *([also[i]] if also else [])])) for i, kind in enumerate(have)]
    for kinds in product(*choices):
        if sum(k != h for k, h in zip(kinds, have)) > 2 and tuple(kinds) != tuple(also or ()):
            continue
        outs = tuple(at._dims_of(s, kinds, rule.whole, layout) for s in step.outs)
        try:
            made = natural(step.op.name, rule, kinds, outs)
            found.append(_call(step, kinds, made, have, layout, at))
        except SpecError:
            continue
    best = _best(found, step, at)
    if not best and not step.op.takes_text and len(step.outs) == 1:
        best = _best([o for f in found if (o := _back(f, step, have[0], layout, at))], step, at)
    return lines(best or _best(found, step, at, alone=True)[:1])


def convert(step: Step, i: int, want: Spec, at: Completer, bare: bool) -> list[str]:
    """The line that converts operand i to `want`; `bare`: without the call around it."""
    if at.trial:
        return []
    layout = (step.layout or at.layout).on(at.mesh)
    try:
        code, name, steps, costs = _conversion(operand(step, i, at.program), step.inputs[i], at.types[at.now[step.inputs[i]]], want, layout, at, "operand")
    except SpecError:
        return []
    inputs = tuple(name if j == i else n for j, n in enumerate(step.inputs))
    if not bare:
        code = written(step, [code if j == i else operand(step, j, at.program) for j in range(len(inputs))])
    offer = Offer(code, (*steps, replace(step, inputs=inputs)), costs)
    return lines([offer] if _total(at, _index(step, at), offer.steps) is not None else [])


def replaced(step: Step, want: Spec, at: Completer) -> list[str]:
    """The line that gives `want` in place of the conversion `step`."""
    if at.trial:
        return []
    layout = (step.layout or at.layout).on(at.mesh)
    code, source = operand(step, 0, at.program), step.inputs[0]
    have = at.types[at.now[source]]
    try:
        code, name, steps, costs = _conversion(code, source, have, want, layout, at, "operand")
    except SpecError:
        return []
    last = Step(RESHARD, (exact(want, layout),), (exact(want, layout),), (name,), step.outputs, layout=step.layout)
    offer = Offer(code, (*steps, last), costs, () if steps else code)
    return lines([offer] if _total(at, _index(step, at), offer.steps) is not None else [])


def returned(value: str, code: str, want: Spec, at: Completer) -> list[str]:
    """The line that makes the program's result `value` what the signature says."""
    if at.trial:
        return []
    try:
        code, name, steps, costs = _conversion(code, value, at.types[at.now[value]], want, at.layout, at, "result")
    except SpecError:
        return []
    results = tuple(Result(r.tree, tuple(name if v == value else v for v in r.values)) for r in at.program.results)
    program = replace(at.program, steps=(*at.program.steps, *steps), results=results)
    return lines([Offer(f"return {code}", steps, costs)] if _received(at, program) is not None else [])


def lines(offers: Sequence[Offer]) -> list[str]:
    width = max((len(o.code) for o in offers), default=0)
    least = min((o.total - o.own for o in offers), default=0.0)
    return [f"  {o.code.ljust(width)}     {cost(o, least)}" for o in offers]


def exact(kind: Spec, layout: Layout) -> Spec:
    """The text that means `kind` under `layout`: with a /1 where a dim would be split."""
    if layout == EXPLICIT:
        return kind
    done = layout.complete_alone(kind)
    return replace(kind, dims=tuple(_pinned(d) if d.factors and not d.axes and c.axes else d for d, c in zip(kind.dims, done.dims)))


def _pinned(dim: Dim) -> Dim:
    return replace(dim, factors=(Factor(dim.factors[0].name, dim.axes, not dim.axes), *dim.factors[1:]))


def _variants(kind: Spec, axes: Sequence[str], others: Sequence[Spec]) -> Iterator[Spec]:
    """The types of a value that differ from `kind` on `axes` only."""
    yield kind
    owed = [o for o in kind.owed if o.axis not in axes]
    free = Spec(tuple(d.split(tuple(a for a in d.axes if a not in axes)) for d in kind.dims), tuple(owed))
    yield free
    inner = [d for d in free.dims if d.factors]
    for dim in sorted(inner, key=lambda d: (d is inner[-1], bool(d.axes), -inner.index(d))):
        yield free.split({d.label: d.axes for d in free.dims} | {dim.label: (*dim.axes, *axes)})
    for other in others:
        for dim in inner:
            if dim.label in other.labels and set(other.axes(dim.label)) - set(dim.axes):
                moved = other.axes(dim.label)
                yield Spec(tuple(d.split(moved if d is dim else tuple(a for a in d.axes if a not in moved)) for d in free.dims),
                           tuple(o for o in owed if o.axis not in moved))
    if not kind.owed and not set(axes) & set(kind.split_axes):
        yield free.owing(*owed, *(Owed("+", a) for a in axes))


def _call(step: Step, kinds: Sequence[Spec], made: Sequence[Spec], have: Sequence[Spec], layout: Layout, at: Completer) -> Offer:
    """The call on operands of types `kinds`, converted from `have`."""
    explicit = layout == EXPLICIT
    if step.op.takes_text and not explicit:
        return _declared(step, kinds, have, at)
    inputs, codes, steps, costs, kind = [], [], [], [], []
    for i, (name, want, had) in enumerate(zip(step.inputs, kinds, have)):
        code, name, conversion, cost = _conversion(operand(step, i, at.program), name, had, want, layout, at, f"operand {i}")
        inputs.append(name), codes.append(code), steps.extend(conversion), costs.extend(cost)
        kind.append(tuple(s.op.name for s in conversion))
    call = replace(step, inputs=tuple(inputs), ins=tuple(kinds), outs=tuple(made)) if step.op.takes_text else replace(step, inputs=tuple(inputs))
    text = written(call, codes)
    if not step.op.takes_text or len(made) > 1:
        return Offer(text, (*steps, call), tuple(costs), tuple(kind))
    want = at._alone(step.outs[0], layout)
    text, _, wrap, cost = _conversion(text, "offered", made[0], want, layout, at, "result", step.outputs[0])
    if wrap:
        call = replace(call, outputs=("offered",))
    return Offer(text, (*steps, call, *wrap), (*costs, *cost), (*kind, tuple(s.op.name for s in wrap)))


def _declared(step: Step, kinds: Sequence[Spec], have: Sequence[Spec], at: Completer) -> Offer:
    """The call with other pins in its text; completion converts."""
    texts, costs = [], []
    for name, text, want, had in zip(step.inputs, step.ins, kinds, have):
        dims = tuple(d if w.axes == h.axes else _pinned(w) for d, w, h in zip(text.dims, want.dims, had.dims))
        texts.append(Spec(dims, want.owed))
        costs += [_cost(label(name), m, at) for m in plan(at.types[at.now[name]], want, at.mesh)]
    call = replace(step, ins=tuple(texts))
    kind = tuple(str(t) for t in texts)
    return Offer(written(call, [operand(step, i, at.program) for i in range(len(step.inputs))]), (call,), tuple(costs), kind)


def _back(offer: Offer, step: Step, want: Spec, layout: Layout, at: Completer) -> Offer | None:
    """The offer with its result made what the first operand was, where the rest of the program counts on that."""
    call = offer.steps[-1]
    kinds = {o: s.outs[0] for s in offer.steps[:-1] for o in s.outputs}
    ins = [kinds.get(n) or at.types[at.now[n]] for n in call.inputs]
    (have,) = natural(step.op.name, step.op.rule(replace(step, ins=tuple(ins))), ins, [step.op.infer(tuple(ins), step.options)[0]])
    try:
        text, _, wrap, cost = _conversion(offer.code, "offered", have, want, layout, at, "result", step.outputs[0])
    except SpecError:
        return None
    return Offer(text, (*offer.steps[:-1], replace(call, outputs=("offered",)), *wrap), (*offer.costs, *cost),
                 (*offer.kind, tuple(s.op.name for s in wrap))) if wrap else None


def _conversion(code: str, name: str, have: Spec, want: Spec, layout: Layout, at: Completer, what: str,
                out: str = "") -> tuple[str, str, tuple[Step, ...], tuple]:
    """`name` made `want`: the code, the name it then has, the step, and its cost. Nothing where it is `want` already."""
    moves = plan(have, want, at.mesh)
    if not moves:
        return code, name, (), ()
    op = moves[0].op if len(moves) == 1 else RESHARD
    out = out or f"{name} {what}"
    step = Step(op, (exact(have, layout),), (exact(want, layout),), (name,), (out,), layout=layout)
    shown = "the result" if what == "result" else label(code)
    return f'{op.name}("{step.text}", {code})', out, (step,), tuple(_cost(shown, m, at) for m in moves)


def _cost(what: str, move: Move, at: Completer) -> Cost:
    return Cost(what, move.received, move.received * _elements(move.have, at), all(n in at.sizes for n in move.have.names))


def _elements(kind: Spec, at: Completer) -> int:
    return prod(at.sizes.get(n, GUESS) for n in kind.names) * prod(d.size for d in kind.dims if not d.factors)


# -- which of them type ------------------------------------------------------------------------------------------------

def _best(found: Sequence[Offer], step: Step, at: Completer, alone: bool = False) -> list[Offer]:
    """The cheapest that type, one of a kind, with as few conversions that cost as can be; short ones where there are any.

    `alone`: they need to type up to this step only.
    """
    good: dict[tuple, Offer] = {}
    for offer in sorted(found, key=lambda o: (o.own, len(o.costs)))[:TRIED]:
        if offer.kind not in good and (total := _total(at, _index(step, at), offer.steps, alone)) is not None:
            good[offer.kind] = replace(offer, total=total)
    fewest = max(1, min((o.paid for o in good.values()), default=0))
    least = min((o.total - o.own for o in good.values()), default=0.0)
    shown = sorted((o for o in good.values() if o.paid <= fewest),
                   key=lambda o: (round(o.total), round(o.total - o.own - least) > 0, o.own, len(o.code)))
    return ([o for o in shown if len(o.code) <= WIDE] or shown)[:SHOWN]


def _index(step: Step, at: Completer) -> int:
    return next(i for i, s in enumerate(at.program.steps) if s is step)


def _total(at: Completer, k: int, steps: Sequence[Step], alone: bool = False) -> float | None:
    """What the program receives with `steps` in place of its step k, None where it does not type; `alone`: up to there."""
    program = replace(at.program, steps=(*at.program.steps[:k], *steps, *(() if alone else at.program.steps[k + 1:])))
    return _received(at, replace(program, results=()) if alone else program)


def _received(at: Completer, program: Program) -> float | None:
    again = type(at)(program, at.layout, at.mesh, at.sizes, at.arg_types, trial=True)
    again.params |= at.params
    made = {o for s in at.steps for o in s.outputs}
    again.now.update({name: again.declare(name, at.types[now]) for name, now in at.now.items() if now not in made})
    try:
        return _traffic(again.run(), at)
    except SpecError:
        return None


def _traffic(program: Program, at: Completer) -> float:
    """Elements that a rank receives in one run of an explicit program."""
    total = 0.0
    for step in program.steps:
        if step.bodies:
            times = at.sizes.get(step.options["dim"], GUESS) if step.op is SCAN else 1
            total += times * max(_traffic(b, at) for b in step.bodies)
        elif step.op in COLLECTIVES:
            total += sum(m.received for m in plan(step.ins[0], step.outs[0], at.mesh)) * _elements(step.ins[0], at)
    return total
