"""Programs: what a traced function is, a list of typed steps.

A `Program` is in single-assignment form: every value has one name, is made by one step (or is an argument), and every
step knows the specs of what it takes and gives. It sits at the level of einsum, rms_norm, all_reduce; never below.
Printed, it is Python: in the explicit style once it is completed. `shardlib.parser.parse_program` reads that back.
Programs compare by what they mean: source lines and reasons are left out.
"""
from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Callable, Iterator, Mapping, Sequence

from shardlib.errors import SpecError
from shardlib.rules import Rule
from shardlib.spec import Spec

if TYPE_CHECKING:
    from shardlib.emit import Emitter
    from shardlib.layout import Layout


@dataclass(frozen=True)
class Where:
    """A line of the user's source, and the instruction that was running (`code.co_positions()` says which expression it is)."""
    file: str
    line: int
    code: Any = field(default=None, compare=False, repr=False)
    at: int = field(default=0, compare=False, repr=False)

    @classmethod
    def of(cls, frame: Any) -> Where:
        return cls(frame.f_code.co_filename, frame.f_lineno, frame.f_code, frame.f_lasti)

    def __str__(self) -> str:
        return f"{self.file.rsplit('/', 1)[-1]}:{self.line}"


@dataclass(frozen=True, eq=False)
class Op:
    """One operation: its typing rule, what it does on local tensors, and its derivative. Compared by identity.

    keywords: its keyword arguments: name -> whether a value may be one; None stands for a missing one.

    rule(step):  the Rule of this call.
    emit(e, step, args): the Python expression that runs it on one rank's tensors (a tuple's, for several results).
    infer(ins, attrs): the results' dims, for an op that is called without a spec string.
    vjp(b, step, cotangents): the cotangents of the operands, built with the grad builder `b`; None where there is none.
    moves:       it changes types and keeps the value: a conversion.
    index:       operands that hold integers or masks, outside linearity and without cotangent.
    updates:     the operand whose buffer the result may reuse, if any.
    distribute(b, step, x): the same over pieces, for an operand split along the dim the op runs over.
    constant:    its results have no gradient, and none is missed.
    statistic:   over a split dim, declarative text lets it owe in at least float32, and rounds what was settled.
    joins:       it acts on the last dim of its first operand, alike for all others: operands joined along those may share a call.
    asserted:    its types are those of its text, unchecked (`local`); `function` is what it runs.
    takes:       what each operand may hold, the last for all further ones: "any", "number" (no mask), "float", "index", "mask"; by
                 default the operands in `index` hold indices and the others any.
    reads(dtypes, attrs): the dtypes in which the operands are read; by default the widest of those that are no index (`shardlib.dtypes`).
    dtype(dtypes, attrs): the results' dtypes; by default that in which the operands are read.
    promotes:    torch itself reads the operands so, those without dims excepted.
    reference(d, *xs): what it means, in float64 by the names of its dims, another way than `emit` has it: see `shardlib.reference`.
    """
    name: str
    rule: Callable[[Step], Rule]
    emit: Callable[[Emitter, Step, list[str]], str] | None = None
    infer: Callable[..., tuple[Spec, ...]] | None = None
    vjp: Callable | None = None
    moves: bool = False
    index: tuple[int, ...] = ()
    updates: int | None = None
    takes: tuple[str, ...] = ()
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

    def __repr__(self) -> str:
        return f"Op({self.name})"


@dataclass(frozen=True)
class Step:
    """One op applied: `outputs = op(inputs)`, with the specs of both sides as text or, once completed, as types."""
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
    said: tuple[str, ...] = field(default=(), compare=False)    # the user's variable for each operand, "" for an expression
    called: str = field(default="", compare=False)              # the @sharded function whose call this step is part of

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.attrs)

    @property
    def bodies(self) -> tuple[Program, ...]:
        """The sub-programs: of a scan one, of a cond two."""
        return tuple(b for b in (self.body, self.orelse) if b is not None)

    def rewritten(self, f: Callable[[Program], Program]) -> Step:
        """The step with `f` applied to its sub-programs."""
        return replace(self, body=f(self.body) if self.body else None, orelse=f(self.orelse) if self.orelse else None) if self.body else self

    @property
    def text(self) -> str:
        return f"{', '.join(map(str, self.ins))} -> {', '.join(map(str, self.outs))}"


