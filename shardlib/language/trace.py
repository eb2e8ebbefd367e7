"""Tracing: run a sharded function once on names instead of tensors, and keep what it did as a Program.

>>> f = Function(lambda x, y: (x + y) * 2, "B T D, D -> B T D")
>>> [(step.op.name, step.text) for step in trace(f).steps]
[('add', 'B T D, D -> B T D'), ('scale', 'B T D -> B T D')]

Every tensor argument and result has a spec in the signature; `*` is a pytree of `Params` (its annotation, or
an instance given to `trace`, says which). Keyword-only arguments are static: plain Python values, part of the
program. A `@sharded` function called inside another becomes part of its program. Refused: dims that are not
those of the value, the wrong number of operands, values of another trace.
"""
from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any, NoReturn

from torch import Tensor

from shardlib.errors import SpecError
from shardlib.language.arguments import argument_trees
from shardlib.language.calls import check_count, check_keywords, check_static, check_tree, misuse, what
from shardlib.language.held import TABLE as HELD
from shardlib.language.moves import RESHARD, TABLE
from shardlib.language.signature import Signature
from shardlib.language.value import ACTIVE, Value, active, apply, check_dims, specs_of
from shardlib.layout import Layout
from shardlib.params import Params, fill, leaf_values, struct
from shardlib.program import Op, Program, Result, Step
from shardlib.source import Where, is_ours, user_frame, user_line
from shardlib.spec import Spec, heading, nameable
from shardlib.tree import Struct

RESERVED = (*TABLE, *HELD, "scan", "fused", "sharded", "EXPLICIT", "Params", "Tensor", "param", "stacked",
            "nested")
"""Names that printed programs use."""


class Function(Signature):
    """A function with a signature of specs.

    Inside of a trace, calling it makes it part of the traced program.
    """

    def __init__(self, fn: Callable, signature: str, layout: Layout | None = None) -> None:
        super().__init__(fn, signature)
        self.layout = layout

    def __call__(self, *args: Any, **static: Any) -> Any:
        tracer = ACTIVE.get()
        if isinstance(tracer, Tracer):
            return _inline(tracer, self, args, static)
        return self.outside(args, static)

    def outside(self, args: Sequence[Any], static: dict[str, Any]) -> Any:
        """What a call on tensors does; the executors say."""
        raise SpecError(f"{self.__name__} was called outside of a @sharded function")


