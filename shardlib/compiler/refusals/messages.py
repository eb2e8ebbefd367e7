"""What a refusal says: the rule broken and the line, the specs aligned by dim name, a caret, code to paste.

One function for each kind of fact in `compiler.refusal`; what there is to paste comes from `offers`.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence

from shardlib.compiler.refusal import (
    ChangedCarry,
    NoWay,
    OwedPredicate,
    Refused,
    RuleRefuses,
    SplitStack,
    State,
    UnlikeBranches,
    UnlikeOperand,
    UnlikeResult,
    UnlikeReturn,
    WrongMove,
)
from shardlib.compiler.refusals import offers
from shardlib.compiler.refusals.user_source import WORDS, label, labels, made_by, variable
from shardlib.errors import SpecError, aligned
from shardlib.language.moves import RESHARD
from shardlib.program import Program, Scan, Step
from shardlib.rules import Rule, RuleError, natural
from shardlib.spec import Owed, Spec

ROWS = 4        # operands in one message
Row = tuple[str, Spec, str]
"""A name, its type, and a note."""


def worded(refused: Refused) -> SpecError:
    """What was refused, in words, at the user's line."""
    return SpecError(_WORDED[type(refused.fact)](refused.fact, refused.state)).at(refused.where)


def _message(first: str, rows: Sequence[Row], caret: str | None, code: Sequence[str]) -> str:
    return "\n".join([first, "", aligned(rows, caret), *(["", *code] if code else [])])


def _rule_refuses(fact: RuleRefuses, state: State) -> str:
    step, types = fact.step, fact.typed.ins
    names = labels(step, state.program)
    error = _rule_error(fact.typed, fact.rule, names)
    if step.op.name == "shift":
        by, axis = step.options["by"], error.axis
        says = f"{names[0]} owes a sum over {axis}; {by!r} would be added once for every rank of {axis}"
        error = RuleError(f"add: {says}", 0, error.item, axis)
    rows = _operands(step, types, state)
    if len(rows) > ROWS:
        concerned = [error.item in (*have.names, *map(str, have.owed)) for have in types]
        rows = [r for i, r in enumerate(rows) if i == error.operand or concerned[i]][:ROWS]
    axes = (error.axis,) if error.axis else _axes_of(error.item, types)
    return _message(str(error), rows, error.item, offers.instead(step, axes, types, state, fact.rule))


def _rule_error(step: Step, rule: Rule, names: Sequence[str]) -> RuleError:
    try:
        natural(WORDS.get(step.op.name, step.op.name), rule, step.ins, step.outs, names)
    except RuleError as error:
        return error
    raise AssertionError(f"{step.op.name} is not refused")


def _axes_of(name: str | None, types: Sequence[Spec]) -> tuple[str, ...]:
    """The axes on which the operands disagree about the dim `name`; where they agree, those that split it."""
    splits = list(dict.fromkeys(f.axes for s in types for d in s.dims for f in d.factors if f.name == name))
    if len(splits) > 1:
        unlike = (i for i, column in enumerate(zip(*splits)) if len(set(column)) > 1)
        shared = next(unlike, min(map(len, splits)))
        splits = [s[shared:] for s in splits]
    return tuple(dict.fromkeys(a for s in splits for a in s))


def _unlike_operand(fact: UnlikeOperand, state: State) -> str:
    step, want = fact.step, fact.want
    have, name = state.type_of(step.inputs[fact.operand]), labels(step, state.program)[fact.operand]
    called, _, result = (step.body.name if step.body else step.called).partition(", ")
    text, whose = ("signature", f"the signature of {called}") if called else ("text", "the text")
    caller, takes = step.called or step.op.name, "says" if result else "takes"
    says, caret = _difference(have, want)
    rows = [(name, have, _note(step, fact.operand, have, state)), (text, want, "")]
    code = _instead_of_operand(fact, have, state)
    return _message(f'{caller}: {name} {says}; {whose} {takes} "{want}"', rows, caret, code)


