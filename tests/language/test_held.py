"""What one coordinate holds: the moves to it, from it and between two, against what they denote."""
from __future__ import annotations

import itertools

import pytest
import torch

from shardlib.compiler.planner import Planned, plan
from shardlib.language.held import BROADCAST, HELD, HOLD, SEND, as_held, runs
from shardlib.language.moves import MOVES, Move, check_move, cost, received
from shardlib.mesh import Mesh
from shardlib.oracle import types
from shardlib.placement import join, place
from shardlib.program import Program, Result, Step
from shardlib.reports.project import project
from shardlib.reports.prove import prove
from shardlib.run.simulate import simulate
from shardlib.spec import Spec, parse

MESH, SIZES = Mesh(pp=3, tp=2), dict(T=5, D=3)
KINDS = [kind for kind in types(parse("T D"), ("pp", "tp"), ("+", "@0", "@2"))
         if all(o.axis == "pp" or o.kind == "+" for o in kind.owed)]
PAIRS = [(a, b) for a, b in itertools.product(KINDS, KINDS) if any(o.kind == "@" for o in (*a.owed, *b.owed))]


def program_of(planned: tuple[Planned, ...], have: Spec) -> Program:
    names = [f"v{i}" for i in range(len(planned) + 1)]
    steps = tuple(Step(m.op, (m.have,), (m.want,), (a,), (b,)) for m, a, b in zip(planned, names, names[1:]))
    want = planned[-1].want if planned else have
    return Program("f", (("v0", have),), steps, (Result(want, (names[-1],)),), True)


def test_every_pair_has_a_plan_that_keeps_the_value_and_is_proven() -> None:
    x = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    seen, ran = set(), 0
    for have, want in PAIRS[::5]:
        program, log = program_of(plan(have, want, MESH), have), []
        seen |= {step.op for step in program.steps}
        assert [check_move(s.op, *s.ins, *s.outs) for s in program.steps] == [None] * len(program.steps)
        pieces = place(x, have, SIZES, MESH, torch.Generator().manual_seed(1))
        outs = simulate(program, MESH, [{"v0": p} for p in pieces], SIZES, log)
        torch.testing.assert_close(join([o["0"] for o in outs], want, SIZES, MESH), x, rtol=0, atol=1e-12)
        calls = [project(program, MESH, rank, SIZES, {"v0": "float64"}) for rank in range(6)]
        for rank, made in enumerate(calls):
            assert ([(c.op.replace("permute", "all_to_all"), c.group) for c in made]
                    == [(name, group) for group, name, _ in log if rank in group])
        assert prove(program, MESH, SIZES).collectives == len(log)
        ran += 1
    assert {*HELD} < seen and ran > 60


@pytest.mark.parametrize("move", HELD, ids=lambda move: move.name)
def test_the_examples_are_moves(move: Move) -> None:
    have, want = map(parse, move.example.strip("`").split(" -> "))
    assert [m.op for m in plan(have, want, Mesh(pp=2))] == [move] and check_move(move, have, want) is None
    assert (cost(move, have, want, dict(pp=2)) > 0) == (move.wire is not None)


@pytest.mark.parametrize("op, have, want", (
    (HOLD, "T/pp D", "T/pp D"), (HOLD, "T D @pp:0", "T D @pp:1"), (HOLD, "T D +pp", "T D @pp:0"),
    (SEND, "T D", "T D @pp:1"), (SEND, "T D @pp:0", "T D @tp:1"), (SEND, "T/tp D @pp:0", "T D @pp:1"),
    (BROADCAST, "T D +pp", "T D"), (BROADCAST, "T D @pp:0", "T/pp D"), (BROADCAST, "T D @pp:0", "T D @pp:1")))
def test_what_is_no_such_move(op: Move, have: str, want: str) -> None:
    assert check_move(op, parse(have), parse(want)) is not None


def test_the_other_moves_are_no_way_out_of_where_a_value_is_held() -> None:
    for op in MOVES:
        assert check_move(op, parse("T D @pp:0"), parse("T D")) is not None
        assert check_move(op, parse("T D"), parse("T D @pp:0")) is not None


def test_who_receives() -> None:
    send = Step(SEND, (parse("T/tp D @pp:0"),), (parse("T/tp D @pp:2"),), ("x",), ("y",))
    spread = Step(BROADCAST, (parse("T D @pp:1"),), (parse("T D"),), ("x",), ("y",))
    assert [received(send, MESH, SIZES, rank) for rank in range(6)] == [0, 0, 0, 0, 9, 6]
    assert [received(spread, MESH, SIZES, rank) for rank in range(6)] == [15, 15, 0, 0, 15, 15]
    assert [[runs(step, c) for c in MESH.coordinates()[::2]] for step in (send, spread)] == [
        [True, False, True], [True] * 3]


def test_held_as_another_value_is() -> None:
    assert str(as_held(parse("T D +tp"), parse("D @pp:1"))) == "T D @pp:1 +tp"
    assert str(as_held(parse("T D @pp:0"), parse("D @pp:1"))) == "T D @pp:0"
