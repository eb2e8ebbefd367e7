"""Reductions of what is odd: nothing, NaN, infinities, ties, integers, masks;
whole, and over pieces of which some are empty."""
from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardlib import Layout, Mesh, sharded, simulate
from shardlib.functions import argmax, logsumexp, max, mean, sum

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
def best(x):
    return argmax("B V -> B", x)


def above(a: Any, b: Any) -> bool:
    """Whether a is larger than b, NaN being larger than all else."""
    return a != a and b == b or a > b


@given(st.data(), st.sampled_from(list(ODD)), st.sampled_from(LAYOUTS), st.integers(0, 3), st.integers(0, 5))
def test_max_and_argmax_of_odd_values(data: st.DataObject, dtype: torch.dtype, layout: Layout, rows: int,
                                      size: int) -> None:
    values = [data.draw(st.lists(st.sampled_from(ODD[dtype]), min_size=size, max_size=size))
              for _ in range(rows)]
    x, mesh = torch.tensor(values, dtype=dtype).view(rows, size), Mesh(x=2, y=2)
    first = [next((i for i, a in enumerate(row) if not any(above(b, a) for b in row)), None)
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
