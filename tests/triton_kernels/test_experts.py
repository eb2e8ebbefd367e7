"""Routing, and experts of few tokens, in the interpreter: at most twice as far from float64 as torch."""
from __future__ import annotations

import pytest
import torch
from accuracy import near
from hypothesis import given, settings
from hypothesis import strategies as st
from rounded import rounded

from shardlib.ops.expert_rows import chosen_rows
from shardlib.triton_kernels import expert_places
from shardlib.triton_kernels.expert_ffn import expert_ffn, expert_ffn_reference
from shardlib.triton_kernels.limits import Tile
from shardlib.triton_kernels.route import route, route_reference

pytestmark = [pytest.mark.usefixtures("one_thread")]
some = settings(max_examples=settings.default.max_examples // 10)
dtypes, seeds = st.sampled_from((torch.float16, torch.bfloat16)), st.integers(0, 2**31)


@some
@given(dtypes, seeds, st.sampled_from((1, 2, 5, 9)), st.integers(1, 5), st.data(), st.integers(1, 40),
       st.integers(1, 40), st.booleans(), st.sampled_from((1, 3)))
def test_experts(dtype: torch.dtype, seed: int, tokens: int, experts: int, data: st.DataObject, d: int,
                 f: int, by_columns: bool, splits: int) -> None:
    """Of any sizes, and of any of the experts that there are: others are other ranks'. Weights lie by lines
    or by columns. What is nobody's is 0, and results do not differ from call to call."""
    torch.manual_seed(seed)
    j, first = data.draw(st.integers(1, experts)), data.draw(st.integers(0, experts - 1))
    here = data.draw(st.integers(1, experts - first))
    x, chosen, weights = (torch.randn(tokens, d).to(dtype), torch.rand(tokens, experts).argsort(-1)[:, :j],
                          torch.rand(tokens, j))
    gate, up, down = ((torch.randn(here, *shape) * shape[0] ** -0.5).to(dtype)
                      for shape in ((d, f), (d, f), (f, d)))
    if by_columns:
        gate, up, down = (w.mT.contiguous().mT for w in (gate, up, down))
    chosen, counts = chosen.contiguous(), torch.zeros(8, dtype=torch.int32)
    tiles = Tile(16, 16, 4, 2), Tile(16, 16, 4, 2, splits)
    with rounded():
        got, again = (expert_ffn(x, chosen, weights, gate, up, down, first, tiles, counts) for _ in range(2))
    assert (counts == 0).all() and torch.equal(got, again)
    exact = expert_ffn_reference(*(t.double() if t.is_floating_point() else t
                                   for t in (x, chosen, weights, gate, up, down)), first)
    assert near(got, expert_ffn_reference(x, chosen, weights, gate, up, down, first), exact, max(d, f))
    nobodys = ((chosen < first) | (chosen >= first + here)).all(1)
    assert (got[nobodys] == 0).all()


def test_experts_that_more_tokens_choose_than_a_tile_has_rows() -> None:
    """All 70 go to one, 2 to another; one has none. Choices that are no experts are passed over."""
    torch.manual_seed(0)
    x, weights = torch.randn(70, 16).half(), torch.rand(70, 2)
    chosen = torch.stack((torch.full((70,), 1), torch.where(torch.arange(70) % 40 == 7, 0, 9)), 1)
    gate, up, down = (torch.randn(3, *shape).half() / 4 for shape in ((16, 24), (16, 24), (24, 16)))
    operands, tiles = (x, chosen, weights, gate, up, down), (Tile(16, 16, 4, 2), Tile(16, 8, 4, 2, 2))
    got = expert_ffn(*operands, 0, tiles, torch.zeros(1, dtype=torch.int32))
    exact = expert_ffn_reference(*(t.double() if t.is_floating_point() else t for t in operands))
    assert near(got, expert_ffn_reference(*operands), exact)


def test_no_bit_depends_on_which_replica_a_row_goes_to() -> None:
    """Nor on how many rows come to one: slots 0 and 2 hold the same expert."""
    torch.manual_seed(0)
    x, weights, counts = torch.randn(9, 16).half(), torch.rand(9, 2), torch.zeros(1, dtype=torch.int32)
    gate, up, down = (torch.randn(2, *shape).half()[[0, 1, 0]] for shape in ((16, 24), (16, 24), (24, 16)))
    tiles = Tile(16, 16, 4, 2), Tile(16, 8, 4, 2, 2)
    one, *others = (expert_ffn(x, torch.stack((slots, torch.ones_like(slots)), 1), weights, gate, up, down, 0,
                               tiles, counts) for slots in torch.tensor([[0] * 9, [2] * 9, [0, 2, 0] * 3]))
    assert all(torch.equal(one, other) for other in others)


@some
@given(seeds, st.integers(1, 30), st.integers(1, 6), st.integers(1, 3), st.integers(0, 3),
       st.sampled_from((8, 64)))
def test_places(seed: int, tokens: int, experts: int, choices: int, first: int, counted: int) -> None:
    """The order of `chosen_rows`, by one block and by several; others' experts, and what is none, have no
    place; rows beyond the most are in no list."""
    chosen = torch.randint(-1, 9, (tokens, choices), generator=torch.Generator().manual_seed(seed))
    n, most = tokens * choices, tokens * choices - seed % 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expert_places, "COUNTED", counted)
        at, place, ends = expert_places.expert_places(chosen, first, experts, most)
    for got, want in zip((at, place, ends),
                         expert_places.expert_places_reference(chosen, first, experts, most)):
        assert torch.equal(got, want)
    x = torch.arange(tokens, dtype=torch.float32).unsqueeze(1)
    assert torch.equal(at, chosen_rows(x, chosen, experts, tokens, choices, first, most)[1])
    assert (at[:int(ends[-1])] < experts * n).all() and (at[int(ends[-1]):] == experts * n).all()


@some
@given(st.sampled_from((torch.float16, torch.float32)), seeds, st.integers(1, 40),
       st.sampled_from((1, 2, 5, 8, 33)), st.data(), st.booleans())
def test_routes(dtype: torch.dtype, seed: int, tokens: int, experts: int, data: st.DataObject,
                renormalise: bool) -> None:
    """The same experts as torch, the first among equals; where logits are NaN, the first ones."""
    torch.manual_seed(seed)
    logits = torch.randn(tokens, experts).mul(2).round().div(2).to(dtype)
    logits[tokens // 2, experts // 2] = float("nan")
    top_k = data.draw(st.integers(1, min(experts, 4)))
    weights, chosen = route(logits, top_k, renormalise, 2.5)
    want, experts_of_torch = route_reference(logits, top_k, renormalise, 2.5)
    assert torch.equal(chosen, experts_of_torch)
    torch.testing.assert_close(weights, want, rtol=1e-6, atol=1e-7, equal_nan=True)
