"""Programs: what a traced function is, a list of typed steps.

A `Program` is in single-assignment form: every value has one name, is made by one step (or is an argument),
and every step knows the specs of what it takes and gives. It sits at the level of einsum, rms_norm,
all_reduce; never below.
Printed, it is Python, explicit once it is completed; `shardlib.parser.parse_program` reads that back.
Programs compare by what they mean: source lines and reasons are left out.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, islice
from typing import Any

from shardlib.layout import Layout
from shardlib.rules import Rule
from shardlib.source import Where
from shardlib.spec import Spec
from shardlib.tree import Struct, Tree, leaves
from shardlib.wires import Wire


@dataclass(frozen=True, eq=False)
class Op:
    """One operation, compared by identity: its typing rule, what it does on local tensors, its derivative.

    keywords:    its keyword arguments: name -> whether a value may be one; None stands for a missing one.
    rule(step):  the Rule of this call.
    emit(e, step, args): the Python expression that runs it on one rank's tensors (a tuple's, for several
                 results); `e` is its `LocalCode`.
    infer(ins, attrs): the results' dims, for an op that is called without a spec string.
    vjp(b, step, cotangents): the cotangents of the operands, by the grad builder `b`; None where none is.
    moves:       it changes types and keeps the value: a conversion.
    wire:        how its ranks communicate, if they do; `exchanges`: of an op that is no move.
    lengths(step): (dim, dims, n) where the dim is as long as the dims together and n, or, where nothing else
        says, as n of their sizes is; None where none is.
    index:       operands that hold integers or masks, outside linearity and without cotangent.
    updates:     the operand whose buffer the result may reuse, if any.
    looks(e, step, args): refuses what an index may not be, where a kernel takes the step's place.
    distribute(b, step): the same over pieces, where a dim that `rule` has whole is split; the results' names.
    constant:    its results have no gradient, and none is missed.
    statistic:   over a split dim, declarative text lets it owe in float32 at least, and rounds once
    joins:       it acts on the last dim of its first operand, alike for all others, which may share a call.
    asserted:    its types are those of its text, unchecked (`local`); `function` is what it runs.
    takes:       what each operand may hold, the last for all further ones, or a function of the step: "any",
                 "number" (no mask), "float", "index", "mask"; by default an index where `index` has it.
    reads(dtypes, attrs): in which dtypes the operands are read; by default the widest of all but indices.
    dtype(dtypes, attrs): the results' dtypes; by default that in which the operands are read.
    promotes:    torch itself reads the operands so, those without dims excepted.
    reference(d, *xs): what it means, another way than `emit` has it: see `shardlib.reference`.
    keeps(step): the op that runs in its place where a gradient is made, and dims of what that gives besides.
    runs(site): who runs it on a rank, and why; of an op that several kernels may take.
    """
    name: str
    rule: Callable[[Step], Rule]
    emit: Callable[..., str] | None = None
    infer: Callable[..., tuple[Spec, ...]] | None = None
    vjp: Callable | None = None
    keeps: Callable | None = None
    runs: Callable[..., str] | None = None
    moves: bool = False
    wire: Wire | None = None
    exchanges: Any = None
    index: tuple[int, ...] = ()
    updates: int | None = None
    looks: Callable[..., str] | None = None
    lengths: Callable | None = None
    takes: tuple[str, ...] | Callable[[Step], tuple[str, ...]] = ()
    reads: Callable | None = None
    dtype: Callable | None = None
    statistic: bool = False
    promotes: bool = False
    distribute: Callable | None = None
    constant: bool = False
    joins: bool = False
    asserted: bool = False
    keywords: Mapping[str, Callable[[Any], bool]] = field(default_factory=dict)
    function: Callable | None = None
    reference: Callable | None = None

    @property
    def takes_text(self) -> bool:
        """Whether a call gives a spec string."""
        return self.infer is None

    def inferred(self, ins: tuple[Spec, ...], attrs: Mapping[str, Any]) -> tuple[Spec, ...]:
        """The results' dims, of a call without a spec string."""
        if self.infer is None:
            raise TypeError(f"{self.name}: a call gives a spec string")
        return self.infer(ins, attrs)

    def __repr__(self) -> str:
        return f"Op({self.name})"


