"""A program cut for microbatches: what is done once before them, what each of them does, what is done after.

The program is typed as if microbatches were ranks along an axis of time: `B/dp/mb T`, `D F +mb`. So means,
masks and gradients are right by the rules that hold over ranks. What depends on a sum over that axis can only
be done when it is there:

    before    what needs neither weights and rows together, nor stages: the count of a mask, weights gathered
    forward   what leads to the pipeline, and the pipeline
    backward  the rest of what one microbatch does; in two where the schedule has it so (`halves`): what
              leads to the cotangent of the carry, and the rest
    after     what depends on sums over all microbatches, and what all stages do together

The first and the last are without time: they are typed, and run, for all rows of a rank at once; moves over
time are nothing there. What a microbatch owes over time is added up as it comes; what it has a piece of is
put together. Refused, with the line: a layer, or a gradient, that needs a sum over all microbatches.
"""
from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from shardlib.compiler.grad import ONES_LIKE, ZEROS_LIKE
from shardlib.compiler.halves import halved
from shardlib.dtypes import FLOATS, value_dtypes
from shardlib.errors import SpecError
from shardlib.language.casts import CAST, CAST_LIKE
from shardlib.language.constants import FULL
from shardlib.language.exchanges import communicates_over
from shardlib.language.held import here, runs, stage_axis
from shardlib.language.moves import Coordinate
from shardlib.mesh import Mesh
from shardlib.program import Program, Result, Step
from shardlib.schedules.folding import TIME, timed, timeless
from shardlib.spec import Spec
from shardlib.tree import Struct, Tree, leaves


@dataclass(frozen=True)
class Cut:
    """The parts of a program, each a program. `units`: those of one microbatch, in order.

    first: what the results of `before` are called by the others.  kinds: the dtype of every value.
    """
    program: Program
    kinds: Mapping[str, str]
    first: tuple[str, ...]
    before: Program
    units: tuple[Program, ...]
    after: Program

    def at(self, here: Coordinate) -> tuple[Program, ...]:
        """The units as one stage has them: its own steps, and of what they make what it uses later."""
        made = [_steps(unit, [s for s in unit.steps if runs(s, here)], here) for unit in self.units]
        wanted, out = {path for path, _ in self.after.arg_leaves()}, []
        for unit in reversed(made):
            kept = tuple(r for r in unit.results if r.values[0] in wanted)
            out.append(replace(unit, results=kept))
            wanted |= {path for path, _ in unit.arg_leaves()}
        return tuple(reversed(out))


def _steps(unit: Program, steps: Sequence[Step], at: Coordinate) -> Program:
    """The unit with these steps alone. What others have made, as the carry of the stage before, is an
    argument that nobody gives."""
    used, made = {i for s in steps for i in s.inputs}, {o for s in steps for o in s.outputs}
    args: list[tuple[str, Tree]] = [(name, tree) for name, tree in unit.args
                                    if any(p in used for p, _ in leaves(name, tree))]
    args += [(o, spec) for s in unit.steps for o, spec in zip(s.outputs, s.outs) if o in used - made]
    return replace(unit, args=tuple(args), steps=tuple(steps),
                   results=tuple(r for r in unit.results if r.values[0] in made and here(r.tree, at)))


def cut(program: Program, mesh: Mesh, dtypes: Mapping[str, str], actions: str,
        default: str = "float32") -> Cut:
    """The parts of an explicit program on `mesh`, which has the axis of time, for a schedule with these kinds
    of actions: "F", "FB" or "FIW". dtypes: of arguments by path, `default` of the others."""
    program = halved(program) if actions == "FIW" else program
    kinds = value_dtypes(program, dtypes, default)
    program = _alike(program, kinds)
    _check(program, mesh)
    pipelines = [s for s in program.steps if stage_axis(s)]
    _check_pipelines(program, pipelines, actions)
    where = _phases(program, mesh)
    steps = _used(program)
    chosen: list[list[Step]] = []
    left = [s for s in steps if where[s.outputs[0]] == "unit"]
    for i in range(len(actions)):
        last = i == len(actions) - 1
        mine = left if last else _ancestors(left, pipelines[i:i + 1])
        chosen.append(mine)
        left = [s for s in left if not any(s is m for m in mine)]
    groups = [[s for s in steps if where[s.outputs[0]] == "before"], *chosen,
              [s for s in steps if where[s.outputs[0]] == "after"]]
    titles = ("before", *dict(F=("forward",), FB=("forward", "backward"),
                              FIW=("forward", "backward", "weights"))[actions], "after")
    parts = [_part(program, f"{program.name}_{title}", groups, i) for i, title in enumerate(titles)]
    first = tuple(name for name, _ in parts[0].result_leaves())
    return Cut(program, kinds, first, _still(parts[0]), tuple(parts[1:-1]), _still(parts[-1]))