class Tracer:
    """Records steps.

    Values are numbered; names are given at the end, from the user's variables where it has them.
    """

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.specs: list[Spec] = []
        self.names: dict[int, tuple[str, str, Any]] = {}  # value -> variable, path in it, the object it holds
        self.num_args = 0
        self.layout: Layout | None = None

    @contextmanager
    def under(self, f: Function) -> Iterator[None]:
        """The layout of `f`, if it has one of its own, is in force."""
        around = self.layout
        self.layout = around if f.layout is None else f.layout
        try:
            yield
        finally:
            self.layout = around

    def new(self, spec: Spec, name: str | None = None) -> Value:
        self.specs.append(spec)
        if name:
            self.names[len(self.specs) - 1] = (name, "", name)
        return Value(self, len(self.specs) - 1, spec)

    def record(self, op: Op, values: Sequence[Value], ins: Sequence[Spec], outs: Sequence[Spec],
               attrs: dict[str, Any], body: Program | None, where: Where | None, said: tuple[str, ...] = (),
               called: str = "", orelse: Program | None = None) -> tuple[Value, ...]:
        made = tuple(self.new(s) for s in outs)
        self.steps.append(Step(op, tuple(ins), tuple(outs), tuple(str(v.id) for v in values),
                               tuple(str(v.id) for v in made), tuple(sorted(attrs.items())), body, orelse,
                               where, layout=self.layout, said=said, called=called))
        if op.keywords:
            check_keywords(self.steps[-1])
        return made

    def call(self, op: Op, operands: Sequence[Any], text: str | None, ins: Sequence[Spec] | None,
             outs: Sequence[Spec] | None, attrs: dict[str, Any], body: Program | None = None,
             orelse: Program | None = None, called: str = "") -> Any:
        """Record one call, as `apply` has it. Its results."""
        frame = user_frame()
        said = self.notice(frame)
        for i, x in enumerate(operands):
            if not isinstance(x, Value):
                raise SpecError(f"{op.name}: operand {i + 1} is {what(x)}, no traced value; make it an "
                                "argument of the @sharded function")
            if x.tracer is not self:
                name = next((n for n, value in frame.f_locals.items() if value is x), f"operand {i + 1}")
                raise SpecError(
                    f"{op.name}: {name} belongs to another trace; a function takes all it uses as arguments")
        names = tuple(said.get(v.id, "") for v in operands)
        ins, outs = specs_of(op, operands, text, ins, outs, attrs, names)
        made = self.record(op, operands, ins, outs, attrs, body, Where.of(frame), names, called, orelse)
        return made if len(made) != 1 else made[0]

    def notice(self, frame: Any) -> dict[int, str]:
        """Name the values that the user's variables in `frame` hold. What they are called there, by value.

        A field of a pytree that holds it gives a value its own name: a program assigns to names alone.
        """
        said: dict[int, str] = {}
        for name, value in frame.f_locals.items():
            for suffix, v in _values(value) if nameable(name) else ():
                if v.tracer is self:
                    said.setdefault(v.id, name + suffix)
                    root, field, tree = self.names.get(v.id, ("", "", v))
                    if v.id >= self.num_args and not root and suffix.endswith(field):
                        self.names[v.id] = (suffix.removesuffix(field).split(".")[-1] or name, field, tree)
        return said

    def group(self, tree: Params) -> None:
        """The leaves of `tree` are known as its fields, whatever its own name becomes."""
        for path, v in _values(tree):
            self.names[v.id] = ("", path, tree)

    def finish(self, name: str, args: Sequence[tuple[str, Any]], results: Sequence[tuple[str, Any]],
               where: Where | None) -> Program:
        """The program, with every value under a unique, readable name."""
        taken = {*(n for n, _ in args), *RESERVED, *(s.op.name for s in self.steps)}
        roots: dict[int, str] = {}
        final: dict[str, str] = {}
        for ident in range(len(self.specs)):
            root, suffix, held = self.names.get(ident, ("", "", None))
            if ident < self.num_args:
                final[str(ident)] = root + suffix
                continue
            key = id(held) if held is not None else -1 - ident
            if key not in roots:
                roots[key] = fresh(root, taken)
            final[str(ident)] = roots[key] + suffix
        steps = tuple(
            s.having(inputs=tuple([final[i] for i in s.inputs]), outputs=tuple([final[i] for i in s.outputs]))
            for s in self.steps)
        return Program(name if heading(name) and name not in RESERVED else "f", tuple(args), steps,
                       tuple(_result(tree, value, final) for tree, value in results), where=where)


class Executor(Tracer, ABC):
    """Whose `call` executes an op, in place of recording it (`shardlib.run.step`)."""

    @abstractmethod
    def whole(self, value: Value) -> Tensor:
        """The scalar `value`, with what it owes paid."""

    @abstractmethod
    def converted(self, value: Value, text: Spec) -> Value:
        """`value` as one that stands alone, `text` being its spec."""

    @abstractmethod
    def scan(self, f: Function, carries: tuple[Value, ...], stacks: Sequence[Any], constants: Sequence[Any],
             static: dict[str, Any]) -> Any:
        """Run the body of a scan, once for each slice of the stacked."""


def fresh(base: str, taken: set[str]) -> str:
    """A name that is not yet in `taken`, like `base`; it is added."""
    name = (base if nameable(base) and base not in taken
            else next(n for i in count(2 if base else 1) if (n := f"{base or 'v'}{i}") not in taken))
    taken.add(name)
    return name


def _values(value: Any) -> list[tuple[str, Value]]:
    if isinstance(value, Value):
        return [("", value)]
    if isinstance(value, Params):
        return [(path, v) for path, v in leaf_values(value, "") if isinstance(v, Value)]
    return []


def tensors(op: str, tree: Any) -> list[Value]:
    """Those of an operand of a scan or a cond: a traced value, or a pytree of them."""
    found = [v for _, v in leaf_values(tree, "")] if isinstance(tree, Params) else [tree]
    if wrong := [v for v in found if not isinstance(v, Value)]:
        raise SpecError(f"{op}: {what(wrong[0])} is neither a tensor of the traced function nor a Params")
    return found


def _result(tree: Any, value: Any, final: dict[str, str]) -> Result:
    return Result(tree, tuple(final[str(v.id)] for _, v in _values(value)))


def trace(f: Function, args: Sequence[Any] = (), static: dict[str, Any] | None = None) -> Program:
    """The Program of `f`, as written: nothing completed.

    `args`: instances that say which pytrees it takes, where annotations do not.
    """
    return trace_results(f, args, static)[0]


