"""Ragged dims where programs are typed. Rows that data chose do not move: what has them is typed as they lie,
and what makes them gives axes to the first factor, the experts, before all others.

Rows of two dispatches do not mix: two values of type `(E T)~J` have the same rows, in the same order, only if
they come from the same call.

>>> from shardlib.language.trace import trace
>>> from shardlib import sharded
>>> from shardlib.ops import combine, dispatch
>>> @sharded("T D, T J, T J -> T D")
... def mixed(x, one, other):
...     rows, at = dispatch("T D, T J -> (E T)~J D, (E T)~J", x, one)
...     more, _ = dispatch("T D, T J -> (E T)~J D, (E T)~J", x, other)
...     return combine("(E T)~J D, (E T)~J -> T D", rows + more, at)
>>> check_same_rows(trace(mixed))   # doctest: +ELLIPSIS
Traceback (most recent call last):
shardlib.errors.SpecError: add: rows and more have the dim (E T)~J of two dispatches; their rows differ ...
"""
from __future__ import annotations

from collections.abc import Iterator, Mapping

from shardlib.errors import SpecError
from shardlib.layout import Layout
from shardlib.program import Program, Step
from shardlib.spec import Factor, Spec

Axes = Mapping[str, tuple[str, ...]]


def as_there(text: Spec, have: Spec) -> Spec:
    """`text` of a value of type `have`, its ragged dims pinned where they are."""
    return text.with_dims(
        d._replace(factors=tuple(Factor(f.name, f.axes, not f.axes) for f in h.factors)) if h.ragged else d
        for d, h in zip(text.dims, have.dims, strict=True)) if have.ragged else text


def first_axes(step: Step, layout: Layout, pinned: Axes) -> Axes:
    """The axes of the first factor of ragged dims that begin here."""
    if not (begun := _begun(step)):
        return {}
    first = [d.names[0] for s in step.outs for d in s.dims if d.label in begun]
    return {n: axes for n, axes in layout.complete(first, pinned).items() if n not in pinned}


def met_by_rows(program: Program, step: Step) -> Iterator[str]:
    """The names that rows which begin here meet later, when they cannot move any more."""
    if begun := _begun(step):
        for later in program.steps:
            if any(begun & {*s.labels} for s in (*later.ins, *later.outs)):
                yield from (n for s in (*later.ins, *later.outs) for n in s.names)


def _begun(step: Step) -> set[str]:
    made = {d.label for s in step.outs if s.ragged for d in s.dims if d.ragged}
    return made and made - {label for s in step.ins for label in s.labels}


def check_same_rows(program: Program, origins: Mapping[str, str] | None = None) -> None:
    """SpecError where an op has rows of two dispatches; in bodies, too.

    origins: of arguments, the value whose rows they have; without it, all have the same.
    """
    rows = {path: (origins or {}).get(path, "") for path, spec in program.arg_leaves() if spec.ragged}
    for step in program.steps:
        found = {rows[name]: i for i, name in reversed(list(enumerate(step.inputs))) if name in rows}
        if len(found) > 1:
            first, other, *_ = sorted(found.values())
            names = [step.said[i] if step.said and step.said[i] else step.inputs[i] for i in (first, other)]
            dim = next(d for d in step.ins[other].dims if d.ragged)
            raise SpecError(f"{step.op.name}: {names[0]} and {names[1]} have the dim {dim.label} of two "
                            "dispatches; their rows differ").at(step.where)
        origin = next(iter(found), step.outputs[0] if step.outputs else "")
        rows.update((name, origin) for name, spec in zip(step.outputs, step.outs) if spec.ragged)
        for body in step.bodies:
            check_same_rows(body, {path: rows[value] for path, value in step.passed(body) if value in rows})


