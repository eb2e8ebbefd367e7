"""replan_moves: a chain of conversions becomes the cheapest plan between its ends.

    y = all_gather("T/tp D -> T D", x)          |
    z = shard("T D -> T/tp D", y)               |   z is x
    u = all_reduce("D +x +y -> D +y", t)        |
    v = all_reduce("D +y -> D", u)              |   v = all_reduce("D +x +y -> D", t)

Side condition: what lies inside of the chain is used by it alone. A chain is replaced only where that moves
fewer bytes, or takes fewer collectives for the same bytes.
"""
from __future__ import annotations

from dataclasses import replace

from shardlib.compiler.passes.rewrite import Pass, renamed, use_counts
from shardlib.compiler.planner import Planned, plan
from shardlib.language.moves import Move, cost
from shardlib.language.trace import fresh
from shardlib.mesh import Mesh
from shardlib.program import Program, Step
from shardlib.spec import Spec


def replan_moves(program: Program, mesh: Mesh) -> Program:
    """The program with every chain of moves planned again."""
    steps: list[Step] = []
    made: dict[str, Step] = {}
    count = use_counts(program)
    taken = program.names()
    alias: dict[str, str] = {}
    for step in program.steps:
        step = renamed(step, alias).rewritten(lambda body: replan_moves(body, mesh))
        chain = _chain(step, made, count) if step.op.moves else []
        if (len(chain) > 1 and (moves := plan(chain[0].ins[0], step.outs[0], mesh)) is not None
            and _better(moves, chain, mesh)):
            steps = [s for s in steps if s not in chain]
            here = chain[0].inputs[0]
            for i, move in enumerate(moves):
                name = step.outputs[0] if i == len(moves) - 1 else fresh("", taken)
                steps.append(Step(move.op, (move.have,), (move.want,), (here,), (name,), where=step.where,
                                  why=step.why))
                made[name], here = steps[-1], name
                count.setdefault(name, 1)
            if not moves:
                alias[step.outputs[0]] = here
            continue
        steps.append(step)
        made.update({o: step for o in step.outputs})
    results = tuple(replace(r, values=tuple(alias.get(v, v) for v in r.values)) for r in program.results)
    return replace(program, steps=tuple(steps), results=results)


def _chain(step: Step, made: dict[str, Step], count: dict[str, int]) -> list[Step]:
    """The moves that end with `step`, each but the last used by the next alone."""
    chain = [step]
    while ((before := made.get(chain[0].inputs[0])) is not None and before.op.moves
           and count[before.outputs[0]] == 1):
        chain.insert(0, before)
    return chain


def _better(moves: tuple[Planned, ...], chain: list[Step], mesh: Mesh) -> bool:
    now = _cost([(s.op, *s.ins, *s.outs) for s in chain], mesh)
    then = _cost([(m.op, m.have, m.want) for m in moves], mesh)
    return then[0] < now[0] - 1e-12 or then[0] <= now[0] + 1e-12 and then[1] < now[1]


def _cost(moves: list[tuple[Move, Spec, Spec]], mesh: Mesh) -> tuple[float, int]:
    """What a rank receives, in tensors, and the number of collectives."""
    return sum(cost(*move, mesh.axes) for move in moves), sum(op.wire is not None for op, *_ in moves)


REPLAN_MOVES = Pass("replan_moves", replan_moves)
