"""cumsum, flip, roll and sort: those of torch, gradients too, on pieces of the other dims; refusals."""
from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardlib import EXPLICIT, Layout, Mesh, SpecError, lower, sharded, simulate, value_and_grad
from shardlib.functions import cumsum, flip, roll, sort, sum

pytestmark = pytest.mark.usefixtures("one_thread")
LAYOUTS = (Layout(), Layout(B="x"), Layout(D="x"), Layout(B=("x", "y")), Layout(D="y", B="x"))
ODD = st.sampled_from((-1.0, -0.0, 0.0, 2.0, 2.0, torch.inf, -torch.inf, torch.nan))


def values(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("reverse", (False, True))
@pytest.mark.parametrize("shape", ((3, 5, 4), (1, 0, 2), (2, 1, 1)))
def test_cumsum_is_that_of_torch(layout: Layout, reverse: bool, shape: tuple[int, ...]) -> None:
    x, by = values(shape), values(shape) + 1
    f = sharded("B T D -> B T D")(lambda x: cumsum(x, along="T", reverse=reverse))
    loss = sharded("B T D, B T D -> ()")(lambda x, by: sum("B T D -> ()", by * f(x)))
    asked = x.clone().requires_grad_()
    want = asked.flip(1).cumsum(1).flip(1) if reverse else asked.cumsum(1)
    torch.testing.assert_close(simulate(f, layout, x, mesh=Mesh(x=2, y=2)), want.detach())
    torch.testing.assert_close(simulate(value_and_grad(loss, wrt="x"), layout, x, by, mesh=Mesh(x=2, y=2))[1],
                               torch.autograd.grad(want, asked, by)[0])


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("by", (0, 2, -7))
@pytest.mark.parametrize("shape", ((3, 5, 4), (1, 0, 2)))
def test_flip_and_roll_are_those_of_torch(layout: Layout, by: int, shape: tuple[int, ...]) -> None:
    x, weight, asked = values(shape), values(shape) + 1, values(shape).requires_grad_()
    f = sharded("B T D -> B T D")(lambda x: flip(roll(x, along="T", by=by), along="T"))
    loss = sharded("B T D, B T D -> ()")(lambda x, by: sum("B T D -> ()", by * f(x)))
    want = asked.roll(by, 1).flip(1)
    assert torch.equal(simulate(f, layout, x, mesh=Mesh(x=2, y=2)), want.detach())
    got = simulate(value_and_grad(loss, wrt="x"), layout, x, weight, mesh=Mesh(x=2, y=2))[1]
    assert torch.equal(got, torch.autograd.grad(want, asked, weight)[0])


def test_roll_takes_whole_numbers() -> None:
    for by in (0.5, True, None):
        with pytest.raises(SpecError) as error:
            lower(sharded("T -> T")(lambda x: roll(x, along="T", by=by)), mesh=Mesh())
        assert str(error.value).split("          ")[0] == f"roll: by is {by!r}; it is a whole number"


def test_over_a_split_dim_another_is_split_meanwhile() -> None:
    """Nothing is gathered where another dim may take the axis."""
    def moves(f: Callable) -> list[str]:
        steps = lower(sharded("B T -> B T")(f), Layout(T="x", B="x"), mesh=Mesh(x=2)).steps
        return [step.op.name for step in steps]
    for name, f in (("cumsum", lambda x: cumsum(x, along="T")), ("sort", lambda x: sort(x, along="T")[0]),
                    ("flip", lambda x: flip(x, along="T")), ("roll", lambda x: roll(x, along="T", by=1))):
        assert moves(f) == ["all_to_all", name, "all_to_all"]


def test_cumsum_passes_an_owed_sum_on() -> None:
    f = sharded("B T +tp -> B T +tp", layout=EXPLICIT)(lambda x: cumsum(x, along="T"))
    assert str(lower(f, mesh=Mesh(tp=2))) == '''\
@sharded("B T +tp -> B T +tp", layout=EXPLICIT)
def f(x):
    v1 = cumsum(x, along='T')
    return v1
'''


def test_cumsum_of_narrow_floats_is_rounded_once_and_of_masks_counts() -> None:
    f = sharded("T -> T")(lambda x: cumsum(x, along="T"))
    x = torch.full((1000,), 0.1).bfloat16()
    assert torch.equal(simulate(f, None, x, mesh=Mesh()), x.double().cumsum(0).bfloat16())
    counted = simulate(f, None, torch.ones(300, dtype=torch.bool), mesh=Mesh())
    assert counted.dtype == torch.int64 and counted[-1] == 300


@given(st.lists(st.lists(ODD, min_size=5, max_size=5), min_size=1, max_size=3), st.booleans(),
       st.sampled_from((Layout(), Layout(B="x"), Layout(B=("x", "y")))))
def test_sort_is_the_stable_one_of_torch(rows: list[list[float]], descending: bool, layout: Layout) -> None:
    x = torch.tensor(rows, dtype=torch.float64)
    f = sharded("B V -> B V, B V")(lambda x: sort(x, along="V", descending=descending))
    made, places = simulate(f, layout, x, mesh=Mesh(x=2, y=2))
    want = torch.sort(x, dim=1, descending=descending, stable=True)
    torch.testing.assert_close(made, want.values, equal_nan=True, rtol=0, atol=0)
    assert torch.equal(places, want.indices)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("descending", (False, True))
def test_what_comes_back_to_sort_goes_where_it_was(layout: Layout, descending: bool) -> None:
    x, by = values((3, 5, 4)).mul(2).round(), values((3, 5, 4)) + 1
    f = sharded("B T D, B T D -> ()")(
        lambda x, by: sum("B T D -> ()", by * sort(x, along="T", descending=descending)[0]))
    asked = x.clone().requires_grad_()
    want = torch.sort(asked, dim=1, descending=descending, stable=True).values
    torch.testing.assert_close(simulate(value_and_grad(f, wrt="x"), layout, x, by, mesh=Mesh(x=2, y=2))[1],
                               torch.autograd.grad(want, asked, by)[0])


def said(signature: str, f: Callable, **more: Layout) -> str:
    """What the error says, but for the line."""
    with pytest.raises(SpecError) as error:
        lower(sharded(signature, **more)(f), mesh=Mesh(tp=2))
    return str(error.value).split("          ")[0].split("\n")[0]


@pytest.mark.parametrize("f", (cumsum, sort))
def test_what_they_refuse(f: Callable) -> None:
    name = f.__name__
    assert said("B T -> B T", lambda x: f(x, along="D")) == f"{name}: D is no dim of B T"
    results = ", ".join(["B T/tp"] * (1 + (f is sort)))
    assert said(f"B T/tp -> {results}", lambda x: f(x, along="T"), layout=EXPLICIT) == (
        f"{name}: T is split over tp in x; {name} needs all of T on each rank")
    assert said("B T +tp -> B T", lambda x: sort(x, along="T")[0], layout=EXPLICIT) == (
        "sort: x owes a sum over tp, and sort of a sum is not the sum of sort")
    assert said("B T -> B T", lambda x: f(x, along=3)) == f"{name}: 3 is no dim of B T"
