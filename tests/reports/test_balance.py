"""Cuts by cost: against all cuts that there are, with and without a limit of memory."""
from __future__ import annotations

import math
from itertools import product

import pytest
from torch import Tensor

from shardlib import (
    Layout,
    Mesh,
    Params,
    SpecError,
    einsum,
    lower,
    param,
    scan,
    sharded,
    stacked,
    value_and_grad,
)
from shardlib.compiler.microbatches import cut
from shardlib.functions import sum
from shardlib.program import Program
from shardlib.reports.balance import _Costs, balance
from shardlib.reports.timetable import timetable
from shardlib.schedules.folding import Fold
from shardlib.schedules.generators import gpipe, interleaved, one_f_one_b, zbv
from shardlib.schedules.schedule import Schedule

pytestmark = pytest.mark.usefixtures("one_thread")


class Layer(Params):
    w: Tensor = param("D E")


class Net(Params):
    tail: Tensor = param("A D")
    layers: Layer = stacked("L", Layer)
    head: Tensor = param("D V")


@sharded("B D, * -> B D")
def layer(x, w: Layer):
    return einsum("B E, D E -> B D", einsum("B D, D E -> B E", x, w.w), w.w)


@sharded("B A, * -> ()")
def loss(x, w: Net):
    made = scan(layer, einsum("B A, A D -> B D", x, w.tail), w.layers)
    return sum("B V -> ()", einsum("B D, D V -> B V", made, w.head))


def lowered(mesh: Mesh, schedule: Schedule) -> Program:
    return lower(value_and_grad(loss), Layout(L="pp", B="mb"), mesh=mesh, schedule=schedule)


@pytest.mark.parametrize(("schedule", "ranks"), [
    (one_f_one_b(2, 3), 2), (gpipe(3, 2), 3), (interleaved(2, 2, 2), 2), (zbv(2, 2), 2)], ids=str)
@pytest.mark.parametrize("ends", ((16, 1), (1, 60), (90, 20)))
def test_no_cut_ends_before(schedule: Schedule, ranks: int, ends: tuple[int, int]) -> None:
    mesh, sizes = Mesh(pp=ranks), dict(L=6, B=6, D=16, E=8, A=ends[0], V=ends[1])
    program = lowered(mesh, schedule)
    found = balance(program, mesh, sizes, schedule)
    fold = Fold(schedule, mesh)
    costs = _Costs(mesh, schedule, cut(program, fold.whole, {}, schedule.kinds), sizes, None)
    every = [n for n in product(range(7), repeat=schedule.stages) if math.fsum(n) == 6]
    assert costs.of(found.layers)[:2] == min(map(costs.of, every))[:2]
    assert timetable(program, mesh, sizes, found).timeline.length == costs.of(found.layers)[1]


def test_memory_comes_before_time() -> None:
    """A rank that may hold no more has fewer layers, though others wait; where no cut is within the limit,
    the one that is least above."""
    mesh, schedule, sizes = Mesh(pp=2), one_f_one_b(2, 4), dict(L=8, B=64, D=16, E=16, A=1, V=64)
    program, most = lowered(mesh, schedule), {}
    for n in range(9):
        made = timetable(program, mesh, sizes, schedule.cut(n, 8 - n))
        most[n, 8 - n] = max(r.peak for r in made.ranks), made.timeline.length
    assert balance(program, mesh, sizes, schedule).layers == min(most, key=lambda cut: most[cut][1])
    for limit in sorted(bytes_ for bytes_, _ in most.values()):
        within = min(most, key=lambda cut: (max(0, most[cut][0] - limit), most[cut][1]))
        assert balance(program, mesh, sizes, schedule, memory=limit).layers == within
    assert balance(program, mesh, sizes, schedule, memory=0).layers == min(most, key=most.get) != (5, 3)


def test_what_has_no_layers_is_not_cut() -> None:
    mesh, schedule = Mesh(pp=2), one_f_one_b(2, 2)

    @sharded("B D -> ()")
    def total(x):
        return sum("B D -> ()", x)
    program = lower(total, Layout(B="mb"), mesh=mesh, schedule=schedule)
    with pytest.raises(SpecError) as refused:
        balance(program, mesh, dict(B=2, D=2), schedule)
    assert str(refused.value) == "balance: total has nothing over pp; a cut is of one number of layers"
