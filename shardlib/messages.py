"""What a refusal says: the rule broken and the user's line, the specs aligned by dim name, a caret, and code to paste with its cost."""
from __future__ import annotations

from typing import TYPE_CHECKING, Sequence

from shardlib import offers
from shardlib.cond import COND
from shardlib.errors import SpecError, aligned
from shardlib.program import Step
from shardlib.rules import Rule, RuleError, natural
from shardlib.scan import SCAN
from shardlib.spec import Owed, Spec
from shardlib.trace import RESHARD
from shardlib.user_source import WORDS, label, labels, variable

if TYPE_CHECKING:
    from shardlib.completer import Completer

ROWS = 4        # operands in one message


def message(first: str, rows: Sequence[tuple[str, object, str]], caret: str | None, code: Sequence[str], where: object) -> SpecError:
    """The error with these parts, at the user's line."""
    return SpecError("\n".join([first, "", aligned(rows, caret), *(["", *code] if code else [])])).at(where)


def refusal(step: Step, here: Step, rule: Rule, at: Completer) -> SpecError:
    """A call whose rule refuses its operands. `here`: the step with the types of its operands."""
    names = labels(step, at.program)
    error = _rule_error(here, rule, names)
    if step.op.name == "shift":
        by = step.options["by"]
        error = RuleError(f"add: {names[0]} owes a sum over {error.axis}; {by!r} would be added once for every rank of {error.axis}",
                          0, error.item, error.axis)
    rows = [(name, kind, _note(step, i, at, kind)) for i, (name, kind) in enumerate(zip(names, here.ins))]
    if len(rows) > ROWS:
        rows = [r for i, r in enumerate(rows) if i == error.operand or error.item in (*r[1].names, *map(str, r[1].owed))][:ROWS]
    axes = (error.axis,) if error.axis else _axes_of(error.item, here.ins)
    return message(str(error), rows, error.item, offers.instead(step, axes, here.ins, at, rule), step.where)


def _rule_error(step: Step, rule: Rule, names: Sequence[str]) -> RuleError:
    try:
        natural(WORDS.get(step.op.name, step.op.name), rule, step.ins, step.outs, names)
    except RuleError as error:
        return error
    raise AssertionError(f"{step.op.name} is not refused")


def _axes_of(name: str | None, ins: Sequence[Spec]) -> tuple[str, ...]:
    """The axes on which the operands disagree about the dim `name`; where they agree, those that split it."""
    splits = list(dict.fromkeys(f.axes for s in ins for d in s.dims for f in d.factors if f.name == name))
    if len(splits) > 1:
        shared = next((i for i, column in enumerate(zip(*splits)) if len(set(column)) > 1), min(map(len, splits)))
        splits = [s[shared:] for s in splits]
    return tuple(dict.fromkeys(a for s in splits for a in s))


def unlike(step: Step, i: int, want: Spec, at: Completer, rule: Rule | None = None) -> SpecError:
    """An operand whose type is not what explicit text says: of an op with `rule`, of a conversion, a scan or a call."""
    have, name = at.types[at.now[step.inputs[i]]], labels(step, at.program)[i]
    called, _, result = (step.body.name if step.body else step.called).partition(", ")
    whose = f"the signature of {called}" if called else "the text"
    word, takes = step.called or step.op.name, "says" if result else "takes"
    says, caret = _difference(have, want)
    rows = [(name, have, _note(step, i, at, have)), ("signature" if called else "text", want, "")]
    if rule is None:
        code = offers.convert(step, i, want, at, bare=step.op in (SCAN, COND, RESHARD))
    else:
        types, text = [at.types[at.now[n]] for n in step.inputs], [s.resolve(at.mesh) for s in step.ins]
        axes = [a for d, w in zip(have.dims, want.dims) if d.axes != w.axes for a in (*d.axes, *w.axes)]
        axes += [o.axis for o in (*have.owed, *want.owed) if o not in have.owed or o not in want.owed]
        code = offers.instead(step, tuple(dict.fromkeys(axes)), types, at, rule, also=text)
    return message(f'{word}: {name} {says}; {whose} {takes} "{want}"', rows, caret, code, step.where)


def unlike_result(step: Step, made: Spec, want: Spec, at: Completer, rule: Rule) -> SpecError:
    """An op whose result is not what its explicit text says."""
    says, caret = _difference(made, want)
    ins = [at.types[at.now[n]] for n in step.inputs]
    gone = next((f for o in made.owed if o not in want.owed for s in ins for d in s.dims for f in d.factors if o.axis in f.axes), None)
    rows = [(name, kind, _note(step, i, at, kind)) for i, (name, kind) in enumerate(zip(labels(step, at.program), ins))][:ROWS - 1]
    rows += [("result", made, f"owed since {gone} is contracted" if gone else ""), ("text", want, "")]
    axes = [o.axis for o in (*made.owed, *want.owed) if o not in made.owed or o not in want.owed]
    axes += [a for d, w in zip(made.dims, want.dims) if d.axes != w.axes for a in (*d.axes, *w.axes)]
    code = offers.instead(step, tuple(dict.fromkeys(axes)), ins, at, rule)
    return message(f'{step.op.name}: the result {says}; the text says "{want}"', rows, caret, code, step.where)


