"""Facts: what completion refuses, and why, as data.

Completion raises a fact and says nothing; `refusals.messages` puts it into words, and adds what could stand
there instead. To try a program is therefore to catch a fact. A fact holds what is its own; beside it is the
`State`, the completion as it stood.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from shardlib.errors import SpecError
from shardlib.layout import Layout
from shardlib.mesh import Mesh
from shardlib.program import Program, Step
from shardlib.rules import Rule
from shardlib.spec import Spec


@dataclass(frozen=True)
class State:
    """The completion of one body as it stood.

    program, layout, mesh, sizes: what is completed, and for what.
    given:  the types that were decided outside: of a scan's arguments, of the operands of a single step.
    types:  of every value so far.
    now:    a value of the program as written -> the value that stands for it.
    source: a converted value -> the value it was converted from, at the root.
    notes:  (value, owed axis) -> since when.
    """
    program: Program
    layout: Layout
    mesh: Mesh
    sizes: Mapping[str, int]
    given: Mapping[str, Spec]
    types: Mapping[str, Spec]
    now: Mapping[str, str]
    source: Mapping[str, str]
    notes: Mapping[tuple[str, str], str]

    def type_of(self, value: str) -> Spec:
        """The type of a value of the program as written."""
        return self.types[self.now[value]]

    def layout_of(self, step: Step) -> Layout:
        return (step.layout or self.layout).on(self.mesh)


@dataclass(frozen=True)
class RuleRefuses:
    """An op whose rule refuses its operands. typed: the step with their types and its results' dims."""
    step: Step
    typed: Step
    rule: Rule


@dataclass(frozen=True)
class UnlikeOperand:
    """An operand whose type is not what explicit text says. rule: of an op; not of a scan, a call."""
    step: Step
    operand: int
    want: Spec
    rule: Rule | None = None


@dataclass(frozen=True)
class UnlikeResult:
    """An op whose result is not what its explicit text says."""
    step: Step
    made: Spec
    want: Spec
    rule: Rule


@dataclass(frozen=True)
class UnlikeReturn:
    """A result of the program whose type is not what its explicit signature says."""
    value: str
    want: Spec


@dataclass(frozen=True)
class WrongMove:
    """A written conversion whose operand is something else; with a `problem`, which leads nowhere it may."""
    step: Step
    have: Spec
    problem: str | None = None


@dataclass(frozen=True)
class NoWay:
    """No conversion leads to what is wanted of an operand, of the step's result, or of the program's."""
    reason: str
    step: Step | None = None
    operand: int | None = None


@dataclass(frozen=True)
class SplitStack:
    """A scan over dims that are split otherwise than that of its first operand, or over several axes."""
    step: Step
    operand: int
    have: Spec
    first: Spec


@dataclass(frozen=True)
class ChangedCarry:
    """A scan whose carry comes out as another type than it went in."""
    step: Step
    before: Spec
    after: Spec


@dataclass(frozen=True)
class OwedPredicate:
    """A cond whose predicate is not the same on every rank."""
    have: Spec


@dataclass(frozen=True)
class UnlikeBranches:
    """A cond whose branches take or return different types. does: which of the two, in words."""
    step: Step
    does: str
    one: Spec
    other: Spec


Fact = (RuleRefuses | UnlikeOperand | UnlikeResult | UnlikeReturn | WrongMove | NoWay | SplitStack
        | ChangedCarry | OwedPredicate | UnlikeBranches)


class Refused(SpecError):
    """A fact that has no words yet, the state of the body it was found in, and the user's line, if known."""

    def __init__(self, fact: Fact, state: State, where: object) -> None:
        super().__init__(f"{state.program.name}: {type(fact).__name__}")
        self.fact, self.state, self.where = fact, state, where

    def at(self, where: object) -> Refused:
        return self if self.where else Refused(self.fact, self.state, where)
