"""Matching: where a program does what a fusion's function does.

Structure first: the same ops, attributes and dataflow, additions and products in either order, dims up to
renaming. Then each mesh axis by itself: it does on every value what an axis of the function does, or no move
among these steps is over it, and it rides along. All axes that do what x does are x, a product in one order.
What is made on the way is used nowhere else, and no operand is made from a result.

    y = all_reduce("B T D +tk +tg -> B T D", v)         |  x is tk and tg
    r = y + x                                           |  r, h = fused(all_reduce_add_rms_norm, v, x, w)
    h = rms_norm(r, w, eps=1e-05)                       |
"""
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from shardlib.compiler.fusion import Fusion, Pattern, runs_over
from shardlib.language.arithmetic import ADD, MUL
from shardlib.language.fused import FUSED
from shardlib.language.moves import axes_of
from shardlib.mesh import Mesh
from shardlib.program import Program, Result, Step
from shardlib.spec import Spec


class Unlike(Exception):
    """Why a step is not the one that is looked for."""


@dataclass(frozen=True)
class Match:
    """Steps of a program that are those of a pattern, in its order.

    values, dims: of the pattern -> of the program.  run: the dims that the pattern's run stands for.
    turned: steps whose operands stand the other way round.  static: the function's static arguments.
    """
    values: Mapping[str, str] = field(default_factory=dict)
    dims: Mapping[str, str] = field(default_factory=dict)
    run: tuple[str, ...] | None = None
    steps: Mapping[int, Step] = field(default_factory=dict)
    turned: frozenset[int] = frozenset()
    static: Mapping[str, float] = field(default_factory=dict)

    def order(self, i: int) -> int:
        """1, or -1 where the operands of step i stand the other way round."""
        return -1 if i in self.turned else 1

    def specs(self) -> list[Spec]:
        """The types of all operands and results, in the pattern's order."""
        return [s for i, step in sorted(self.steps.items()) for s in (*step.ins[::self.order(i)], *step.outs)]


@dataclass(frozen=True)
class Found:
    """A fused step that may be made, those that it takes the place of, the function's static arguments."""
    made: Step
    steps: tuple[Step, ...]
    static: Mapping[str, float]


def static_of(fusion: Fusion, body: Program, mesh: Mesh) -> Mapping[str, float] | None:
    """The static arguments with which `body` is what the fusion's function means; None where it is not."""
    matching = Matching(body, mesh)
    for mark in matching.candidates(fusion):
        found = matching.at(fusion, mark)
        if isinstance(found, Found) and found.made.body == body:
            return found.static
    return None