def _instead_of_operand(fact: UnlikeOperand, have: Spec, state: State) -> list[str]:
    step, want = fact.step, fact.want
    if fact.rule is None:
        return offers.convert(step, fact.operand, want, state, bare=bool(step.bodies) or step.op is RESHARD)
    types, text = [state.type_of(n) for n in step.inputs], [s.resolve(state.mesh) for s in step.ins]
    axes = dict.fromkeys([*_split_apart(have, want), *_owed_apart(have, want)])
    return offers.instead(step, tuple(axes), types, state, fact.rule, also=text)


def _unlike_result(fact: UnlikeResult, state: State) -> str:
    step, made, want = fact.step, fact.made, fact.want
    says, caret = _difference(made, want)
    types = [state.type_of(n) for n in step.inputs]
    lost = [o.axis for o in made.owed if o not in want.owed]
    gone = next((f for a in lost for s in types for d in s.dims for f in d.factors if a in f.axes), None)
    rows = _operands(step, types, state)[:ROWS - 1]
    rows += [("result", made, f"owed since {gone} is contracted" if gone else ""), ("text", want, "")]
    axes = dict.fromkeys([*_owed_apart(made, want), *_split_apart(made, want)])
    return _message(f'{step.op.name}: the result {says}; the text says "{want}"', rows, caret,
                    offers.instead(step, tuple(axes), types, state, fact.rule))


def _unlike_return(fact: UnlikeReturn, state: State) -> str:
    have, want = state.type_of(fact.value), fact.want
    says, caret = _difference(have, want)
    code = variable(fact.value, state.program)
    note = _owed_since(fact.value, have, state) or _made(fact.value, state.program)
    rows = [(label(code), have, note), ("signature", want, "")]
    return _message(f'{state.program.name}: the result {says}; the signature says "{want}"', rows, caret,
                    offers.returned(fact.value, code, want, state))


def _wrong_move(fact: WrongMove, state: State) -> str:
    step, have, problem = fact.step, fact.have, fact.problem
    name, value, text = labels(step, state.program)[0], step.inputs[0], step.ins[0]
    unowed = next((o for o in text.owed if o not in step.outs[0].owed and o not in have.owed), None)
    says, caret = _difference(have, text)
    if problem is None and unowed:
        problem = (f"{name} owes no {_reduction(unowed)} over {unowed.axis}; reducing it would count it once "
                   f"for every rank of {unowed.axis}")
    since = unowed and _paid(value, unowed.axis, state.program) or _owed_since(value, have, state)
    rows = [(name, have, since), ("text", text, ""), ("to", step.outs[0], "")]
    want = state.layout_of(step).type_of(step.outs[0], state.mesh)
    return _message(f"{step.op.name}: " + (problem or f'{name} {says}; the text takes "{text}"'), rows, caret,
                    offers.replaced(step, want, state))


def _no_way(fact: NoWay, state: State) -> str:
    caller = fact.step.op.name if fact.step else state.program.name
    what = "the result" if fact.operand is None else labels(fact.step, state.program)[fact.operand]
    return f"{caller}: {what} cannot be made what is wanted: {fact.reason}"


def _split_stack(fact: SplitStack, state: State) -> str:
    dim, value = fact.have.dims[0], fact.step.inputs[fact.operand]
    first = fact.step.inputs[len(Scan.of(fact.step).carries)]
    if len(dim.axes) > 1:
        return _message(f"scan: {dim.label} is {_split(dim.axes)} in {value}; the stages of a pipeline are "
                        "those of one axis", [(value, fact.have, "")], dim.label, ())
    return _message(f"scan: {dim.label} is {_split(fact.first.dims[0].axes)} in {first}, "
                    f"{_split(dim.axes) if dim.axes else 'whole'} in {value}; a layout that begins with "
                    f"{dim.label} splits it everywhere", [(first, fact.first, ""), (value, fact.have, "")],
                    dim.label, ())


def _changed_carry(fact: ChangedCarry, state: State) -> str:
    says, caret = _difference(fact.after, fact.before)
    rows, body = [("in", fact.before, ""), ("out", fact.after, "")], fact.step.body.name
    return _message(f'scan: the carry goes into {body} as "{fact.before}" and {says} when it comes out; it '
                    "must come out as it went in", rows, caret, ())


