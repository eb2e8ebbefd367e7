"""A move is one record, a wire another: one more of each, made here, is planned, run and reported."""
from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence

import pytest
import torch
from rank_by_rank import match

from shardlib import wires
from shardlib.compiler.parser import parse_program
from shardlib.compiler.planner import Planned, plan
from shardlib.distributed import GroupCoordinator
from shardlib.distributed.communicators.alone import Alone
from shardlib.distributed.communicators.protocol import Call
from shardlib.errors import SpecError
from shardlib.language import held, moves
from shardlib.language.moves import MOVES, Move, Search, check_move, cost, received
from shardlib.language.trace import RESERVED
from shardlib.lowering.emit import Emitter
from shardlib.lowering.load import load
from shardlib.mesh import Mesh
from shardlib.oracle import dual
from shardlib.placement import join
from shardlib.program import Program, Result, Step
from shardlib.reports.explain import explain
from shardlib.reports.project import project
from shardlib.reports.prove import prove
from shardlib.run.simulate import simulate
from shardlib.spec import Spec, parse
from shardlib.wires import WIRES, Wire

# -- one wire and one move more: what one coordinate holds, on every rank ------------------------------------


def from_the_root(xs: Sequence[torch.Tensor], more: Sequence[tuple]) -> list[torch.Tensor]:
    ((root,), *_) = more
    return [xs[root].clone() for _ in xs]


def towards(s: Search) -> Iterator[Spec]:
    for o in s.here.owed:
        if o.kind == "@" and o.axis in s.axes and o.axis not in s.wanted:
            yield s.to(owing=s.without(o.axis))


OVER = Wire("broadcast", ("the root a tensor", "the root's"), from_the_root, lambda k: 1.0,
            lambda part: 0 if part.member == part.root else part.gets, rooted=True)
BROADCAST = Move("broadcast", example="`D @tp:0 -> D`", does="what one holds, on every rank", wire=OVER,
                 legal=lambda c: not (c.grown or c.shrunk or c.new) and [o.kind for o in c.lost] == ["@"],
                 neighbours=towards, axes=lambda c: c.paid,
                 root=lambda at: at.change.lost[0].at, request=lambda at: (at.root,))
MESH, SIZES = Mesh(dp=2, tp=3), dict(T=5, D=4)
HELD, WHOLE = parse("T/dp D @tp:2"), parse("T D")


def program_of(planned: Sequence[Planned]) -> Program:
    names = [f"v{i}" for i in range(len(planned) + 1)]
    steps = tuple(Step(m.op, (m.have,), (m.want,), (a,), (b,)) for m, a, b in zip(planned, names, names[1:]))
    return Program("f", (("v0", planned[0].have),), steps, (Result(planned[-1].want, (names[-1],)),), True)


@pytest.fixture
def program() -> Program:
    return program_of(plan(HELD, WHOLE, MESH, (*MOVES, BROADCAST)))


def test_the_planner_finds_it() -> None:
    """Before the gather: there is less to send."""
    assert list(map(str, plan(HELD, WHOLE, MESH, (*MOVES, BROADCAST)))) == [
        'broadcast("T/dp D @tp:2 -> T/dp D")', 'all_gather("T/dp D -> T D")']
    assert cost(BROADCAST, HELD, parse("T/dp D"), MESH.axes) == 0.5
    with pytest.raises(SpecError, match="^there is no way from"):
        plan(HELD, WHOLE, MESH, MOVES)
    assert check_move(BROADCAST, parse("T +tp"), parse("T")) == 'it does not lead from "T +tp" to "T"'


def test_ranks_in_one_process_make_it(program: Program) -> None:
    x, log = torch.arange(20.0).view(5, 4), []
    pieces = [x[:3] if c["dp"] == 0 else x[3:] for c in MESH.coordinates()]
    held = [c["tp"] == 2 for c in MESH.coordinates()]
    given = [{"v0": p if h else p + torch.nan} for p, h in zip(pieces, held)]
    made = simulate(program, MESH, given, SIZES, log)
    assert torch.equal(join([r["0"] for r in made], WHOLE, SIZES, MESH), x)
    assert sorted((group, method) for group, method, _ in log) == [
        ((0, 1, 2), "broadcast"), *(((i, i + 3), "all_gather") for i in range(3)), ((3, 4, 5), "broadcast")]


