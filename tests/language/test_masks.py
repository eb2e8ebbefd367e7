"""Comparisons, masks, and what chooses by them: as torch has it at ties, bounds, NaN and infinity."""
from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from shardlib import (
    EXPLICIT,
    Layout,
    Mesh,
    SpecError,
    all_reduce,
    compile,
    einsum,
    lower,
    sharded,
    simulate,
    value_and_grad,
)
from shardlib.functions import (
    clamp,
    equal,
    greater,
    greater_equal,
    less,
    less_equal,
    maximum,
    minimum,
    not_equal,
    sum,
    where,
)

X = torch.tensor([-1.0, 0.0, 1.0, 1.0, 2.0, float("inf")])
Y = torch.tensor([0.0, 0.0, 1.0, -1.0, 3.0, 1.0])
NAN = torch.tensor([float("nan"), 1.0, 2.0])
TORCH = {greater: torch.gt, less: torch.lt, greater_equal: torch.ge, less_equal: torch.le, equal: torch.eq,
         not_equal: torch.ne}


def slopes(f: Callable, *xs: Tensor, by: Tensor) -> list[Tensor]:
    """Gradients of the sum of by * f(*xs), over two ranks."""
    traced = sharded(", ".join(["D"] * (len(xs) + 1)) + " -> ()")(
        [lambda x, by: sum("D -> ()", by * f(x)), lambda x, y, by: sum("D -> ()", by * f(x, y))][len(xs) - 1])
    grads = value_and_grad(traced, wrt=("x", "y")[:len(xs)])
    return list(simulate(grads, Layout(D="tp"), *xs, by, mesh=Mesh(tp=2))[1:])


def torch_slopes(f: Callable, *xs: Tensor, by: Tensor) -> list[Tensor]:
    xs = tuple(x.clone().requires_grad_() for x in xs)
    return list(torch.autograd.grad(f(*xs), xs, by))


@pytest.mark.parametrize("ours", TORCH, ids=lambda f: f.__name__)
def test_comparisons_are_those_of_torch(ours: Callable) -> None:
    for x, y in ((X, Y), (NAN, torch.ones(3)), (NAN, NAN)):
        whole = sharded("D, D -> D")(lambda x, y: ours(x, y))
        assert torch.equal(simulate(whole, Layout(D="tp"), x, y, mesh=Mesh(tp=2)), TORCH[ours](x, y))
        one = sharded("D -> D")(lambda x: ours(x, 1))
        assert torch.equal(simulate(one, Layout(D="tp"), x, mesh=Mesh(tp=2)), TORCH[ours](x, 1))


def test_operators_are_the_functions() -> None:
    def f(x, y):
        return where((x < y) & ~(x >= 2.0) | (y > x) & (y <= 0), abs(x), x ** 2)
    assert str(lower(sharded("D, D -> D")(f), mesh=Mesh())) == '''\
@sharded("D, D -> D", layout=EXPLICIT)
def f(x, y):
    v1 = compare(x, y, sign='<')
    v2 = greater_equal(x, than=2.0)
    v3 = logical_not(v2)
    v4 = logical_and(v1, v3)
    v5 = compare(y, x, sign='>')
    v6 = less_equal(y, than=0)
    v7 = logical_and(v5, v6)
    v8 = logical_or(v4, v7)
    v9 = abs(x)
    v10 = square(x)
    v11 = where(v8, v9, v10)
    return v11
'''
    want = torch.where((X < Y) & ~(X >= 2.0) | (Y > X) & (Y <= 0), abs(X), X ** 2)
    assert torch.equal(simulate(sharded("D, D -> D")(f), Layout(D="tp"), X, Y, mesh=Mesh(tp=2)), want)


