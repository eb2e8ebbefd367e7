"""Offers: what to write in place of a call that does not type, cheapest first.

Each operand is given the types it could have on the axes in question: whole, split on another dim, owed. What
the op's rule takes of these is tried: the call is written anew with the conversions around its operands, and
the program is completed again with it. Only what types is offered, so what a message says can be pasted.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import prod

from shardlib.compiler.completer import Completer, result_dims
from shardlib.compiler.planner import Planned, plan
from shardlib.compiler.refusal import State
from shardlib.compiler.refusals.user_source import label, operand, written
from shardlib.errors import SpecError, bytes_text
from shardlib.language.held import HELD
from shardlib.language.moves import RESHARD
from shardlib.language.scan import SCAN
from shardlib.layout import EXPLICIT, Layout
from shardlib.program import Program, Step
from shardlib.rules import Rule, natural
from shardlib.spec import Dim, Factor, Owed, Spec

ITEMSIZE = 4        # bytes of an element in messages: float32
SHOWN = 3           # offers in one message
TRIED = 32          # rewritten calls that are completed again
CHANGED = 2         # operands of one call that are converted
WIDE = 120          # characters of a line of code, where there is a shorter one
GUESS = 64          # rows of a dim of unknown size, for comparing costs


@dataclass(frozen=True)
class Offer:
    """Code for the user, the steps it stands for, and the cost of each of its conversions.

    conversions: which ones, of which operand; of offers alike in this, one is shown.
    total: elements that the whole program then receives, so that what is put off is not free.
    why_free: in words, where that is all there is to say of its cost.
    """
    code: str
    steps: tuple[Step, ...]
    costs: tuple[Cost, ...]
    conversions: tuple = ()
    total: float = 0.0
    why_free: str = ""

    @property
    def own(self) -> float:
        return sum(c.elements for c in self.costs)

    @property
    def paid(self) -> int:
        return sum(c.fraction > 0 for c in self.costs)


@dataclass(frozen=True)
class Cost:
    """Of a conversion of `what`: the fraction of its elements that a rank receives. known: its sizes are."""
    what: str
    fraction: float
    elements: float
    known: bool


def cost(offer: Offer, least: float) -> str:
    """What an offer costs; `least`: what the rest of the program costs at least."""
    if offer.why_free:
        return f"free: {offer.why_free}"
    later = offer.total - offer.own - least
    paid = [c for c in offer.costs if c.fraction]
    if not all(c.known for c in paid):
        text = " and ".join(f"{c.fraction:.3g} x the size of {c.what}" for c in paid) + " per rank"
        return text + (", and more later" if later > 1 else "")
    text = f"{bytes_text(offer.own * ITEMSIZE)} per rank" if paid else "free"
    if later < 1:
        return text
    known = all(c.known for c in offer.costs)
    return f"{text}, then {bytes_text(later * ITEMSIZE)} later" if known else f"{text}, and more later"


def lines(offers: Sequence[Offer]) -> list[str]:
    width = max((len(o.code) for o in offers), default=0)
    least = min((o.total - o.own for o in offers), default=0.0)
    return [f"  {o.code.ljust(width)}     {cost(o, least)}" for o in offers]


# -- what could stand there instead --------------------------------------------------------------------------

def instead(step: Step, axes: Sequence[str], have: Sequence[Spec], state: State, rule: Rule,
            also: Sequence[Spec] | None = None) -> list[str]:
    """Lines of code that type, in place of the call `step` on operands of types `have`.

    also: operand types to try beside those that differ from `have` on `axes`.
    """
    layout = state.layout_of(step)
    choices = [[*_variants(one, axes, have), *([also[i]] if also else [])] for i, one in enumerate(have)]
    few = (types for types in product(*map(dict.fromkeys, choices))
           if sum(t != h for t, h in zip(types, have)) <= CHANGED or types == tuple(also or ()))
    found = [offer for types in few if (offer := _call(step, types, have, rule, layout, state))]
    best = _best(found, step, state)
    if not best and not step.op.takes_text and len(step.outs) == 1:
        best = _best([o for f in found if (o := _back(f, step, have[0], layout, state))], step, state)
    return lines(best or _best(found, step, state, alone=True)[:1])


def convert(step: Step, i: int, want: Spec, state: State, bare: bool) -> list[str]:
    """The line that converts operand i to `want`; `bare`: without the call around it."""
    layout, source = state.layout_of(step), step.inputs[i]
    codes, have = [operand(step, j, state.program) for j in range(len(step.inputs))], state.type_of(source)
    try:
        code, name, steps, costs = _conversion(codes[i], source, have, want, layout, state, "operand")
    except SpecError:
        return []
    inputs = tuple(name if j == i else n for j, n in enumerate(step.inputs))
    if not bare:
        code = written(step, [*codes[:i], code, *codes[i + 1:]])
    return _if_it_types(Offer(code, (*steps, replace(step, inputs=inputs)), costs), step, state)


def replaced(step: Step, want: Spec, state: State) -> list[str]:
    """The line that gives `want` in place of the conversion `step`."""
    layout, (source,) = state.layout_of(step), step.inputs
    code, have = operand(step, 0, state.program), state.type_of(source)
    try:
        code, name, steps, costs = _conversion(code, source, have, want, layout, state, "operand")
    except SpecError:
        return []
    text = (_exact(want, layout),)
    last = Step(RESHARD, text, text, (name,), step.outputs, layout=step.layout)
    why_free = "" if steps else "nothing is owed"
    return _if_it_types(Offer(code, (*steps, last), costs, why_free=why_free), step, state)


def returned(value: str, code: str, want: Spec, state: State) -> list[str]:
    """The line that makes the program's result `value` what the signature says."""
    program, have = state.program, state.type_of(value)
    try:
        code, name, steps, costs = _conversion(code, value, have, want, state.layout, state, "result")
    except SpecError:
        return []
    results = (replace(r, values=tuple(name if v == value else v for v in r.values)) for r in program.results)
    again = replace(program, steps=(*program.steps, *steps), results=tuple(results))
    return lines([Offer(f"return {code}", steps, costs)] if _received(again, state) is not None else [])


