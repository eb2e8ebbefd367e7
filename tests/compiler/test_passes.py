"""Passes: each rewrite does what it says on the case it is for, keeps its hands off others,
and keeps results."""
from __future__ import annotations

import importlib
import pkgutil

import pytest
import torch

from shardlib import (
    EXPLICIT,
    Layout,
    Mesh,
    SpecError,
    all_gather,
    all_reduce,
    einsum,
    lower,
    owe,
    reduce_scatter,
    scan,
    shard,
    sharded,
    simulate,
)
from shardlib.compiler import passes
from shardlib.compiler.parser import check
from shardlib.functions import max, silu, sum
from shardlib.language.moves import COLLECTIVES

MESH = Mesh(tp=2, x=2)


@sharded("T D, D F, F D, F D -> T D")
def parallel(x, up, a, b):
    h = einsum("T D, D F -> T F", x, up)
    return einsum("T F, F D -> T D", h, a) + einsum("T F, F D -> T D", silu(h), b)


@sharded("T D, D F, F D, F D -> T D")
def shared(x, up, a, b):
    h = einsum("T D, D F -> T F", x, up)
    y = einsum("T F, F D -> T D", h, a)
    return (y + einsum("T F, F D -> T D", silu(h), b)) * silu(y)


@sharded("T D, D F, F D, F D -> T D, T D")
def shared_on_the_right(x, up, a, b):
    h = einsum("T D, D F -> T F", x, up)
    y = einsum("T F, F D -> T D", h, a)
    return einsum("T F, F D -> T D", silu(h), b) + y, y


@sharded("T/tp D -> T/tp D", layout=EXPLICIT)
def round_trip(x):
    whole = all_gather("T/tp D -> T D", x)
    back = shard("T D -> T/tp D", whole)
    owed = owe("T/tp D -> T/tp D +x", back)
    return all_reduce("T/tp D +x -> T/tp D", owed)


@sharded("T D +tp +x -> T D", layout=EXPLICIT)
def twice(x):
    once = all_reduce("T D +tp +x -> T D +x", x)
    return all_reduce("T D +x -> T D", once)


@sharded("T/tp D -> T/tp D", layout=EXPLICIT)
def dead(x):
    all_gather("T/tp D -> T D", x)
    return x * 2.0


@sharded("T F, T F -> T, T, T, T")
def linear_or_not(a, b):
    """Two sums may be one; two maxima may not."""
    def total(x):
        return sum("T F -> T", x)

    def top(x):
        return max("T F -> T", x)
    return total(a) - total(b), total(b) + total(a * 3.0), top(a) + top(b), top(a) - top(b * 2.0)


@sharded("T +tp, T +x -> T", layout=EXPLICIT)
def over_two_axes(a, b):
    return all_reduce("T +tp -> T", a) + all_reduce("T +x -> T", b)


@sharded("T D, D F, F D -> T D")
def layer(x, up, down):
    h = einsum("T D, D F -> T F", x, up)
    return einsum("T F, F D -> T D", h, down) - einsum("T F, F D -> T D", silu(h), down)


@sharded("T D, L D F, F D -> T D")
def layers(x, up, down):
    return scan(layer, x, up, down)


@sharded("T/tp D +x -> T D", layout=EXPLICIT)
def used_twice(x):
    """A chain of moves may be planned anew as far as nothing else uses what lies inside:
    each reduction, and the gathers."""
    paid = all_reduce("T/tp D +x -> T/tp D", x)
    back = shard("T D -> T/tp D", all_gather("T/tp D -> T D", paid))
    return all_gather("T/tp D -> T D", back) * all_gather("T/tp D -> T D", silu(paid))


@sharded("T D +tp -> T/tp D", layout=EXPLICIT)
def fewer_bytes(x):
    return shard("T D -> T/tp D", all_reduce("T D +tp -> T D", x))


@sharded("T/tp/x D -> T D", layout=EXPLICIT)
def fewer_collectives(x):
    return all_gather("T/tp D -> T D", all_gather("T/tp/x D -> T/tp D", x))


@sharded("T/tp D +x -> T D/x", layout=EXPLICIT)
def cheapest(x):
    return all_gather("T/tp D/x -> T D/x", reduce_scatter("T/tp D +x -> T/tp D/x", x))


@sharded("T D, T D -> T D, T D", layout=EXPLICIT)
def body_of_moves(x, y):
    """Nothing in it is needed but what it returns."""
    all_reduce("T +tp -> T", sum("T D/tp -> T +tp", shard("T D -> T D/tp", y)))
    return y, all_gather("T/tp D -> T D", shard("T D -> T/tp D", x))


@sharded("T D, L T D -> L T D", layout=EXPLICIT)
def stacked_alone(x, ys):
    _, xs = scan(body_of_moves, x, ys)
    return xs


def collectives(program) -> list[str]:
    return [s.op.name for p in (program, *program.bodies()) for s in p.steps if s.op in COLLECTIVES]


