"""Fusions: steps that a kernel may take together. A fusion is a function and a kernel.

The function says what the steps mean; its traced program is the pattern that is looked for.

>>> from shardlib import EXPLICIT, all_reduce, sharded
>>> from shardlib.functions import silu
>>> @sharded("F +x, F -> F, F", layout=EXPLICIT)            # x: any axis, or product of axes
... def add_silu(y, residual, *, by):
...     residual = residual + all_reduce("F +x -> F", y)
...     return residual, silu(residual * by)
>>> pattern = Fusion(add_silu).pattern
>>> pattern.program.steps[0].text, pattern.run, pattern.static
('F +x -> F', ('F',), {(2, 'by'): 'by'})

Static arguments are holes: the function is traced with two values of each, and attributes that differ may be
anything. They are numbers, and become attributes as they are. A run of dims that no step looks at (they are
carried along, side by side) stands for any number of dims: F above.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from torch import Tensor

from shardlib.compiler.complete import complete
from shardlib.errors import SpecError
from shardlib.language.rearrange import REARRANGE, RENAME
from shardlib.language.trace import Function, trace
from shardlib.layout import EXPLICIT
from shardlib.mesh import Mesh
from shardlib.program import Program, Step
from shardlib.rules import Rule
from shardlib.spec import Spec

PLAIN = ("add", "sub", "mul", "div", "scale", "shift")      # ops that stand everywhere


class Kernels(Protocol):
    """What generated code may call in place of what it would write; None where it writes that."""

    def __call__(self, step: Step, operands: Sequence[Tensor]) -> Callable | None:
        """What takes a fused step of operands like these, on meta."""

    def body(self, step: Step) -> Program:
        """What runs where nothing takes the fused step."""

    def product(self, rows: int, lines: int, columns: int, dtype: str, then: Step | None) -> Callable | None:
        """What takes a `Product` of these sizes, with the step that takes its columns."""


@dataclass(frozen=True)
class Product:
    """x @ w as one rank is to run it on `device`, where a kernel is asked for: x of (rows, lines), and w of
    (lines, columns), a weight that lies by columns, w.mT contiguous. The kernel gives (rows, columns).

    then: the function of the fused step that takes all columns, each operand as many, in its order; None
    where there is no such step. With it the kernel gives what that function gives, of rows.
    """
    device: str
    rows: int
    lines: int
    columns: int
    dtype: str
    then: Function | None = None


@dataclass(frozen=True)
class Site:
    """A fused step as one rank is to run it on `device`, where a kernel is asked for.

    function: what it means.  operands: their local shapes and dtypes, on meta.
    static: the function's static arguments.
    communicators: those of the group over which the step communicates, if it does.  ranks: its size; 1 where
    nothing is sent.  begins: of each operand, where this rank's piece begins, by dim.
    """
    function: Function
    device: str
    operands: Sequence[Tensor]
    static: Mapping[str, float]
    communicators: Sequence[object] = ()
    ranks: int = 1
    begins: Sequence[tuple[int, ...]] = ()


@dataclass(frozen=True, eq=False)
class Fusion:
    """What to look for, `function`, and what takes it.

    kernel(site): what is called with the local operands, and gives the local results; or why nothing is.
    Members of a group are asked alike, and answer alike. An operand that a result updates, as `update_cache`
    does, is the kernel's: it writes there, and gives it back; what it gives instead is copied there.
    when(step): why the fused step is not to be made; None where it is. It sees types: a program is one for
    all sizes, and those the kernel sees.
    mark: the op whose steps are candidates; if not said, one that communicates, where there is one.
    """
    function: Function
    kernel: Callable[[Site], Callable | str] | None = None
    when: Callable[[Step], str | None] | None = None
    mark: str = ""

    @property
    def name(self) -> str:
        return self.function.__name__

    @cached_property
    def pattern(self) -> Pattern:
        """The function's program. SpecError where it cannot be one that is looked for."""
        return Pattern.of(self.function, self.mark)

    @property
    def communicates(self) -> bool:
        return any(step.op.wire for step in self.pattern.program.steps)