class Matching:
    """A program in which patterns are looked for."""

    def __init__(self, program: Program, mesh: Mesh) -> None:
        self.program, self.mesh = program, mesh
        self.made = {o: s for s in program.steps for o in s.outputs}
        self.users: dict[str, list[Step]] = {}
        for step in program.steps:
            for name in dict.fromkeys(step.inputs):
                self.users.setdefault(name, []).append(step)
        self.results = {name for name, _ in program.result_leaves()}

    @cached_property
    def types(self) -> Mapping[str, Spec]:
        return self.program.types()

    def candidates(self, fusion: Fusion) -> Iterator[Step]:
        """The steps that are like the one by which a fusion is known."""
        mark = fusion.pattern.program.steps[fusion.pattern.order[0]]
        for step in self.program.steps:
            if step.op is mark.op and [o.kind for s in step.ins for o in s.owed][:1] == [
                    o.kind for s in mark.ins for o in s.owed][:1]:
                yield step

    def at(self, fusion: Fusion, mark: Step) -> Found | str:
        """The fused step that `mark` is in; or why there is none."""
        search, unlike = _Search(self, fusion.pattern), ""
        for found in search.matches(0, Match(), [mark]):
            try:
                return Found(self._step(fusion, found), tuple(found.steps.values()), found.static)
            except Unlike as why:
                unlike = unlike or str(why)
        return unlike or search.why

    def _step(self, fusion: Fusion, match: Match) -> Step:
        """The match as one step. Unlike, where it must not be made."""
        self._alone(fusion.pattern, match)
        self._check_axes(fusion.pattern, match)
        made = self._fused(fusion, match)
        if fusion.when is not None and (why := fusion.when(made)) is not None:
            raise Unlike(why)
        return made

    def _fused(self, fusion: Fusion, match: Match) -> Step:
        """In the body, values are called as in the function, so that equal bodies are equal."""
        pattern, types = fusion.pattern.program, self.types
        steps = tuple(replace(match.steps[i], inputs=p.inputs[::match.order(i)], outputs=p.outputs)
                      for i, p in enumerate(pattern.steps))
        takes = [name for name, _ in pattern.arg_leaves()]
        gives = [name for name, _ in pattern.result_leaves()]
        inputs, outputs = (tuple(match.values[n] for n in names) for names in (takes, gives))
        body = Program(fusion.name, tuple((n, types[v]) for n, v in zip(takes, inputs)), steps,
                       tuple(Result(types[v], (n,)) for n, v in zip(gives, outputs)), True,
                       fusion.function.definition)
        where = next((s.where for s in steps if s.op.wire), steps[-1].where)
        return Step(FUSED, tuple(types[v] for v in inputs), tuple(types[v] for v in outputs), inputs, outputs,
                    body=body, where=where)

    # -- what surrounds it -----------------------------------------------------------------------------------

    def _alone(self, pattern: Pattern, match: Match) -> None:
        """Unlike, where a value inside is used elsewhere, or an operand is made from what is made here."""
        mine = {id(s) for s in match.steps.values()}
        gives = {match.values[name] for name, _ in pattern.program.result_leaves()}
        made = {o for s in match.steps.values() for o in s.outputs}
        for name in (o for i in sorted(match.steps) for o in match.steps[i].outputs):
            others = [u for u in self.users.get(name, ()) if id(u) not in mine]
            if name not in gives and (others or name in self.results):
                raise Unlike(f"{name} is used by {said(others[0]) if others else 'the result'}, too")
        for step in self.program.steps:
            if id(step) not in mine and made.intersection(step.inputs):
                made.update(step.outputs)
        for name in (match.values[n] for n, _ in pattern.program.arg_leaves()):
            if name in made:
                raise Unlike(f"its operand {name} is made from what it makes")

    # -- axis by axis ----------------------------------------------------------------------------------------

    def _check_axes(self, pattern: Pattern, match: Match) -> None:
        """Unlike, where an axis neither does what one of the function does, nor rides along."""
        steps = [match.steps[i] for i in range(len(match.steps))]
        specs, names = match.specs(), {mine: theirs for theirs, mine in match.dims.items()}
        wanted = [s for step in pattern.program.steps for s in (*step.ins, *step.outs)]
        forms = {x: [_state(s, x, {n: n for n in match.dims}) for s in wanted] for x in axes(wanted)}
        plays: dict[str, list[str]] = {x: [] for x in forms}
        for axis in (a for a in self.mesh.axes if a in axes(specs)):
            form = [_state(s, axis, names) for s in specs]
            role = next((x for x in forms if forms[x] == form), None)
            if role is not None:
                plays[role].append(axis)
            elif moved := next((s for s in steps if s.op.moves and _state(s.ins[0], axis, {})
                                != _state(s.outs[0], axis, {})), None):
                raise Unlike(f"{said(moved)} is over {axis}, and {axis} is not throughout what "
                             f"{' or '.join(forms)} is in the function")
            elif split := next((s for s in steps if _depends(s, axis)), None):
                raise Unlike(f"{said(split)} does over {axis} what it does not in the function")
        for x, players in plays.items():
            if not players:
                raise Unlike(f"no axis does what {x} does in the function")
            products = [*(d.axes for s in specs for d in s.dims),
                        *(axes_of(s, self.mesh) for s in steps if s.op.wire)]
            orders = dict.fromkeys("/".join(a for a in product if a in players) for product in products)
            if len(known := [order for order in orders if order]) > 1:
                raise Unlike(f"{x} is {' and '.join(known)}, a product in two orders")


def axes(specs: Sequence[Spec]) -> dict[str, None]:
    """All axes that split something, or over which something is owed."""
    return dict.fromkeys(a for s in specs for a in (*s.split_axes, *(o.axis for o in s.owed)))


def _state(spec: Spec, axis: str, names: Mapping[str, str]) -> object:
    """What a value is on one axis: split along a dim, by its name in `names`, owed, or whole."""
    dim = next((d.label for d in spec.dims if axis in d.axes), None)
    owed = next(((o.kind, o.at) for o in spec.owed if o.axis == axis), None)
    return (names.get(dim), dim if dim not in names else "") if dim is not None else owed


def _depends(step: Step, axis: str) -> bool:
    """Whether a step does otherwise where `axis` splits something: it runs over such a dim, or makes one, or
    leaves a sum owed. A move keeps the value, whatever rides along."""
    if step.op.moves:
        return False
    dims = [d for s in (*step.ins, *step.outs) for d in s.dims if axis in d.axes]
    owes = [any(o.axis == axis for s in side for o in s.owed) for side in (step.ins, step.outs)]
    return owes[0] != owes[1] or any({d.label, *d.names} & runs_over(step) for d in dims)


def said(step: Step) -> str:
    """A step, for a person."""
    return f"{step.op.name}{f' at {step.where}' if step.where else ''}"