@dataclass(frozen=True)
class Struct:
    """The shape of a pytree argument: a Params class by name, its fields each a Spec or a Struct; absent ones are left out.

    `stacked`: the leading dim along which many are stacked; it stands in the specs of all fields.
    """
    name: str
    fields: tuple[tuple[str, Spec | Struct], ...]
    stacked: str = ""

    def leaves(self, path: str) -> Iterator[tuple[str, Spec]]:
        for name, sub in self.fields:
            if isinstance(sub, Struct):
                yield from sub.leaves(f"{path}.{name}")
            else:
                yield f"{path}.{name}", sub

    def map(self, f: Callable[[Spec], Spec]) -> Struct:
        return replace(self, fields=tuple((n, s.map(f) if isinstance(s, Struct) else f(s)) for n, s in self.fields))


    def slice(self) -> Struct:
        """One of the stacked."""
        return replace(self.map(lambda spec: replace(spec, dims=spec.dims[1:])), stacked="")


def number(value: Any) -> bool:
    """A keyword argument that is a finite number; an integer has 64 bits."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < (1 << 63 if isinstance(value, int) else math.inf)


def check_keywords(step: Step) -> None:
    """SpecError unless the step's keyword arguments are those that its op takes."""
    kinds, given = step.op.keywords, step.options
    if (wrong := next((n for n in (*kinds, *given) if n not in kinds or not kinds[n](given.get(n))), None)) is not None:
        raise SpecError(f"{step.op.name}: the keyword argument {wrong} is missing" if wrong not in given else
                        f"{step.op.name}: it has no keyword argument {wrong}" if wrong not in kinds else
                        f"{step.op.name}: {wrong} is {given[wrong]!r}")


Tree = Spec | Struct


def leaves(name: str, tree: Tree) -> list[tuple[str, Spec]]:
    """(path, spec) of every tensor in the argument `name`."""
    return list(tree.leaves(name)) if isinstance(tree, Struct) else [(name, tree)]


@dataclass(frozen=True)
class Result:
    """What a program returns in one place: a value, or a pytree. `values` are its leaves, in order."""
    tree: Tree
    values: tuple[str, ...]

    def leaves(self) -> list[tuple[str, Spec]]:
        return [(v, spec) for v, (_, spec) in zip(self.values, leaves("", self.tree))]


@dataclass(frozen=True)
class Program:
    """Arguments (name, spec or Struct), steps, results. `explicit`: its specs are types, nothing is left to complete.

    unmet: (dim, axis, line) where the layout would have split a dim over an axis that another dim had.
    """
    name: str
    args: tuple[tuple[str, Tree], ...]
    steps: tuple[Step, ...]
    results: tuple[Result, ...]
    explicit: bool = False
    where: Where | None = field(default=None, compare=False)
    unmet: tuple[tuple[str, str, str], ...] = field(default=(), compare=False)

    def arg_leaves(self) -> list[tuple[str, Spec]]:
        return [leaf for name, tree in self.args for leaf in leaves(name, tree)]

    def result_leaves(self) -> list[tuple[str, Spec]]:
        return [leaf for r in self.results for leaf in r.leaves()]

    def types(self) -> dict[str, Spec]:
        """The spec of every value."""
        out = dict(self.arg_leaves())
        for step in self.steps:
            out.update(zip(step.outputs, step.outs))
        return out

    def __str__(self) -> str:
        return show(self)

    def bodies(self) -> list[Program]:
        """Every sub-program, innermost first, each once."""
        found: list[Program] = []
        for step in self.steps:
            for body in step.bodies:
                found += [b for b in (*body.bodies(), body) if b not in found]
        return found


# -- printing ----------------------------------------------------------------------------------------------------------

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
    return "\n\n\n".join([*(_show_class(s, classes) for s in classes.values()), *(_show_function(f, classes, functions) for f in functions)]) + "\n"


def _called(functions: Sequence[Program]) -> set[str]:
    """The names of the ops that a text calls: nothing of its own is printed under one."""
    return {s.op.name for f in functions for s in f.steps}


def _collect(struct: Struct, classes: dict[str, Struct], others: set[str]) -> None:
    one = struct.slice() if struct.stacked else struct
    for _, sub in one.fields:
        if isinstance(sub, Struct):
            _collect(sub, classes, others)
    name, n = one.name, 1
    while name in others or name in classes and (classes[name].fields, classes[name].name) != (one.fields, one.name):
        n += 1
        name = f"{one.name}__{n}"
    classes.setdefault(name, one)


def _class_name(struct: Struct, classes: dict[str, Struct]) -> str:
    one = struct.slice() if struct.stacked else struct
    return next(n for n, s in classes.items() if s.fields == one.fields and s.name == one.name)