@pytest.mark.parametrize("ours, theirs", [(maximum, torch.maximum), (minimum, torch.minimum)])
def test_equal_ones_share_the_gradient(ours: Callable, theirs: Callable) -> None:
    by = torch.arange(1.0, 7.0)
    for got, want in zip(slopes(ours, X, Y, by=by), torch_slopes(theirs, X, Y, by=by), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("bounds", [dict(min=0, max=1), dict(min=0.0), dict(max=1)], ids=str)
def test_bounds_let_the_gradient_through(bounds: dict) -> None:
    by = torch.arange(1.0, 7.0)
    (got,), (want,) = (slopes(lambda x: clamp(x, **bounds), X, by=by),
                       torch_slopes(lambda x: x.clamp(**bounds), X, by=by))
    assert torch.equal(got, want)


@pytest.mark.parametrize("exponent", [-1, 0, 0.5, 1, 2, 2.5, 3])
def test_powers_and_their_slopes(exponent: float) -> None:
    x, by = torch.tensor([0.0, 0.5, 4.0]), torch.ones(3)
    f = sharded("D -> D")(lambda x: x ** exponent)
    assert torch.equal(simulate(f, Layout(D="tp"), x, mesh=Mesh(tp=2)), x ** exponent)
    (got,), (want,) = (how(lambda x: x ** exponent, x, by=by) for how in (slopes, torch_slopes))
    torch.testing.assert_close(got, want)


def test_what_is_not_chosen_gets_no_gradient_whatever_comes_back() -> None:
    """An infinite cotangent times 0 would be NaN."""
    mask, by = X > 0, torch.full((6,), float("inf"))
    for ours, theirs in ((lambda x, y: where(x > 0, x, y), lambda x, y: torch.where(mask, x, y)),
                         (maximum, torch.maximum)):
        for got, want in zip(slopes(ours, X, Y, by=by), torch_slopes(theirs, X, Y, by=by), strict=True):
            assert torch.equal(got, want)


def test_where_with_a_number() -> None:
    """On either side of the mask, and in an order that a text says."""
    by = torch.arange(1.0, 7.0)
    for ours, theirs in ((lambda x: where(x > 0, x, -1e9), lambda x: torch.where(x > 0, x, -1e9)),
                         (lambda x: where(x > 0, 2, x), lambda x: torch.where(x > 0, 2, x))):
        f = sharded("D -> D")(lambda x: ours(x))
        assert torch.equal(simulate(f, Layout(D="tp"), X, mesh=Mesh(tp=2)), theirs(X))
        (got,), (want,) = slopes(ours, X, by=by), torch_slopes(theirs, X, by=by)
        assert torch.equal(got, want)
    x, real = torch.randn(3, 4), torch.tensor([True, False, True])
    wide = sharded("B, D -> B D")(lambda real, x: where("B, D -> B D", equal(real, 1), x, 0.5))
    assert torch.equal(simulate(wide, Layout(B="x", D="y"), real.long(), x[0], mesh=Mesh(x=2, y=2)),
                       torch.where(real[:, None], x[0], 0.5))


def test_what_owes_a_sum_stands_beside_zero() -> None:
    @sharded("B, B F/x, F/x D -> B D", layout=EXPLICIT)
    def f(real, h, w, *, number):
        y = einsum("B F/x, F/x D -> B D +x", h, w)
        return all_reduce("B D +x -> B D", where(real > 0, y, number))
    real, h, w = torch.tensor([0.0, 1.0]), torch.randn(2, 3), torch.randn(3, 4)
    found = simulate(f, None, real, h, w, mesh=Mesh(x=2), number=0)
    torch.testing.assert_close(found, torch.where(real[:, None] > 0, h @ w, 0))
    with pytest.raises(SpecError) as error:
        lower(f, mesh=Mesh(x=2), number=1)
    text = str(error.value)
    assert text.startswith("where: y owes a sum over x, and where of a sum is not the sum of where  ")
    assert '  where(greater(real, than=0), reduce_scatter("B D +x -> B D/x", y), 1)' in text


@pytest.mark.parametrize("kind, value, gives", [
    ("int32", 5, "int32"), ("int64", 0.5, "float32"), ("bfloat16", -1e9, "bfloat16"),
    ("float16", 2, "float16")])
def test_a_number_that_is_chosen_widens_nothing(kind: str, value: float, gives: str) -> None:
    x, of = torch.tensor([1, 0, 3], dtype=getattr(torch, kind)), getattr(torch, gives)
    found = compile(sharded("D -> D")(lambda x: where(x > 0, x, value)), mesh=Mesh())(x)
    assert torch.equal(found, torch.where(x > 0, x.to(of), value)) and found.dtype == of


@pytest.mark.parametrize("f, error", [
    (lambda x: where(x > 0, x, -1e9), "where: the number is -1000000000.0, and the tensor is float16, which "
     "does not hold it"),
    *((f, "where: it chooses by a mask, of two tensors, or of one and a finite number; cast makes ones and "
       "zeros of a mask") for f in (lambda x: where(x > 0, 1, 0), lambda x: where(True, x, x),
                                    lambda x: where(x > 0, x, -float("inf")))),
    (lambda x: maximum(x, 0), "maximum: 0 is a number; clamp(x, min=0) is bounded by one"),
    (lambda x: minimum(1.5, x), "minimum: 1.5 is a number; clamp(x, max=1.5) is bounded by one")])
def test_numbers_that_do_not_go(f: Callable, error: str) -> None:
    with pytest.raises(SpecError) as raised:
        compile(sharded("D -> D")(lambda x: f(x)), mesh=Mesh())(torch.ones(2, dtype=torch.float16))
    assert str(raised.value).split("   ")[0] == error


@pytest.mark.parametrize("dtype, than", [(torch.int8, 300), (torch.uint8, -1), (torch.int32, 2 ** 40)])
def test_a_number_that_narrow_integers_do_not_reach(dtype: torch.dtype, than: int) -> None:
    """torch turns it round: 100 > 300 of int8."""
    x = torch.tensor([1, 100], dtype=dtype)
    for ours, theirs in TORCH.items():
        f = sharded("D -> D")(lambda x: ours(x, than))
        assert torch.equal(simulate(f, Layout(D="tp"), x, mesh=Mesh(tp=2)), theirs(x.long(), than))
    kept, wrong = ("max", "min") if than > 0 else ("min", "max")
    f = compile(sharded("D -> D")(lambda x: clamp(x, **{kept: than})), mesh=Mesh())
    assert torch.equal(f(x), x) and f(x).dtype == dtype
    with pytest.raises(SpecError) as error:
        compile(sharded("D -> D")(lambda x: clamp(x, **{wrong: than})), mesh=Mesh())(x)
    assert str(error.value).split("   ")[0] == (
        f"clamp: {wrong} is {than}, and x is {str(dtype)[6:]}, which does not hold it")


@pytest.mark.parametrize("dtype, far", [(torch.float16, 7e4), (torch.bfloat16, 1e39), (torch.float32, 1e39)])
def test_a_number_that_narrow_floats_do_not_reach(dtype: torch.dtype, far: float) -> None:
    """torch takes it for infinite where it compares, and refuses it as a bound."""
    x = torch.tensor([1.0, float("inf")], dtype=dtype)
    for ours, theirs in TORCH.items():
        f = sharded("D -> D")(lambda x: ours(x, far))
        assert torch.equal(simulate(f, Layout(D="tp"), x, mesh=Mesh(tp=2)), theirs(x.double(), far))
    f = compile(sharded("D -> D")(lambda x: clamp(x, min=-far, max=far)), mesh=Mesh())
    assert torch.equal(f(x), x) and f(x).dtype == dtype


def test_integers_stay_integers_between_whole_numbers() -> None:
    ids = torch.tensor([-3, 2, 9])
    for bounds, dtype in ((dict(min=0, max=5), torch.int64), (dict(min=0.5), torch.float32)):
        f = compile(sharded("D -> D")(lambda x: clamp(x, **bounds)), mesh=Mesh())
        assert f(ids).dtype == dtype and torch.equal(f(ids), torch.clamp(ids, **bounds).to(dtype))
    both = compile(sharded("D, D -> D")(maximum), mesh=Mesh())
    assert torch.equal(both(ids, ids.flip(0)), torch.tensor([9, 2, 9]))
    assert both(ids.int(), ids).dtype == torch.int64
