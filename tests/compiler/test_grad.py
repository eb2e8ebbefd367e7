"""What backward gathers again, and what it keeps: counted; and the gradients, against torch.autograd."""
from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor

from shardlib import (
    Layout,
    Mesh,
    Params,
    SpecError,
    einsum,
    lower,
    param,
    rename,
    scan,
    sharded,
    simulate,
    stacked,
    value_and_grad,
)
from shardlib.functions import silu, stop_gradient, sum, where
from shardlib.language.moves import ALL_GATHER, ALL_REDUCE
from shardlib.ops import rope

MESH = Mesh(dp=2, tp=2)


class Layer(Params):
    up: Tensor = param("D F")


class Net(Params):
    layers: Layer = stacked("L", Layer)
    down: Tensor = param("F D")


@sharded("T D, *, F D/1 -> T D")
def layer(x, w: Layer, down):
    """`down` comes with D whole; T has the axis of its F, so that it is gathered here once more."""
    return x + einsum("T F, F D -> T D", silu(einsum("T D, D F -> T F", x, w.up)), down)


@sharded("T D, * -> ()")
def loss(x, w: Net):
    y = scan(layer, x, w.layers, w.down)
    return sum("T D -> ()", y * y)


LAYOUT = Layout(T="tp", F="tp", D="dp")


@pytest.mark.parametrize("regather, gathers", [("all", 3), ("weights", 3), ("nothing", 1)])
def test_a_parameter_that_is_gathered_before_a_scan_is_one_within_it(regather: str, gathers: int) -> None:
    """Kept gathered, each layer would hold the whole of it.

    One gather brings its gradient home; the others are of the two weights.
    """
    program = lower(value_and_grad(loss, regather=regather), LAYOUT, mesh=MESH)
    (backward,) = (p for p in program.bodies() if p.name == "layer_vjp")
    made = Counter(s.op for s in backward.steps)
    # what was paid is kept, whatever is gathered again
    assert made[ALL_GATHER] == gathers and made[ALL_REDUCE] == 1


@pytest.mark.parametrize("regather", ["all", "weights", "nothing"])
def test_gradients_are_those_of_torch(regather: str) -> None:
    g = torch.Generator().manual_seed(0)
    x, up, down = (torch.randn(*s, generator=g, dtype=torch.float64, requires_grad=True)
                   for s in ((5, 3), (2, 3, 7), (7, 3)))
    y = x
    for w in up:
        y = y + torch.nn.functional.silu(y @ w) @ down
    (want := (y * y).sum()).backward()
    net = Net(layers=Layer(up=up.detach()), down=down.detach())
    value, dx, dw = simulate(value_and_grad(loss, ("x", "w"), regather=regather), LAYOUT, x.detach(), net,
                             mesh=MESH)
    for got, meant in ((value, want.detach()), (dx, x.grad), (dw.layers.up, up.grad), (dw.down, down.grad)):
        assert torch.allclose(got, meant, rtol=1e-12, atol=1e-12)


@sharded("T D -> ()")
def two_uses_of_a_name(x):
    """The cotangent that comes back by the first is owed, where T is split; by the second it is not."""
    y = rename("T D -> S D", x)
    return sum("T S -> ()", einsum("T D, S D -> T S", x, y)) + sum("S D -> ()", y * y * y)


def test_owed_and_settled_cotangents_of_a_renamed_value_meet() -> None:
    x = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    ((x @ x.T).sum() + (x ** 3).sum()).backward()
    for layout in (Layout(), Layout(T="tp"), Layout(T="tp", D="dp"), Layout(T="tp", S="dp")):
        _, dx = simulate(value_and_grad(two_uses_of_a_name, "x"), layout, x.detach(), mesh=MESH)
        assert torch.allclose(dx, x.grad, rtol=1e-12, atol=1e-12), str(layout)


def test_a_table_that_an_op_takes_as_a_constant_has_no_gradient():
    """It was zeros, without a word."""
    @sharded("B T H, B T H -> ()")
    def turned(x, table):
        return sum("B T H -> ()", rope("B T H, B T H -> B T H", x, table))

    @sharded("B T H, B T H -> ()")
    def of_a_constant(x, table):
        return sum("B T H -> ()", rope("B T H, B T H -> B T H", x, stop_gradient(table)) * x)
    x, table = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    with pytest.raises(SpecError) as error:
        simulate(value_and_grad(turned, "table"), Layout(), x, table, mesh=Mesh())
    line = turned.fn.__code__.co_firstlineno + 2
    assert str(error.value) == ("value_and_grad: rope has no derivative by table; stop_gradient makes it a "
                                f"constant          test_grad.py:{line}")
    assert not simulate(value_and_grad(of_a_constant, "table"), Layout(), x, table, mesh=Mesh())[1].any()


@pytest.mark.parametrize("layout", [Layout(), Layout(T="tp", D="dp")])
def test_each_side_of_where_gets_its_own_rows(layout):
    @sharded("T D, T D, T D, T D -> ()")
    def chosen(mask, a, b, c):
        return sum("T D -> ()", where(mask, a, b) * c)
    a, b, c = torch.randn(3, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    value, of_a, of_b = simulate(value_and_grad(chosen, ["a", "b"]), layout, a > 0, a, b, c, mesh=MESH)
    assert torch.allclose(value, (torch.where(a > 0, a, b) * c).sum())
    assert torch.equal(of_a, torch.where(a > 0, c, 0)) and torch.equal(of_b, torch.where(a > 0, 0, c))
