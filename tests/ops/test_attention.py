"""Attention where queries see nothing: zeros, and no gradient, on every path that may run it; and by where
the queries stand, which is what a mask of it gives, bit for bit, without a mask where a kernel needs none."""
from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from accuracy import near
from hypothesis import given
from hypothesis import strategies as st

from shardlib import Layout, Mesh, compile, lower, scan, sharded, simulate, value_and_grad
from shardlib.functions import sum
from shardlib.ops import attend as attending
from shardlib.ops import attention, causal_mask, few_rows
from shardlib.ops.attend import attend
from shardlib.ops.attend_lse import Scores, attend_lse
from shardlib.ops.attend_vjp import attend_vjp
from shardlib.ops.seen import Seen
from shardlib.oracle import same
from shardlib.reference import meaning

pytestmark = pytest.mark.usefixtures("one_thread")
SEEN = import_module("shardlib.ops.seen")


@sharded("B T K G H, B S K H, B S K V, B T S, B T K G V -> ()")
def masked(q, k, v, mask, weight):
    a = attention("B T K G H, B S K H, B S K V, B T S -> B T K G V", q, k, v, mask)
    return sum("B T K G V -> ()", a * weight)


@sharded("B T K G H, B S K H, B S K V, B T K G V -> ()")
def causal(q, k, v, weight):
    a = attention("B T K G H, B S K H, B S K V -> B T K G V", q, k, v)
    return sum("B T K G V -> ()", a * weight)


@sharded("B T K G H, B S K H, B S K V, B, B T K G V -> ()")
def placed(q, k, v, start, weight):
    a = attention("B T K G H, B S K H, B S K V, B -> B T K G V", q, k, v, start)
    return sum("B T K G V -> ()", a * weight)


@sharded("B T K G H, B S K H, B S K V, B, B T K G V -> ()")
def masked_there(q, k, v, start, weight):
    mask = causal_mask("B -> B T/1 S/1", start)
    a = attention("B T K G H, B S K H, B S K V, B T S -> B T K G V", q, k, v, mask)
    return sum("B T K G V -> ()", a * weight)


@st.composite
def masks(draw: st.DrawFn, b: int, t: int, s: int) -> torch.Tensor:
    """Any, with queries that see nothing, keys that nothing sees, and batches without either."""
    seed = draw(st.integers(0, 1 << 20))
    mask = (torch.rand(b, t, s, generator=torch.Generator().manual_seed(seed))
            < draw(st.sampled_from((0.0, 0.2, 0.7, 1.0))))
    for dims in ((b, t, 1), (b, 1, s), (b, 1, 1)):
        if draw(st.booleans()):
            mask &= torch.rand(dims, generator=torch.Generator().manual_seed(seed + 1)) < 0.6
    return mask


