"""What a program under a schedule is said to keep is what it keeps; the pictures are of the programs."""
from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from shardlib import (
    Layout,
    Mesh,
    Params,
    einsum,
    explain,
    init,
    lower,
    param,
    scan,
    sharded,
    stacked,
    value_and_grad,
)
from shardlib.compiler.microbatches import cut
from shardlib.functions import mean, silu
from shardlib.params import leaf_values
from shardlib.reports.timetable import most_kept
from shardlib.run.simulate import simulate_schedule
from shardlib.schedules.folding import Fold
from shardlib.schedules.generators import gpipe, interleaved, one_f_one_b, zbv, zero_bubble

pytestmark = pytest.mark.usefixtures("one_thread")


class Layer(Params):
    up: torch.Tensor = param("D F")
    down: torch.Tensor = param("F D")


class Net(Params):
    layers: Layer = stacked("L", Layer)
    head: torch.Tensor = param("D V")


@sharded("B D, * -> B D")
def layer(x, w: Layer):
    return x + einsum("B F, F D -> B D", silu(einsum("B D, D F -> B F", x, w.up)), w.down)


@sharded("B D, * -> ()")
def loss(x, w: Net):
    y = einsum("B D, D V -> B V", scan(layer, x, w.layers), w.head)
    return mean("B V -> ()", y * y)


SIZES = dict(L=5, B=7, D=4, F=6, V=3)


@pytest.mark.parametrize("mesh, schedule", [
    (Mesh(pp=2), gpipe(2, 4)), (Mesh(dp=2, pp=3), one_f_one_b(3, 3)), (Mesh(pp=2), interleaved(2, 2, 2)),
    (Mesh(pp=2), zero_bubble(2, 3)), (Mesh(pp=2), zbv(2, 3))])
def test_what_is_kept_is_what_was_said(mesh, schedule) -> None:
    """To the byte, on every rank: uneven layers and microbatches, backward in one and in two."""
    layout = Layout(L="pp", B=("dp", "mb") if "dp" in mesh.axes else "mb")
    program = lower(value_and_grad(loss), layout, mesh=mesh, schedule=schedule)
    fold = Fold(schedule, mesh)
    whole = {"x": torch.randn(7, 4), **dict(leaf_values(init(Net, SIZES), "w"))}
    placed = {path: fold.place_all(whole[path], kind, SIZES) for path, kind in program.arg_leaves()}
    most: list[int] = []
    simulate_schedule(program, fold, [{path: shards[r] for path, shards in placed.items()}
                                      for r in range(mesh.world_size)], SIZES, None, most)
    parts = cut(program, fold.whole, {}, schedule.kinds)
    assert most == [most_kept(fold, parts, SIZES, c) for c in mesh.coordinates()]
    told = explain(program, mesh, SIZES, schedule=schedule)
    assert [plan.kept for plan in told.ranks] == most[:len(told.ranks)]
    if mesh.world_size == len(told.ranks):
        assert [plan.arguments for plan in told.ranks] == [
            sum(shards[r].nbytes for (path, kind), shards in zip(program.arg_leaves(), placed.values())
                if not any(o.kind == "@" and schedule.rank_of[o.at] != r for o in kind.owed))
            for r in range(mesh.world_size)]


def test_what_it_prints() -> None:
    """A layer keeps 64 bytes a row, of 2 layers and 2 rows 256; the first stage of two keeps that twice, the
    last one once, with the carry of 32 that its head takes."""
    schedule, mesh = one_f_one_b(2, 4), Mesh(pp=2)
    program = lower(value_and_grad(loss), Layout(L="pp", B="mb"), mesh=mesh, schedule=schedule)
    told = explain(program, mesh, {**SIZES, "L": 4, "B": 8}, schedule=schedule)
    assert [line.rstrip() for line in str(told).splitlines()] == PRINTED.splitlines()
    lengths = {str(s.action): s.end - s.start for s in told.timeline.spans}
    assert lengths["0F0"] == lengths["1F0"] == 2 * (2 * 48 + 12 + 8)
    assert told.messages == {(0, 1): (32, 1), (1, 0): (32, 1)}


PRINTED = """\
loss_and_grad on mesh pp=2, 2 stages, 4 microbatches
pp  stages  arguments  kept for backward   sums   busy
 0  0           512 B              512 B  384 B  70.2%
 1  1           560 B              288 B  436 B  82.5%
stage 0 to 1: 32 B a message, 1 at once
stage 1 to 0: 32 B a message, 1 at once
23.7% of the time idle, by work alone
"""


def test_the_pictures_are_of_the_programs() -> None:
    path = Path(__file__).parents[2] / "docs" / "make_timeline.py"
    spec = importlib.util.spec_from_file_location("make_timeline", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, text in module.pictures():
        assert path.with_name(name).read_text() == text, "python docs/make_timeline.py"
