"""What attention takes besides: masks of fewer dims, lengths, biases, sinks, windows, softcaps, scales. Each,
and any of them together, is the op's meaning, forward and backward, however the dims are split, and holds no
scores of all pairs."""
from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from shardlib import Layout, Mesh, SpecError, lower, sharded, simulate, value_and_grad
from shardlib.functions import sum
from shardlib.ops import TABLE, attend_lse, attention
from shardlib.ops.attend_lse import Scores, merged, sunk
from shardlib.ops.attend_vjp import attend_vjp
from shardlib.ops.attention import placed
from shardlib.ops.seen import Seen
from shardlib.oracle import same
from shardlib.parser import parse_program
from shardlib.reference import meaning

pytestmark = pytest.mark.usefixtures("one_thread")
QKV = "B T K G H, B S K H, B S K V"
OPTIONS: dict[str, tuple] = dict(window=(1, 2, 4), softcap=(0.7,), scale=(1.5,), causal=(False, True))
SPECS = dict(start="B", mask="S T", lengths="B", bias="K T S", sinks="G K")


def program(beside: tuple[str, ...], specs: dict[str, str] = SPECS, **options: Any) -> Any:
    """The sum of attention, which takes those `beside`, times a weight."""
    text = ", ".join([QKV, *(specs[n] for n in beside)])

    @sharded(f"{QKV}, {', '.join(specs.values())}, B T K G V -> ()")
    def f(q, k, v, start, mask, lengths, bias, sinks, weight):
        every = dict(start=start, mask=mask, lengths=lengths, bias=bias, sinks=sinks)
        operands = {n: every[n] for n in beside}
        a = attention(f"{text} -> B T K G V", q, k, v, operands.pop("start", None), **operands, **options)
        return sum("B T K G V -> ()", a * weight)
    return f


def inputs(b: int, t: int, kv: int, g: int, s: int, seed: int, dtype: torch.dtype = torch.float64,
           h: int = 2, specs: dict[str, str] = SPECS) -> dict[str, torch.Tensor]:
    r, sizes = torch.Generator().manual_seed(seed), dict(B=b, T=t, K=kv, G=g, S=s)
    mask, bias, sinks = ([sizes[n] for n in specs[name].strip("()").split()]
                         for name in ("mask", "bias", "sinks"))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=r, dtype=torch.float64).to(dtype)
    return dict(q=normal(b, t, kv, g, h), k=normal(b, s, kv, h), v=normal(b, s, kv, h),
                start=torch.randint(-t, s + 1, (b,), generator=r), mask=torch.rand(mask, generator=r) < 0.7,
                lengths=torch.randint(s + 2, (b,), generator=r), bias=normal(*bias), sinks=normal(*sinks),
                weight=normal(b, t, kv, g, h))


