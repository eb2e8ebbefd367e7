"""Reductions of what is odd: nothing, NaN, infinities, ties, integers, masks;
whole, and over pieces of which some are empty; and the gradients of extremes, ties among them."""
from __future__ import annotations

import builtins
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardlib import EXPLICIT, Layout, Mesh, SpecError, lower, sharded, simulate, value_and_grad
from shardlib.functions import all, any, argmax, argmin, logsumexp, max, mean, min, prod, sum

pytestmark = pytest.mark.usefixtures("one_thread")
LOWEST = {torch.float64: -torch.inf, torch.float32: -torch.inf, torch.int64: -2 ** 63, torch.int32: -2 ** 31,
          torch.bool: False}
ODD = {torch.float64: (0.0, -0.0, 1.0, torch.inf, -torch.inf, torch.nan),
       torch.float32: (0.0, 2.0, 2.0, torch.nan, -torch.inf), torch.int64: (-2 ** 63, 2 ** 63 - 1, 0, 7),
       torch.int32: (-2 ** 31, 3, 3), torch.bool: (False, True)}
LAYOUTS = (Layout(), Layout(V="x"), Layout(V=("x", "y")), Layout(V=("y", "x")), Layout(B="y", V="x"))


@sharded("B V -> B")
def top(x):
    return max("B V -> B", x)


@sharded("B V -> B")
def least(x):
    return min("B V -> B", x)


@sharded("B V -> B")
def best(x):
    return argmax("B V -> B", x)


@sharded("B V -> B")
def worst(x):
    return argmin("B V -> B", x)


def above(a: Any, b: Any) -> bool:
    """Whether a is larger than b, NaN being larger than all else."""
    return a != a and b == b or a > b


@given(st.data(), st.sampled_from(list(ODD)), st.sampled_from(LAYOUTS), st.integers(0, 3), st.integers(0, 5))
def test_max_and_argmax_of_odd_values(data: st.DataObject, dtype: torch.dtype, layout: Layout, rows: int,
                                      size: int) -> None:
    values = [data.draw(st.lists(st.sampled_from(ODD[dtype]), min_size=size, max_size=size))
              for _ in range(rows)]
    x, mesh = torch.tensor(values, dtype=dtype).view(rows, size), Mesh(x=2, y=2)
    first = [next((i for i, a in enumerate(row) if not builtins.any(above(b, a) for b in row)), None)
             for row in values]
    want = torch.tensor([LOWEST[dtype] if i is None else row[i] for row, i in zip(values, first)],
                        dtype=dtype)
    torch.testing.assert_close(simulate(top, layout, x, mesh=mesh), want, rtol=0, atol=0, equal_nan=True)
    if size and dtype != torch.bool:            # torch has no argmax of masks
        assert simulate(best, layout, x, mesh=mesh).tolist() == first


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_mean_of_nothing_is_nan_and_its_sum_is_zero(layout: Layout) -> None:
    @sharded("B V -> B, B")
    def of_nothing(x):
        return mean("B V -> B", x), sum("B V -> B", x)
    for dtype in (torch.float64, torch.bfloat16, torch.int64):
        means, sums = simulate(of_nothing, layout, torch.ones(2, 0, dtype=dtype), mesh=Mesh(x=2, y=2))
        assert means.isnan().all() and sums.tolist() == [0, 0]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_logsumexp_of_infinities_is_that_of_torch(layout: Layout) -> None:
    """What is nothing but -inf stays so, +inf is larger than all else, and a NaN is not lost."""
    @sharded("B V -> B")
    def total(x):
        return logsumexp("B V -> B", x)
    inf, nan = torch.inf, torch.nan
    rows = [0.0, inf, 1.0], [inf] * 3, [-inf] * 3, [-inf, 2.0, -inf], [inf, -inf, 0.0], [0.0, nan, inf]
    x = torch.tensor(rows, dtype=torch.float64)
    got = simulate(total, layout, x, mesh=Mesh(x=2, y=2))
    torch.testing.assert_close(got, x.logsumexp(1), equal_nan=True)


# -- minimum, any, all ---------------------------------------------------------------------------------------

GREATEST = {torch.float64: torch.inf, torch.float32: torch.inf, torch.int64: 2 ** 63 - 1,
            torch.int32: 2 ** 31 - 1, torch.bool: True, torch.uint8: 255}


@given(st.data(), st.sampled_from(list(GREATEST)), st.sampled_from(LAYOUTS), st.integers(0, 3),
       st.integers(0, 5))