def _variants(have: Spec, axes: Sequence[str], others: Sequence[Spec]) -> Iterator[Spec]:
    """The types of a value that differ from `have` on `axes` only."""
    yield have
    owed = [o for o in have.owed if o.axis not in axes]
    free = Spec(tuple(d.split(tuple(a for a in d.axes if a not in axes)) for d in have.dims), tuple(owed))
    yield free
    inner = [d for d in free.dims if d.factors]
    for dim in sorted(inner, key=lambda d: (d is inner[-1], bool(d.axes), -inner.index(d))):
        yield free.split({d.label: d.axes for d in free.dims} | {dim.label: (*dim.axes, *axes)})
    for other in others:
        for dim in inner:
            if dim.label in other.labels and set(other.axes(dim.label)) - set(dim.axes):
                moved = other.axes(dim.label)
                left = {d: tuple(a for a in d.axes if a not in moved) for d in free.dims}
                yield Spec(tuple(d.split(moved if d is dim else left[d]) for d in free.dims),
                           tuple(o for o in owed if o.axis not in moved))
    if not have.owed and not set(axes) & set(have.split_axes):
        yield free.owing(*owed, *(Owed("+", a) for a in axes))


def _call(step: Step, types: Sequence[Spec], have: Sequence[Spec], rule: Rule, layout: Layout,
          state: State) -> Offer | None:
    """The call on operands of these `types`, converted from `have`; nothing where they cannot be that."""
    try:
        outs = tuple(result_dims(s, types, rule, layout, state.mesh) for s in step.outs)
        made = natural(step.op.name, rule, types, outs)
        if step.op.takes_text and layout != EXPLICIT:
            return _declared(step, types, have, state)
        return _explicit(step, types, made, have, layout, state)
    except SpecError:
        return None


def _explicit(step: Step, types: Sequence[Spec], made: Sequence[Spec], have: Sequence[Spec], layout: Layout,
              state: State) -> Offer:
    """The call with its operands' conversions, and that of its result, written around it."""
    inputs, codes, steps, costs, conversions = [], [], [], [], []
    for i, (value, want, had) in enumerate(zip(step.inputs, types, have)):
        code = operand(step, i, state.program)
        code, name, moved, cost = _conversion(code, value, had, want, layout, state, f"operand {i}")
        inputs.append(name), codes.append(code), steps.extend(moved), costs.extend(cost)
        conversions.append(tuple(s.op.name for s in moved))
    call = replace(step, inputs=tuple(inputs))
    if step.op.takes_text:
        call = replace(call, ins=tuple(types), outs=tuple(made))
    offer = Offer(written(call, codes), (*steps, call), tuple(costs), tuple(conversions))
    if not step.op.takes_text or len(made) > 1:
        return offer
    return _converted(offer, made[0], layout.type_of(step.outs[0], state.mesh), layout, state)


def _declared(step: Step, types: Sequence[Spec], have: Sequence[Spec], state: State) -> Offer:
    """The call with other pins in its text; completion converts."""
    texts, costs = [], []
    for value, text, want, had in zip(step.inputs, step.ins, types, have):
        dims = tuple(d if w.axes == h.axes else _pinned(w) for d, w, h in zip(text.dims, want.dims, had.dims))
        texts.append(Spec(dims, want.owed))
        costs += [_cost(label(value), m, state) for m in plan(state.type_of(value), want, state.mesh)]
    call = replace(step, ins=tuple(texts))
    code = written(call, [operand(step, i, state.program) for i in range(len(step.inputs))])
    return Offer(code, (call,), tuple(costs), tuple(map(str, texts)))


