"""The planner: every plan relabels its value, costs at most gathering everything,
is the same each time, and transposes."""
from __future__ import annotations

import hashlib
import itertools
import os
import subprocess
import sys
from collections.abc import Sequence
from math import prod
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardlib.compiler.planner import Planned, plan
from shardlib.errors import SpecError
from shardlib.language.moves import ALL_TO_ALL, COLLECTIVES, MOVES, PERMUTE, check_move, cost
from shardlib.language.moves import received as elements_received
from shardlib.mesh import Mesh
from shardlib.oracle import dual, types
from shardlib.placement import join, place
from shardlib.program import Op, Program, Result, Step
from shardlib.run.simulate import perform, simulate
from shardlib.spec import Spec, parse

pytestmark = pytest.mark.usefixtures("one_thread")
TWO = types(parse("T D"), ("x", "y"), ("+", "max"))
PAIRS = list(itertools.product(TWO, TWO))
MESHES = (Mesh(x=2, y=2), Mesh(x=2, y=3), Mesh(y=2, x=3))
SIZES = ((5, 7), (2, 1), (0, 3), (12, 12))          # uneven; below the number of ranks; nothing at all; even


def reachable(have: Spec, want: Spec) -> bool:
    """A maximum is never owed anew."""
    return {o for o in want.owed if o.kind == "max"} <= set(have.owed)


def program_of(moves: tuple[Planned, ...], have: Spec) -> Program:
    names = [f"v{i}" for i in range(len(moves) + 1)]
    steps = tuple(Step(m.op, (m.have,), (m.want,), (a,), (b,)) for m, a, b in zip(moves, names, names[1:]))
    want = moves[-1].want if moves else have
    return Program("plan", ((names[0], have),), steps, (Result(want, (names[-1],)),), True)


def carried(x: torch.Tensor, have: Spec, moves: tuple[Planned, ...], sizes: dict, mesh: Mesh,
            log: list | None = None) -> torch.Tensor:
    """What `x`, placed as `have`, denotes after `moves`."""
    program = program_of(moves, have)
    ran = simulate(program, mesh, [{"v0": p} for p in place(x, have, sizes, mesh)], sizes, log)
    return join([r["0"] for r in ran], program.results[0].tree, sizes, mesh)


def gather_everything(have: Spec, mesh: Mesh) -> float:
    """What a rank receives when it pays all that is owed, then gathers all that is split; in tensors."""
    owed, split = prod(mesh.axes[o.axis] for o in have.owed), prod(mesh.axes[a] for a in have.split_axes)
    return (2 * (owed - 1) / owed + split - 1) / split


def received(moves: tuple[Planned, ...]) -> float:
    return sum(m.received for m in moves)


def numbers(sizes: dict) -> torch.Tensor:
    return torch.randn(tuple(sizes.values()), dtype=torch.float64, generator=torch.Generator().manual_seed(1))


# -- all pairs on two axes -----------------------------------------------------------------------------------

@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_every_pair_has_a_plan_of_typed_moves_that_costs_at_most_gathering_everything(mesh: Mesh) -> None:
    planned = 0
    for have, want in PAIRS:
        if not reachable(have, want):
            with pytest.raises(SpecError, match=r'^there is no way from ".*" to ".*"; '):
                plan(have, want, mesh)
            continue
        moves = plan(have, want, mesh)
        assert [m.have for m in moves] + [want] == [have] + [m.want for m in moves]
        assert [check_move(m.op, m.have, m.want) for m in moves] == [None] * len(moves)
        assert received(moves) <= gather_everything(have, mesh) + 1e-9, (have, want)
        planned += 1
    assert planned == 475


@pytest.mark.parametrize("mesh, rows, columns", list(zip(MESHES[1:] * 2, *zip(*SIZES))), ids=str)
def test_every_plan_relabels_its_value(mesh: Mesh, rows: int, columns: int) -> None:
    """Uneven and below the ranks: one mesh has one of each, the other the other's axes."""
    sizes = dict(T=rows, D=columns)
    x = numbers(sizes)
    for have, want in PAIRS:
        if reachable(have, want):
            torch.testing.assert_close(carried(x, have, plan(have, want, mesh), sizes, mesh), x, rtol=0,
                                       atol=1e-12)


def test_only_reductions_of_what_is_owed_and_exchanges_cost_anything() -> None:
    for have, want in PAIRS:
        if reachable(have, want):
            for move in plan(have, want, MESHES[0]):
                assert (move.received > 0) == (move.op in COLLECTIVES)