@dataclass(frozen=True)
class Pattern:
    """A program to look for in others.

    run: dims that stand for any number of dims.  static: (step, attribute) -> the static argument it is.
    order: of its steps, from the one that marks a candidate on; each shares a value with one before.
    """
    program: Program
    run: tuple[str, ...]
    static: Mapping[tuple[int, str], str]
    order: tuple[int, ...]

    @classmethod
    def of(cls, f: Function, mark: str = "") -> Pattern:
        """SpecError where the function is not explicit, has pytrees, gives what it takes, or one value twice,
        takes what nothing uses, or where its steps have bodies or share no value."""
        if f.layout != EXPLICIT or None in (*f.ins, *f.outs):
            raise _refused(f, "it is a function of tensors, with layout=EXPLICIT")
        values = {0.7182 + i: name for i, name in enumerate(f.static_names)}    # special to no op
        one, other = (_traced(f, {name: x - less for x, name in values.items()}) for less in (0, 0.25))
        if problem := _problem(one) or _unlike(one, other):
            raise _refused(f, problem)
        static = {(i, key): values.get(value, "") for i, (a, b) in enumerate(zip(one.steps, other.steps))
                  for key, value in a.attrs if value != b.options[key]}
        if "" in static.values():
            raise _refused(f, "a static argument becomes an attribute as it is")
        return cls(one, _run(one), static, tuple(_order(one, mark)))


def _refused(f: Function, problem: str) -> SpecError:
    return SpecError(f"fusion {f.__name__}: {problem}").at(f.definition)


def _traced(f: Function, static: Mapping[str, float]) -> Program:
    written = trace(f, (), dict(static))
    specs = [*f.ins, *(s for step in written.steps for s in (*step.ins, *step.outs))]
    axes = dict.fromkeys(a for s in specs if s for a in (*s.split_axes, *(o.axis for o in s.owed)))
    return complete(written, EXPLICIT, Mesh(dict.fromkeys(axes, 2)))


def _problem(program: Program) -> str | None:
    """Why a program is no pattern."""
    made, given = {o for s in program.steps for o in s.outputs}, [n for n, _ in program.result_leaves()]
    used = {i for s in program.steps for i in s.inputs}
    if any(s.bodies for s in program.steps):
        return "its steps have no bodies"
    if not made.issuperset(given) or len({*given}) < len(given):
        return "it gives what its steps make, each once"
    if unused := [name for name, _ in program.arg_leaves() if name not in used]:
        return f"no step takes {unused[0]}"
    if len([*_order(program)]) < len(program.steps):
        return "each of its steps shares a value with another"
    return None


def _unlike(one: Program, other: Program) -> str | None:
    """Where a static argument decides more than attributes."""
    def form(program: Program) -> list:
        return [(s.op, s.ins, s.outs, s.inputs, [*s.options]) for s in program.steps]
    return None if form(one) == form(other) else "its steps depend on a static argument"


def _order(program: Program, mark: str = "") -> Iterator[int]:
    steps = program.steps
    known: set[str] = set()
    left = sorted(range(len(steps)), key=lambda i: (steps[i].op.name != mark, steps[i].op.wire is None,
                                                    steps[i].op.name in PLAIN, i))
    while near := [i for i in left if not known or known & _values(steps[i])]:
        yield near[0]
        known |= _values(steps[near[0]])
        left.remove(near[0])


def _values(step: Step) -> set[str]:
    return {*step.inputs, *step.outputs}


def _run(program: Program) -> tuple[str, ...]:
    """The first dims, side by side wherever they stand, that no step looks at."""
    seen = {name for step in program.steps for name in _looked_at(step)}
    specs = [s for step in program.steps for s in (*step.ins, *step.outs)]
    run: tuple[str, ...] = ()
    for label in next((s.labels for s in specs if {*s.labels} - seen), ()):
        if label in seen:
            if run:
                break
        elif all(_together((*run, label), s) for s in specs):
            run = (*run, label)
    return run


def _together(run: tuple[str, ...], spec: Spec) -> bool:
    """Whether a spec has all dims of the run, one after the other, or none."""
    if not {*run} & {*spec.labels}:
        return True
    at = spec.labels.index(run[0]) if run[0] in spec.labels else len(spec.labels)
    return spec.labels[at:at + len(run)] == run


def runs_over(step: Step) -> set[str]:
    """The dims that a step runs over, makes, or puts together anew."""
    if step.op in (RENAME, REARRANGE):
        return {n for s in (*step.ins, *step.outs) for d in s.dims for n in (d.label, *d.names)}
    rule: Rule = step.op.rule(step)
    names = {*rule.whole, *rule.met, *rule.sums, *rule.maxes}
    names |= {v for _, v in step.attrs if isinstance(v, str)}
    return names | {n for s in step.ins for n in s.labels} ^ {n for s in step.outs for n in s.labels}


def _looked_at(step: Step) -> set[str]:
    """The dims that a step does not merely carry along."""
    every, names = [d for s in (*step.ins, *step.outs) for d in s.dims], runs_over(step)
    names |= {n for d in every if len(d.factors) != 1 or d.axes for n in (d.label, *d.names)}
    if step.op.moves:
        (have,), (want,) = step.ins, step.outs
        names |= {a.label for a, b in zip(have.dims, want.dims) if a != b}
    return names
