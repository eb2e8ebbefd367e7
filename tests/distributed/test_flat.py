"""Flat buffers: packed pieces are what torch.cat makes of them, and no copy where they lie in turn already."""
from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from shardlib.distributed.flat import Cut, pack

SIZES = st.lists(st.integers(0, 4), min_size=1, max_size=5)


@given(SIZES, st.randoms(use_true_random=False), st.integers(0, 1))
def test_packed_pieces_follow_each_other(sizes: list[int], order: object, dim: int) -> None:
    x = torch.arange(3. * sum(sizes)).view(*((sum(sizes), 3) if dim == 0 else (3, sum(sizes))))
    pieces = list(x.split(sizes, dim))
    order.shuffle(pieces)
    want = torch.cat([piece.flatten() for piece in pieces])
    assert torch.equal(pack(pieces), want)
    strided = [piece.t() for piece in pieces]
    assert torch.equal(pack(strided), torch.cat([piece.flatten() for piece in strided]))


def test_pieces_in_turn_are_not_copied() -> None:
    x = torch.arange(12.)
    assert pack(x.split([4, 3, 5])).data_ptr() == x.data_ptr() and pack([x[2:6]]).data_ptr() == x[2:].data_ptr()
    assert pack([x[:4], x[5:]]).data_ptr() != x.data_ptr()              # a gap
    assert pack([x[:4].clone(), x[4:]]).data_ptr() != x.data_ptr()      # two storages
    assert torch.equal(pack([x[:4], x[:4]]), torch.cat([x[:4], x[:4]]))


@given(st.lists(st.integers(0, 3), min_size=1, max_size=4), st.lists(st.integers(0, 3), min_size=1, max_size=3), st.data())
def test_split_and_join_are_inverse(sizes: list[int], shape: list[int], data: st.DataObject) -> None:
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    shape[dim] = sum(sizes)
    cut, x = Cut.of(tuple(shape), dim, tuple(sizes)), torch.randn(shape)
    assert torch.equal(cut.join(cut.split(x)), x)
    assert torch.equal(cut.split(x), torch.cat([piece.flatten() for piece in x.split(sizes, dim)]))
