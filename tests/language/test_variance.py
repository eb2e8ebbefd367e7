"""Variances and deviations: those of torch, gradients too, whole and over pieces of which some are empty."""
from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardlib import EXPLICIT, Layout, Mesh, SpecError, lower, sharded, simulate, value_and_grad
from shardlib.functions import std, sum, var

pytestmark = pytest.mark.usefixtures("one_thread")
LAYOUTS = (Layout(), Layout(V="x"), Layout(V=("x", "y")), Layout(V=("y", "x")), Layout(B="y", V="x"),
           Layout(T="x", V="y"), Layout(B=("x", "y")))
OURS = {"var": var, "std": std}


def both(name: str, correction: int, layout: Layout, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The value over V, and the gradient of its sum."""
    def f(x):
        return OURS[name]("B V T -> B T", x, correction=correction)
    loss = sharded("B V T -> ()")(lambda x: sum("B T -> ()", f(x)))
    return (simulate(sharded("B V T -> B T")(f), layout, x, mesh=Mesh(x=2, y=2)),
            simulate(value_and_grad(loss, wrt="x"), layout, x, mesh=Mesh(x=2, y=2))[1])


def of_torch(name: str, correction: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        y = getattr(x, name)(1, correction=correction)
    return y.detach(), torch.autograd.grad(y.sum(), x)[0]


@given(st.sampled_from(("var", "std")), st.integers(0, 1), st.sampled_from(LAYOUTS), st.integers(0, 5),
       st.integers(0, 3), st.integers(0, 99), st.booleans())
def test_they_are_those_of_torch(name: str, correction: int, layout: Layout, size: int, rows: int, seed: int,
                                 equal: bool) -> None:
    """NaN where there is nothing to divide by; where all are equal, the deviation has the slope 0."""
    x = torch.randn(rows, size, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = torch.full_like(x, 0.5) if equal else x
    for got, want in zip(both(name, correction, layout, x), of_torch(name, correction, x)):
        torch.testing.assert_close(got, want, equal_nan=True)


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_statistics_are_float32_and_rounded_once(name: str, layout: Layout) -> None:
    """Far from 0 the squares of bfloat16 would cancel; 257 of them would count as 256."""
    x = (100 + torch.randn(3, 257, 2, generator=torch.Generator().manual_seed(0))).bfloat16()
    value, slope = both(name, 1, layout, x)
    exact, exact_slope = of_torch(name, 1, x.double())
    assert value.dtype == slope.dtype == torch.bfloat16
    assert torch.equal(value, exact.bfloat16())
    torch.testing.assert_close(slope.double(), exact_slope, rtol=2 ** -7, atol=1e-6)


def test_of_integers_they_are_fractions() -> None:
    f = sharded("V -> ()")(lambda x: var("V -> ()", x, correction=0))
    got = simulate(f, Layout(V="x"), torch.tensor([1, 2, 3, 6]), mesh=Mesh(x=3))
    assert got.dtype == torch.float32 and got.item() == 3.5


def test_over_a_split_dim_two_small_sums_are_sent() -> None:
    f = sharded("B V -> B")(lambda x: std("B V -> B", x))
    assert str(lower(f, Layout(V="tp"), mesh=Mesh(tp=2))) == '''\
@sharded("B V/tp -> B", layout=EXPLICIT)
def f(x):
    v2 = widen(x)
    v3 = mean("B V/tp -> B +tp", v2)
    v = all_reduce("B +tp -> B", v3)
    v4 = var_about("B V/tp, B -> B +tp", v2, v, correction=1)
    v5 = all_reduce("B +tp -> B", v4)
    v6 = root(v5)
    v7 = cast_like(v6, x)
    return v7
'''


def said(call: Callable, *args: object, **more: object) -> str:
    """What the error says, but for the line."""
    with pytest.raises(SpecError) as error:
        call(*args, **more)
    return str(error.value).split("          ")[0].split("\n")[0]


@pytest.mark.parametrize("f", [var, std])
def test_what_they_refuse(f: Callable) -> None:
    name = f.__name__
    for wrong in (2, -1, True, 0.5, None):
        assert said(lower, sharded("V -> ()")(lambda x: f("V -> ()", x, correction=wrong)), mesh=Mesh()) == (
            f"{name}: correction is {wrong!r}; it is 0 or 1")
    split = sharded("B V/tp -> B", layout=EXPLICIT)(lambda x: f("B V/tp -> B", x))
    assert said(lower, split, mesh=Mesh(tp=2)) == (
        f"{name}: V is split over tp in x; {name} needs all of V on each rank")
    owed = sharded("B V +tp -> B", layout=EXPLICIT)(lambda x: f("B V -> B", x))
    assert said(lower, owed, mesh=Mesh(tp=2)) == f'{name}: x owes a sum over tp; the text takes "B V"'
    masks = sharded("V -> ()")(lambda x: f("V -> ()", x))
    assert simulate(masks, None, torch.tensor([True, True]), mesh=Mesh()).item() == 0
