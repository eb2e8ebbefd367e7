"""Operands that meet by the names of their dims: one order of all, or a text that says it."""
from __future__ import annotations

import pytest
import torch

from shardlib import EXPLICIT, Layout, Mesh, SpecError, lower, rearrange, sharded, simulate, value_and_grad
from shardlib.functions import add, div, greater, logical_and, maximum, mul, square, sub, where
from shardlib.functions import sum as total
from shardlib.language.arithmetic import broadcast
from shardlib.ops import rms_norm
from shardlib.spec import parse

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = dict(B=3, T=4, D=5, S=2, K=2, G=3)


@pytest.mark.parametrize("ins, out", [
    (("B T", "T D"), "B T D"), (("T D", "B T"), "B T D"), (("B D", "T D", "B T D"), "B T D"), ((), "B T"),
    (("B T D", "D"), "B T D"), (("B K T S", "B S"), "B K T S"), (("B (K G)", "(K G) D"), "B (K G) D")])
def test_the_result_has_the_one_order_in_which_all_keep_theirs(ins: tuple[str, ...], out: str) -> None:
    assert str(broadcast("add", [parse(s) for s in ins or ("B T", "()", "T")])) == out


@pytest.mark.parametrize("ins, says", [
    (("B D", "T D"), 'either of B and T may come first; add("B D, T D -> B T D", x, y) says the order'),
    (("B", "T"), 'either of B and T may come first; add("B, T -> B T", x, y) says the order'),
    (("B T", "T B"), 'B comes before T in one operand, and behind it in another; '
                     'add("B T, T B -> B T", x, y) says the order'),
    (("B 1 D", "B T D"), '1 is a dim beside the others, and none that meets them; '
                         'rearrange("B 1 D -> B D", x) drops it'),
    (("(K G) D", "G"), "G is a dim of one operand and in a group of another; rearrange makes them alike")])
def test_where_there_are_two_orders_or_none_the_error_writes_the_line(ins: tuple[str, ...],
                                                                       says: str) -> None:
    with pytest.raises(SpecError) as refused:
        broadcast("add", [parse(s) for s in ins])
    assert str(refused.value) == f"add: {says}"


def test_each_op_is_called_as_the_user_calls_it() -> None:
    for f, says in (
            (lambda x, y: where(x > 0, y, y * 2), 'where("T, S, S -> T S", mask, a, b)'),
            (lambda x, y: greater(x, y), 'greater("T, S -> T S", x, y)'),
            (lambda x, y: x / y, 'div("T, S -> T S", x, y)')):
        with pytest.raises(SpecError) as refused:
            lower(sharded("T, S -> T S")(f), mesh=Mesh(x=1))
        assert f"{says} says the order" in str(refused.value)


def joined(text: str, y):
    return total(f"{text} -> ()", square(y))


CALLS = [
    sharded("B T, T D -> ()")(lambda x, y: joined("B T D", x / (2 + square(y)))),
    sharded("B D, T D -> ()")(lambda x, y: joined("B T D", add("B D, T D -> B T D", x, y))),
    sharded("B T, T B -> ()")(lambda x, y: joined("T B", mul("B T, T B -> T B", x, y))),
    sharded("B T, T B D -> ()")(lambda x, y: joined("D B T", div("... T, T B D -> D B T", x, 2 + square(y)))),
    sharded("B, T -> ()")(lambda x, y: joined("B T", sub("B/1, T -> B T/1", x, y))),
    sharded("T, S, B -> ()")(lambda x, y, z: joined("B T S", where(
        "T S, S, B -> B T S", greater("T, S -> T S", x, y), y, z))),
    sharded("T, S -> ()")(lambda x, y: joined("S T", maximum("T, S -> S T", x, y))),
    sharded("B T (K G), K -> ()")(lambda x, y: joined("K B T G", add(
        "B T K G, K -> K B T G", rearrange("B T (K G) -> B T K G", x), y))),
    sharded("B D, D -> ()")(lambda x, w: joined("D 1 B", rearrange(
        "B 1 D -> D 1 B", rms_norm(rearrange("B D -> B 1 D", x), w))))]


def plain(i: int, *args: torch.Tensor) -> torch.Tensor:
    """The same in torch, dims by their places."""
    x, y, *z = args
    made = (lambda: x[:, :, None] / (2 + y ** 2), lambda: x[:, None] + y, lambda: x.T * y,
            lambda: x.T[:, :, None] / (2 + y ** 2), lambda: x[:, None] - y,
            lambda: torch.where(x[:, None] > y, y, z[0][:, None, None]),
            lambda: torch.maximum(x[:, None], y),
            lambda: x.unflatten(2, (2, 3)) + y[:, None],
            lambda: torch.nn.functional.rms_norm(x, (5,), y, 1e-6))[i]()
    return made.square().sum()


@pytest.mark.parametrize("i", range(len(CALLS)))
def test_numbers_and_gradients_under_layouts(i: int) -> None:
    f, g = CALLS[i], torch.Generator().manual_seed(i)
    shapes = [[torch.Size([SIZES[n] for n in d.names]).numel() for d in s.dims] for s in f.ins]
    args = [torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes]
    leaves = [x.clone().requires_grad_() for x in args]
    loss = plain(i, *leaves)
    want = [loss.detach(), *torch.autograd.grad(loss, leaves, allow_unused=True)]
    for layout in ("B=x,T=y", "T=x,B=y", "D=x/y,S=y", "S=y,T=x", "K=y,B=x"):
        got = simulate(value_and_grad(f, f.arg_names), Layout.parse(layout), *args, mesh=Mesh(x=2, y=2))
        for a, b in zip(got, want, strict=True):
            assert torch.allclose(a, torch.zeros_like(a) if b is None else b), layout


def test_what_a_text_says_is_what_is_there() -> None:
    """In explicit style; whole and owed stay an error."""
    for signature, text, says in (
            ("B/x D, T D -> B/x T D", "B D, T D -> B T D", "has B split over x"),
            ("B/x D, T D -> B T D", "B/x D, T D -> B T D", "B is split over x in x, whole in spread("),
            ("B D +x, T D -> B T D +x", "B D +x, T D -> B T D +x", "is whole, x owes a sum over x; the sum")):
        f = sharded(signature, layout=EXPLICIT)(lambda x, y, *, text: add(text, x, y))
        with pytest.raises(SpecError) as refused:
            lower(f, mesh=Mesh(x=2), text=text)
        assert says in str(refused.value), str(refused.value)
    f = sharded("B/x D, T D -> B/x T D", layout=EXPLICIT)(lambda x, y: add("B/x D, T D -> B/x T D", x, y))
    assert [s.op.name for s in lower(f, mesh=Mesh(x=2)).steps] == ["spread", "add"]


def test_what_is_no_such_text() -> None:
    for text in ("B D, T D -> B T", "B D, T D -> B T D S", "B D, T D -> B T D, B"):
        with pytest.raises(SpecError) as refused:
            lower(sharded("B D, T D -> B T D")(lambda x, y, *, text: add(text, x, y)), mesh=Mesh(), text=text)
        assert f'add "{text}": the result has the dims of all operands, each once' in str(refused.value)


def test_masks_meet_too() -> None:
    seen = sharded("T, S -> S T")(lambda q, k: logical_and("T, S -> S T", q > 0, k > 0))
    q, k = torch.tensor([1.0, -1.0, 1.0]), torch.tensor([1.0, -1.0])
    found = simulate(seen, Layout(S="x", T="x"), q, k, mesh=Mesh(x=2))
    assert torch.equal(found, (k > 0)[:, None] & (q > 0))