def _alike(program: Program, kinds: Mapping[str, str]) -> Program:
    """The program in which nothing waits for a value of which only the dtype counts."""
    def alike(step: Step) -> Step:
        if step.op in (ONES_LIKE, ZEROS_LIKE):
            kind = kinds[step.inputs[0]]
            return replace(step, op=FULL, ins=(), inputs=(), said=(), attrs=(
                ("dtype", kind), ("value", 1.0 if step.op is ONES_LIKE else 0.0)))
        if step.op is CAST_LIKE and (kind := kinds[step.outputs[0]]) in FLOATS:
            return replace(step, op=CAST, ins=step.ins[:1], inputs=step.inputs[:1], said=step.said[:1],
                           attrs=(("dtype", kind),))
        return step
    return replace(program, steps=tuple(map(alike, program.steps)))


def _check(program: Program, mesh: Mesh) -> None:
    """SpecError unless microbatches are the last axis of what they split."""
    for spec in program.types().values():
        if wrong := next((d for d in spec.dims for f in d.factors if TIME in f.axes[:-1]), None):
            raise SpecError(f"schedule: a value is {spec}; microbatches are cut last: "
                            f'{wrong.names[0]}=(.., "{TIME}")').at(program.where)
    if not any(timed(spec) for _, spec in program.arg_leaves()):
        raise SpecError(f"schedule: no argument of {program.name} is split over {TIME}; the layout says what "
                        f'microbatches are pieces of, as in B="{TIME}"').at(program.where)


def _check_pipelines(program: Program, found: Sequence[Step], actions: str) -> None:
    most = 1 if actions == "F" else 2
    if len(found) > most or any(s.options.get("reverse", False) != bool(i) for i, s in enumerate(found)):
        raise SpecError(f"schedule: {program.name} has {len(found)} pipelines, "
                        f"{', '.join(s.bodies[0].name for s in found)}; under a schedule there is one"
                        f"{', and its gradient' if most > 1 else ''}").at(found[-1].where)
    inner = next((s for body in program.bodies() for s in body.steps if stage_axis(s)), None)
    if inner is not None:
        raise SpecError(f"schedule: the pipeline of {inner.bodies[0].name} is in the body of another scan; "
                        "under a schedule it is not").at(inner.where)


# -- which step is where -------------------------------------------------------------------------------------

def _phases(program: Program, mesh: Mesh) -> dict[str, str]:
    """Where each step is, by its first result: before, unit or after. SpecError where that cannot be."""
    weights = {path for path, spec in _weights(program) if not timed(spec)}
    rows = {path for path, spec in program.arg_leaves() if timed(spec)}
    axis = next((stage_axis(s) for s in program.steps if stage_axis(s)), None)
    where: dict[str, str] = {}
    late: dict[str, Step] = {}          # of a value that comes after, the step because of which it does
    for step in program.steps:
        both = stage_axis(step) or weights & {*step.inputs} and rows & {*step.inputs}
        gathers = _communicates(step, mesh, TIME)
        joins = gathers or axis is not None and not stage_axis(step) and _communicates(step, mesh, axis)
        joins = joins or step.op.moves and bool(step.op.wire) and TIME in step.ins[0].owed_axes
        why = next((late[i] for i in step.inputs if i in late), step if both and joins else None)
        if why is not None and (stage_axis(step) or gathers and step.bodies):
            raise _refused(step, why)
        late.update({out: why for out in step.outputs} if why else {})
        first = not both and (joins or not any(map(timed, (*step.ins, *step.outs))))
        where[step.outputs[0]] = "after" if why else "before" if first else "unit"
        weights |= {*step.outputs} if both or weights & {*step.inputs} else set()
        rows |= {*step.outputs} if both or rows & {*step.inputs} else set()
    wanted: set[str] = set()
    for step in reversed(program.steps):
        if where[step.outputs[0]] == "unit" and wanted & {*step.outputs}:
            where[step.outputs[0]] = "before"
        if where[step.outputs[0]] == "before":
            wanted |= {*step.inputs}
    return where