class _Search:
    """Looks for a pattern, step by step in its order. `why`: how the attempt that came farthest ended."""

    def __init__(self, around: Matching, pattern: Pattern) -> None:
        self.around, self.pattern, self.why, self._farthest = around, pattern, "", -1

    def matches(self, at: int, so_far: Match, marks: Sequence[Step] = ()) -> Iterator[Match]:
        """All ways to go on."""
        if at == len(self.pattern.order):
            yield so_far
            return
        i = self.pattern.order[at]
        wanted = self.pattern.program.steps[i]
        try:
            near = marks or self._near(wanted, so_far)
        except Unlike as why:
            return self._note(at, str(why))
        for step in near:
            for turned in (False, True) if wanted.op in (ADD, MUL) else (False,):
                came = at
                try:
                    values = self._values(so_far, wanted, step, turned)
                    came = at + 0.5
                    found = self._with(so_far, i, wanted, step, turned, values)
                except Unlike as why:
                    self._note(came, str(why))
                    continue
                yield from self.matches(at + 1, found)

    def _note(self, at: float, why: str) -> None:
        if at > self._farthest:
            self.why, self._farthest = why, at

    def _near(self, wanted: Step, so_far: Match) -> list[Step]:
        """The steps that may be `wanted`: those that make, or take, what is known already."""
        values, around = so_far.values, self.around
        if made := next((values[o] for o in wanted.outputs if o in values), None):
            if made not in around.made:
                raise Unlike(f"{made} is an argument, not made by {wanted.op.name}")
            return [around.made[made]]
        taken = next(values[i] for i in wanted.inputs if i in values)
        users = around.users.get(taken, [])
        if not any(u.op is wanted.op for u in users):
            goes = ", ".join(dict.fromkeys(u.op.name for u in users)) or "the result"
            raise Unlike(f"{taken} goes into {goes}, not into {wanted.op.name}")
        return [u for u in users if u.op is wanted.op]

    def _values(self, so_far: Match, wanted: Step, step: Step, turned: bool) -> Mapping[str, str]:
        """What values are called here, those of `step` among them. Unlike, where it is another step."""
        if step.op is not wanted.op:
            raise Unlike(f"{step.outputs[0]} is made by {said(step)}, not by {wanted.op.name}")
        if any(step is s for s in so_far.steps.values()):
            raise Unlike(f"{said(step)} is there once, not twice")
        values, mine = dict(so_far.values), (*step.inputs[::-1 if turned else 1], *step.outputs)
        for name, value in zip((*wanted.inputs, *wanted.outputs), mine, strict=True):
            if values.setdefault(name, value) != value:
                raise Unlike(f"{said(step)} takes {value}, not {values[name]}")
        return values

    def _with(self, so_far: Match, i: int, wanted: Step, step: Step, turned: bool,
              values: Mapping[str, str]) -> Match:
        """The match with `step` in the place of `wanted`. Unlike, where its dims or attributes are others."""
        dims, run = dict(so_far.dims), so_far.run
        for spec, mine in zip((*wanted.ins, *wanted.outs), (*step.ins[::-1 if turned else 1], *step.outs)):
            run = self._dims(spec, mine, dims, run, step)
        static = dict(so_far.static)
        for key in {**wanted.options, **step.options}:
            self._attribute(i, key, wanted.options.get(key), step, dims, static)
        return Match(values, dims, run, {**so_far.steps, i: step},
                     so_far.turned | {i} if turned else so_far.turned, static)

    def _dims(self, spec: Spec, mine: Spec, dims: dict[str, str], run: tuple[str, ...] | None,
              step: Step) -> tuple[str, ...] | None:
        """Adds what the dims of `spec` are called here; what its run stands for."""
        labels, here, many = spec.labels, mine.labels, self.pattern.run
        unlike = Unlike(f'{said(step)} has "{mine.whole()}", which is no "{spec.whole()}"')
        if many and many[0] in labels:
            at, longer = labels.index(many[0]), len(here) - len(labels) + len(many)
            if longer < 0 or run is not None and here[at:at + longer] != run:
                raise unlike
            run = here[at:at + longer]
            labels, here = labels[:at] + labels[at + len(many):], here[:at] + here[at + longer:]
        if len(labels) != len(here):
            raise unlike
        for name, label in zip(labels, here):
            known, constant = dims.setdefault(name, label), name.isdigit() or label.isdigit()
            if (known != label or constant and name != label or label in (run or ())
                or list(dims.values()).count(label) > 1):
                raise unlike
        return run

    def _attribute(self, i: int, key: str, wanted: object, step: Step, dims: Mapping[str, str],
                   static: dict[str, float]) -> None:
        mine = step.options.get(key)
        if name := self.pattern.static.get((i, key)):
            if key not in step.options:
                raise Unlike(f"{said(step)} has no {key}")
            if static.setdefault(name, mine) != mine:
                raise Unlike(f"{said(step)} has {key}={mine!r}, and {name} is {static[name]!r} already")
        elif mine != (dims.get(wanted, wanted) if isinstance(wanted, str) else wanted):
            raise Unlike(f"{said(step)} has {key}={mine!r}, not {wanted!r}")