@dataclass(frozen=True)
class Step:
    """One op applied: `outputs = op(inputs)`, with the specs of both sides as text or,
    once completed, as types."""
    op: Op
    ins: tuple[Spec, ...]
    outs: tuple[Spec, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attrs: tuple[tuple[str, Any], ...] = ()
    body: Program | None = None
    orelse: Program | None = None
    where: Where | None = field(default=None, compare=False)
    why: str = field(default="", compare=False)
    layout: Layout | None = field(default=None, compare=False)
    said: tuple[str, ...] = field(default=(), compare=False)    # the user's variable for each operand, or ""
    called: str = field(default="", compare=False)  # the @sharded function whose call this step is part of

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.attrs)

    @property
    def bodies(self) -> tuple[Program, ...]:
        """The sub-programs: of a scan or a fused step one, of a cond two."""
        return () if self.body is None else (self.body,) if self.orelse is None else (self.body, self.orelse)

    def having(self, **fields: Any) -> Step:
        """The same but for these fields, as `dataclasses.replace` has it in ten times the time."""
        made = object.__new__(Step)
        vars(made).update({**vars(self), **fields})
        return made

    def rewritten(self, f: Callable[[Program], Program]) -> Step:
        """The step with `f` applied to its sub-programs."""
        return self.having(body=f(self.body) if self.body else None,
                           orelse=f(self.orelse) if self.orelse else None) if self.body else self

    def passed(self, body: Program) -> list[tuple[str, str]]:
        """(argument of a body, value that it gets).

        A cond's predicate, its first operand, goes into neither body.
        """
        paths = [path for path, _ in body.arg_leaves()]
        return list(zip(paths, self.inputs[len(self.inputs) - len(paths):]))

    @property
    def text(self) -> str:
        made = ", ".join(map(str, self.outs))
        return f"{', '.join(map(str, self.ins))} -> {made}" if self.ins else made


def number(value: Any) -> bool:
    """A keyword argument that is a finite number; an integer has 64 bits."""
    return (isinstance(value, (int, float)) and not isinstance(value, bool)
            and abs(value) < (1 << 63 if isinstance(value, int) else math.inf))


@dataclass(frozen=True)
class Result:
    """What a program returns in one place: a value, or a pytree. `values` are its leaves, in order."""
    tree: Tree
    values: tuple[str, ...]

    def leaves(self) -> list[tuple[str, Spec]]:
        return [(v, spec) for v, (_, spec) in zip(self.values, leaves("", self.tree))]


@dataclass(frozen=True)
class Program:
    """Arguments (name, spec or Struct), steps, results.

    `explicit`: its specs are types, nothing is left to complete.
    unmet: (dim, axis, line) where another dim had the axis; no line: no value has the dim.
    unfused: what is like a fusion and is none, and why.  layout: of a body that has one of its own.
    """
    name: str
    args: tuple[tuple[str, Tree], ...]
    steps: tuple[Step, ...]
    results: tuple[Result, ...]
    explicit: bool = False
    where: Where | None = field(default=None, compare=False)
    unmet: tuple[tuple[str, str, str], ...] = field(default=(), compare=False)
    unfused: tuple[str, ...] = field(default=(), compare=False)
    layout: Layout | None = field(default=None, compare=False)

    def arg_leaves(self) -> list[tuple[str, Spec]]:
        return [*self._arg_leaves]

    @cached_property
    def _arg_leaves(self) -> list[tuple[str, Spec]]:
        return [leaf for name, tree in self.args for leaf in leaves(name, tree)]

    def result_leaves(self) -> list[tuple[str, Spec]]:
        return [leaf for r in self.results for leaf in r.leaves()]

    def types(self) -> dict[str, Spec]:
        """The spec of every value."""
        out = dict(self._arg_leaves)
        for step in self.steps:
            out.update(zip(step.outputs, step.outs))
        return out

    def names(self) -> set[str]:
        """What no new value may be called: every value, and every pytree that some are leaves of."""
        return {name for value in self.types() for name in (value, value.split(".")[0])}

    def __str__(self) -> str:
        return show(self)

    def __repr__(self) -> str:
        return str(self).rstrip()       # a debugger ends the line itself

    def bodies(self) -> list[Program]:
        """Every sub-program, innermost first, each once."""
        found: list[Program] = []
        for step in self.steps:
            for body in step.bodies:
                found += [b for b in (*body.bodies(), body) if b not in found]
        return found