@pytest.mark.parametrize("mesh", (MESHES[1], Mesh(x=4, y=3)), ids=str)
def test_what_a_move_costs_is_what_each_rank_receives(mesh: Mesh) -> None:
    """Of sizes that the axes divide; of a permute at most that.

    Merged moves cost what the two did, or what the one does.
    """
    sizes, seen = dict(T=24, D=24), set()
    for have, want in PAIRS:
        for move in plan(have, want, mesh) if reachable(have, want) else ():
            got = (elements_received(Step(move.op, (move.have,), (move.want,), (), ()), mesh, sizes, 0)
                   if move.op in COLLECTIVES else 0)
            for told in (move.received, cost(move.op, move.have, move.want, mesh.axes)):
                assert (abs(told * 24 * 24 - got) < 1e-9 or move.op is PERMUTE
                        and told * 24 * 24 > got), str(move)
            seen.add(move.op)
    assert seen == {*MOVES}


@pytest.mark.parametrize("have, want, moves", (
    ("T D +x", "T/x D", ["reduce_scatter"]),
    ("T D +x +y", "T D", ["all_reduce"]),
    ("T D +x +y", "T/x/y D", ["reduce_scatter"]),
    ("T/x/y D", "T D", ["all_gather"]),
    ("T/x D", "T D/x", ["all_to_all"]),
    ("T/x/y D", "T/y/x D", ["permute"]),
    ("T D", "T/x D/y", ["shard"]),
    ("T/x D", "T D +x", ["owe"]),
    ("T D max:x", "T D +x", ["all_reduce", "owe"]),
))
def test_one_move_where_one_is_enough(have: str, want: str, moves: list[str]) -> None:
    assert [m.op.name for m in plan(parse(have), parse(want), MESHES[0])] == moves


# -- each move by itself -------------------------------------------------------------------------------------

@pytest.mark.parametrize("op", MOVES, ids=lambda op: op.name)
def test_a_move_that_types_relabels_its_value(op: Op) -> None:
    mesh, sizes = MESHES[1], dict(T=5, D=7)
    kinds, x, typed = types(parse("T D"), ("x", "y"), ("+", "max", "@0")), numbers(sizes), 0
    for have, want in itertools.product(kinds, kinds):
        if check_move(op, have, want) is None:
            torch.testing.assert_close(carried(x, have, (Planned(op, have, want, 0.0),), sizes, mesh), x,
                                       rtol=0, atol=1e-12)
            typed += 1
    assert typed >= 4


def test_an_exchange_says_that_it_is_even_on_every_rank_or_on_none() -> None:
    """Communicators are chosen by it."""
    mesh, kinds, said = MESHES[1], types(parse("T D"), ("x", "y")), set()

    def looked_at(requests: Sequence[tuple], *wires: Any) -> list:
        if requests[0][1] == "all_to_all":
            even = len({piece.numel() for r in requests for piece in r[2]}) == 1
            assert [r[4:] for r in requests] == [(True,) if even else ()] * len(requests)
            said.add(even)
        return perform(requests, *wires)
    with mock.patch("shardlib.run.simulate.perform", looked_at):
        for op, have, want, (rows, columns) in itertools.product((ALL_TO_ALL, PERMUTE), kinds, kinds,
                                                                 ((5, 4), (4, 5), (4, 4), (12, 6))):
            if check_move(op, have, want) is None:
                carried(numbers(dict(T=rows, D=columns)), have, (Planned(op, have, want, 0.0),),
                        dict(T=rows, D=columns), mesh)
    assert said == {True, False}


# -- the same each time --------------------------------------------------------------------------------------

PRINT_ALL = """
import itertools
from shardlib.compiler.planner import plan
from shardlib.errors import SpecError
from shardlib.mesh import Mesh
from shardlib.oracle import types
from shardlib.spec import parse
kinds = types(parse("T D"), ("x", "y", "z"))
for have, want in itertools.islice(itertools.product(kinds, kinds), 0, None, 7):
    print(have, "|", want, "|", *plan(have, want, Mesh(x=2, y=2, z=3)))
"""


def test_plans_do_not_depend_on_the_hash_seed() -> None:
    runs = [subprocess.Popen([sys.executable, "-c", PRINT_ALL], stdout=subprocess.PIPE,
                             env={**os.environ, "PYTHONHASHSEED": seed}) for seed in "12"]
    printed = [run.communicate()[0] for run in runs]
    assert printed[0].count(b"\n") > 1000
    assert len({hashlib.sha256(p).hexdigest() for p in printed}) == 1


# -- transposes ----------------------------------------------------------------------------------------------

