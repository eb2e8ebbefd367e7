"""The step executor: a sharded function run line by line on this rank's tensors, for a debugger.

The user's own Python runs; every op is typed, completed, converted and executed at once, so that a breakpoint
in the function sees real values: `x.spec` is the type, `x.local` this rank's tensor. What an op needs (its
conversions, its local code) is worked out once for each set of operand types, and kept.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from shardlib.compiler.complete import complete_step
from shardlib.compiler.sizes import Sizes, bound
from shardlib.distributed.runtime import Runtime
from shardlib.dtypes import ITEMSIZE, changed, step_dtypes, value_dtypes
from shardlib.errors import SpecError
from shardlib.language.arguments import argument_trees
from shardlib.language.calls import check_given, check_tensors
from shardlib.language.held import BROADCAST
from shardlib.language.moves import RESHARD
from shardlib.language.rearrange import RENAME
from shardlib.language.trace import Executor, Function, raise_at_user_line, result_texts
from shardlib.language.value import Value, active, specs_of
from shardlib.layout import EXPLICIT, Layout
from shardlib.lowering.emit import Emitter
from shardlib.lowering.load import load
from shardlib.params import Params, fill, leaf_values
from shardlib.program import Op, Program, Step
from shardlib.run.failures import Lines, explain_failure
from shardlib.run.surroundings import refuse_gradients, without_autocast
from shardlib.source import Where, user_frame
from shardlib.spec import Dim, Owed, Spec
from shardlib.tree import leaves

KNOWN = frozenset(getattr(torch, name) for name in ITEMSIZE)
CONSTANT = -2    # the id of values made of nothing, which are made again as they are wanted


def _place() -> tuple[Any, int]:
    """The user's call that is running: what looks up an index says it in its error."""
    frame = user_frame()
    return frame.f_code, frame.f_lasti