def unlike_return(value: str, want: Spec, at: Completer) -> SpecError:
    """A result of the function whose type is not what its signature says."""
    have = at.types[at.now[value]]
    says, caret = _difference(have, want)
    code = variable(value, at.program)
    note = _owed_since(at.now[value], have, at) or _made(value, at)
    return message(f'{at.program.name}: the result {says}; the signature says "{want}"', [(label(code), have, note), ("signature", want, "")], caret,
                   offers.returned(value, code, want, at), at.program.where)


def wrong_move(step: Step, have: Spec, at: Completer, problem: str | None = None) -> SpecError:
    """A written conversion whose operand is something else, or which does not lead where it says."""
    name, text = labels(step, at.program)[0], step.ins[0]
    lost = [o for o in text.owed if o not in step.outs[0].owed]
    unowed = next((o for o in lost if o not in have.owed), None)
    if problem is None and unowed:
        problem = f"{name} owes no {_kind(unowed)} over {unowed.axis}; reducing it would count it once for every rank of {unowed.axis}"
    elif problem is None:
        says, _ = _difference(have, text)
        problem = f'{name} {says}; the text takes "{text}"'
    layout = (step.layout or at.layout).on(at.mesh)
    want = at._alone(step.outs[0], layout)
    since = _paid(step.inputs[0], unowed.axis, at) if unowed else ""
    rows = [(name, have, since or _owed_since(at.now[step.inputs[0]], have, at)), ("text", text, ""), ("to", step.outs[0], "")]
    return message(f"{step.op.name}: {problem}", rows, _difference(have, text)[1], offers.replaced(step, want, at), step.where)


def split_stack(step: Step, i: int, have: Spec, at: Completer) -> SpecError:
    """A scan over a split dim."""
    dim = have.dims[0]
    return message(f"scan: {dim.label} is split over {'/'.join(dim.axes)} in {step.inputs[i]}; a scan over a split dim is a pipeline, "
                   f"which is not built yet", [(step.inputs[i], have, "")], dim.label, (), step.where)


def changed_carry(step: Step, before: Spec, after: Spec, at: Completer) -> SpecError:
    """A scan whose carry comes out as another type than it went in."""
    says, caret = _difference(after, before)
    return message(f'scan: the carry goes into {step.body.name} as "{before}" and {says} when it comes out; it must come out as it went in',
                   [("in", before, ""), ("out", after, "")], caret, (), step.where)


def _difference(have: Spec, want: Spec) -> tuple[str, str | None]:
    """How `have` differs from `want`, in words, and the item to point at."""
    for owed in have.owed:
        if owed not in want.owed:
            return f"{'is held at' if owed.kind == '@' else 'owes a ' + _kind(owed) + ' over'} {owed.axis}", str(owed)
    for a, b in zip(have.dims, want.dims):
        if a.axes != b.axes:
            return f"has {a.label} {_split(a.axes)}", a.label
    for owed in want.owed:
        if owed not in have.owed:
            return f"{'is not held at' if owed.kind == '@' else 'owes no ' + _kind(owed) + ' over'} {owed.axis}", str(owed)
    return f"has dims {have}", None


def _split(axes: Sequence[str]) -> str:
    return f"split over {'/'.join(axes)}" if axes else "whole"


def _kind(owed: Owed) -> str:
    return "max" if owed.kind == "max" else "sum"


def _note(step: Step, i: int, at: Completer, kind: Spec) -> str:
    """Since when operand i owes; where an expression was made, if not on the same line."""
    owed = _owed_since(at.now[step.inputs[i]], kind, at)
    if owed or i < len(step.said) and step.said[i]:
        return owed
    made = next((s for s in at.program.steps if step.inputs[i] in s.outputs), None)
    return f"made at {made.where}" if made and made.where and made.where != step.where else ""


def _owed_since(name: str, kind: Spec, at: Completer) -> str:
    root = at.source.get(name, name)
    return next((note for o in kind.owed if (note := at.notes.get((name, o.axis)) or at.notes.get((root, o.axis)))), "")


def _made(value: str, at: Completer) -> str:
    """Which call made a value."""
    made = next((s for s in at.program.steps if value in s.outputs), None)
    return f"made by {WORDS.get(made.op.name, made.op.name)} at {made.where}" if made and made.where else ""


def _paid(value: str, axis: str, at: Completer) -> str:
    """Which call paid what this value, or one that it was made of, owed over `axis`."""
    wanted = {value}
    for step in reversed(at.program.steps):
        if wanted.intersection(step.outputs):
            if step.op.moves and any(o.axis == axis for o in step.ins[0].owed) and not any(o.axis == axis for o in step.outs[0].owed):
                return f"paid since {step.op.name} at {step.where}"
            wanted.update(step.inputs)
    return ""