def transposed(have: Spec, want: Spec, sizes: dict, mesh: Mesh) -> torch.Tensor:
    """The cotangent of the operand, put together, that torch.autograd makes
    of random pieces of the result's."""
    pieces = [p.requires_grad_() for p in place(numbers(sizes), have, sizes, mesh)]
    ran = simulate(program_of(plan(have, want, mesh), have), mesh, [{"v0": p} for p in pieces], sizes)
    seeds = place(numbers(sizes).exp(), dual(want, mesh), sizes, mesh)
    # not the zeros that owe makes
    made = [(r["0"], seed) for r, seed in zip(ran, seeds) if r["0"].requires_grad]
    found = torch.autograd.grad([y for y, _ in made], pieces, [seed for _, seed in made], allow_unused=True)
    back = [torch.zeros_like(p) if g is None else g for p, g in zip(pieces, found)]
    return join(back, dual(have, mesh), sizes, mesh)


@pytest.mark.parametrize("mesh", MESHES[1:2], ids=str)
def test_the_transpose_of_a_plan_carries_cotangents_between_the_duals_and_so_does_the_plan_of_the_duals(
        mesh: Mesh) -> None:
    sizes = dict(T=5, D=4)
    cotangent = numbers(sizes).exp()
    sums = types(parse("T D"), ("x", "y"))
    for have, want in itertools.product(sums, sums):
        torch.testing.assert_close(transposed(have, want, sizes, mesh), cotangent, rtol=0, atol=1e-12)
        back = plan(dual(want, mesh), dual(have, mesh), mesh)
        torch.testing.assert_close(carried(cotangent, dual(want, mesh), back, sizes, mesh), cotangent, rtol=0,
                                   atol=1e-12)


@pytest.mark.parametrize("have, want, back", (
    ("T/x D", "T D", ["reduce_scatter"]), ("T D +x", "T/x D", ["all_gather"]),
    ("T D +x", "T D", ["all_reduce"]), ("T/x D", "T D/x", ["all_to_all"]), ("T D", "T/x D", ["owe"]),
    ("T D", "T D +x", []),
))
def test_the_transpose_of_each_move(have: str, want: str, back: list[str]) -> None:
    mesh = Mesh(x=2)
    found = [m.op.name for m in plan(dual(parse(want), mesh), dual(parse(have), mesh), mesh)]
    assert found == (back if want != "T D +x" else ["owe"])


# -- three axes ----------------------------------------------------------------------------------------------

@st.composite
def conversions(draw: st.DrawFn) -> tuple[Mesh, Spec, Spec, dict[str, int]]:
    axes = draw(st.permutations("xyz"))
    mesh = Mesh({a: draw(st.sampled_from((1, 2, 2, 3, 4))) for a in axes})
    dims = parse(draw(st.sampled_from(("T D", "T (K H) D", "B T D", "T 3"))))
    kinds = st.sampled_from(types(dims, sorted(axes)))
    return (mesh, draw(kinds), draw(kinds),
            {n: draw(st.sampled_from((0, 1, 2, 3, 5, 7, 8))) for n in dims.names})


@given(conversions())
@settings(max_examples=3 * settings.default.max_examples)
def test_plans_on_three_axes(case: tuple[Mesh, Spec, Spec, dict[str, int]]) -> None:
    mesh, have, want, sizes = case
    moves = plan(have, want, mesh)
    assert (received(moves) <= gather_everything(have, Mesh({a: max(2, n) for a, n in mesh.axes.items()}))
            + 1e-9)
    x = torch.randn(mesh.local_shape(have.whole(), sizes, {}), dtype=torch.float64,
                    generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(carried(x, have, moves, sizes, mesh), x, rtol=0, atol=1e-12)


@given(conversions())
def test_an_axis_of_one_rank_costs_nothing_when_run(case: tuple[Mesh, Spec, Spec, dict[str, int]]) -> None:
    mesh, have, want, sizes = case
    log: list = []
    carried(torch.zeros(mesh.local_shape(have.whole(), sizes, {})), have, plan(have, want, mesh),
            sizes, mesh, log)
    assert all(len(group) > 1 for group, *_ in log)


# -- what is refused -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("have, want, says", (
    ("T D", "D T", '"T D" and "D T" have different dims'),
    ("T D", "T D max:x", 'there is no way from "T D" to "T D max:x"; a maximum is owed only by what took it'),
))
def test_refusals(have: str, want: str, says: str) -> None:
    with pytest.raises(SpecError) as caught:
        plan(parse(have), parse(want), Mesh(x=2, y=2))
    assert str(caught.value) == says
