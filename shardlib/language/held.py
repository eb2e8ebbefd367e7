"""The moves of what one coordinate of an axis holds, as a stage of a pipeline does.

| move | from -> to | communication |
|---|---|---|
| hold | `T D -> T D @pp:0` | none: one coordinate keeps it |
| send | `T D @pp:0 -> T D @pp:1` | one coordinate to another |
| broadcast | `T D @pp:0 -> T D` | what one coordinate holds, on every rank |

Ranks elsewhere have nothing: they neither compute what is held nor keep room for it. Like every move these
are the identity on what is denoted: a send's transpose is the send back, a broadcast's of a settled cotangent
is free.

>>> from shardlib.compiler.planner import plan
>>> from shardlib.mesh import Mesh
>>> from shardlib.spec import parse
>>> for move in plan(parse("T D +pp"), parse("T D @pp:1"), Mesh(pp=2)): print(move)
all_reduce("T D +pp -> T D")
hold("T D -> T D @pp:1")
"""
from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import pairwise

from shardlib import wires
from shardlib.language.changes import Change, Search
from shardlib.language.local_code import LocalCode
from shardlib.language.moves import Coordinate, Move
from shardlib.program import Op, Scan, Step
from shardlib.spec import Owed, Spec


def here(spec: Spec, coordinate: Coordinate) -> bool:
    """Whether a rank has a value of this type at all."""
    return all(o.kind != "@" or coordinate[o.axis] == o.at for o in spec.owed)


def held(spec: Spec) -> Spec:
    """The dims, owing nothing, held where `spec` is."""
    return spec.owing(*(o for o in spec.owed if o.kind == "@"))


def as_held(spec: Spec, like: Spec) -> Spec:
    """`spec`, held where `like` is, but for axes on which it says otherwise."""
    said = {o.axis for o in spec.owed}
    return spec.owing(*spec.owed, *(o for o in like.owed if o.kind == "@" and o.axis not in said))


def runs(step: Step, coordinate: Coordinate) -> bool:
    """Whether a rank has a part in a step: it has the operands, or a result."""
    ins = [here(spec, coordinate) for spec in step.ins]
    outs = [here(spec, coordinate) for spec in step.outs]
    if step.op.moves:
        return any(outs) or step.op.wire is not None and any(ins)
    if axis := stage_axis(step):                    # each stage has its part of what is stacked
        kinds = {o for spec in (*step.ins, *step.outs) for o in spec.owed if o.axis != axis}
        return here(Spec(owed=tuple(kinds)), coordinate)
    return all(ins) and all(outs)


def stage_axis(step: Step) -> str | None:
    """The axis along which the stages of a pipeline stand; None of any other step."""
    options = step.options
    return step.ins[options.get("carries", 1)].dims[0].axes[0] if options.get("stages") else None


def _only(made: Change, lost: int, new: int) -> bool:
    """Nothing changes but so much of what is held."""
    kinds = {o.kind for o in (*made.lost, *made.new)}
    return (not (made.grown or made.shrunk or made.crossed) and kinds == {"@"}
            and (len(made.lost), len(made.new)) == (lost, new))


def _towards_hold(s: Search) -> Iterator[Spec]:
    for a in s.free:
        if a in s.holds:
            yield s.to(owing=(*s.here.owed, s.wanted[a]))


HOLD = Move("hold", example="`T D -> T D @pp:0`", does="none: one coordinate keeps it",
            legal=lambda c: _only(c, 0, 1) and not {o.axis for o in c.new} & {*c.have.split_axes},
            neighbours=_towards_hold, emit=lambda e, step, args: args[0])


def _towards_send(s: Search) -> Iterator[Spec]:
    for a in s.held:
        if a in s.holds:
            yield s.to(owing=(*s.without(a), s.wanted[a]))


def ends(step: Step) -> tuple[str, int, int]:
    """The axis of a send, and its two coordinates."""
    (source,), (target,) = ([o for o in one.owed if o not in other.owed]
                            for one, other in ((step.ins[0], step.outs[0]), (step.outs[0], step.ins[0])))
    return source.axis, int(source.at or 0), int(target.at or 0)


def _send(e: LocalCode, step: Step, args: list[str]) -> str:
    axis, source, target = ends(step)
    if e.coordinate[axis] == source:
        return e.send(axis, source, target, args[0])
    return e.recv(axis, source, target, e.shape(step.ins[0]), str(e.dtypes[step.inputs[0]]))


SEND = Move("send", example="`T D @pp:0 -> T D @pp:1`", does="one coordinate to another", wire=wires.SEND,
            legal=lambda c: _only(c, 1, 1) and c.lost[0].axis == c.new[0].axis, neighbours=_towards_send,
            axes=lambda c: c.paid, emit=_send, root=lambda at: int(at.change.new[0].at or 0))


def _towards_broadcast(s: Search) -> Iterator[Spec]:
    for a in s.held:
        if a not in s.holds:
            yield s.to(owing=s.without(a))


BROADCAST = Move("broadcast", example="`T D @pp:0 -> T D`", does="what one coordinate holds, on every rank",
                 legal=lambda c: _only(c, 1, 0), neighbours=_towards_broadcast, axes=lambda c: c.paid,
                 wire=wires.BROADCAST, root=lambda at: int(at.change.lost[0].at or 0),
                 request=lambda at: (at.root,))

HELD = (HOLD, SEND, BROADCAST)


def carries_sent(step: Step) -> list[Step]:
    """The sends of a pipeline, each from one stage to the next, in order."""
    axis = stage_axis(step)
    if axis is None:
        return []
    parts = Scan.of(step)
    order = range(parts.stages)[::-1] if parts.reverse else range(parts.stages)

    def at(spec: Spec, stage: int) -> Spec:
        return spec.owing(*(o for o in spec.owed if o.axis != axis), Owed("@", axis, stage))
    return [replace(step, op=SEND, ins=(at(spec, i),), outs=(at(spec, j),), inputs=(value,), outputs=(value,),
                    attrs=(), body=None, why=f"the carry of {step.bodies[0].name}, to the next stage")
            for i, j in pairwise(order) for spec, (_, value) in zip(step.ins, parts.carries)]

TABLE: Mapping[str, Op] = {op.name: op for op in HELD}
