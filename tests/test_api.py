"""Calling, compiling, stepping and simulating one function: the same numbers;
parameters drawn alike on every mesh."""
from __future__ import annotations

import pytest
import torch
from torch import Tensor

from shardlib import (
    EXPLICIT,
    Layout,
    Mesh,
    Params,
    SpecError,
    all_gather,
    compile,
    einsum,
    explain,
    init,
    lower,
    owe,
    param,
    prove,
    rename,
    reshard,
    scan,
    sharded,
    simulate,
    stacked,
    step,
)
from shardlib.functions import mean, silu, sum
from shardlib.ops import rms_norm
from shardlib.params import leaf_values, struct
from shardlib.placement import region, shard_of
from shardlib.spec import parse

SIZES = dict(T=3, D=4, F=5, L=2)


class Mlp(Params):
    up: Tensor = param("D F")
    down: Tensor = param("F D")


class Net(Params):
    layers: Mlp = stacked("L", Mlp)
    bias: Tensor = param("D", initial="ones")


@sharded("T D, * -> T D, ()")
def block(x, w: Mlp):
    y = einsum("T F, F D -> T D", silu(einsum("T D, D F -> T F", x, w.up)), w.down)
    return x + y, sum("T D -> ()", y)


@sharded("T D, * -> T D, L")
def net(x, w: Net):
    x, totals = scan(block, x, w.layers)
    return x + w.bias, totals


def dense(x: Tensor, w: Net) -> tuple[Tensor, Tensor]:
    totals = []
    for up, down in zip(w.layers.up, w.layers.down):
        y = torch.nn.functional.silu(x @ up) @ down
        x, totals = x + y, [*totals, y.sum()]
    return x + w.bias, torch.stack(totals)


def arguments() -> tuple[Tensor, Net]:
    return (torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),
            init(Net, SIZES, dtype=torch.float64))


RUNS = [
    lambda x, w: net(x, w), lambda x, w: compile(net)(x, w), lambda x, w: step(net)(x, w),
    lambda x, w: compile(net, Layout(F="tp"), mesh=Mesh(tp=1))(x, w),
    lambda x, w: simulate(net, Layout(F="tp", T="tp"), x, w, mesh=Mesh(tp=2)),
    lambda x, w: simulate(net, Layout(T="dp", F="tp", D="dp"), x, w, mesh=Mesh(dp=3, tp=2))]


