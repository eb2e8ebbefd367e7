"""layer_norm and its gradients: those of torch, in any dtypes and pieces; and what it refuses."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from shardlib import EXPLICIT, Layout, Mesh, SpecError, lower, sharded, simulate, value_and_grad
from shardlib.api import Sharded
from shardlib.functions import cast, sum
from shardlib.ops import layer_norm
from shardlib.ops.layer_norm import NORM_VJP, norm_vjp
from shardlib.program import Step
from shardlib.reference import refer
from shardlib.spec import parse_signature

pytestmark = pytest.mark.usefixtures("one_thread")
LAYOUTS = (Layout(), Layout(B="x"), Layout(B=("x", "y")), Layout(T="x", B="y"))


def drawn(*shapes: tuple[int, ...]) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=g, dtype=torch.float64) for s in shapes]


@sharded("B T D, D, D -> B T D")
def norm(x, w, b):
    return layer_norm(x, w, b, eps=1e-3)


@sharded("B T D, D -> B T D")
def unbiased(x, w):
    return layer_norm(x, w, eps=1e-3)


@sharded("B T D, D, D, B T D -> ()")
def loss(x, w, b, by):
    return sum("B T D -> ()", by * norm(x, w, b))


@sharded("B T D, D, B T D -> ()")
def unbiased_loss(x, w, by):
    return sum("B T D -> ()", by * unbiased(x, w))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("of, through", ((norm, loss), (unbiased, unbiased_loss)))
def test_values_and_gradients_are_those_of_torch(of: Sharded, through: Sharded, layout: Layout) -> None:
    by, *xs = drawn((3, 5, 4), (3, 5, 4), (4,), (4,))[:1 + len(of.arg_names)]
    asked = [y.clone().requires_grad_() for y in xs]
    want = F.layer_norm(asked[0], (4,), *asked[1:], eps=1e-3)
    torch.testing.assert_close(simulate(of, layout, *xs, mesh=Mesh(x=2, y=2)), want.detach())
    grads = value_and_grad(through, wrt=of.arg_names)
    for got, exact in zip(simulate(grads, layout, *xs, by, mesh=Mesh(x=2, y=2))[1:],
                          torch.autograd.grad(want, asked, by), strict=True):
        torch.testing.assert_close(got, exact)


@pytest.mark.parametrize("kinds", (("bfloat16", "bfloat16", "bfloat16"), ("bfloat16", "float32", "float32"),
                                   ("float32", "bfloat16", "float64"), ("float16", "float16", "float32")))
def test_the_result_has_the_dtype_of_x_and_is_rounded_once(kinds: tuple[str, ...]) -> None:
    x, w, b = (y.to(getattr(torch, kind)) for y, kind in zip(drawn((6, 5, 64), (64,), (64,)), kinds))
    exact = F.layer_norm(x.double(), (64,), w.double(), b.double(), eps=1e-3)
    got = simulate(norm, Layout(B="x"), x, w, b, mesh=Mesh(x=2))
    assert got.dtype == x.dtype
    assert float((got.double() - exact).abs().max()) <= 0.51 * torch.finfo(x.dtype).eps * 8


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_a_derivative_is_within_one_rounding_of_float64(dtype: torch.dtype) -> None:
    x, g, w, b = (y.to(dtype) for y in drawn((64, 32, 24), (64, 32, 24), (24,), (24,)))
    ins, outs = parse_signature("B T D, D, D, B T D -> B T D, D, D")
    step = Step(NORM_VJP, ins, outs, ("x", "w", "b", "g"), ("dx", "dw", "db"), (("eps", 1e-5), ("over", "D")))
    for found, want in zip(norm_vjp((2,), (0, 1), 1e-5, x, w[None, None], b[None, None], g),
                           refer(step, dict(B=64, T=32, D=24), [y.double() for y in (x, w, b, g)]),
                           strict=True):
        rounding = torch.finfo(dtype).eps / 2 * want.abs() + torch.finfo(torch.float32).eps * want.abs().max()
        assert found.dtype == dtype
        assert bool(((found.double().view(want.shape) - want).abs() <= rounding).all())


def test_gradients_have_the_dtypes_of_their_values() -> None:
    x, w, b = drawn((3, 5, 4), (4,), (4,))
    mixed = sharded("B T D, D, D -> ()")(lambda x, w, b: sum("B T D -> ()", cast(norm(x, w, b), "float32")))
    kinds = (torch.bfloat16, torch.float32, torch.float64)
    made = simulate(value_and_grad(mixed, wrt=("x", "w", "b")), Layout(B="x"),
                    *(y.to(kind) for y, kind in zip((x, w, b), kinds)), mesh=Mesh(x=2))
    assert tuple(y.dtype for y in made[1:]) == kinds
    assert torch.equal(made[3], torch.full((4,), 15.0, dtype=torch.float64))


def said(signature: str, f: Callable, **more: Any) -> str:
    """What the error says, but for the line."""
    with pytest.raises(SpecError) as error:
        lower(sharded(signature, **more)(f), mesh=Mesh(tp=2))
    return str(error.value).split("          ")[0].split("\n")[0]


def test_what_it_refuses() -> None:
    assert said("B T, D -> B T", lambda x, w: layer_norm(x, w)) == (
        "layer_norm: the weight has dims D, x ends with T; they must be the same dim")
    assert said("B D, D, B -> B D", lambda x, w, b: layer_norm(x, w, b)) == (
        "layer_norm: the bias has dims B, x ends with D; they must be the same dim")
    assert said("(), D -> ()", lambda x, w: layer_norm(x, w)) == (
        "layer_norm: the weight has dims D, x ends with nothing; they must be the same dim")
    assert said("B D/tp, D/tp -> B D/tp", lambda x, w: layer_norm(x, w), layout=EXPLICIT) == (
        "layer_norm: D is split over tp in x; layer_norm needs all of D on each rank")
    assert said("B D, D +tp, D -> B D +tp", lambda x, w, b: layer_norm(x, w, b), layout=EXPLICIT) == (
        "layer_norm: b is whole, w owes a sum over tp; the sum would count b once for every rank of tp")
    assert said("B D +tp, D -> B D +tp", lambda x, w: layer_norm(x, w), layout=EXPLICIT) == (
        "layer_norm: x owes a sum over tp, and layer_norm of a sum is not the sum of layer_norm")
    assert said("B D, D -> B D", lambda x, w: layer_norm(x, w, eps=float("nan"))) == "layer_norm: eps is nan"
