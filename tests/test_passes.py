"""Passes: each rewrite does what it says on the case it is for, keeps its hands off others, and keeps results."""
from __future__ import annotations

import pytest
import torch

from shardlib import EXPLICIT, Layout, Mesh, SpecError, all_gather, all_reduce, einsum, lower, owe, shard, sharded, simulate
from shardlib.functions import silu
from shardlib.parser import check

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


def collectives(program) -> list[str]:
    return [s.op.name for s in program.steps if s.op.name in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "permute")]


@pytest.mark.parametrize("f, layout, before, after", [
    (parallel, Layout(F="tp"), ["all_reduce"] * 2, ["all_reduce"]),
    (parallel, Layout(F="tp", T="tp"), ["all_gather"] + ["reduce_scatter"] * 2, ["all_gather", "reduce_scatter"]),
    (shared, Layout(F="tp"), ["all_reduce"] * 2, ["all_reduce"] * 2),
    (round_trip, None, ["all_gather", "all_reduce"], []),
    (twice, None, ["all_reduce"] * 2, ["all_reduce"]),
    (dead, None, ["all_gather"], [])])
def test_what_passes_leave_of_the_collectives(f, layout, before, after):
    plain, rewritten = lower(f, layout, mesh=MESH, passes=()), lower(f, layout, mesh=MESH)
    assert collectives(plain) == before and collectives(rewritten) == after
    assert check(rewritten, MESH) == rewritten
    assert [s for _, s in plain.result_leaves()] == [s for _, s in rewritten.result_leaves()]


@pytest.mark.parametrize("f", [parallel, shared])
@pytest.mark.parametrize("layout", [Layout(F="tp"), Layout(F="tp", T="tp"), Layout(F=("tp", "x"), T="x")])
def test_results_stay(f, layout):
    values = [torch.randn(*s, dtype=torch.float64) for s in ((3, 4), (4, 5), (5, 4), (5, 4))]
    want = f(*values)
    assert torch.allclose(simulate(f, layout, *values, mesh=MESH), want, rtol=1e-12, atol=1e-12)


def test_the_product_of_two_reductions_is_one_over_both_axes():
    (step,) = lower(twice, mesh=MESH).steps
    assert step.text == "T D +tp +x -> T D"


def test_an_unknown_pass_is_named():
    with pytest.raises(SpecError) as error:
        lower(parallel, Layout(F="tp"), mesh=MESH, passes=("fuse_all",))
    assert str(error.value) == "passes: 'fuse_all' is not one of hoist_sums, replan_moves, drop_dead_steps"
