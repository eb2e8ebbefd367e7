"""The completer: from a program as written, and a layout, to the explicit program.

`complete` beside it is how it is called.

Four rules. A value that stands alone (argument, result, the result spec of an op) is completed over its own
dims. The operands of one op are completed together, over the union of their names, and converted to that. A
conversion is made once in a straight-line body. An op without a spec string is one whose spec string is
written from the dims of its operands; a pin (`T/1`) lives on where all that have the dim have it. So what
names no axis is never refused for a split: a dim that an op needs whole is whole before the others are
completed, or the op has a form over pieces. Constants are made as they are wanted. Under `EXPLICIT` nothing
is completed or converted. What does not match is refused: a fact is raised, and `refusals` words it.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from shardlib.compiler import reasons
from shardlib.compiler.builder import Builder
from shardlib.compiler.ragged import as_there, first_axes, met_by_rows
from shardlib.compiler.refusal import (
    ChangedCarry,
    Fact,
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
from shardlib.errors import SpecError
from shardlib.language.casts import CAST_LIKE, WIDEN
from shardlib.language.cond import COND
from shardlib.language.einsum import EINSUM
from shardlib.language.fused import FUSED
from shardlib.language.held import as_held
from shardlib.language.local import row_axes
from shardlib.language.moves import RESHARD, check_move
from shardlib.language.rearrange import RENAME, renamed, whole_in_rename
from shardlib.language.scan import SCAN
from shardlib.layout import EXPLICIT, Layout, pins
from shardlib.mesh import Mesh
from shardlib.program import Program, Result, Scan, Step
from shardlib.rules import Rule, RuleError, natural
from shardlib.spec import Owed, Spec
from shardlib.tree import Struct, leaves


class Completer(Builder):
    """Completes one body.

    given, returned: types decided already: of a scan's or a cond's arguments, or a single step's operands;
    and of results, of which further ones, and None, are completed by themselves.
    """

    def __init__(self, program: Program, layout: Layout, mesh: Mesh, sizes: Mapping[str, int] | None = None,
                 given: Mapping[str, Spec] | None = None, returned: Sequence[Spec | None] = ()) -> None:
        super().__init__(mesh, program.names())
        self.program, self.sizes, self.given = program, sizes or {}, given or {}
        self.layout = layout if program.layout is None else program.layout.on(mesh)
        self.returned = iter(returned)
        # of a value of the program as written: the value here, and its dims with their pins
        self.now: dict[str, str] = {}
        self.texts: dict[str, Spec] = {}
        self.notes: dict[tuple[str, str], str] = {}  # (value, owed axis) -> since when
        self.constants: dict[str, Step] = {}        # what is made of nothing, by its name here
        self.unmet: dict[tuple[str, str, str], None] = {}
        # a statistic of the program as written -> the value whose dtype it gets
        self.rounded: dict[str, str] = {}

    def run(self) -> Program:
        self.where = self.program.where
        try:
            args = tuple((name, self._argument(name, tree)) for name, tree in self.program.args)
            for step in self.program.steps:
                self.where = step.where
                self.do(step)
            self.where = self.program.where
            results = tuple(self._result(r) for r in self.program.results)
        except SpecError as error:
            raise error.at(self.where) from None
        return Program(self.program.name, args, tuple(self.steps), results, True, self.program.where,
                       tuple(self.unmet))

    def _argument(self, name: str, tree: Any) -> Any:
        types, note = {}, f"owed in the signature of {self.program.name}"
        for path, spec in leaves(name, tree):
            types[path] = self.given.get(path) or self.layout.type_of(spec, self.mesh)
            self.now[path] = self.declare(path, types[path])
            self.texts[path] = self.mesh.resolve(spec, True)
            self.notes.update({(path, owed.axis): note for owed in types[path].owed})
        flat = iter(types.values())
        return tree.map(lambda _: next(flat)) if isinstance(tree, Struct) else types[name]

    def _result(self, result: Result) -> Result:
        out, types = [], []
        for name, spec in result.leaves():
            want = next(self.returned, None) or self._alone(
                spec, self.types[self.now[name]] if self.given else spec, self.layout)  # a body's stay held
            if self.layout == EXPLICIT and self.types[self.now[name]] != want:
                raise self._refused(UnlikeReturn(name, want))
            out.append(self._move_to(want, self.now[name], "the result of " + self.program.name))
            types.append(want)
        flat = iter(types)
        tree = result.tree.map(lambda _: next(flat)) if isinstance(result.tree, Struct) else types[0]
        return Result(tree, tuple(out))

    def _alone(self, spec: Spec, have: Spec, layout: Layout) -> Spec:
        """The type of a value that stands alone, its text being `spec`; it is held where `have` is, and
        ragged rows stay where they are."""
        return layout.type_of(spec if layout == EXPLICIT else as_there(as_held(spec, have), have), self.mesh)

    def _refused(self, fact: Fact) -> Refused:
        state = State(self.program, self.layout, self.mesh, self.sizes, self.given,
                      self.types, self.now, self.source, self.notes)
        return Refused(fact, state, self.where)

    # -- one step --------------------------------------------------------------------------------------------

    def do(self, step: Step) -> None:
        """Complete one step as written: what it needs is added, and what it makes is known in `now`."""
        layout = (step.layout if step.layout is not None else self.layout).on(self.mesh)
        inputs = [self.now[i] for i in step.inputs]
        self.called.update((self.source.get(i, i), word) for i, word in zip(inputs, step.said) if word)
        if step.op is SCAN:
            return self._scan(step, inputs, layout)
        if step.op is COND:
            return self._cond(step, inputs, layout)
        if step.op is FUSED:
            return self._fused(step, inputs, layout)
        if step.op.moves:
            return self._move(step, inputs[0], layout)
        if step.op is RENAME:
            return self._rename(step, inputs[0], layout)
        ins, outs = self._text(step, layout)
        placed = []
        wants = self._operands(step, inputs, ins, outs, layout)
        for i, (name, want) in enumerate(zip(inputs, wants)):
            if layout == EXPLICIT and self.types[name] != want:
                raise self._refused(UnlikeOperand(step, i, want, step.op.rule(step)))
            why = reasons.taken(step, i, self.types[name], wants, layout)
            placed.append(self._move_to(want, name, why, step, i))
        made = self._natural(step, placed, outs, layout)
        for written, name, text in zip(step.outputs, made, outs):
            if not step.op.takes_text:
                text = self.types[name] if layout == EXPLICIT else text.owing(*self.types[name].owed)
            want = self._alone(text, self.types[name], layout)
            if layout == EXPLICIT and self.types[name] != want:
                raise self._refused(UnlikeResult(step, self.types[name], want, step.op.rule(step)))
            name = self._move_to(want, name, reasons.kept(text, self.types[name], want, layout), step)
            self.texts[written] = text
            self.now[written] = (self.call(CAST_LIKE, [name, self.rounded[written]])
                                 if written in self.rounded else name)
            if not inputs:
                self.constants[name] = step

    def _move_to(self, want: Spec, name: str, why: str, step: Step | None = None,
                 operand: int | None = None) -> str:
        """`name`, an operand of `step`, its result or the program's, converted to `want`."""
        try:
            return self.move(name, want, why)
        except SpecError as error:
            raise self._refused(NoWay(str(error), step, operand)) from None

    def move(self, name: str, want: Spec, why: str = "") -> str:
        """As the builder has it; a constant is made as it is wanted, and nothing is sent."""
        root = self.source.get(name, name)
        if root not in self.constants or want.owed or want in (self.types[name], self.types[root]):
            return super().move(name, want, why)
        if (root, want) not in self._converted:
            step = self.constants[root]
            (made,) = self.add(step.op, [], [want], attrs=step.attrs, why=why, base=root.rstrip("0123456789"))
            self.source[made], self._converted[root, want] = root, made
        return self._converted[root, want]

    def _text(self, step: Step, layout: Layout) -> tuple[tuple[Spec, ...], tuple[Spec, ...]]:
        """The specs of operands and results as text has them. Where the call gave none, the dims of its
        operands make it, with the pins that all with a dim have in common, and what they owe."""
        if step.op.takes_text:
            ins, outs = ([self.mesh.resolve(s, True) for s in side] for side in (step.ins, step.outs))
            rows = row_axes(step, [self.types[self.now[i]] for i in step.inputs], layout, self.mesh)
            return (tuple(s.keeping(rows) for s in ins),
                    tuple(s.keeping(rows) if layout == EXPLICIT else s for s in outs))
        types = tuple(self.types[self.now[i]] for i in step.inputs)
        outs = step.op.inferred(tuple(t.whole() for t in types), step.options)
        if layout == EXPLICIT:
            return types, outs
        said = [self.texts[i] for i in step.inputs]
        common = {n: axes for text in said for n, axes in pins(text).items()
                  if all(pins(other).get(n) == axes for other in said if n in other.names)}
        return (tuple(t.whole().keeping(common).owing(*t.owed) for t in types),
                tuple(s.keeping(common) for s in outs))

    def _operands(self, step: Step, inputs: Sequence[str], ins: Sequence[Spec],
                  outs: Sequence[Spec], layout: Layout) -> list[Spec]:
        """The types that the operands are converted to: completed together, over the union of their dims."""
        if layout == EXPLICIT or step.op.asserted:
            return [s.resolve(self.mesh) for s in ins]
        ins = [as_there(as_held(s, self.types[n]), self.types[n]) for s, n in zip(ins, inputs)]
        # a split that text asks for counts before a dim that is whole on purpose
        pinned: dict[str, tuple[str, ...]] = {}
        for text in ins:
            pinned.update({n: a for n, a in pins(text).items() if a or n not in pinned})
        # a result's group is split over its first factor alone
        whole = [f.name for s in outs for d in s.dims if not d.ragged for f in d.factors[1:]]
        rule = step.op.rule(step)
        whole += () if step.op.distribute else [n for n in rule.whole if not layout.alike(n, rule.alike)]
        pinned.update({n: () for n in whole if n not in pinned or not step.op.takes_text})
        names = dict.fromkeys(n for s in ins for n in s.names)
        pinned.update(first_axes(step, layout, pinned))
        met = dict.fromkeys((*names, *met_by_rows(self.program, step)))
        axes = layout.complete(met, pinned, (o.axis for s in ins for o in s.owed))
        axes = layout.shared(axes, rule.alike, pinned)
        if step.op.takes_text:
            self.unmet.update(
                {(dim, axis, str(step.where or step.op.name)): None for dim, wanted in layout.entries.items()
                 if dim in names and dim not in pinned for axis in wanted[len(axes[dim]):]})
        return [s.split_by(axes).resolve(self.mesh) for s in ins]

    def _natural(self, step: Step, placed: list[str], written: Sequence[Spec],
                 layout: Layout) -> tuple[str, ...]:
        """The op on operands that are placed, and its results as its rule types them."""
        ins = tuple(self.types[p] for p in placed)
        rule = step.op.rule(step.having(ins=ins))
        outs = tuple(result_dims(s, ins, rule, layout, self.mesh) for s in written)
        typed = step.having(ins=ins, outs=outs)
        rule = step.op.rule(typed)
        pieces = step.op.distribute and layout != EXPLICIT and any(
            _axes(s, n) for s in ins for n in rule.whole if n in s.names)
        rule = replace(rule, whole=(), maxes=rule.whole) if pieces else rule
        try:
            types = (tuple(self.mesh.resolve(s, True).keeping(row_axes(step, ins, EXPLICIT, self.mesh))
                           .resolve(self.mesh) for s in step.outs)
                     if step.op.asserted else natural(step.op.name, rule, ins, outs))
        except RuleError:
            raise self._refused(RuleRefuses(step, typed, rule)) from None
        if pieces:
            return tuple(step.op.distribute(self, typed.having(inputs=tuple(placed))))
        if step.op.statistic and layout != EXPLICIT and set(types[0].owed) - set(ins[0].owed):
            self.rounded[step.outputs[0]] = placed[0]
            placed = [self.call(WIDEN, placed)]
        names = step.outputs if not set(step.outputs) & set(self.types) else None
        made = self.add(step.op, placed, types, names, attrs=tuple(a for a in step.attrs if a[0] != "rows"))
        self._note(step, placed, made)
        return made

    def _note(self, step: Step, placed: Sequence[str], made: Sequence[str]) -> None:
        for name in made:
            for owed in self.types[name].owed:
                older = next((self.notes[p, owed.axis] for p in placed if (p, owed.axis) in self.notes), None)
                label = next((f for p in placed for d in self.types[p].dims for f in d.factors
                              if owed.axis in f.axes), None)
                does = "contracts" if step.op is EINSUM else "runs over"
                self.notes[name, owed.axis] = older or (
                    f"owed since {step.op.name}{f' at {step.where}' if step.where else ''}"
                    + (f", which {does} {label}" if label and not step.op.moves else ""))

    # -- the steps that are not of the common kind -----------------------------------------------------------

    def _move(self, step: Step, name: str, layout: Layout) -> None:
        want = self._alone(step.outs[0], self.types[name], layout)
        self.texts[step.outputs[0]] = self.mesh.resolve(step.outs[0], True)
        if step.op is RESHARD:
            have = layout.type_of(step.ins[0], self.mesh)
            if layout == EXPLICIT and self.types[name] != have:
                wrong = UnlikeOperand(step, 0, have) if step.called else WrongMove(step, self.types[name])
                raise self._refused(wrong)
            self.now[step.outputs[0]] = self.move(name, want, "reshard")
            return
        have = layout.type_of(step.ins[0], self.mesh)
        if self.types[name] != have:
            if layout == EXPLICIT or set(map(str, have.owed)) != set(map(str, self.types[name].owed)):
                raise self._refused(WrongMove(step, self.types[name]))
            name = self.move(name, have, step.op.name)
        if problem := check_move(step.op, have, want):
            raise self._refused(WrongMove(step, have, problem))
        made = self.add(step.op, [name], [want], step.outputs if step.outputs[0] not in self.types else None,
                        why="written")
        (self.now[step.outputs[0]],) = made
        self._note(step, [name], made)

    def _rename(self, step: Step, name: str, layout: Layout) -> None:
        """A dim keeps its axes under its new name; one that is a group on one side alone is whole, and split,
        if at all, after."""
        named = self.texts[step.outputs[0]] = self.mesh.resolve(step.outs[0], True)
        products = {d.names[0]: () for d in whole_in_rename(self.types[name], named) if d.names}
        want = self._alone(named, self.types[name], layout)
        made = want if layout == EXPLICIT else self._alone(named.keeping(products), self.types[name], layout)
        source = Spec(tuple(d.split(m.axes) for d, m in zip(self.types[name].dims, made.dims)), made.owed)
        if layout == EXPLICIT:
            renamed(step.ins[0].resolve(self.mesh), named), renamed(want, step.ins[0])
            if source != self.types[name]:
                raise self._refused(UnlikeOperand(step, 0, source))
        placed = self.move(name, source, reasons.renamed(self.types[name], source, made, layout))
        (there,) = self.add(RENAME, [placed], [made], step.outputs)
        self.now[step.outputs[0]] = self.move(there, want, reasons.kept(named, made, want, layout))

    def _cond(self, step: Step, inputs: list[str], layout: Layout) -> None:
        if at := next((o for n in inputs for o in self.types[n].owed if o.kind == "@"), None):
            raise SpecError(f"cond: all ranks take one branch, and an operand is held at {at.axis}:{at.at}; "
                            "a cond after a pipeline is not built yet")
        whole = self.types[inputs[0]].owing()
        if layout == EXPLICIT and self.types[inputs[0]] != whole:
            raise self._refused(OwedPredicate(self.types[inputs[0]]))
        inputs[0] = self.move(inputs[0], whole, "the predicate of cond")
        first = Completer(step.bodies[0], layout, self.mesh, self.sizes).run()
        given, returned = {}, [kind for _, kind in first.result_leaves()]
        if layout != EXPLICIT:
            given = dict(zip(dict(step.bodies[1].arg_leaves()), dict(first.arg_leaves()).values()))
        bodies = [first, Completer(step.bodies[1], layout, self.mesh, self.sizes, given,
                                   returned if given else ()).run()]
        for i, (path, kind) in enumerate(bodies[0].arg_leaves(), 1):
            if layout == EXPLICIT and self.types[inputs[i]] != kind:
                raise self._refused(UnlikeOperand(step, i, kind))
            inputs[i] = self.move(inputs[i], kind, f"{step.body.name} takes {path} as {kind}")
        yes, no = ([(f"takes {path} as", kind) for path, kind in b.arg_leaves()]
                   + [("returns", k) for _, k in b.result_leaves()] for b in bodies)
        if other := next(((does, a, b) for (does, a), (_, b) in zip(yes, no) if a != b), None):
            raise self._refused(UnlikeBranches(step, *other))
        made = self.add(COND, inputs, returned, step.outputs, attrs=step.attrs, body=first, orelse=bodies[1])
        self.texts.update(zip(step.outputs, (text for _, text in step.bodies[0].result_leaves())))
        self.now.update(zip(step.outputs, made))

    def _fused(self, step: Step, inputs: list[str], layout: Layout) -> None:
        body = Completer(step.bodies[0], layout, self.mesh, self.sizes).run()
        for i, (path, kind) in enumerate(body.arg_leaves()):
            if layout == EXPLICIT and self.types[inputs[i]] != kind:
                raise self._refused(UnlikeOperand(step, i, kind))
            inputs[i] = self.move(inputs[i], kind, f"{body.name} takes {path} as {kind}")
        made = self.add(FUSED, inputs, [kind for _, kind in body.result_leaves()], step.outputs, body=body)
        self.texts.update(zip(step.outputs, (text for _, text in step.bodies[0].result_leaves())))
        self.now.update(zip(step.outputs, made))

    def _scan(self, step: Step, inputs: list[str], layout: Layout) -> None:
        parts, declared, types = Scan.of(step), dict(step.body.arg_leaves()), {}
        stacked, carries = ({path for path, _ in pairs} for pairs in (parts.stacked, parts.carries))
        axes = self._stages(step, inputs, parts)
        layout = layout.without(axes)
        for i, (path, name) in enumerate(zip(declared, inputs)):
            have = self.types[name]
            if path in stacked:
                types[path] = have.with_dims(have.dims[1:])
                continue
            types[path] = layout.type_of(declared[path] if layout == EXPLICIT or axes else
                                         as_held(declared[path], have), self.mesh)
            want = self._on_stage(types[path], axes, parts.reverse) if path in carries else types[path]
            if layout == EXPLICIT and have != want:
                raise self._refused(UnlikeOperand(step, i, want))
            inputs[i] = self.move(name, want, f"{step.body.name} takes {path} as {want}")
        carried = [types[path] for path, _ in parts.carries] if layout != EXPLICIT else ()
        body = Completer(step.body, layout, self.mesh, self.sizes, types, carried).run()
        made, first = [spec for _, spec in body.result_leaves()], len(parts.carries)
        for (path, _), after in zip(parts.carries, made):
            if after != types[path]:
                raise self._refused(ChangedCarry(step, types[path], after))
        outs = [*(self._on_stage(spec, axes, not parts.reverse) for spec in made[:first]),
                *(Spec((out.dims[0].split(axes), *spec.dims), spec.owed)
                  for out, spec in zip(step.outs[first:], made[first:]))]
        attrs = Scan.attrs(parts.dim, len(stacked), first, parts.reverse, self.mesh.size(axes) if axes else 0)
        declares = (declared[path] for path, _ in parts.carries)
        self.texts.update(zip(step.outputs, (*declares, *step.outs[first:])))
        self.now.update(
            zip(step.outputs, self.add(SCAN, inputs, outs, step.outputs, attrs=attrs, body=body)))

    def _stages(self, step: Step, inputs: Sequence[str], parts: Scan) -> tuple[str, ...]:
        """The axis over which the stages of a pipeline are: that of the stacked dim; none of another scan."""
        first = len(parts.carries)
        kinds = [self.types[n] for n in inputs[first:first + len(parts.stacked)]]
        axes = kinds[0].dims[0].axes
        for i, have in enumerate(kinds, first):
            if len(have.dims[0].axes) > 1 or have.dims[0].axes != axes:
                raise self._refused(SplitStack(step, i, have, kinds[0]))
        if parts.stages and parts.stages != self.mesh.size(axes):
            raise SpecError(f"scan: it has {parts.stages} stages, and {parts.dim} is split over "
                            f"{self.mesh.size(axes)} ranks")
        return axes

    def _on_stage(self, kind: Spec, axes: Sequence[str], last: bool) -> Spec:
        """`kind` as the first stage has it, or the last one."""
        return kind.owing(*kind.owed, *(Owed("@", a, self.mesh.axes[a] - 1 if last else 0) for a in axes))


def result_dims(spec: Spec, ins: Sequence[Spec], rule: Rule, layout: Layout, mesh: Mesh) -> Spec:
    """A result's dims; those that the op makes are split over what its operands leave free, if not whole."""
    spec, known = mesh.resolve(spec, True), {n: _axes(s, n) for s in ins for n in s.names}
    busy = [o.axis for s in ins for o in s.owed if o.kind == "@"]
    axes = layout.complete(spec.names, {**dict.fromkeys(rule.whole, ()), **pins(spec), **known}, busy)
    axes = layout.shared({**known, **axes}, rule.alike, known)
    return spec.split_by({n: axes[n] for n in spec.names if n not in known}).owing().resolve(mesh)


def _axes(spec: Spec, name: str) -> tuple[str, ...]:
    return next(f.axes for d in spec.dims for f in d.factors if f.name == name)