@given(st.data(), st.sampled_from((masked, placed, causal)))
def test_what_sees_nothing_gives_zeros_and_takes_no_gradient(data: st.DataObject, f: Any) -> None:
    b, t, kv, g, s = (data.draw(st.sampled_from(n), n)
                      for n in ((2, 3, 1, 0), (1, 3, 2, 0), (2, 1, 3), (1, 2), (4, 1, 5, 0)))
    sizes, r = (dict(B=b, T=t, K=kv, G=g, H=2, S=s, V=3),
                torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    q, k, v, weight = (torch.randn(shape, generator=r, dtype=torch.float64) for shape in
                       ((b, t, kv, g, 2), (b, s, kv, 2), (b, s, kv, 3), (b, t, kv, g, 3)))
    mask = data.draw(masks(b, t, s))
    mesh, layout = Mesh(x=2), Layout({data.draw(st.sampled_from("BTKG")): ("x",)})
    start = torch.tensor([data.draw(st.integers(-t - 1, s + 1)) for _ in range(b)], dtype=torch.int64)
    args = dict(q=q, k=k, v=v, **({"mask": mask} if f is masked else {"start": start} if f is placed else {}),
                weight=weight)
    found = simulate(value_and_grad(f, ("q", "k", "v")), layout, *args.values(), mesh=mesh)
    (value,) = meaning(lower(f, mesh=mesh), {n: x.requires_grad_(n in "qkv") for n, x in args.items()}, sizes)
    wanted = torch.autograd.grad(value, [q, k, v], allow_unused=True) if value.requires_grad else (None,) * 3
    for name, got, want in zip(("value", "q", "k", "v"), found, (value.detach(), *wanted), strict=True):
        assert same(got, torch.zeros_like(args[name]) if want is None else want, 1e-12), (name, sizes, mask)
    if f is placed:
        mask = torch.arange(s) <= start[:, None, None] + torch.arange(t)[:, None]
    if f is not causal:
        assert (not found[1][~mask.any(-1)].any()
                and not found[2].transpose(1, 2)[~mask.any(1)[:, None].expand(b, kv, s)].any())


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("t, s, g", ((1, 4, 3), (5, 5, 1), (5, 70, 2)))
def test_in_every_dtype(dtype: torch.dtype, t: int, s: int, g: int) -> None:
    """Kernels are chosen by dtype and size. Keys that nothing sees may hold anything that is finite."""
    r = torch.Generator().manual_seed(0)
    q, k, v, ct = (torch.randn(shape, generator=r).to(dtype)
                   for shape in ((2, t, 3, g, 16), (2, s, 3, 16), (2, s, 3, 16), (2, t, 3, g, 16)))
    mask = torch.rand(2, t, s, generator=r) < 0.7
    mask[0, 0], mask[1, :, 0] = False, False
    k[1, 0] = torch.finfo(dtype).max / 64
    seen, scores = Seen(0, t, 0, s, causal=False, mask=mask[:, None, None]), Scores(0.25)
    out, (kept, lse) = attend(q, k, v, seen, scores), attend_lse(q, k, v, seen, scores)
    grads = attend_vjp(q, k, v, seen, scores, None, kept, lse, ct)
    assert not kept[0, 0].any() and bool((lse[0, 0] == -torch.inf).all())
    assert (not out[0, 0].any() and not grads[0][0, 0].any() and not grads[1][1, 0].any()
            and not grads[2][1, 0].any())
    assert all(bool(x.isfinite().all()) for x in (out, *grads))


@pytest.mark.parametrize("f", (masked, placed, causal))
def test_heads_without_a_dim_see_all_keys_alike(f: Any) -> None:
    """q k is a sum over nothing, 0: v gets the mean's gradient, q and k have none."""
    q, k, mask = (torch.ones(1, 2, 1, 1, 0), torch.ones(1, 2, 1, 0),
                  torch.ones(1, 2, 2, dtype=torch.bool).tril())
    v, weight = torch.tensor([1.0, 3.0]).view(1, 2, 1, 1), torch.tensor([10.0, 20.0]).view(1, 2, 1, 1, 1)
    seen = {masked: [mask], placed: [torch.tensor([0])], causal: []}[f]
    args = (q, k, v, *seen, weight)
    value, of_q, of_k, of_v = simulate(value_and_grad(f, ("q", "k", "v")), Layout(), *args, mesh=Mesh(x=1))
    assert value == 10 * 1 + 20 * 2 and of_v.flatten().tolist() == [10 + 20 / 2, 20 / 2]
    assert of_q.shape == q.shape and of_k.shape == k.shape


# -- by where the queries stand ------------------------------------------------------------------------------

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@given(st.data(), st.sampled_from(FLOATS), st.sampled_from((torch.int64, torch.int32, torch.int8)))
def test_a_start_gives_the_bits_of_its_mask(data: st.DataObject, dtype: torch.dtype,
                                            of_start: torch.dtype) -> None:
    """Forward and backward, whichever dim is split: a rank's queries begin where its piece of T does."""
    b, t, kv, g, s = (data.draw(st.sampled_from(n), n)
                      for n in ((1, 2, 3), (1, 2, 5), (1, 2), (1, 3), (1, 4, 150)))
    r = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    q, k, v, weight = (torch.randn(shape, generator=r).to(dtype) for shape in
                       ((b, t, kv, g, 4), (b, s, kv, 4), (b, s, kv, 4), (b, t, kv, g, 4)))
    near_ends = st.one_of(st.integers(-t - 1, min(s + 1, 127)), st.sampled_from((-128, 127)))
    start = torch.tensor([data.draw(near_ends) for _ in range(b)], dtype=of_start)
    mesh, layout = Mesh(x=2), Layout({data.draw(st.sampled_from("BTKGS")): ("x",)})
    ours, theirs = (simulate(value_and_grad(f, ("q", "k", "v")), layout, q, k, v, start, weight, mesh=mesh)
                    for f in (placed, masked_there))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_where_queries_stand_is_reckoned_in_64_bits() -> None:
    """The last rank's one query stands at 127 + 2."""
    r = torch.Generator().manual_seed(0)
    q, k, v, weight = (torch.randn(shape, generator=r) for shape in
                       ((1, 3, 1, 1, 4), (1, 150, 1, 4), (1, 150, 1, 4), (1, 3, 1, 1, 4)))
    one, other = (simulate(placed, Layout(T="x"), q, k, v, torch.tensor([127], dtype=kind), weight,
                           mesh=Mesh(x=2)) for kind in (torch.int8, torch.int64))
    assert torch.equal(one, other)


@sharded("B T K G H, B S K H, B -> B T K G H")
def layer(x, cache, start):
    return x + attention("B T K G H, B S K H, B S K H, B -> B T K G H", x, cache, cache, start)


@sharded("B T K G H, L B S K H, B -> B T K G H")
def layers(x, caches, start):
    return scan(layer, x, caches, start)


def inputs(t: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    r = torch.Generator().manual_seed(0)
    return (torch.randn(3, t, 2, 3, 16, generator=r), torch.randn(4, 3, 21, 2, 16, generator=r),
            torch.tensor([-1, 7, 19]))


class Asked:
    """What has been made of starts, and what the kernel was given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kernel: bool) -> None:
        self.masks = self.biases = 0
        self.lengths: list[torch.Tensor] = []
        self._positions, self._bias = SEEN.positions, SEEN.bias
        monkeypatch.setattr(SEEN, "positions", self.positions)
        monkeypatch.setattr(SEEN, "bias", self.bias)
        monkeypatch.setattr(attending, "attend_lengths", self.attend_lengths)
        if kernel:
            monkeypatch.setattr(few_rows, "has_room", lambda device: True)
            monkeypatch.setattr(attending, "counts_of",
                                lambda device: torch.zeros(few_rows.COUNTS, dtype=torch.int32))

    def positions(self, *of: Any) -> torch.Tensor:
        self.masks += 1
        return self._positions(*of)

    def bias(self, *of: Any) -> torch.Tensor:
        self.biases += 1
        return self._bias(*of)

    def attend_lengths(self, q: Any, k: Any, v: Any, lengths: torch.Tensor, counts: Any) -> torch.Tensor:
        self.lengths.append(lengths)
        return few_rows.attend_lengths(q, k, v, lengths, counts)


@pytest.mark.parametrize("of_start", (torch.int64, torch.int32))
def test_a_call_makes_one_bias_for_all_layers(of_start: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, run, (x, caches, start) = Asked(monkeypatch, kernel=False), compile(layers), inputs()
    for calls in (1, 2):
        run(x, caches, start.to(of_start))
        assert (asked.masks, asked.biases, asked.lengths) == (calls, calls, [])


def test_backward_makes_one_mask_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    @sharded("B T K G H, L B S K H, B -> ()")
    def total(x, caches, start):
        return sum("B T K G H -> ()", layers(x, caches, start))
    asked, (x, caches, start) = Asked(monkeypatch, kernel=False), inputs()
    simulate(value_and_grad(total, ("x",)), Layout(), x, caches, start, mesh=Mesh(x=1))
    assert (asked.masks, asked.biases) == (2, 0)


@pytest.mark.parametrize("t", (1, 2))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
def test_where_a_kernel_takes_lengths_no_mask_is_made(t: int, dtype: torch.dtype,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer has the same lengths, made once. The kernel, in the interpreter, is as near as torch."""
    x, caches, start = inputs(t)
    wide, narrow = ((x.to(kind), caches.to(kind), start) for kind in (torch.float64, dtype))
    exact, torchs = (compile(layers)(*of) for of in (wide, narrow))
    asked = Asked(monkeypatch, kernel=True)
    with torch.inference_mode():
        got = compile(layers)(*narrow)
    assert (asked.masks, asked.biases) == (0, 0) and len({id(made) for made in asked.lengths}) == 1
    assert len(asked.lengths) == 4 and asked.lengths[0].tolist() == [0, 8, 20]
    assert near(got, torchs, exact, terms=x.abs().max() + 4 * caches.abs().max())
    assert torch.equal(got[0, 0], narrow[0][0, 0])      # it sees nothing: each layer adds zeros


def test_a_derivative_takes_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, (x, caches, start) = Asked(monkeypatch, kernel=True), inputs()
    x.requires_grad_()
    layer(x, caches[0], start).sum().backward()
    assert asked.lengths == [] and asked.biases == 1 and bool(x.grad.isfinite().all())


@pytest.mark.parametrize("start, offset, lengths", ((0, 0, 1), (0, 3, 4), (-1, 0, 0), (-9, 3, -2), (6, 0, 7),
                                                    (7, 0, 7), (1 << 40, 0, 7), (-(1 << 40), 3, -2)))
def test_lengths_have_room_in_int32(start: int, offset: int, lengths: int) -> None:
    assert Seen(offset, 2, 0, 7, start=torch.tensor([start])).reach.tolist() == [lengths]