@dataclass(frozen=True)
class Scan:
    """A scan's operands and results by what they are to its body: (name in the body, value outside).

    carries: what each round takes from the one before.  stacked: what each takes a slice of, along `dim`.
    constants: what all take.
    carried: the carries after the last round.  made: what every round makes, stacked along `dim`.
    stages: of a pipeline, over how many ranks `dim` is split: each makes its rounds and sends the carries on.
    """
    dim: str
    reverse: bool
    carries: tuple[tuple[str, str], ...]
    stacked: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, str], ...]
    carried: tuple[tuple[str, str], ...]
    made: tuple[tuple[str, str], ...]
    stages: int = 0

    @classmethod
    def of(cls, step: Step) -> Scan:
        (body,), options = step.bodies, step.options
        taken, given = (tuple(step.passed(body)),
                        tuple(zip((name for name, _ in body.result_leaves()), step.outputs)))
        first = options.get("carries", 1)
        last = first + options["stacked"]
        return cls(options["dim"], options.get("reverse", False), taken[:first], taken[first:last],
                   taken[last:], given[:first], given[first:], options.get("stages", 0))

    @staticmethod
    def attrs(dim: str, stacked: int, carries: int = 1, reverse: bool = False,
              stages: int = 0) -> tuple[tuple[str, Any], ...]:
        """The attributes of a scan over `dim` with so many carries and stacked tensors."""
        rare = (("carries", carries, 1), ("reverse", reverse, False), ("stages", stages, 0))
        said = ((name, value) for name, value, common in rare if value != common)
        return tuple(sorted([("dim", dim), ("stacked", stacked), *said]))


# -- printing ------------------------------------------------------------------------------------------------

INFIX = {"add": "+", "sub": "-", "mul": "*", "div": "/"}


def show(program: Program) -> str:
    """The program as source text: classes of its pytrees, bodies of its scans, then the function."""
    functions = [*program.bodies(), program]
    classes: dict[str, Struct] = {}
    others = {_function_name(f, functions) for f in functions} | _called(functions)
    for f in functions:
        for tree in (*(t for _, t in f.args), *(r.tree for r in f.results)):
            if isinstance(tree, Struct):
                _collect(tree, classes, others)
    return "\n\n\n".join([*(_show_class(s, classes) for s in classes.values()),
                          *(_show_function(f, classes, functions) for f in functions)]) + "\n"


def _called(functions: Sequence[Program]) -> set[str]:
    """The names of the ops that a text calls: nothing of its own is printed under one."""
    return {s.op.name for f in functions for s in f.steps}


def _collect(struct: Struct, classes: dict[str, Struct], others: set[str]) -> None:
    one = struct.slice() if struct.stacked else struct
    for _, sub in one.fields:
        if isinstance(sub, Struct):
            _collect(sub, classes, others)
    name, n = one.name, 1
    while (name in others or name in classes
           and (classes[name].fields, classes[name].name) != (one.fields, one.name)):
        n += 1
        name = f"{one.name}__{n}"
    classes.setdefault(name, one)


def _class_name(struct: Struct, classes: dict[str, Struct]) -> str:
    one = struct.slice() if struct.stacked else struct
    return next(n for n, s in classes.items() if s.fields == one.fields and s.name == one.name)


def _show_class(struct: Struct, classes: dict[str, Struct]) -> str:
    lines = [f"class {next(n for n, s in classes.items() if s is struct)}(Params):"]
    for field_name, sub in struct.fields:
        if isinstance(sub, Struct):
            kind, inner = _class_name(sub, classes), leaves("", sub)
            stack = inner[0][1].dims[0] if inner else sub.stacked
            lines.append(f'    {field_name}: {kind} = '
                         + (f'stacked("{stack}", {kind})' if sub.stacked else f"nested({kind})"))
        else:
            lines.append(f'    {field_name}: Tensor = param("{sub}")')
    return "\n".join(lines if len(lines) > 1 else [*lines, "    pass"])


def _show_function(program: Program, classes: dict[str, Struct], functions: list[Program]) -> str:
    def side(trees: list[Tree]) -> str:
        return ", ".join("*" if isinstance(t, Struct) else str(t) for t in trees)
    signature = f"{side([t for _, t in program.args])} -> {side([r.tree for r in program.results])}".lstrip()
    args = (
        ", ".join(f"{n}: {_class_name(t, classes)}" if isinstance(t, Struct) else n for n, t in program.args))
    lines = [f'@sharded("{signature}"{", layout=EXPLICIT" if program.explicit else ""})',
             f"def {_function_name(program, functions)}({args}):"]
    lines += ["    " + _show_step(step, classes, functions, program) for step in program.steps]
    results = ", ".join(_show_tree(r.tree, r.values, classes, program) for r in program.results)
    return "\n".join([*lines, f"    return {results}"])