def trace_results(f: Function, args: Sequence[Any] = (),
                  static: dict[str, Any] | None = None) -> tuple[Program, tuple[Any, ...]]:
    """The Program of `f`, and what it returned: Values, and pytrees of them."""
    check_static(f, static or {})
    tracer, hints, trees = Tracer(), f.hints(), argument_trees(f, args)
    values = [_argument(tracer, name, tree, hints.get(name), args[i] if i < len(args) else None)
              for i, (name, tree) in enumerate(trees)]
    tracer.num_args = len(tracer.specs)
    try:
        with active(tracer):
            results = f.fn(*values, **(static or {}))
    except (SpecError, TypeError, ValueError) as error:
        raise_at_user_line(error)
    given = _results(f, results)
    return tracer.finish(f.__name__, trees, given, f.definition), tuple(value for _, value in given)


def raise_at_user_line(error: SpecError | TypeError | ValueError) -> NoReturn:
    """What came out of a user's function, with the line there;
    as a SpecError, where it was a wrong call of one of ours."""
    said = error if isinstance(error, SpecError) else misuse(error, is_ours)
    if said is None:
        raise error
    raise said.at(user_line(error)) from (error.__cause__ if said is error else error)


def _argument(tracer: Tracer, name: str, tree: Any, hint: Any, given: Any) -> Any:
    if isinstance(tree, Spec):
        return tracer.new(tree, name)
    specs = dict(tree.leaves(name))
    like = given if isinstance(given, Params) else hint
    if isinstance(given, Struct):
        return _fill_struct(tracer, hint, tree, name)
    return fill(like, name, lambda path: tracer.new(specs[path], path))


def _fill_struct(tracer: Tracer, cls: type[Params], tree: Struct, path: str) -> Any:
    kinds = {f.name: f.metadata["of"] for f in dataclasses.fields(cls) if "of" in f.metadata}
    return cls(**{n: _fill_struct(tracer, kinds[n], sub, f"{path}.{n}") if isinstance(sub, Struct)
                  else tracer.new(sub, f"{path}.{n}") for n, sub in tree.fields})


def _results(f: Function, results: Any) -> list[tuple[Any, Any]]:
    try:
        return _checked_results(f, results)
    except SpecError as error:
        raise error.at(f.definition) from None


def _checked_results(f: Function, results: Any) -> list[tuple[Any, Any]]:
    given = results if isinstance(results, tuple) else (results,)
    if len(given) != len(f.outs):
        raise SpecError(f'{f.__name__}: it returns {len(given)}, its signature "{f.signature}" names '
                        f'{len(f.outs)} results')
    out: list[tuple[Any, Any]] = []
    for spec, value in zip(f.outs, given):
        if spec is None:
            if not isinstance(value, Params):
                raise SpecError(f'{f.__name__}: result "*" is a Params pytree, not {type(value).__name__}')
            for path, leaf in leaf_values(value, ""):
                if not isinstance(leaf, Value):
                    raise SpecError(f'{f.__name__}: {path[1:]} of result "*" is {what(leaf)}, not a tensor '
                                    'of the traced function')
            out.append((_types(value), value))
        else:
            check_dims(f"{f.__name__}: the result", spec, value)
            out.append((spec, value))
    return out


def _types(tree: Params) -> Struct:
    """The specs of a pytree of traced values."""
    texts = result_texts(tree, {path: v.spec for path, v in leaf_values(tree, "")})
    return struct(fill(tree, "", lambda path: texts[path]))


def result_texts(tree: Params, texts: Mapping[str, Spec]) -> dict[str, Spec]:
    """The spec of each leaf of a pytree that is returned: its class's, where the value says dims alone."""
    said = dict(struct(tree).leaves(""))
    return {path: said[path] if said[path].labels == text.labels and text.plain else text
            for path, text in texts.items()}


def _inline(tracer: Tracer, f: Function, args: Sequence[Any], static: dict[str, Any]) -> Any:
    check_count(f, args)
    check_static(f, static)
    hints = f.hints()
    for name, spec, given in zip(f.arg_names, f.ins, args):
        if spec is None:
            check_tree(f, name, given, hints.get(name))
    with tracer.under(f):
        passed = [a if spec is None else _pass(f"{f.__name__}: the argument {n}", spec, a, f.__name__)
                  for n, spec, a in zip(f.arg_names, f.ins, args)]
        results = f.fn(*passed, **static)
        given = _results(f, results)
        out = tuple(v if isinstance(v, Params) else apply(RESHARD, (v,), ins=(s,), outs=(s,),
                                                          called=f"{f.__name__}, result") for s, v in given)
    return out if isinstance(results, tuple) else out[0]


def _pass(who: str, spec: Spec, value: Any, called: str) -> Value:
    check_dims(who, spec, value)
    return apply(RESHARD, (value,), ins=(spec,), outs=(spec,), called=called)