def _back(offer: Offer, step: Step, want: Spec, layout: Layout, state: State) -> Offer | None:
    """The offer with its result made what the first operand was: the rest of the program may need that."""
    call = offer.steps[-1]
    types = {o: s.outs[0] for s in offer.steps[:-1] for o in s.outputs}
    ins = [types.get(n) or state.type_of(n) for n in call.inputs]
    outs = [step.op.infer(tuple(ins), step.options)[0]]
    (have,) = natural(step.op.name, step.op.rule(replace(step, ins=tuple(ins))), ins, outs)
    try:
        made = _converted(offer, have, want, layout, state)
    except SpecError:
        return None
    return made if len(made.steps) > len(offer.steps) else None


def _converted(offer: Offer, have: Spec, want: Spec, layout: Layout, state: State) -> Offer:
    """The offer with the result of its call, of type `have`, made `want`."""
    *before, call = offer.steps
    (out,) = call.outputs
    code, _, steps, costs = _conversion(offer.code, "offered", have, want, layout, state, "result", out)
    if steps:
        call = replace(call, outputs=("offered",))
    return replace(offer, code=code, steps=(*before, call, *steps), costs=(*offer.costs, *costs),
                   conversions=(*offer.conversions, tuple(s.op.name for s in steps)))


def _conversion(code: str, name: str, have: Spec, want: Spec, layout: Layout, state: State, what: str,
                out: str = "") -> tuple[str, str, tuple[Step, ...], tuple[Cost, ...]]:
    """`name` made `want`: the code, the name it then has, the step, its costs. No step where it is `want`."""
    moves = plan(have, want, state.mesh)
    if not moves:
        return code, name, (), ()
    op = moves[0].op if len(moves) == 1 and moves[0].op not in HELD else RESHARD
    out = out or f"{name} {what}"
    step = Step(op, (_exact(have, layout),), (_exact(want, layout),), (name,), (out,), layout=layout)
    shown = "the result" if what == "result" else label(code)
    return f'{op.name}("{step.text}", {code})', out, (step,), tuple(_cost(shown, m, state) for m in moves)


def _exact(want: Spec, layout: Layout) -> Spec:
    """The text that means the type `want` under `layout`: with a /1 where a dim would be split."""
    if layout == EXPLICIT:
        return want
    done = layout.complete_alone(want)
    dims = (_pinned(d) if d.factors and not d.axes and c.axes else d for d, c in zip(want.dims, done.dims))
    return want.with_dims(dims)


def _pinned(dim: Dim) -> Dim:
    return dim._replace(factors=(Factor(dim.factors[0].name, dim.axes, not dim.axes), *dim.factors[1:]))


def _cost(what: str, move: Planned, state: State) -> Cost:
    known = all(n in state.sizes for n in move.have.names)
    return Cost(what, move.received, move.received * _elements(move.have, state), known)


def _elements(have: Spec, state: State) -> int:
    constants = (d.size for d in have.dims if not d.factors)
    return prod(state.sizes.get(n, GUESS) for n in have.names) * prod(constants)


# -- which of them type --------------------------------------------------------------------------------------

def _best(found: Sequence[Offer], step: Step, state: State, alone: bool = False) -> list[Offer]:
    """The cheapest that type, with as few conversions that cost as can be; short ones where there are any.

    `alone`: they need to type up to this step only.
    """
    good: dict[tuple, Offer] = {}
    for offer in sorted(found, key=lambda o: (o.own, len(o.costs)))[:TRIED]:
        if offer.conversions not in good and (total := _total(offer, step, state, alone)) is not None:
            good[offer.conversions] = replace(offer, total=total)
    fewest = max(1, min((o.paid for o in good.values()), default=0))
    least = min((o.total - o.own for o in good.values()), default=0.0)
    shown = sorted((o for o in good.values() if o.paid <= fewest),
                   key=lambda o: (round(o.total), round(o.total - o.own - least) > 0, o.own, len(o.code)))
    return ([o for o in shown if len(o.code) <= WIDE] or shown)[:SHOWN]


def _if_it_types(offer: Offer, step: Step, state: State) -> list[str]:
    return lines([offer] if _total(offer, step, state) is not None else [])


def _total(offer: Offer, step: Step, state: State, alone: bool = False) -> float | None:
    """What the program receives with the offer in place of `step`; None if refused. alone: up to there."""
    steps = state.program.steps
    k = next(i for i, s in enumerate(steps) if s is step)
    program = replace(state.program, steps=(*steps[:k], *offer.steps, *(() if alone else steps[k + 1:])))
    return _received(replace(program, results=()) if alone else program, state)


def _received(program: Program, state: State) -> float | None:
    """What another program than the one refused, in its place, receives; None where it is refused as well."""
    trial = Completer(program, state.layout, state.mesh, state.sizes, state.given)
    try:
        return _traffic(trial.run(), state)
    except SpecError:
        return None


def _traffic(program: Program, state: State) -> float:
    """Elements that a rank receives in one run of an explicit program."""
    total = 0.0
    for step in program.steps:
        if step.bodies:
            times = state.sizes.get(step.options["dim"], GUESS) if step.op is SCAN else 1
            total += times * max(_traffic(b, state) for b in step.bodies)
        elif step.op.wire:
            received = sum(m.received for m in plan(step.ins[0], step.outs[0], state.mesh))
            total += received * _elements(step.ins[0], state)
    return total
