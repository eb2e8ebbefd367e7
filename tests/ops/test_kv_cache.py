"""Caches in a scan: what a body returns is the update, what it reads is what it was given,
whoever owns the buffer."""
from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardlib import Layout, Mesh, compile, scan, sharded, simulate
from shardlib.functions import sum
from shardlib.ops import causal_mask, update_cache

pytestmark = pytest.mark.usefixtures("one_thread")


@sharded("B T H, B S H, B -> B T H, B S H")
def write(x, cache, start):
    """The update alone is used: it may be made in place."""
    new = update_cache("B S H, B T H, B -> B S H", cache, x, start)
    return x + sum("B S H -> B H", new), new


@sharded("B T H, B S H, B -> B T H, B S H")
def write_and_read_old(x, cache, start):
    new = update_cache("B S H, B T H, B -> B S H", cache, x, start)
    return x + sum("B S H -> B H", cache), new


@sharded("B T H, B S H, B -> B T H, B S H")
def read_and_write(x, cache, start):
    old = sum("B S H -> B H", cache)
    return x + old, update_cache("B S H, B T H, B -> B S H", cache, x, start)


@sharded("B T H, B S H, B -> B T H, B S H")
def write_twice(x, cache, start):
    once = update_cache("B S H, B T H, B -> B S H", cache, x, start)
    return x + sum("B S H -> B H", once), update_cache("B S H, B T H, B -> B S H", once, x * 2.0, start)


@sharded("B T H, B S H, B -> B T H, B S H")
def return_old(x, cache, start):
    new = update_cache("B S H, B T H, B -> B S H", cache, x, start)
    return x + sum("B S H -> B H", new), cache


def by_hand(name: str, x: torch.Tensor, cache: torch.Tensor,
            start: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One layer, in plain torch."""
    new = cache.clone()
    for b, at in enumerate(start.tolist()):
        new[b, at:at + x.shape[1]] = x[b] * (2 if name == "write_twice" else 1)
    once = torch.where(new == cache, cache, new / 2) if name == "write_twice" else new
    read = {"write": new, "write_twice": once, "return_old": new}.get(name, cache)
    return x + read.sum(1)[:, None], cache if name == "return_old" else new


def program(body: Any, after: bool) -> Any:
    """A scan over the layers of a cache; `after`: the old cache is read behind it, too."""
    if after:
        @sharded("B T H, L B S H, B -> B T H, L B S H, L B H")
        def f(x, cache, start):
            y, new = scan(body, x, cache, start)
            return y, new, sum("L B S H -> L B H", cache)
    else:
        @sharded("B T H, L B S H, B -> B T H, L B S H")
        def f(x, cache, start):
            return scan(body, x, cache, start)
    return f


@given(st.sampled_from((write, write_and_read_old, read_and_write, write_twice, return_old)), st.booleans(),
       st.booleans(), st.sampled_from((Layout(), Layout(B="x"), Layout(H="x"))), st.integers(1, 3),
       st.integers(0, 3))
def test_a_cache_is_updated_and_the_old_one_is_what_it_was(body: Any, after: bool, donate: bool,
                                                           layout: Layout, t: int, layers: int) -> None:
    r, f = torch.Generator().manual_seed(t), program(body, after)
    x, cache = (torch.randn(3, t, 2, generator=r, dtype=torch.float64),
                torch.randn(layers, 3, 5, 2, generator=r, dtype=torch.float64))
    start = torch.randint(0, 6 - t, (3,), generator=r)
    carry, news = x, []
    for old in cache:
        carry, new = by_hand(body.__name__, carry, old, start)
        news.append(new)
    want = (carry, torch.stack(news) if news else cache, *([cache.sum(2)] if after else []))
    given, kept = cache.clone(), cache.clone()
    for got in (simulate(f, layout, x, given, start, mesh=Mesh(x=2)),
                compile(f, Layout(), mesh=Mesh(), donate=("cache",) if donate else ())(x, kept, start)):
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert (bool((given == cache).all())
            and (donate or bool((kept == cache).all()))), "an argument that nobody gave up has changed"


@pytest.mark.parametrize("layout",
                         (Layout(), Layout(S="x"), Layout(T="x"), Layout(B="x"), Layout(T="x", S="y")))
def test_a_query_sees_the_slots_up_to_its_own(layout: Layout) -> None:
    """Wherever a rank's queries and slots begin."""
    @sharded("B, T, S -> B T S")
    def seen(start, queries, slots):
        return causal_mask("B -> B T S", start)
    start, t, s = torch.tensor([0, 2, 4]), 3, 7
    want = [[[slot <= b + query for slot in range(s)] for query in range(t)] for b in start.tolist()]
    assert simulate(seen, layout, start, torch.ones(t), torch.ones(s), mesh=Mesh(x=3, y=2)).tolist() == want