def test_it_is_proven_with_its_root(program: Program) -> None:
    assert prove(program, MESH, SIZES).collectives == 5
    ranks = [project(program, MESH, rank, SIZES) for rank in range(6)]
    assert {(c.op, c.root) for calls in ranks for c in calls} == {("broadcast", 2), ("all_gather", None)}
    (first, *rest) = ranks[1]
    ranks[1] = [type(first)(**{**vars(first), "root": 1}), *rest]
    with pytest.raises(SpecError, match="^ranks 0 and 1 meet in different collectives: "):
        match(ranks)


def test_it_is_explained(program: Program) -> None:
    sent, gathered = explain(program, MESH, SIZES).traffic
    assert (sent.op, sent.axes, sent.received) == ("broadcast", ("tp",), (48, 48, 0, 32, 32, 0))
    assert gathered.received == (32,) * 3 + (48,) * 3
    assert [received(program.steps[0], MESH, SIZES, rank) for rank in range(6)] == [12, 12, 0, 8, 8, 0]


class Noted(Alone):
    def supports(self, call: Call) -> str | None:
        return f"noted {call}"


def test_a_rank_asks_its_coordinator_for_it(program: Program) -> None:
    emitter = Emitter(MESH, 1, SIZES)
    source = emitter.program(program)
    assert "g0.broadcast(a0, 2, at=s1)" in source
    cpu = torch.device("cpu")
    groups = {name: GroupCoordinator("/".join(axes), MESH.group(axes, 1), 1, 0, cpu, (Noted(),), Alone())
              for axes, name in emitter.groups.items()}
    with pytest.raises(SpecError) as said:
        load(source, emitter.space(cpu), groups, "f")(torch.zeros(3, 4))
    assert f"noted {Call('broadcast', None, torch.float32, 'cpu', 48)}" in str(said.value)


def test_it_is_printed_and_read(program: Program) -> None:
    assert parse_program(str(program), {"broadcast": BROADCAST}) == program


# -- the records that are there ------------------------------------------------------------------------------

def rows(doc: str | None) -> list[str]:
    return [line for line in (doc or "").splitlines() if line.startswith("| ")][1:]


def test_the_tables_in_the_docs_are_those_of_the_records() -> None:
    for module, records in ((moves, MOVES), (held, held.HELD)):
        assert rows(module.__doc__) == [f"| {move.name} | {move.example} | {move.does} |" for move in records]
    assert rows(wires.__doc__) == [f"| {wire.name} | {' | '.join(wire.does)} |" for wire in WIRES.values()]


@pytest.mark.parametrize("move", MOVES, ids=lambda move: move.name)
def test_the_examples_are_moves(move: Move) -> None:
    mesh = Mesh(tp=2, x=2, y=2)
    for example in move.example.split(", "):
        have, want = map(parse, example.strip("`").split(" -> "))
        assert check_move(move, have, want) is None
        assert [m.op for m in plan(have, want, mesh)] == [move]
        assert (cost(move, have, want, mesh.axes) > 0) == (move.wire is not None)


@pytest.mark.parametrize("move", MOVES, ids=lambda move: move.name)
def test_the_transpose_is_one_move_and_costs_the_same(move: Move) -> None:
    """No record says which: it is the move between the duals."""
    mesh = Mesh(tp=2, x=2, y=2)
    for example in move.example.split(", "):
        have, want = map(parse, example.strip("`").split(" -> "))
        (back,) = plan(dual(want, mesh), dual(have, mesh), mesh)
        assert back.received == cost(move, have, want, mesh.axes)


@pytest.mark.parametrize("move", [move for move in MOVES if move.wire], ids=lambda move: move.name)
def test_a_request_is_a_call_of_the_coordinator(move: Move) -> None:
    have, want = map(parse, move.example.strip("`").split(" -> "))
    at = moves.Placed(move, have, want, Mesh(tp=2, x=2, y=2), dict(T=5, D=4), dict(tp=0, x=0, y=0))
    method = getattr(GroupCoordinator, move.wire.name)
    inspect.signature(method).bind(None, "x", *move.request(at), at="step 1")


def test_no_value_is_called_as_a_move() -> None:
    assert {move.name for move in MOVES} < {*RESERVED}


def test_wires_that_moves_share() -> None:
    assert len({move.wire for move in MOVES if move.wire}) == 4
    assert {move.wire for move in (*MOVES, *held.HELD) if move.wire} == {*WIRES.values()}