def _function_name(program: Program, functions: list[Program]) -> str:
    at = ([f for f in functions if f.name == program.name].index(program)
          + (program.name in _called(functions)))
    return program.name + (f"__{at + 1}" if at else "")


def _show_tree(tree: Tree, values: tuple[str, ...], classes: dict[str, Struct], here: Program) -> str:
    """The value, or the pytree: by its own name where the values are all its leaves, else put together."""
    if isinstance(tree, Spec):
        return values[0]
    paths = [path for path, _ in leaves("", tree)]
    root = values[0][:len(values[0]) - len(paths[0])] if values else ""
    own = [value for value in here.types() if value.startswith(f"{root}.")]
    if root and [root + path for path in paths] == [*values] == own:
        return root
    fields = (tree.slice() if tree.stacked else tree).fields
    parts = zip(fields, _show_trees([sub for _, sub in fields], values, classes, here))
    return f"{_class_name(tree, classes)}({', '.join(f'{name}={text}' for (name, _), text in parts)})"


def _show_step(step: Step, classes: dict[str, Struct], functions: list[Program], here: Program) -> str:
    op, options = step.op, step.options
    if step.bodies:
        return _WITH_BODIES[op.name](step, classes, functions, here)
    target = ", ".join(step.outputs)
    if op.name in INFIX and len(step.inputs) == 2:
        return f"{target} = {step.inputs[0]} {INFIX[op.name]} {step.inputs[1]}"
    if op.name in ("scale", "shift"):
        return f"{target} = {step.inputs[0]} {'*' if op.name == 'scale' else '+'} {options['by']!r}"
    callee = [f"{op.function.__module__}.{op.function.__qualname__}"] if op.function else []
    parts = (([f'"{step.text}"'] if op.takes_text else []) + callee + [*step.inputs]
             + [f"{k}={v!r}" for k, v in step.attrs])
    return f"{target} = {op.name}({', '.join(parts)})"


def _show_cond(step: Step, classes: dict[str, Struct], functions: list[Program], here: Program) -> str:
    body, chosen = step.bodies[0], [_function_name(b, functions) for b in step.bodies]
    args = _show_trees([tree for _, tree in body.args], [v for _, v in step.passed(body)], classes, here)
    return f"{_show_targets(step, classes, here)} = cond({', '.join([step.inputs[0], *chosen, *args])})"


def _show_scan(step: Step, classes: dict[str, Struct], functions: list[Program], here: Program) -> str:
    parts, body = Scan.of(step), step.bodies[0]
    trees = [tree for _, tree in body.args]
    starts = accumulate((len(leaves("", tree)) for tree in trees), initial=0)
    shown = list(zip(starts, _show_trees(trees, [value for _, value in step.passed(body)], classes, here)))
    first = len(parts.carries)
    last = first + len(parts.stacked)
    carries, stacked = ([text for start, text in shown if low <= start < high]
                        for low, high in ((0, first), (first, last)))
    operands = [_function_name(body, functions), carries[0] if first == 1 else f"({', '.join(carries)})",
                f"({', '.join(stacked)},)", *(text for start, text in shown if start >= last),
                *(f"{k}={step.options[k]}" for k in ("reverse", "stages") if k in step.options)]
    return f"{_show_targets(step, classes, here)} = scan({', '.join(operands)})"


def _show_fused(step: Step, classes: dict[str, Struct], functions: list[Program], here: Program) -> str:
    operands = [_function_name(step.bodies[0], functions), *step.inputs]
    return f"{', '.join(step.outputs)} = fused({', '.join(operands)})"


_WITH_BODIES = {"scan": _show_scan, "cond": _show_cond, "fused": _show_fused}


def _show_targets(step: Step, classes: dict[str, Struct], here: Program) -> str:
    return ", ".join(_show_trees([r.tree for r in step.bodies[0].results], step.outputs, classes, here))


def _show_trees(trees: Sequence[Tree], values: Sequence[str], classes: dict[str, Struct],
                here: Program) -> list[str]:
    """Each of `trees`, whose leaves are `values`, one tree's after the other's."""
    left = iter(values)
    return [_show_tree(tree, tuple(islice(left, len(leaves("", tree)))), classes, here) for tree in trees]