def _weights(program: Program) -> list[tuple[str, Spec]]:
    """The leaves of pytrees; without any, all arguments."""
    trees = [leaf for name, tree in program.args if isinstance(tree, Struct) for leaf in leaves(name, tree)]
    return trees or program.arg_leaves()


def _refused(step: Step, why: Step) -> SpecError:
    if step is why:
        return SpecError(f"schedule: {step.bodies[0].name} has a sum over all microbatches in each layer; "
                         "there is none before all have come to it").at(step.where)
    said = f"{why.op.name}(\"{why.text}\")"
    return SpecError(f"schedule: the pipeline of {step.bodies[0].name} waits for {said}, which all "
                     "microbatches have to come to first").at(why.where)


def _communicates(step: Step, mesh: Mesh, axis: str) -> bool:
    """Whether it is, or has within, a collective over `axis`."""
    if step.bodies:
        return any(_communicates(s, mesh, axis) for body in step.bodies for s in body.steps)
    return axis in communicates_over(step, mesh)


def _used(program: Program) -> list[Step]:
    """The steps that a result needs, and all of a pipeline."""
    wanted, kept = {name for name, _ in program.result_leaves()}, []
    for step in reversed(program.steps):
        if stage_axis(step) or wanted & {*step.outputs}:
            wanted |= {*step.inputs}
            kept.append(step)
    return kept[::-1]


def _ancestors(steps: Sequence[Step], ends: Sequence[Step]) -> list[Step]:
    wanted, kept = set(), []
    for step in reversed(steps):
        if any(step is end for end in ends) or wanted & {*step.outputs}:
            wanted |= {*step.inputs}
            kept.append(step)
    return kept[::-1]


# -- the parts -----------------------------------------------------------------------------------------------

def _part(program: Program, title: str, groups: Sequence[Sequence[Step]], i: int) -> Program:
    """The part of the steps `groups[i]`: it takes what others have made, and gives what later ones use."""
    steps, types = groups[i], program.types()
    made = {o for s in steps for o in s.outputs}
    last = i == len(groups) - 1
    results = {name for name, _ in program.result_leaves()}
    used = {n for s in steps for n in s.inputs} | (results if last else set())
    later = {n for group in groups[i + 1:] for s in group for n in s.inputs} | results
    mine = {path for path, _ in program.arg_leaves()}
    args: list[tuple[str, Tree]] = [(name, tree) for name, tree in program.args
                                    if any(path in used for path, _ in leaves(name, tree))]
    args += [(name, types[name]) for name in types if name in used - made - mine]
    gives: Iterable[Result] = program.results if last else (
        Result(types[name], (name,)) for name in types if name in made & later)
    return Program(title, tuple(args), tuple(steps), tuple(gives), True, program.where)


def _still(program: Program) -> Program:
    """The program for all microbatches at once: the same without their axis."""
    alias: dict[str, str] = {}
    steps = []
    for step in program.steps:
        step = replace(step.rewritten(_still), inputs=tuple(alias.get(n, n) for n in step.inputs),
                       ins=tuple(map(timeless, step.ins)), outs=tuple(map(timeless, step.outs)))
        if step.op.moves and step.ins == step.outs:
            alias[step.outputs[0]] = step.inputs[0]
        else:
            steps.append(step)
    args = tuple((name, _tree(tree)) for name, tree in program.args)
    return replace(program, args=args, steps=tuple(steps),
                   results=tuple(Result(_tree(r.tree), tuple(alias.get(v, v) for v in r.values))
                                 for r in program.results))


def _tree(tree: Tree) -> Tree:
    return tree.map(timeless) if isinstance(tree, Struct) else timeless(tree)