class Stepper(Executor):
    """Executes each op as it is called. `recipes`: what was worked out before, at the same sizes."""

    def __init__(self, runtime: Runtime, layout: Layout, sizes: Sizes, recipes: dict) -> None:
        super().__init__()
        self.runtime, self.base, self.sizes, self.recipes = runtime, layout, sizes, recipes
        self.constants: dict[str, Step] = {}        # by their keys

    def value(self, spec: Spec, text: Spec, local: Tensor, key: str = "") -> Value:
        """A value with data, of type `spec`; `text` has its pins, and `key` is what recipes know it by."""
        made = Value(self, -1, spec)
        made.text, made.local, made.key = text, local, key or _key(spec, text, _name(local.dtype))
        return made

    def call(self, op: Op, operands: Sequence[Any], text: str | None, ins: Any, outs: Any,
             attrs: dict[str, Any], body: Program | None = None, orelse: Program | None = None,
             called: str = "") -> Any:
        """Execute one call."""
        try:
            key = (op, text or ins, outs, self.layout, *[x.key for x in operands],
                   repr(attrs) if attrs else "", _place() if op.index else None)
            function, made, lines = self.recipes[key]
        except (KeyError, AttributeError):
            function, made, lines = self._recipe(op, operands, text, ins, outs, attrs,
                                                 self.layout if self.layout is not None else self.base)
            self.recipes[key] = function, made, lines
        try:
            results = function(*[x.local for x in operands])
        except Exception as error:
            explain_failure(error, lines, Where.of(user_frame()))
            raise
        if len(made) > 1:
            return tuple(self.value(spec, pinned, local, key) for (spec, pinned, key), local
                         in zip(made, results))
        spec, pinned, known = made[0]
        value = Value(self, -1, spec)
        value.text, value.local, value.key = pinned, results[0], known
        return value if operands else self._constant(op, value, attrs)

    def _constant(self, op: Op, made: Value, attrs: dict[str, Any]) -> Value:
        made.id, made.key = CONSTANT, f"{made.key} {op.name} {attrs}"
        self.constants[made.key] = Step(op, (), (made.spec,), (), ("o0",), tuple(sorted(attrs.items())))
        return made

    def _recipe(self, op: Op, operands: Sequence[Any], text: str | None, ins: Any, outs: Any,
                attrs: dict[str, Any],
                layout: Layout) -> tuple[Callable, list[tuple[Spec, Spec, str]], Lines]:
        """What runs a call like this one; the types of its results, their texts, and what recipes know them
        by; and whose lines are whose."""
        for i, x in enumerate(operands):
            if not isinstance(x, Value) or x.tracer is not self:
                raise SpecError(
                    f"{op.name}: operand {i + 1} is no tensor of this function; pass tensors in as arguments")
        frame = user_frame()
        said = tuple(next((n for n, value in frame.f_locals.items() if value is x), "") for x in operands)
        names = tuple(f"i{i}" for i in range(len(operands)))
        ins, outs = specs_of(op, operands, text, ins, outs, attrs, said)
        made = tuple(f"o{i}" for i in range(len(outs)))
        step = Step(op, ins, outs, names, made, tuple(sorted(attrs.items())), where=Where.of(frame),
                    said=said)
        given = {n: _name(x.local.dtype) for n, x in zip(names, operands)}
        step_dtypes(step, [*given.values()])
        if op is RENAME or op.lengths:
            self.sizes.say(step)
            self.sizes.settle()
        types = {name: x.spec for name, x in zip(names, operands)}
        texts = {name: x.text for name, x in zip(names, operands)}
        constants = {name: self.constants[x.key] for name, x in zip(names, operands) if x.id == CONSTANT}
        program, pinned = complete_step(step, types, texts, layout, self.runtime.mesh, self.sizes.of,
                                        constants)
        e = Emitter(self.runtime.mesh, self.runtime.rank, self.sizes.of, given=given)
        source = e.program(program)
        self.runtime.create_groups(list(e.groups))
        groups = {name: self.runtime.group(axes) for axes, name in e.groups.items()}
        function = load(source, e.space(self.runtime.device), groups, op.name)
        for site in e.index_sites():
            site.tell = self.runtime.end_others
        dtypes = value_dtypes(program, given)
        known = [(spec, said, _key(spec, said, dtypes[name]))
                 for (name, spec), said in zip(program.result_leaves(), pinned)]
        return function, known, {function.__code__.co_filename: e.lines}

    def whole(self, value: Value) -> Tensor:
        """The scalar `value`, with what it owes paid."""
        return self.given_back(value, value.spec.owing(*_held(value.spec))).local

    def converted(self, value: Value, text: Spec) -> Value:
        """`value` as a value that stands alone, `text` being its spec."""
        return self.call(RESHARD, (value,), None, (value.spec,), (text,), {})

    def given_back(self, value: Value, text: Spec) -> Value:
        """`value` as a result of all, on every stage."""
        made, around = self.converted(value, text), self.layout
        self.layout = EXPLICIT
        for o in _held(made.spec):
            whole = made.spec.owing(*(other for other in made.spec.owed if other != o))
            made = self.call(BROADCAST, (made,), None, (made.spec,), (whole,), {})
        self.layout = around
        return made

    def scan(self, f: Function, carries: tuple[Value, ...], stacks: Sequence[Any], constants: Sequence[Any],
             static: dict[str, Any]) -> Any:
        """Run the body of a scan layer by layer, through the user's own function."""
        first = next(v for s in stacks for v in _values(s))
        dim = first.spec.dims[0]
        run = self._pipeline if dim.axes else self._layers
        return run(f, carries, stacks, constants, static, first.local.shape[0], dim)

    def _pipeline(self, f: Function, carries: tuple[Value, ...], stacks: Sequence[Any],
                  constants: Sequence[Any], static: dict[str, Any], layers: int, dim: Dim) -> Any:
        """The layers of this stage, behind the carry of the one before; the result is the last one's."""
        mesh, here = self.runtime.mesh, self.runtime.coordinate
        axis, around = dim.axes[0], self.layout
        last = mesh.axes[axis] - 1
        if len(f.outs) > len(carries) and not all(
                mesh.rows(dim, self.sizes.of, {**here, axis: s})[1] for s in range(last + 1)):
            raise SpecError(f"scan: a stage of {dim} has no layer, and of none nothing is stacked here; "
                            "compile and simulate do it")
        self.runtime.create_groups([(axis,)])
        group, self.layout = self.runtime.group((axis,)), (around or self.base).without((axis,))
        try:
            with self.under(f):
                carries = tuple(self.converted(c, said) for c, said in zip(carries, f.ins))
            if here[axis]:
                carries = tuple(self.value(c.spec, c.text, group.recv(
                    c.local.shape, c.local.dtype, here[axis] - 1)) for c in carries)
            out = self._layers(f, carries, stacks, constants, static, layers, dim)
        finally:
            self.layout = around
        out = out if isinstance(out, tuple) else (out,)
        if here[axis] < last:
            for c in out[:len(carries)]:
                group.send(c.local, here[axis] + 1)
        held = (self.value(c.spec.owing(*c.spec.owed, Owed("@", axis, last)), c.text, c.local)
                for c in out[:len(carries)])
        out = (*held, *out[len(carries):])
        return out if len(out) > 1 else out[0]

    def _layers(self, f: Function, carries: tuple[Value, ...], stacks: Sequence[Any],
                constants: Sequence[Any], static: dict[str, Any], layers: int, dim: Dim) -> Any:
        rows = []
        for i in range(layers):
            out = f(*carries, *(self._slice(s, i) for s in stacks), *constants, **static)
            out = out if isinstance(out, tuple) else (out,)
            for before, after in zip(carries, out):
                if error := changed(f.__name__, _name(before.local.dtype), _name(after.local.dtype)):
                    raise error
            with self.under(f):
                carries = tuple(self.converted(c, said) for c, said in zip(out, f.ins[:len(carries)]))
            rows.append(out[len(carries):])

        def stacked(values: Sequence[Value]) -> Value:
            spec, text = (s.with_dims((dim, *s.dims)) for s in (values[0].spec, values[0].text))
            return self.value(spec, text, torch.stack([v.local for v in values]))
        ys = []
        for column in zip(*rows):
            if isinstance(column[0], Params):
                per_path = zip(*([v for _, v in leaf_values(c, "")] for c in column))
                made = iter([stacked(values) for values in per_path])
                ys.append(fill(column[0], "", lambda _: next(made)))
            else:
                ys.append(stacked(column))
        out = (*carries, *ys)
        return out if len(out) > 1 else out[0]

    def _slice(self, tree: Any, i: int) -> Any:
        def one(v: Value) -> Value:
            spec, text = (s.with_dims(s.dims[1:]) for s in (v.spec, v.text))
            return self.value(spec, text, v.local[i])
        if isinstance(tree, Params):
            old = dict(leaf_values(tree, ""))
            return fill(tree, "", lambda path: one(old[path]))
        return one(tree)


