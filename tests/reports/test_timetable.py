"""What a program under a schedule is said to keep is what it keeps; the pictures are of the programs."""
from __future__ import annotations

import importlib.util
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from shardlib import (
    Layout,
    Mesh,
    Params,
    compile,
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
from shardlib.schedules.schedule import Schedule

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


class Live(TorchDispatchMode):
    """Bytes of `given` and of all that ops have made and somebody still has; `most` at once."""

    def __init__(self, given: list[torch.Tensor]) -> None:
        super().__init__()
        self.there = {x.untyped_storage()._cdata for x in given}
        self.now = self.most = sum(x.nbytes for x in given)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for x in tree_leaves(made):
            if isinstance(x, torch.Tensor) and (key := (of := x.untyped_storage())._cdata) not in self.there:
                self.there.add(key)
                self.now += of.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(of, self._gone, key, of.nbytes())
        return made

    def _gone(self, key: int, size: int) -> None:
        self.there.discard(key)
        self.now -= size


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("sizes", (dict(L=4, B=64, D=32, F=48, V=16), dict(L=2, B=256, D=8, F=16, V=300)))
@pytest.mark.parametrize("schedule", (gpipe(1, 4), zero_bubble(1, 4)), ids=("gpipe", "zero bubble"))
def test_the_peak_is_what_was_said(sizes: dict[str, int], dtype: torch.dtype, schedule: Schedule) -> None:
    """Within 5 %: of weights that count for more than rows, and of rows of logits that do."""
    f, layout = value_and_grad(loss), Layout(B="mb")
    run = compile(f, layout, mesh=Mesh(), schedule=schedule)
    x, w = torch.randn(sizes["B"], sizes["D"]).to(dtype), init(Net, sizes, dtype=dtype)
    run(x, w)
    with Live([x, *(leaf for _, leaf in leaf_values(w, ""))]) as live:
        made = run(x, w)
    program = lower(f, layout, mesh=Mesh(), schedule=schedule)
    dtypes = dict.fromkeys((path for path, _ in program.arg_leaves()), str(dtype)[6:])
    (told,) = explain(program, Mesh(), sizes, schedule=schedule, dtypes=dtypes).ranks
    assert 0.95 < live.most / told.peak < 1.05, (live.most, told)
    del made


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
pp  stages  arguments  kept for backward   sums    peak   busy
 0  0           512 B              512 B  384 B  1.9 kB  70.2%
 1  1           560 B              288 B  436 B  1.8 kB  82.5%
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
