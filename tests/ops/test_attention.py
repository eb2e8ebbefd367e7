"""Attention where queries see nothing: zeros, and no gradient, on every path that may run it."""
from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardlib import Layout, Mesh, lower, sharded, simulate, value_and_grad
from shardlib.functions import sum
from shardlib.ops import attention
from shardlib.ops.attention import attend, attend_vjp, bias
from shardlib.oracle import same
from shardlib.reference import meaning

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = ("q", "k", "v", "mask", "weight")


@sharded("B T K G H, B S K H, B S K V, B T S, B T K G V -> ()")
def masked(q, k, v, mask, weight):
    a = attention("B T K G H, B S K H, B S K V, B T S -> B T K G V", q, k, v, mask)
    return sum("B T K G V -> ()", a * weight)


@sharded("B T K G H, B S K H, B S K V, B T K G V -> ()")
def causal(q, k, v, weight):
    a = attention("B T K G H, B S K H, B S K V -> B T K G V", q, k, v)
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


@given(st.data(), st.sampled_from((masked, causal)))
def test_what_sees_nothing_gives_zeros_and_takes_no_gradient(data: st.DataObject, f: Any) -> None:
    b, t, kv, g, s = (data.draw(st.sampled_from(n), n)
                      for n in ((2, 3, 1, 0), (1, 3, 2, 0), (2, 1, 3), (1, 2), (4, 1, 5, 0)))
    sizes, r = (dict(B=b, T=t, K=kv, G=g, H=2, S=s, V=3),
                torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    q, k, v, weight = (torch.randn(shape, generator=r, dtype=torch.float64) for shape in
                       ((b, t, kv, g, 2), (b, s, kv, 2), (b, s, kv, 3), (b, t, kv, g, 3)))
    mask = data.draw(masks(b, t, s))
    mesh, layout = Mesh(x=2), Layout({data.draw(st.sampled_from("BTKG")): ("x",)})
    args = dict(q=q, k=k, v=v, **({"mask": mask} if f is masked else {}), weight=weight)
    found = simulate(value_and_grad(f, ("q", "k", "v")), layout, *args.values(), mesh=mesh)
    (value,) = meaning(lower(f, mesh=mesh), {n: x.requires_grad_(n in "qkv") for n, x in args.items()}, sizes)
    wanted = torch.autograd.grad(value, [q, k, v], allow_unused=True) if value.requires_grad else (None,) * 3
    for name, got, want in zip(("value", "q", "k", "v"), found, (value.detach(), *wanted), strict=True):
        assert same(got, torch.zeros_like(args[name]) if want is None else want, 1e-12), (name, sizes, mask)
    if f is masked:
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
    out, grads = attend(q, k, v, bias(mask, g, dtype)), attend_vjp(q, k, v, mask, ct)
    assert (not out[0, 0].any() and not grads[0][0, 0].any() and not grads[1][1, 0].any()
            and not grads[2][1, 0].any())
    assert all(bool(x.isfinite().all()) for x in (out, *grads))


@pytest.mark.parametrize("f", (masked, causal))
def test_heads_without_a_dim_see_all_keys_alike(f: Any) -> None:
    """q k is a sum over nothing, 0: v gets the mean's gradient, q and k have none."""
    q, k, mask = (torch.ones(1, 2, 1, 1, 0), torch.ones(1, 2, 1, 0),
                  torch.ones(1, 2, 2, dtype=torch.bool).tril())
    v, weight = torch.tensor([1.0, 3.0]).view(1, 2, 1, 1), torch.tensor([10.0, 20.0]).view(1, 2, 1, 1, 1)
    args = (q, k, v, mask, weight) if f is masked else (q, k, v, weight)
    value, of_q, of_k, of_v = simulate(value_and_grad(f, ("q", "k", "v")), Layout(), *args, mesh=Mesh(x=1))
    assert value == 10 * 1 + 20 * 2 and of_v.flatten().tolist() == [10 + 20 / 2, 20 / 2]
    assert of_q.shape == q.shape and of_k.shape == k.shape
