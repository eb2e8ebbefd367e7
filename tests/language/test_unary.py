"""Functions of each element where a formula of theirs has a hole."""
from __future__ import annotations

import pytest
import torch

from shardlib import sharded, value_and_grad
from shardlib.functions import sum

X = torch.tensor([-2.0, 0.0, 3.0])


@pytest.mark.parametrize("by", [0, 1, 2, 3, 0.0, 1.0, 2.0])
def test_powers_have_a_gradient_at_zero(by: float) -> None:
    """by * x ** (by - 1) is 0 / 0 of x ** 0."""
    total = sharded("N -> ()")(lambda x: sum("N -> ()", x ** by))
    value, slope = value_and_grad(total, wrt="x")(X)
    x = X.clone().requires_grad_()
    x.pow(by).sum().backward()
    assert torch.equal(value, X.pow(by).sum()) and torch.equal(slope, x.grad)