def _key(spec: Spec, text: Spec, dtype: str) -> str:
    return f"{spec.text} {text.text} {dtype}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _values(tree: Any) -> list[Value]:
    return [v for _, v in leaf_values(tree, "")] if isinstance(tree, Params) else [tree]


@dataclass(frozen=True)
class Likeness:
    """What is known of all calls whose arguments have these trees and shapes.

    types, texts: by path, of every tensor, what it is on the mesh and what the signature says of it;
    recipes: see `Stepper`."""
    trees: tuple[tuple[str, Any], ...]
    types: dict[str, Spec]
    texts: dict[str, Spec]
    sizes: Sizes
    recipes: dict[Any, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, f: Function, layout: Layout, runtime: Runtime, said: Sequence[tuple[str, Any]],
           shapes: Mapping[str, tuple[int, ...]], sizes: Mapping[str, int]) -> Likeness:
        mesh = runtime.mesh
        texts = {path: mesh.resolve(spec, True) for name, tree in said for path, spec in leaves(name, tree)}
        trees = tuple((name, _complete(tree, layout, mesh)) for name, tree in said)
        program = Program(f.__name__, trees, (), (), True)
        return cls(trees, dict(program.arg_leaves()), texts,
                   bound(program, shapes, sizes, mesh, runtime.coordinate))


def run_steps(f: Function, layout: Layout, runtime: Runtime, args: Sequence[Any], sizes: Mapping[str, int],
              static: dict[str, Any], likes: dict[Any, Likeness]) -> Any:
    """Run `f` op by op on this rank's shards; shards come back. `likes`: what earlier calls have found."""
    check_given(f, args)
    layout = (f.layout if f.layout is not None else layout).on(runtime.mesh)
    said = argument_trees(f, args)
    given = {path: v for (name, tree), arg in zip(said, args)
             for (path, _), v in zip(leaves(name, tree), _tensors(arg))}
    check_tensors(f, given.items(), stages=runtime.mesh.world_size > 1)
    given = {path: _here(v, runtime.device) for path, v in given.items()}
    if runtime.mesh.world_size > 1:
        refuse_gradients(f.__name__, given.items())
    shapes = {path: v.shape for path, v in given.items()}
    key = *said, *shapes.values()
    like = likes.get(key)
    if like is None:
        like = likes[key] = Likeness.of(f, layout, runtime, said, shapes, sizes)
    if any(v.dtype not in KNOWN for v in given.values()):
        value_dtypes(Program(f.__name__, like.trees, (), ()), {p: _name(v.dtype) for p, v in given.items()})
    stepper = Stepper(runtime, layout, like.sizes, like.recipes)
    made = {path: stepper.value(like.types[path], like.texts[path], v) for path, v in given.items()}
    values = [fill(arg, name, made.__getitem__) if isinstance(arg, Params) else made[name]
              for (name, _), arg in zip(said, args)]
    with active(stepper), without_autocast():
        try:
            results = f.fn(*values, **static)
        except (SpecError, TypeError, ValueError) as error:
            raise_at_user_line(error)
        given_back = results if isinstance(results, tuple) else (results,)
        out = tuple(_locals(v, stepper) if spec is None else stepper.given_back(v, spec).local
                    for spec, v in zip(f.outs, given_back, strict=True))
    return out if len(out) > 1 else out[0]


def _complete(tree: Any, layout: Layout, mesh: Any) -> Any:
    def type_of(spec: Spec) -> Spec:
        return layout.type_of(spec, mesh)
    return type_of(tree) if isinstance(tree, Spec) else tree.map(type_of)


def _tensors(arg: Any) -> list[Tensor]:
    return [v for _, v in leaf_values(arg, "")] if isinstance(arg, Params) else [arg]


def _held(spec: Spec) -> list[Owed]:
    return [o for o in spec.owed if o.kind == "@"]


def _here(x: Tensor, device: torch.device) -> Tensor:
    """What another stage has alone is zeros here, which nobody looks at, and takes no room."""
    return torch.zeros((), dtype=x.dtype, device=device).expand(x.shape) if x.is_meta else x


def _locals(tree: Any, stepper: Stepper) -> Any:
    old = dict(leaf_values(tree, ""))
    texts = result_texts(tree, {path: v.text for path, v in old.items()})
    return fill(tree, "", lambda path: stepper.given_back(old[path], texts[path]).local)