@settings(max_examples=40)
@given(st.data())
def test_it_is_what_it_means(data: st.DataObject) -> None:
    beside = tuple(n for n in SPECS if data.draw(st.booleans(), n))
    options = {n: value for n, values in OPTIONS.items()
               if (value := data.draw(st.sampled_from((None, *values)), n)) is not None}
    b, t, kv, g, s = (data.draw(st.sampled_from(n))
                      for n in ((2, 1), (3, 1, 5), (2, 1), (1, 2), (5, 1, 3, 8)))
    specs = {**SPECS, **{name: " ".join(data.draw(st.permutations(dims), name)) for name in ("mask", "bias")
                         for dims in [["S", *data.draw(st.sets(st.sampled_from("BKGT")), name)]]}}
    args = inputs(b, t, kv, g, s, data.draw(st.integers(0, 99)), specs=specs)
    f = program(beside, specs, **options)
    wrt, sizes = ("q", "k", "v", "bias", "sinks"), dict(B=b, T=t, K=kv, G=g, H=2, S=s, V=2)
    layout = Layout({data.draw(st.sampled_from("BTKG")): ("x",)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attend_lse, "MOST_SCORES", data.draw(st.sampled_from((1, 40, 1 << 24))))
        found = simulate(value_and_grad(f, wrt), layout, *args.values(), mesh=Mesh(x=2))
        plain = simulate(f, layout, *args.values(), mesh=Mesh(x=2))
    args = {n: x.requires_grad_(n in wrt) for n, x in args.items()}
    (value,) = meaning(lower(f, mesh=Mesh(x=2)), args, sizes)
    wanted = (torch.autograd.grad(value, [args[n] for n in wrt], allow_unused=True) if value.requires_grad
              else [None] * 5)
    assert same(found[0], value.detach(), 1e-12) and same(plain, value.detach(), 1e-12)
    for name, got, want in zip(wrt, found[1:], wanted, strict=True):
        right = torch.zeros_like(args[name]) if want is None else want
        assert same(got, right, 1e-12), (name, beside, specs, options)


def test_a_start_that_hides_nothing() -> None:
    args = inputs(2, 3, 1, 2, 4, 0)
    placed, free = (simulate(program(beside, causal=False), Layout(), *args.values(), mesh=Mesh(x=1))
                    for beside in (("start",), ()))
    assert torch.equal(placed, free)


@pytest.mark.parametrize("beside, options", (((), dict(window=3)), (("start", "bias"), dict(softcap=0.7))))
def test_autograd_on_one_rank(beside: tuple[str, ...], options: dict[str, Any]) -> None:
    """And without, where autograd looks on and nothing requires a gradient."""
    f, wrt = program(beside, **options), ("q", "k", "v", *(n for n in beside if n in ("bias", "sinks")))
    unwatched = f(*inputs(2, 4, 2, 2, 6, 0).values())
    args = {n: x.requires_grad_(x.is_floating_point()) for n, x in inputs(2, 4, 2, 2, 6, 0).items()}
    value = f(*args.values())
    assert value.requires_grad and torch.equal(value, unwatched) and not unwatched.requires_grad
    value.backward()
    with torch.no_grad():
        _, *wanted = simulate(value_and_grad(f, wrt), Layout(), *args.values(), mesh=Mesh(x=1))
    assert all(same(args[n].grad, want, 1e-12) for n, want in zip(wrt, wanted, strict=True))


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that is made."""
    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for x in tree_leaves(made):
            if isinstance(x, torch.Tensor) and x.untyped_storage().nbytes():
                self.most = max(self.most, x.untyped_storage().nbytes() // x.itemsize)
        return made


@pytest.mark.parametrize("beside, options", (((), {}), ((), dict(window=9)), (("start",), dict(softcap=2.0)),
                                             (("lengths", "sinks"), {})))
def test_no_scores_of_all_pairs_are_held(beside: tuple[str, ...], options: dict[str, Any],
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    t, h, room = 600, 2, 20_000
    args = inputs(1, t, 1, 2, t, 0, torch.float32, h)
    monkeypatch.setattr(attend_lse, "MOST_SCORES", room)
    assert t * t > 10 * room
    with Largest() as largest:
        q, k, v = (args[n] for n in "qkv")
        seen = Seen(0, t, 0, t, True, options.get("window"), args["start"] if "start" in beside else None,
                    args["lengths"] if "lengths" in beside else None)
        scores = Scores(0.5, options.get("softcap"))
        out, lse = attend_lse.attend_lse(q, k, v, seen, scores)
        attend_vjp(q, k, v, seen, scores, None, out, lse, args["weight"])
    assert 0 < largest.most <= 2 * room


@pytest.mark.parametrize("beside", (("start",), ("mask",)))
def test_some_queries_at_a_time(beside: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two, two and one."""
    f, args = program(beside), inputs(1, 5, 1, 1, 4, 0)
    whole = simulate(f, Layout(), *args.values(), mesh=Mesh(x=1))
    monkeypatch.setattr(attend_lse, "MOST_SCORES", 8)
    assert same(simulate(f, Layout(), *args.values(), mesh=Mesh(x=1)), whole, 1e-12)


def test_places_alone_say_what_is_seen() -> None:
    def f(q, k, v):
        return attention(f"B T K G H, B S K H, B S K {last} -> B T K G {last}", q, k, v, **options)
    for last, options, alone in (("H", dict(ahead=3, scale=2.0), True), ("V", {}, False),
                                 ("H", dict(window=9), True), ("H", dict(softcap=2.0), False)):
        signature = f"B T K G H, B S K H, B S K {last} -> B T K G {last}"
        assert placed(lower(sharded(signature)(f), mesh=Mesh(x=1))) == alone
    assert not placed(lower(program(("start",)), mesh=Mesh(x=1)))


def test_results_of_pieces_are_merged() -> None:
    """Also where a piece, or all, have nothing that is seen; a sink is a piece without a value."""
    args = inputs(2, 3, 2, 2, 6, 1)
    q, k, v, scores = args["q"], args["k"], args["v"], Scores(0.7)
    start = torch.tensor([-2, 3])
    whole = attend_lse.attend_lse(q, k, v, Seen(0, 3, 0, 6, start=start), scores)
    parts = [attend_lse.attend_lse(q, k[:, a:b], v[:, a:b], Seen(0, 3, a, b - a, start=start), scores)
             for a, b in ((0, 2), (2, 2), (2, 5), (5, 6))]
    assert all(same(a, b, 1e-12) for a, b in zip(merged(parts), whole, strict=True))
    sinks = args["sinks"].T
    (out, lse), given = sunk(*whole, sinks), (whole[1].exp() + sinks.exp())
    assert same(lse, given.log(), 1e-12) and not out[0, 0].any()
    assert same(out, whole[0] * (whole[1].exp() / given)[..., None], 1e-12)


@pytest.mark.parametrize("text, options, says", (
    (f"{QKV}, T -> B T K G V", {}, "a start says where the queries of each B stand; its dim is B, not T"),
    (f"{QKV}, T -> B T K G V", dict(beside="lengths"),
     "lengths say how many keys each B has; its dim is B, not T"),
    (f"{QKV}, B T -> B T K G V", {}, "a mask has S, and any of B, K, G, T, not B T"),
    (f"{QKV}, K G -> B T K G V", dict(beside="bias"), "a bias has S, and any of B, K, G, T, not K G"),
    (f"{QKV}, B K -> B T K G V", dict(beside="sinks"),
     "sinks are scores of heads; their dims are K and G, not B K"),
))
def test_what_it_is_not(text: str, options: dict[str, Any], says: str) -> None:
    said = "".join(f", {n}={v!r}" for n, v in options.items())
    ins = text.partition(" -> ")[0]
    names = "q, k, v, x"
    with pytest.raises(SpecError) as error:
        parse_program(f'@sharded("{text}", layout=EXPLICIT)\ndef f({names}):\n'
                      f'    y = attention("{text}", {names}{said})\n    return y\n', TABLE)
    assert str(error.value).startswith(f"attention: {says}"), ins


@pytest.mark.parametrize("options, says", ((dict(window=0), "attention: window is 0"),
                                           (dict(window=1.5), "attention: window is 1.5"),
                                           (dict(softcap=-1.0), "attention: softcap is -1.0")))
def test_what_no_option_is(options: dict[str, Any], says: str) -> None:
    with pytest.raises(SpecError, match=says):
        lower(program((), **options), mesh=Mesh())