def _owed_predicate(fact: OwedPredicate, state: State) -> str:
    return f"cond: the predicate is {fact.have}; ranks that see different pieces of it would part ways"


def _unlike_branches(fact: UnlikeBranches, state: State) -> str:
    yes, no = fact.step.body.name, fact.step.orelse.name
    return f'cond: {yes} {fact.does} "{fact.one}", {no} "{fact.other}"; both take and return the same types'


_WORDED: dict[type, Callable[..., str]] = {
    RuleRefuses: _rule_refuses, UnlikeOperand: _unlike_operand, UnlikeResult: _unlike_result,
    UnlikeReturn: _unlike_return, WrongMove: _wrong_move, NoWay: _no_way, SplitStack: _split_stack,
    ChangedCarry: _changed_carry, OwedPredicate: _owed_predicate, UnlikeBranches: _unlike_branches}


# -- how two types differ ------------------------------------------------------------------------------------

def _difference(have: Spec, want: Spec) -> tuple[str, str | None]:
    """How `have` differs from `want`, in words, and the item to point at."""
    for owed in have.owed:
        if owed not in want.owed:
            return (f"is held at {owed.axis}:{owed.at}" if owed.kind == "@"
                    else f"owes a {_reduction(owed)} over {owed.axis}"), str(owed)
    for a, b in zip(have.dims, want.dims):
        if a.axes != b.axes:
            return f"has {a.label} {_split(a.axes)}", a.label
    for owed in want.owed:
        if owed not in have.owed:
            return (f"is not held at {owed.axis}:{owed.at}" if owed.kind == "@"
                    else f"owes no {_reduction(owed)} over {owed.axis}"), str(owed)
    return f"has dims {have}", None


def _split_apart(one: Spec, other: Spec) -> list[str]:
    """The axes that split a dim of which the two say otherwise."""
    return [a for d, e in zip(one.dims, other.dims) if d.axes != e.axes for a in (*d.axes, *e.axes)]


def _owed_apart(one: Spec, other: Spec) -> list[str]:
    """The axes over which one of the two owes what the other does not."""
    return [o.axis for o in (*one.owed, *other.owed) if o not in one.owed or o not in other.owed]


def _owed_axes(spec: Spec) -> list[str]:
    """The axes over which it owes anything, be it a sum or a maximum."""
    return [o.axis for o in spec.owed]


def _split(axes: Sequence[str]) -> str:
    return f"split over {'/'.join(axes)}" if axes else "whole"


def _reduction(owed: Owed) -> str:
    return "max" if owed.kind == "max" else "sum"


# -- what became of a value ----------------------------------------------------------------------------------

def _operands(step: Step, types: Sequence[Spec], state: State) -> list[Row]:
    names = labels(step, state.program)
    return [(name, have, _note(step, i, have, state)) for i, (name, have) in enumerate(zip(names, types))]


def _note(step: Step, i: int, have: Spec, state: State) -> str:
    """Since when operand i owes; where an expression was made, if not on the same line."""
    owed = _owed_since(step.inputs[i], have, state)
    if owed or i < len(step.said) and step.said[i]:
        return owed
    made = made_by(step.inputs[i], state.program)
    return f"made at {made.where}" if made and made.where and made.where != step.where else ""


def _owed_since(value: str, have: Spec, state: State) -> str:
    name = state.now[value]
    names = (name, state.source.get(name, name))
    return next((note for o in have.owed for n in names if (note := state.notes.get((n, o.axis)))), "")


def _made(value: str, program: Program) -> str:
    """Which call made a value."""
    made = made_by(value, program)
    return f"made by {WORDS.get(made.op.name, made.op.name)} at {made.where}" if made and made.where else ""


def _paid(value: str, axis: str, program: Program) -> str:
    """Which call paid what this value, or one that it was made of, owed over `axis`."""
    wanted = {value}
    for step in reversed(program.steps):
        if wanted.intersection(step.outputs):
            if step.op.moves and axis in _owed_axes(step.ins[0]) and axis not in _owed_axes(step.outs[0]):
                return f"paid since {step.op.name} at {step.where}"
            wanted.update(step.inputs)
    return ""