def test_min_of_odd_values(data: st.DataObject, dtype: torch.dtype, layout: Layout, rows: int,
                           size: int) -> None:
    """The smallest integer has no negative, and is the smallest all the same."""
    odd = st.sampled_from(ODD.get(dtype, (0, 255, 7)))
    values = [data.draw(st.lists(odd, min_size=size, max_size=size)) for _ in range(rows)]
    x = torch.tensor(values, dtype=dtype).view(rows, size)
    want = x.amin(1) if size else torch.full((rows,), GREATEST[dtype], dtype=dtype)
    torch.testing.assert_close(simulate(least, layout, x, mesh=Mesh(x=2, y=2)), want, rtol=0, atol=0,
                               equal_nan=True)
    if size and dtype != torch.bool:
        first = [next((i for i, a in enumerate(row) if a != a), row.index(builtins.min(row)))
                 for row in values]
        assert simulate(worst, layout, x, mesh=Mesh(x=2, y=2)).tolist() == first


@given(st.lists(st.lists(st.booleans(), min_size=3, max_size=3), max_size=3), st.booleans(),
       st.sampled_from(LAYOUTS))
def test_any_and_all_are_those_of_torch(rows: list[list[bool]], empty: bool, layout: Layout) -> None:
    """Of nothing, any is false and all is true."""
    x = torch.tensor(rows, dtype=torch.bool).view(len(rows), 3)[:, :0 if empty else 3]
    both = sharded("B V -> B, B")(lambda x: (any("B V -> B", x), all("B V -> B", x)))
    somewhere, everywhere = simulate(both, layout, x, mesh=Mesh(x=2, y=2))
    assert torch.equal(somewhere, x.any(1)) and torch.equal(everywhere, x.all(1))


# -- gradients of extremes -----------------------------------------------------------------------------------

