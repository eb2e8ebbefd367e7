"""group_norm: that of torch where channels are taken apart, gradients too; and what it refuses."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from shardlib import Layout, Mesh, SpecError, lower, rearrange, sharded, simulate, value_and_grad
from shardlib.functions import sum
from shardlib.ops import group_norm

pytestmark = pytest.mark.usefixtures("one_thread")


@sharded("B (G C) X, G C, G C, B (G C) X -> ()")
def loss(x, w, b, by):
    made = group_norm(rearrange("B (G C) X -> B G C X", x), w, b, over="C X", eps=1e-3)
    return sum("B (G C) X -> ()", by * rearrange("B G C X -> B (G C) X", made))


@pytest.mark.parametrize(
    "layout", (Layout(), Layout(G="x"), Layout(B="x", G="y"), Layout(G=("x", "y"))), ids=str)
def test_groups_of_channels_are_those_of_torch(layout: Layout) -> None:
    """Groups split over ranks, unevenly, too."""
    g = torch.Generator().manual_seed(0)
    x, by, w, b = (torch.randn(s, generator=g, dtype=torch.float64)
                   for s in ((2, 6, 5), (2, 6, 5), (3, 2), (3, 2)))
    asked = [y.clone().requires_grad_() for y in (x, w, b)]
    want = (F.group_norm(asked[0], 3, *(y.view(6) for y in asked[1:]), eps=1e-3) * by).sum()
    value, *grads = simulate(value_and_grad(loss, wrt=("x", "w", "b")), layout, x, w, b, by,
                             mesh=Mesh(x=2, y=2))
    torch.testing.assert_close(value, want.detach())
    for got, exact in zip(grads, torch.autograd.grad(want, asked), strict=True):
        torch.testing.assert_close(got, exact)


def test_bfloat16_is_rounded_once() -> None:
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(4, 3, 8, 16, generator=g).bfloat16(), torch.randn(3, 8, generator=g)
    f = sharded("B G C X, G C -> B G C X")(lambda x, w: group_norm(x, w, over="C X"))
    got = simulate(f, Layout(G="x"), x, w, mesh=Mesh(x=2))
    exact = F.group_norm(x.double().view(4, 24, 16), 3, w.double().view(24)).view(x.shape)
    assert got.dtype == torch.bfloat16
    near = torch.finfo(torch.bfloat16).eps / 2 * exact.abs() + 1e-6 * exact.abs().max()
    assert bool(((got.double() - exact).abs() <= near).all())


def said(signature: str, f: Callable, layout: Layout = Layout(), **more: Any) -> str:
    """What the error says, but for the line."""
    with pytest.raises(SpecError) as error:
        lower(sharded(signature, **more)(f), layout, mesh=Mesh(tp=2))
    return str(error.value).split("          ")[0].split("\n")[0]


def test_what_it_refuses() -> None:
    for over in ("X", "C X", "C/tp", "... C", "()", "C +tp"):
        assert said("B G C, G C -> B G C", lambda x, w: group_norm(x, w, over=over)) == (
            f'group_norm: over is "{over}"; it is some of the dims of x, B G C')
    assert said("B G C, G C -> B G C", lambda x, w: group_norm(x, w, over=2)) == (
        'group_norm: over is 2; it is a text of dims, as in "C Y X"')
    assert said("B G C, C G -> B G C", lambda x, w: group_norm(x, w, over="C")) == (
        "group_norm: the weight has dims C G, x has B G C; weight and bias have the same ones of them, in "
        "order")
    assert said("B G C, G C, G -> B G C", lambda x, w, b: group_norm(x, w, b, over="C")) == (
        "group_norm: the bias has dims G, x has B G C; weight and bias have the same ones of them, in order")