@pytest.mark.parametrize("run", RUNS)
def test_every_way_to_run_gives_the_dense_result(run):
    x, w = arguments()
    for got, want in zip(run(x, w), dense(x, w), strict=True):
        assert torch.allclose(got, want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("run", RUNS)
def test_where_new_tensors_are_by_default_does_not_matter(run):
    """Every tensor that shardlib makes says its device:
    a user may load a model within torch.device("cuda")."""
    x, w = arguments()
    want = run(x, w)
    with torch.device("meta"):
        assert torch.equal(init(Net, SIZES, dtype=torch.float64).layers.up, w.layers.up)
        got = run(x, w)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_step_mode_shows_types_and_local_tensors_to_the_function():
    seen = []

    @sharded("T D, D F -> T F")
    def looking(x, w):
        y = einsum("T D, D F -> T F", x, w)
        seen.append((str(y.spec), tuple(y.local.shape)))
        return y
    step(looking, Layout(F="tp"), mesh=Mesh(tp=1))(torch.randn(3, 4), torch.randn(4, 5))
    assert seen == [("T F/tp", (3, 5))]


def test_step_mode_works_out_the_same_text_anew_under_another_layout():
    """The operands are of the same types in both, whole; what the op makes of them is not."""
    seen = []

    def product(x, w):
        y = einsum("T D, D F -> T F", x, w)
        seen.append(str(y.spec))
        return y
    inner = sharded("T/1 D/1, D/1 F/1 -> T F", layout=Layout(T="tp"))(lambda x, w: product(x, w))

    @sharded("T/1 D/1, D/1 F/1 -> T F, T F, T F")
    def outer(x, w):
        return product(x, w), inner(x, w), product(x, w)
    x, w = torch.randn(3, 4), torch.randn(4, 5)
    assert all(torch.equal(y, x @ w) for y in step(outer, Layout(F="tp"), mesh=Mesh(tp=1))(x, w))
    assert seen == ["T F/tp", "T/tp F", "T F/tp"]


def test_sizes_in_conflict_name_both_binders():
    with pytest.raises(SpecError) as error:
        net(torch.randn(3, 4), init(Net, dict(SIZES, D=6)))
    line = net.fn.__code__.co_firstlineno
    assert str(error.value) == f"net: D is 4 by x, and 6 by w.layers.up          test_api.py:{line}"


def test_a_launch_of_one_process_has_a_mesh_of_one_rank():
    with pytest.raises(SpecError) as error:
        compile(net, Layout(F="tp"), mesh=Mesh(tp=2))
    assert str(error.value) == ("mesh tp=2 has 2 ranks, but this process was started without torchrun; "
                                "start torchrun --nproc-per-node 2, or change the mesh")


def test_shards_of_drawn_parameters_are_slices_of_the_whole():
    mesh = Mesh(dp=2, tp=3)
    whole = dict(leaf_values(init(Net, SIZES, seed=7), "w"))
    types = {path: Layout(F="tp", D="dp").complete_alone(spec) for path, spec in struct(Net).leaves("w")}
    for coordinate in mesh.coordinates():
        for path, shard in leaf_values(
                init(Net, SIZES, types, mesh=mesh, coordinate=coordinate, seed=7), "w"):
            assert torch.equal(shard, whole[path][region(types[path], SIZES, mesh, coordinate)])
    assert not torch.equal(whole["w.layers.up"],
                           dict(leaf_values(init(Net, SIZES, seed=8), "w"))["w.layers.up"])


def test_drawn_numbers_are_standard_normal():
    class Big(Params):
        x: Tensor = param("N", scale=1.0)
    x = init(Big, dict(N=200_000), dtype=torch.float64).x
    assert abs(float(x.mean())) < 4 / 200_000 ** 0.5 and abs(float(x.var()) - 1) < 4 * (2 / 200_000) ** 0.5
    assert (float((x.abs() > 1.959964).double().mean())
            == pytest.approx(0.05, abs=4 * (0.05 * 0.95 / 200_000) ** 0.5))


class Parts(Params):
    a: Tensor = param("D")
    b: Tensor = param("D")
    c: Tensor = param("D")


@sharded("D, * -> D")
def weighed(x, w: Parts):
    for factor, part in ((1.0, w.a), (10.0, w.b), (100.0, w.c)):
        x = x if part is None else x + factor * part
    return x


def test_a_pytree_with_other_fields_set_is_another_program():
    x, one = torch.ones(2), torch.ones(2)
    run = compile(weighed)
    for _ in range(2):
        for w, want in ((Parts(a=one, b=one), 12.0), (Parts(a=one, c=one), 102.0),
                        (Parts(a=one, b=one, c=one), 112.0), (Parts(b=one), 11.0)):
            assert run(x, w).tolist() == [want] * 2


class Layers(Params):
    parts: Parts = stacked("L", Parts)
    last: Parts = stacked("M", Parts)


@sharded("D, * -> D")
def deeply_weighed(x, w: Layers):
    return scan(weighed, scan(weighed, x, w.parts), w.last)


def test_a_pytree_whose_inner_fields_differ_is_another_program():
    """The same fields are set at the top, and as many leaves."""
    x, one = torch.zeros(2), torch.ones(2, 2)
    run = compile(deeply_weighed)
    for _ in range(2):
        for w, want in ((Layers(parts=Parts(a=one), last=Parts(b=one)), 22.0),
                        (Layers(parts=Parts(b=one), last=Parts(a=one)), 22.0),
                        (Layers(parts=Parts(b=one), last=Parts(c=one)), 220.0),
                        (Layers(parts=Parts(a=one), last=Parts(c=one)), 202.0)):
            assert run(x, w).tolist() == [want] * 2


def test_parameters_are_drawn_as_their_fields_say():
    """By default by 1/sqrt of the first dim, without the dim along which they are stacked."""
    class Kinds(Params):
        plain: Tensor = param("D N")
        grouped: Tensor = param("(K H) N")
        wide: Tensor = param("D N", scale=3.0)
        none: Tensor = param("D N", scale=0.0)
        scalar: Tensor = param("()")
        ones: Tensor = param("D", initial="ones")
        zeros: Tensor = param("D", initial="zeros")

    class Many(Params):
        layers: Kinds = stacked("L", Kinds)
        odd: Tensor = param("4 N")
    w = init(Many, dict(L=3, D=16, K=64, H=2, N=1024), dtype=torch.float64)
    for drawn, std in ((w.layers.plain, 1 / 4), (w.layers.grouped, 1 / 128 ** 0.5), (w.layers.wide, 3.0),
                       (w.odd, 1 / 2)):
        n = drawn.numel()
        assert (abs(float(drawn.mean())) < 4 * std / n ** 0.5
                and abs(float(drawn.var()) / std ** 2 - 1) < 4 * (2 / n) ** 0.5)
        rows = drawn.reshape(-1, 1024)
        assert len({float(row[0]) for row in rows}) == len(rows)
    assert (w.layers.scalar.shape == (3,) and bool(w.layers.scalar.all())
            and float(w.layers.scalar.abs().max()) < 6)
    assert not w.layers.none.any() and bool((w.layers.ones == 1).all()) and not w.layers.zeros.any()
    assert not torch.allclose(w.layers.plain * 12, w.layers.wide)  # each field draws its own


class Norm(Params):
    weight: Tensor = param("D")


class Norms(Params):
    layers: Norm = stacked("L", Norm)


@sharded("T D, * -> T D")
def norm_layer(x, w: Norm):
    return rms_norm(x, w.weight)


@sharded("T D, * -> T D, T, T")
def many_kinds(x, w: Norms):
    """The same op with other attributes, a dim that is named here,
    parameters that are gathered layer by layer."""
    x = scan(norm_layer, x * 2.0 + x * 3.0, w.layers)
    scores = einsum("T D, S D -> T S", x, rename("T D -> S D", x))
    return x, mean("T S -> T", scores), mean("T D -> T", x * 2.0 - x * -3.0)


def test_a_shard_of_a_group_is_not_cut_by_its_rows():
    with pytest.raises(SpecError) as refused:
        shard_of(torch.ones(6), parse("(K/tp G)"), Mesh(tp=2), dict(tp=0))
    assert str(refused.value) == "shard_of: (K/tp G) is a group; take it apart first"


def test_step_mode_works_out_other_sizes_anew():
    average = step(sharded("T D -> D")(lambda x: mean("T D -> D", x)))
    assert [average(torch.ones(rows, 2)).tolist() for rows in (2, 5, 2, 3)] == [[1.0, 1.0]] * 4


class OneOfTwo:
    """Rank 0 of two, which tells what it would compare with the other."""
    mesh, rank, coordinate, device = Mesh(tp=2), 0, {"tp": 0}, torch.device("cpu")

    def __init__(self) -> None:
        self.plans: list[str] = []

    def compare_plans(self, title: str, plan: str) -> None:
        self.plans.append(plan)

    def create_groups(self, products: list) -> None:
        assert not products


def test_a_plan_says_all_that_ranks_must_agree_on():
    """Sizes and dtypes of arguments, too: else ranks would wait for each other, or read other bytes."""
    rank, double = OneOfTwo(), sharded("T D -> T D")(lambda x: x * 2.0)
    for rows, dtype in ((5, torch.float32), (6, torch.float32), (5, torch.bfloat16), (5, torch.float64)):
        compile(double, Layout(T="tp"), runtime=rank, sizes=dict(T=rows))(torch.ones(3, 2, dtype=dtype))
    assert len(set(rank.plans)) == 4


def test_step_mode_works_out_each_call_by_itself():
    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    w = Norms(
        layers=Norm(weight=torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.5, 1.0, -1.0, 2.0]], dtype=torch.float64)))
    want = 5 * x
    for weight in w.layers.weight:
        want = want / (want.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    meant = (want, (want @ want.T).mean(1), 5 * want.mean(1))
    runs = (step(many_kinds, Layout(T="dp", D="dp"), mesh=Mesh(dp=1)), compile(many_kinds),
            lambda *args: simulate(
                many_kinds, Layout(T="dp", D="dp"), *args, mesh=Mesh(dp=2)))
    for run in runs:
        for got, y in zip(run(x, w), meant, strict=True):
            assert torch.allclose(got, y, rtol=1e-12, atol=1e-12)


class Weight(Params):
    weight: Tensor = param("D")


@sharded("D, * -> D")
def by_a_whole(x, w: Weight):
    return x * reshard("D -> D/1", w.weight)


def test_a_parameter_follows_an_activation_after_a_conversion_too():
    assert str(lower(by_a_whole, Layout(D="dp"), mesh=Mesh(dp=2))).endswith(
        "    v2 = x * w.weight\n    return v2\n")
    x, w = torch.tensor([1.0, 2.0, 3.0]), Weight(weight=torch.tensor([5.0, 7.0, 9.0]))
    assert simulate(by_a_whole, Layout(D="dp"), x, w, mesh=Mesh(dp=2)).tolist() == [5, 14, 27]


@sharded("B D/1, D, * -> B D/1")
def by_two(x, v, w: Weight):
    return rms_norm(rms_norm(x, w.weight), v)


def test_what_is_beside_a_parameter_of_its_type_is_converted_alike():
    x, v, w = torch.randn(2, 3), torch.randn(3), Weight(weight=torch.randn(3))
    right = step(by_two, Layout(), mesh=Mesh(dp=1))(x, v, w)
    for layout in (Layout(D="dp"), Layout(B="dp", D="dp")):
        assert torch.allclose(simulate(by_two, layout, x, v, w, mesh=Mesh(dp=2)), right)


@sharded("B -> B")
def times(x, *, k):
    return x * k


@sharded("B -> B, B")
def twice_over(x):
    return x * 2, x * 2.0


def test_equal_numbers_of_two_types_are_two_programs():
    x = torch.tensor([1, 2])
    for k, kind in ((2, torch.int64), (2.0, torch.float32), (2, torch.int64)):
        assert times(x, k=k).dtype == kind
    assert ([y.dtype for y in step(twice_over)(x)] == [y.dtype for y in compile(twice_over)(x)]
            == [torch.int64, torch.float32])


def test_sizes_are_told_apart_by_name():
    @sharded("B D -> ()")
    def average(x):
        return mean("B D -> ()", x)
    run = compile(average)
    assert run.at(B=2)(torch.ones(2, 3)) == 1
    with pytest.raises(SpecError, match="^average: D is 2 by sizes, and 3 by x"):
        run.at(D=2)(torch.ones(2, 3))


def test_what_one_has_been_called_with_its_copy_has_not():
    x, one = torch.ones(2), torch.ones(2)
    run = compile(weighed)
    run.lower(None, Parts(a=one, b=one))
    other = run.at(D=2)
    run.lower(None, Parts(a=one))
    assert other(x, Parts(a=one)).tolist() == [2, 2] and run(x, Parts(a=one, b=one)).tolist() == [12, 12]


def test_the_old_word_for_what_a_field_is_filled_with() -> None:
    with pytest.warns(DeprecationWarning) as said:
        class Old(Params):
            ones: Tensor = param("D", init="ones")
    assert str(said[0].message) == (
        "param('D'): init= is now initial=; a checker of types takes init for a word of dataclasses")
    assert init(Old, dict(D=3)).ones.tolist() == [1, 1, 1]
    with pytest.raises(SpecError) as refused:
        param("D", initial="random")
    assert str(refused.value) == "param('D'): initial is 'random'; it is one of normal, ones, zeros"


def test_a_debugger_shows_what_print_shows() -> None:
    seen = []

    @sharded("T/tp D -> T D +dp", layout=EXPLICIT)
    def f(x):
        seen.append(x)
        return owe("T D -> T D +dp", all_gather("T/tp D -> T D", x))

    mesh = Mesh(dp=2, tp=2)
    program = lower(f, mesh=mesh)
    spec = program.steps[-1].outs[0]
    assert repr([seen[0], spec, *spec.dims, *spec.owed]) == "[Value(T/tp D), T D +dp, T, D, +dp]"
    for shown in (program, explain(program, mesh, SIZES), prove(program, mesh, SIZES)):
        assert repr(shown) == str(shown).rstrip("\n")