def _show_class(struct: Struct, classes: dict[str, Struct]) -> str:
    name = next(n for n, s in classes.items() if s is struct)
    lines = [f"class {name}(Params):"]
    for field_name, sub in struct.fields:
        if isinstance(sub, Struct):
            kind = _class_name(sub, classes)
            lines.append(f'    {field_name}: {kind} = ' + (f'stacked("{sub.stacked}", {kind})' if sub.stacked else f"nested({kind})"))
        else:
            lines.append(f'    {field_name}: Tensor = param("{sub}")')
    return "\n".join(lines if len(lines) > 1 else [*lines, "    pass"])


def _show_function(program: Program, classes: dict[str, Struct], functions: list[Program]) -> str:
    def side(trees: list[Tree]) -> str:
        return ", ".join("*" if isinstance(t, Struct) else str(t) for t in trees)
    signature = f"{side([t for _, t in program.args])} -> {side([r.tree for r in program.results])}"
    args = ", ".join(f"{n}: {_class_name(t, classes)}" if isinstance(t, Struct) else n for n, t in program.args)
    lines = [f'@sharded("{signature}"{", layout=EXPLICIT" if program.explicit else ""})', f"def {_function_name(program, functions)}({args}):"]
    for step in program.steps:
        lines.append("    " + _show_step(step, classes, functions))
    lines.append("    return " + ", ".join(_show_tree(r.tree, r.values, classes) for r in program.results))
    return "\n".join(lines)


def _function_name(program: Program, functions: list[Program]) -> str:
    same = [f for f in functions if f.name == program.name]
    at = same.index(program) + (program.name in _called(functions))
    return program.name + (f"__{at + 1}" if at else "")


def _show_tree(tree: Tree, values: tuple[str, ...], classes: dict[str, Struct]) -> str:
    """The value, or the pytree: by its own name where the values are all its leaves, else put together."""
    if isinstance(tree, Spec):
        return values[0]
    paths = [path for path, _ in tree.leaves("")]
    root = values[0][:len(values[0]) - len(paths[0])] if values else ""
    if root and all(v == root + p for v, p in zip(values, paths)):
        return root
    parts, at = [], 0
    for name, sub in tree.fields:
        n = len(leaves("", sub))
        parts.append(f"{name}={_show_tree(sub, values[at:at + n], classes)}")
        at += n
    return f"{_class_name(tree, classes)}({', '.join(parts)})"


def _show_step(step: Step, classes: dict[str, Struct], functions: list[Program]) -> str:
    op, options = step.op, step.options
    if step.orelse is not None:
        return _show_cond(step, classes, functions)
    if step.body is not None:
        return _show_scan(step, classes, functions)
    target = ", ".join(step.outputs)
    if op.name in INFIX and len(step.inputs) == 2:
        return f"{target} = {step.inputs[0]} {INFIX[op.name]} {step.inputs[1]}"
    if op.name in ("scale", "shift"):
        return f"{target} = {step.inputs[0]} {'*' if op.name == 'scale' else '+'} {options['by']!r}"
    callee = [f"{op.function.__module__}.{op.function.__qualname__}"] if op.function else []
    parts = ([f'"{step.text}"'] if op.takes_text else []) + callee + [*step.inputs] + [f"{k}={v!r}" for k, v in step.attrs]
    return f"{target} = {op.name}({', '.join(parts)})"


def _show_cond(step: Step, classes: dict[str, Struct], functions: list[Program]) -> str:
    args, at = [], 1
    for _, tree in step.body.args:
        n = len(leaves("", tree))
        args.append(_show_tree(tree, step.inputs[at:at + n], classes))
        at += n
    targets, at = [], 0
    for r in step.body.results:
        targets.append(_show_tree(r.tree, step.outputs[at:at + len(r.values)], classes))
        at += len(r.values)
    chosen = ", ".join(_function_name(b, functions) for b in step.bodies)
    return f"{', '.join(targets)} = cond({', '.join([step.inputs[0], chosen, *args])})"


def _show_scan(step: Step, classes: dict[str, Struct], functions: list[Program]) -> str:
    body, count = step.body, step.options["stacked"]
    at, groups = 0, []
    for _, tree in body.args:
        n = len(leaves("", tree))
        groups.append((at, _show_tree(tree, step.inputs[at:at + n], classes)))
        at += n
    stacked = [g for i, g in groups if 1 <= i <= count]
    rest = "".join(f", {g}" for i, g in groups if i > count)
    targets, at = [], 0
    for r in body.results:
        targets.append(_show_tree(r.tree, step.outputs[at:at + len(r.values)], classes))
        at += len(r.values)
    options = "".join(f", {k}={v!r}" for k, v in step.attrs if k not in ("dim", "stacked"))
    return f"{', '.join(targets)} = scan({_function_name(body, functions)}, {groups[0][1]}, ({', '.join(stacked)},){rest}{options})"
