"""concat, split, stack, unbind, pad, slice and topk: those of torch, gradients too, whatever is split; the
sizes that they say; what they refuse."""
from __future__ import annotations

import operator
from collections.abc import Callable
from functools import reduce
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from shardlib import (
    EXPLICIT,
    Layout,
    Mesh,
    SpecError,
    compile,
    explain,
    lower,
    prove,
    sharded,
    simulate,
    step,
    value_and_grad,
)
from shardlib.api import Sharded
from shardlib.functions import concat, pad, slice, split, stack, sum, topk, unbind

pytestmark = pytest.mark.usefixtures("one_thread")
LAYOUTS = (Layout(), Layout(B="x"), Layout(D="x", B="y"), Layout(T="x"), Layout(S="x", N="y"),
           Layout(N=("x", "y"), D="y"), Layout(T=("y", "x"), B="x"))
MESH = Mesh(x=2, y=2)


def values(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=g, dtype=torch.float64) for s in shapes]


@sharded("B T D, B S D -> B N D")
def joined(x, y):
    return concat("B T D, B S D -> B N D", x, y)


@sharded("B T D, B S D -> B S D, B T D")
def parted(x, y):
    """The other way round."""
    return split("B N D -> B S D, B T D", joined(x, y))


@sharded("B T D, B S D -> B N D, B S D")
def widened(x, y):
    return pad("B T D -> B N D", x, before=1, after=2), y


@sharded("B T D, B S D -> B N D, B Q D, B R D")
def narrowed(x, y):
    return (slice("B T D -> B N D", x, 1, 3), slice("B S D -> B Q D", y, 1),
            slice("B T D -> B R D", x, 1, -1))


@sharded("B T D, B S D -> B P T D, B T D")
def stacked(x, y):
    """x beside its opposite, and back; y stands by."""
    both = stack("B T D, B T D -> B P T D", x, -2.0 * x)
    one, other = unbind("B P T D -> B T D, B T D", both)
    return both, one * other