@pytest.mark.parametrize("f, layout, before, after", [
    (parallel, Layout(F="tp"), ["all_reduce"] * 2, ["all_reduce"]),
    (parallel, Layout(F="tp", T="tp"), ["all_gather"] + ["reduce_scatter"] * 2,
     ["all_gather", "reduce_scatter"]),
    (shared, Layout(F="tp"), ["all_reduce"] * 2, ["all_reduce"] * 2),
    (shared_on_the_right, Layout(F="tp"), ["all_reduce"] * 2, ["all_reduce"] * 2),
    (round_trip, None, ["all_gather", "all_reduce"], []),
    (twice, None, ["all_reduce"] * 2, ["all_reduce"]),
    (dead, None, ["all_gather"], []),
    (linear_or_not, Layout(F="tp"), ["all_reduce"] * 8, ["all_reduce"] * 6),
    (over_two_axes, None, ["all_reduce"] * 2, ["all_reduce"] * 2),
    (layers, Layout(F="tp"), ["all_reduce"] * 2, ["all_reduce"]),
    (used_twice, None, ["all_reduce"] + ["all_gather"] * 3, ["all_reduce"] + ["all_gather"] * 2),
    (fewer_bytes, None, ["all_reduce"], ["reduce_scatter"]),
    (fewer_collectives, None, ["all_gather"] * 2, ["all_gather"]),
    (cheapest, None, ["reduce_scatter", "all_gather"], ["reduce_scatter", "all_gather"]),
    (stacked_alone, None, ["all_reduce", "all_gather"], [])])
def test_what_passes_leave_of_the_collectives(f, layout, before, after):
    plain, rewritten = lower(f, layout, mesh=MESH, passes=()), lower(f, layout, mesh=MESH)
    assert collectives(plain) == before and collectives(rewritten) == after
    assert check(rewritten, MESH) == rewritten
    assert [s for _, s in plain.result_leaves()] == [s for _, s in rewritten.result_leaves()]


def meant(f, *args):
    """The same in plain torch."""
    if f in (parallel, shared):
        x, up, a, b = args
        h, g = x @ up, torch.nn.functional.silu(x @ up) @ b
        return h @ a + g if f is parallel else (h @ a + g) * torch.nn.functional.silu(h @ a)
    if f is linear_or_not:
        a, b = args
        return a.sum(1) - b.sum(1), b.sum(1) + 3 * a.sum(1), a.amax(1) + b.amax(1), a.amax(1) - 2 * b.amax(1)
    if f is layers:
        x, up, down = args
        for layer_up in up:
            x = (x @ layer_up - torch.nn.functional.silu(x @ layer_up)) @ down
        return x
    if f is stacked_alone:
        x, ys = args
        return torch.cat([x[None], ys[:-1]])
    others = {over_two_axes: lambda a, b: a + b, used_twice: lambda x: x * torch.nn.functional.silu(x),
              dead: lambda x: x * 2}
    return others.get(f, lambda x: x)(*args)


WEIGHTS = ((3, 4), (4, 5), (5, 4), (5, 4))


@pytest.mark.parametrize(
    "f, shapes", [(parallel, WEIGHTS), (shared, WEIGHTS), (linear_or_not, ((3, 5), (3, 5))),
                  (layers, ((3, 4), (2, 4, 5), (5, 4))), (over_two_axes, ((3,), (3,))),
                  (stacked_alone, ((3, 4), (2, 3, 4))), *((f, ((3, 4),)) for f in (
                      used_twice, twice, round_trip, dead, fewer_bytes, fewer_collectives, cheapest))])
@pytest.mark.parametrize("layout", [Layout(F="tp"), Layout(F="tp", T="tp"), Layout(F=("tp", "x"), T="x")])
def test_results_stay(f, shapes, layout):
    """On every mesh what plain torch makes of whole tensors."""
    values = [torch.randn(*s, dtype=torch.float64) for s in shapes]
    got, want = simulate(f, layout, *values, mesh=MESH), meant(f, *values)
    for a, b in zip(*((x if isinstance(x, tuple) else (x,)) for x in (got, want)), strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)


def test_the_product_of_two_reductions_is_one_over_both_axes():
    (step,) = lower(twice, mesh=MESH).steps
    assert step.text == "T D +tp +x -> T D"


def test_a_chain_that_is_cheapest_is_left_as_it_is_written():
    assert lower(cheapest, mesh=MESH) == lower(cheapest, mesh=MESH, passes=())


def test_every_pass_has_a_name():
    modules = [importlib.import_module(f"{passes.__name__}.{m.name}")
               for m in pkgutil.iter_modules(passes.__path__)]
    made = {p for m in modules for p in vars(m).values() if isinstance(p, passes.Pass)}
    assert made == {*passes.PASSES.values()}


def test_an_unknown_pass_is_named():
    with pytest.raises(SpecError) as error:
        lower(parallel, Layout(F="tp"), mesh=MESH, passes=("fuse_all",))
    assert str(error.value) == (
        "passes: 'fuse_all' is not one of hoist_sums, replan_moves, drop_dead_steps, rotate_scan")