def slopes(f: Callable, x: torch.Tensor, by: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The gradient of the sum of by * f(x)."""
    loss = sharded("B V, B -> ()")(lambda x, by: sum("B -> ()", by * f("B V -> B", x)))
    return simulate(value_and_grad(loss, wrt="x"), layout, x, by, mesh=Mesh(x=2, y=2))[1]


def torch_slopes(f: Callable, x: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(f(x, 1), x, by)[0]


@pytest.mark.parametrize("ours, theirs", [(max, torch.amax), (min, torch.amin)])
@given(st.lists(st.lists(st.sampled_from((-1.0, -0.0, 0.0, 2.0, torch.inf, -torch.inf, torch.nan)),
                         min_size=5, max_size=5), min_size=1, max_size=3),
       st.sampled_from(LAYOUTS), st.sampled_from((torch.float64, torch.float32)))
def test_equal_ones_share_the_gradient_as_those_of_torch(
        ours: Callable, theirs: Callable, rows: list[list[float]], layout: Layout,
        dtype: torch.dtype) -> None:
    """On whichever ranks they are; where one is NaN, the gradient of its row is."""
    x, by = torch.tensor(rows, dtype=dtype), torch.arange(1.0, 1 + len(rows), dtype=dtype)
    torch.testing.assert_close(slopes(ours, x, by, layout), torch_slopes(theirs, x, by), equal_nan=True)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_of_many_equal_ones_each_gets_its_share_rounded_once(layout: Layout) -> None:
    """bfloat16 has no 259; and an infinite cotangent goes to them alone."""
    x = torch.cat([torch.ones(2, 259), torch.zeros(2, 3)], 1).bfloat16()
    by = torch.tensor([3.0, torch.inf]).bfloat16()
    for f, y in ((max, x), (min, -x)):
        got = slopes(f, y, by, layout)
        assert got.dtype == torch.bfloat16
        assert torch.equal(got[0], ((x[0] == 1) * (3 / 259)).bfloat16())
        assert torch.equal(got[1], torch.where(x[1] == 1, torch.inf, 0).bfloat16())


def test_backward_of_a_maximum_sends_one_count_and_nothing_large() -> None:
    loss = sharded("B V -> ()")(lambda x: sum("B -> ()", max("B V -> B", x)))
    assert str(lower(value_and_grad(loss, wrt="x"), Layout(V="tp"), mesh=Mesh(tp=2))) == '''\
@sharded("B V/tp -> (), B V/tp", layout=EXPLICIT)
def f_and_grad(x):
    v1 = max("B V/tp -> B max:tp", x)
    v = all_reduce("B max:tp -> B", v1)
    v2 = sum("B -> ()", v)
    v3 = ones_like(v2)
    v4 = spread("() -> B", v3)
    v5 = ties("B V/tp, B -> B +tp", x, v)
    v6 = all_reduce("B +tp -> B", v5)
    v7 = extreme_vjp(x, v, v6, v4)
    return v2, v7
'''


def test_a_minimum_over_pieces_is_the_opposite_of_a_maximum() -> None:
    assert str(lower(least, Layout(V="tp"), mesh=Mesh(tp=2))) == '''\
@sharded("B V/tp -> B", layout=EXPLICIT)
def least(x):
    v2 = max_opposite("B V/tp -> B max:tp", x)
    v = all_reduce("B max:tp -> B", v2)
    v3 = opposite(v)
    return v3
'''


def said(call: Callable, *args: Any, **more: Any) -> str:
    """What the error says, but for the line."""
    with pytest.raises(SpecError) as error:
        call(*args, **more)
    return str(error.value).split("          ")[0].split("\n")[0]


@pytest.mark.parametrize("f", [max, min, any, all])
def test_extremes_refuse_other_specs_than_those_of_a_reduction(f: Callable) -> None:
    name = f.__name__
    for text in ("B V, V -> B", "B -> B V"):
        assert said(lower, sharded("B V -> B")(lambda x: f(text, x)), mesh=Mesh()) == (
            f'{name} "{text}": one spec on each side, the right one with some of the dims of the left one')
    assert said(lower, sharded("B V T -> T B")(lambda x: f("B V T -> T B", x)), mesh=Mesh()) == (
        f'{name} "B V T -> T B": the dims that remain keep their order')


@pytest.mark.parametrize("f", [any, all])
def test_any_and_all_take_masks_alone(f: Callable) -> None:
    whole = sharded("V -> ()")(lambda x: f("V -> ()", x))
    assert said(simulate, whole, None, torch.ones(2), mesh=Mesh()) == (
        f"{f.__name__}: x is float32; a mask is bool, as greater and less make it")


@pytest.mark.parametrize("f", [min, all])
def test_explicit_text_needs_the_dim_whole_that_they_run_over(f: Callable) -> None:
    split = sharded("B V/tp -> B", layout=EXPLICIT)(lambda x: f("B V/tp -> B", x))
    assert said(lower, split, mesh=Mesh(tp=2)) == (
        f"{f.__name__}: V is split over tp in x; {f.__name__} needs all of V on each rank")


@pytest.mark.parametrize("layout", (Layout(), Layout(V="x")), ids=str)
@pytest.mark.parametrize("f, word", ((best, "largest"), (worst, "smallest")))
def test_nothing_has_no_first(f: Callable, word: str, layout: Layout) -> None:
    name = {"largest": "argmax", "smallest": "argmin"}[word]
    assert said(simulate, f, layout, torch.ones(2, 0), mesh=Mesh(x=2)) == (
        f"{name}: V is 0; nothing is the {word} of nothing")


# -- products ------------------------------------------------------------------------------------------------

@given(st.lists(st.lists(st.sampled_from((0.0, -1.5, 2.0, 0.5)), min_size=4, max_size=4), max_size=3),
       st.integers(0, 4), st.sampled_from((*LAYOUTS, Layout(T="x"), Layout(B="x", T="y"))))
def test_products_and_their_gradients_are_those_of_torch(rows: list, size: int, layout: Layout) -> None:
    """Where none, one or more are 0, too; over a split dim, which is made whole."""
    x = torch.tensor(rows, dtype=torch.float64).view(len(rows), 4, 1)[:, :size].repeat(1, 1, 2)
    x[..., 1] += 0.25
    f = sharded("B V T -> B")(lambda x: prod("B V T -> B", x))
    loss = sharded("B V T -> ()")(lambda x: sum("B -> ()", prod("B V T -> B", x)))
    asked = x.clone().requires_grad_()
    want = asked.flatten(1).prod(1)
    torch.testing.assert_close(simulate(f, layout, x, mesh=Mesh(x=2, y=2)), want.detach())
    torch.testing.assert_close(simulate(value_and_grad(loss, wrt="x"), layout, x, mesh=Mesh(x=2, y=2))[1],
                               torch.autograd.grad(want.sum(), asked)[0])


def test_products_of_integers_are_int64_and_of_bfloat16_rounded_once() -> None:
    f = sharded("B V -> B")(lambda x: prod("B V -> B", x))
    ints = torch.tensor([[100, 100, 3]], dtype=torch.int8)
    assert torch.equal(simulate(f, Layout(B="x"), ints, mesh=Mesh(x=2)), torch.tensor([30000]))
    x = (1 + torch.rand(3, 64, generator=torch.Generator().manual_seed(0)) / 64).bfloat16()
    assert torch.equal(simulate(f, None, x, mesh=Mesh()), x.double().prod(1).bfloat16())
