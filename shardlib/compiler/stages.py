"""Which stage of a pipeline has what: values that one stage alone uses live there, and nowhere else.

What a layout says nothing of is whole on the axis of the stages: each would keep the embedding and the head,
and compute them. So what is only used where it is held sinks to there: first the steps, then the parameters,
whose types at rest say it, `embed: param("V D @pp:0")`. Types are all that is changed; what follows from them
is that no other rank computes, loads or keeps any of it.

>>> from shardlib import Layout, Mesh, Params, einsum, lower, param, scan, sharded, stacked
>>> from torch import Tensor
>>> class Layer(Params):
...     w: Tensor = param("D")
>>> class Net(Params):
...     inside: Tensor = param("F D")
...     layers: Layer = stacked("L", Layer)
>>> @sharded("D, * -> D")
... def layer(x, w: Layer):
...     return x * w.w
>>> @sharded("F, * -> D")
... def net(x, w: Net):
...     return scan(layer, einsum("F, F D -> D", x, w.inside), w.layers)
>>> print(str(lower(net, Layout(L="pp"), mesh=Mesh(pp=2))).partition("class Net")[2])
(Params):
    inside: Tensor = param("F D @pp:0")
    layers: Layer = stacked("L/pp", Layer)
<BLANKLINE>
<BLANKLINE>
@sharded("D, * -> D", layout=EXPLICIT)
def layer(x, w: Layer):
    v1 = x * w.w
    return v1
<BLANKLINE>
<BLANKLINE>
@sharded("F, * -> D", layout=EXPLICIT)
def net(x, w: Net):
    v1 = einsum("F, F D @pp:0 -> D @pp:0", x, w.inside)
    v2 = scan(layer, v1, (w.layers,), stages=2)
    v3 = broadcast("D @pp:1 -> D", v2)
    return v3
<BLANKLINE>
"""
from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace

from shardlib.language.held import BROADCAST, HELD, HOLD, runs
from shardlib.language.trace import fresh
from shardlib.program import Program, Scan, Step
from shardlib.spec import Owed, Spec
from shardlib.tree import Struct, leaves

Wanted = dict[str, set[Owed | None]]        # of each value, where those who use it are; None: everywhere


def sunk(program: Program) -> Program:
    """The program in which what one stage alone uses is computed and kept by that stage."""
    if not any(o.kind == "@" for step in program.steps for spec in step.outs for o in spec.owed):
        return program
    wanted: Wanted = defaultdict(set)
    for name, _ in program.result_leaves():
        wanted[name].add(None)
    places = [_sink(step, wanted) for step in reversed(program.steps)][::-1]
    types: dict[str, Spec] = dict(program.arg_leaves())
    for name, tree in program.args:
        if isinstance(tree, Struct):
            types |= {path: _at(spec, _one(wanted[path], spec)) for path, spec in leaves(name, tree)}
    args = tuple((name, _retyped(name, tree, types)) for name, tree in program.args)
    steps, taken, alias = [], program.names(), {}
    for step, place in zip(program.steps, places):
        step = replace(step, inputs=tuple(alias.get(i, i) for i in step.inputs))
        if step.op is HOLD and types[step.inputs[0]] == step.outs[0]:
            alias[step.outputs[0]] = step.inputs[0]
            continue
        if place and not any(place in types[i].owed for i in step.inputs):
            first = step.inputs[0]
            hold = Step(HOLD, (types[first],), (_at(types[first], place),), (first,), (fresh("", taken),),
                        where=step.where, why=f"only {place.axis}:{place.at} needs it")
            types[hold.outputs[0]] = hold.outs[0]
            steps.append(hold)
            step = replace(step, inputs=(hold.outputs[0], *step.inputs[1:]))
        step = replace(step, ins=tuple(types[i] for i in step.inputs),
                       outs=tuple(_at(spec, place) for spec in step.outs))
        types.update(zip(step.outputs, step.outs))
        steps.append(step)
    results = tuple(replace(r, values=tuple(alias.get(v, v) for v in r.values)) for r in program.results)
    return replace(program, args=args, steps=tuple(steps), results=results)


def _sink(step: Step, wanted: Wanted) -> Owed | None:
    """Where a step of which all uses are known sinks to; and what it wants of its operands."""
    places = {_one(wanted[out], spec) for out, spec in zip(step.outputs, step.outs)}
    place = next(iter(places)) if len(places) == 1 else None
    if (step.bodies or not step.inputs or step.op.asserted or step.op in HELD
        or place and _names((*step.ins, *step.outs), place.axis)):
        place = None
    at = {o for spec in step.outs for o in spec.owed if o.kind == "@"} | ({place} if place else set())
    whole = bool(step.bodies) or len(at) != 1 or step.op is BROADCAST
    for name in step.inputs:
        wanted[name] |= {None} if whole else at
    return place


def _one(wanted: set[Owed | None], spec: Spec) -> Owed | None:
    """The one place at which a value is wanted, if it is nowhere yet on that axis."""
    place = next(iter(wanted)) if len(wanted) == 1 else None
    return None if place is None or _names((spec,), place.axis) else place


def _names(specs: tuple[Spec, ...], axis: str) -> bool:
    return any(axis in (*spec.split_axes, *(o.axis for o in spec.owed)) for spec in specs)


def _at(spec: Spec, place: Owed | None) -> Spec:
    return spec.owing(*spec.owed, place) if place else spec


def _retyped(name: str, tree: Spec | Struct, types: Mapping[str, Spec]) -> Spec | Struct:
    if isinstance(tree, Spec):
        return types[name]
    flat = iter([types[path] for path, _ in leaves(name, tree)])
    return tree.map(lambda _: next(flat))


def needed(program: Program, coordinate: Mapping[str, int]) -> set[str]:
    """The arguments' leaves that a rank uses: those of its own steps, and what it returns."""
    used = {name for name, _ in program.result_leaves()}
    for step in program.steps:
        if runs(step, coordinate):
            used |= {*step.inputs} - (_carries(step) if _inner(step, coordinate) else set())
    return used & {path for path, _ in program.arg_leaves()}


def _carries(step: Step) -> set[str]:
    return {value for _, value in Scan.of(step).carries}


def _inner(step: Step, coordinate: Mapping[str, int]) -> bool:
    """Whether it is a pipeline, of which this is not the first stage."""
    return bool(step.options.get("stages")) and not all(
        coordinate[o.axis] == o.at for o in step.ins[0].owed if o.kind == "@")