def parts(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
    both = torch.cat((x, y), 1)
    return both[:, :y.shape[1]], both[:, y.shape[1]:]


OF_TORCH = ((joined, lambda x, y: (torch.cat((x, y), 1),)), (parted, parts),
            (widened, lambda x, y: (F.pad(x, (0, 0, 1, 2)), y)),
            (stacked, lambda x, y: (torch.stack((x, -2 * x), 1), -2 * x * x)),
            (narrowed, lambda x, y: (x[:, 1:3], y[:, 1:], x[:, 1:-1])))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("ours, theirs", OF_TORCH, ids=lambda f: getattr(f, "__name__", "torch"))
@pytest.mark.parametrize("t, s", ((5, 3), (3, 1)))
def test_values_and_gradients_are_those_of_torch(ours: Sharded, theirs: Callable, layout: Layout, t: int,
                                                 s: int) -> None:
    x, y = values((3, t, 4), (3, s, 4))
    made = simulate(ours, layout, x, y, mesh=MESH)
    asked = [x.clone().requires_grad_(), y.clone().requires_grad_()]
    want = theirs(*asked)
    for got, whole in zip(made if isinstance(made, tuple) else (made,), want, strict=True):
        assert torch.equal(got, whole.detach())

    def loss(x, y):
        out = ours(x, y)
        every = out if isinstance(out, tuple) else (out,)
        return reduce(operator.add, [sum(f"{v.spec.whole()} -> ()", v * v * 0.5) for v in every])
    grads = value_and_grad(sharded("B T D, B S D -> ()")(loss), wrt=("x", "y"))
    exact = torch.autograd.grad(torch.stack([(w * w * 0.5).sum() for w in want]).sum(), asked,
                                materialize_grads=True)
    for got, whole in zip(simulate(grads, layout, x, y, mesh=MESH)[1:], exact, strict=True):
        torch.testing.assert_close(got, whole)


def test_what_is_printed() -> None:
    """The dim that is joined is whole; other dims keep their split."""
    assert str(lower(joined, Layout(T="x", N="x", D="y"), mesh=MESH)) == '''\
@sharded("B T/x D/y, B S D/y -> B N/x D/y", layout=EXPLICIT)
def joined(x, y):
    x2 = all_gather("B T/x D/y -> B T D/y", x)
    v1 = concat("B T D/y, B S D/y -> B N D/y", x2, y)
    v = shard("B N D/y -> B N/x D/y", v1)
    return v
'''


def test_owed_sums_pass() -> None:
    f = sharded("T +x, S +x -> N +x, T +x", layout=EXPLICIT)(
        lambda x, y: ((n := concat("T +x, S +x -> N +x", x, y)), split("N +x -> T +x, S +x", n)[0]))
    assert str(lower(f, mesh=Mesh(x=2))).count("+x") == 10
    assert said(lambda: lower(sharded("T +x, S -> N +x", layout=EXPLICIT)(
        lambda x, y: concat("T +x, S -> N +x", x, y)), mesh=Mesh(x=2))) == (
        "concat: y is whole, x owes a sum over x; the sum would count y once for every rank of x")


def test_dtypes_meet_and_masks_stay() -> None:
    f = sharded("T, S -> N")(lambda x, y: concat("T, S -> N", x, y))
    made = simulate(f, None, torch.ones(2, dtype=torch.bfloat16), torch.ones(1), mesh=Mesh())
    assert made.dtype == torch.float32
    made = simulate(f, None, torch.tensor([True]), torch.tensor([False]), mesh=Mesh())
    assert made.dtype == torch.bool and made.tolist() == [True, False]
    g = sharded("T -> N")(lambda x: pad("T -> N", x, after=1))
    assert simulate(g, None, torch.tensor([True]), mesh=Mesh()).tolist() == [True, False]


# -- sizes ---------------------------------------------------------------------------------------------------

def test_sizes_follow_both_ways() -> None:
    f = sharded("N -> T, S")(lambda x: split("N -> T, S", x))
    for how in (compile, step):
        made = how(f, sizes=dict(T=1), mesh=Mesh())(torch.arange(3))
        assert [y.tolist() for y in made] == [[0], [1, 2]]
    assert said(lambda: compile(f, mesh=Mesh())(torch.arange(3))) == (
        "split: no argument holds all of T; say its global size: sizes=dict(T=...)")
    g = sharded("T, N -> N")(lambda x, y: pad("T -> N", x, before=1) + y)
    assert compile(g, mesh=Mesh())(torch.ones(2), torch.ones(3)).tolist() == [1, 2, 2]


@pytest.mark.parametrize("signature, f, given, message", (
    ("T, S, N -> N", lambda x, y, z: concat("T, S -> N", x, y) + z, (2, 3, 4),
     "N is 4 by z, and 5 by concat"),
    ("T, N -> N", lambda x, z: pad("T -> N", x, after=2) + z, (2, 3), "N is 3 by z, and 4 by pad"),
    ("T, N -> N", lambda x, z: slice("T -> N", x, 1, 3) + z, (4, 3), "N is 3 by z, and 2 by slice"),
    ("T -> N", lambda x: slice("T -> N", x, 2, -1), (2,), "T is 2 by x, and at least 3 by slice"),
    ("T, N -> N", lambda x, z: slice("T -> N", x, 1) + z, (4, 4), "T is 4 by x, and 5 by slice"),
))
def test_sizes_that_do_not_meet(signature: str, f: Callable, given: tuple[int, ...], message: str) -> None:
    error = said(lambda: simulate(sharded(signature)(f), None, *map(torch.ones, given), mesh=Mesh()))
    assert error.rpartition(":")[0] == f"f: {message} at test_pieces.py"


def test_more_than_there_is() -> None:
    f = sharded("T -> N")(lambda x: slice("T -> N", x, 1, 4))
    assert said(lambda: simulate(f, None, torch.ones(3), mesh=Mesh())) == (
        "slice: N is 1 to 4 of T, and that is 3")
    g = sharded("T -> K")(lambda x: topk("T -> K", x, k=4)[0])
    assert said(lambda: simulate(g, None, torch.ones(3), mesh=Mesh())) == "topk: k is 4, and T is 3"


# -- topk ----------------------------------------------------------------------------------------------------


def test_topk_of_one_element_of_a_strided_piece() -> None:
    f, x = sharded("T V -> P V, P V")(lambda x: topk("T V -> P V", x, k=1)), torch.randn(3, 2)
    for got, want in zip(simulate(f, Layout(T="x", V="y"), x, mesh=Mesh(x=2, y=2)), x.topk(1, 0)):
        assert torch.equal(got, want)


@given(st.lists(st.lists(st.sampled_from((-1.0, 0.0, 2.0, 2.0, torch.inf, -torch.inf, torch.nan)),
                         min_size=5, max_size=5), min_size=1, max_size=3), st.integers(0, 5),
       st.sampled_from((Layout(), Layout(B="x"), Layout(T="x"), Layout(K="y", T="x"))))
def test_topk_takes_the_first_of_equal_ones(rows: list[list[float]], k: int, layout: Layout) -> None:
    x = torch.tensor(rows, dtype=torch.float64)
    f = sharded("B T -> B K, B K")(lambda x: topk("B T -> B K", x, k=k))
    made, places = simulate(f, layout, x, mesh=MESH)
    want = torch.sort(x, dim=1, descending=True, stable=True)
    torch.testing.assert_close(made, want.values[:, :k], equal_nan=True, rtol=0, atol=0)
    assert torch.equal(places, want.indices[:, :k])


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_what_comes_back_to_topk_goes_where_it_was(layout: Layout) -> None:
    x, by = values((3, 5, 4), (3, 2, 4))
    f = sharded("B T D, B K D -> ()")(
        lambda x, by: sum("B K D -> ()", by * topk("B T D -> B K D", x, k=2)[0]))
    asked = x.clone().requires_grad_()
    want = torch.autograd.grad((asked.topk(2, 1).values * by).sum(), asked)[0]
    got = simulate(value_and_grad(f, wrt="x"), layout, x, by, mesh=MESH)[1]
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("kind", ("float32", "bfloat16", "int64"))
def test_topk_over_pieces_sends_k_of_each(kind: str) -> None:
    """Three values of each rank and their places, though one has two; more are padded, and cut off again."""
    f, mesh, log = sharded("B T -> B K, B K")(lambda x: topk("B T -> B K", x, k=3)), Mesh(x=4), []
    x = torch.tensor([[3, 7, 7, 0, -9, 7, 1, -9, -9, 2, -9], [-9] * 11]).to(getattr(torch, kind))
    program = lower(f, Layout(T="x"), mesh=mesh)
    assert [f"{s.op.name} {s.text}" for s in program.steps] == ["topk B T/x -> B K, B K"]
    made, places = simulate(f, Layout(T="x"), x, mesh=mesh, log=log)
    assert made.dtype == x.dtype and made.tolist() == [[7, 7, 7], [-9, -9, -9]]
    assert places.tolist() == [[1, 2, 5], [0, 1, 2]]
    size = 2 * 3 * (x.itemsize + 8)
    assert log == [((0, 1, 2, 3), "all_gather", size)]
    report = explain(program, mesh, dict(B=2, T=11, K=3), dict(x=kind))
    assert report.received == (3 * size,) * 4
    assert prove(program, mesh, dict(B=2, T=11, K=3), dict(x=kind)).collectives == 1


# -- refusals ------------------------------------------------------------------------------------------------

def said(call: Callable) -> str:
    """What the error says, but for the line."""
    with pytest.raises(SpecError) as error:
        call()
    return str(error.value).split("          ")[0].split("\n")[0]


def refusal(f: Callable, **more: Any) -> str:
    return said(lambda: lower(sharded("B T D -> B T D", **more)(f), mesh=Mesh(x=2)))


@pytest.mark.parametrize("f, meant, texts", (
    (lambda text, x: concat(text, x, x), "B T D, B S D -> B N D",
     ("B T D -> B N D", "B T D, B T D -> B T D", "B T D, B T D -> N T S", "B T D, B T D -> B T N, B T N",
      "B T D, B T -> B N D", "B T D, B T D -> B (N M) D", "B T D, B T D -> N D B")),
    (split, "B N D -> B T D, B S D", ("B T D -> B S D", "B T D -> B T D, B S D", "B T D -> B S D, T S D")),
    (pad, "B T D -> B S D", ("B T D -> B T D", "B T D -> B T", "B T D -> B S R", "B T D -> T S D")),
    (slice, "B T D -> B S D", ("B T D -> B T D", "B T D, B T D -> B S D", "B T D -> B 3 D")),
    (lambda text, x: topk(text, x, k=1), "B V -> B K", ("B T D -> B T D", "B T D -> B K D, B K D")),
))
def test_texts_that_are_none(f: Callable, meant: str, texts: tuple[str, ...]) -> None:
    name = {"B V -> B K": "topk", "B T D, B S D -> B N D": "concat"}.get(meant) or f.__name__
    for text in texts:
        assert refusal(lambda x: f(text, x)) == (
            f'{name} "{text}": the specs are those of "{meant}": one dim is another, in its place')


@pytest.mark.parametrize("f, meant, texts", (
    (lambda text, x: stack(text, x, x), "B D, B D -> B S D",
     ("B T D, B T D -> B T D", "B T D, B D T -> B S T D", "B T D, B T D -> S B D T",
      "B T D, B T D -> B S N T D", "B T D, B T D -> B (S N) T D", "B T D, B T D -> B S T D, B S T D")),
    (unbind, "B S D -> B D, B D", ("B T D -> B D, B T", "B T D -> B T D", "B T D -> B",
                                    "B T D, B T D -> B D")),
))
def test_texts_that_put_nothing_side_by_side(f: Callable, meant: str, texts: tuple[str, ...]) -> None:
    for text in texts:
        assert refusal(lambda x: f(text, x)) == (
            f'{"unbind" if f is unbind else "stack"} "{text}": the specs are those of "{meant}": one value '
            f'has one dim more, the others are alike')


def test_there_are_as_many_values_as_places() -> None:
    f = sharded("B S -> B, B, B")(lambda x: unbind("B S -> B, B, B", x))
    assert said(lambda: simulate(f, None, torch.ones(1, 2), mesh=Mesh())).startswith(
        "f: S is 2 by x, and 3 by unbind at test_pieces.py")


def test_what_they_refuse() -> None:
    for value in (-1, 0.5, True, None):
        assert refusal(lambda x: pad("B T D -> B S D", x, before=value)) == (
            f"pad: before is {value!r}; it is a whole number, 0 or more")
        assert refusal(lambda x: topk("B T D -> B K D", x, k=value)) == (
            f"topk: k is {value!r}; it is a whole number, 0 or more")
        assert refusal(lambda x: slice("B T D -> B S D", x, value)) == (
            f"slice: start is {value!r}; it is a whole number, 0 or more")
    for value in (1, 0.5, True):
        assert refusal(lambda x: slice("B T D -> B S D", x, 2, value)) == (
            f"slice: stop is {value!r}; it is a whole number, not before start, which is 2")
    split_dim = sharded("B T/x D -> B S D", layout=EXPLICIT)(lambda x: pad("B T/x D -> B S D", x, after=1))
    assert said(lambda: lower(split_dim, mesh=Mesh(x=2))) == (
        "pad: T is split over x in x; pad needs all of T on each rank")
    owed = sharded("T +x -> K", layout=EXPLICIT)(lambda x: topk("T +x -> K", x, k=1)[0])
    assert said(lambda: lower(owed, mesh=Mesh(x=2))) == (
        "topk: x owes a sum over x, and topk of a sum is not the sum of topk")
