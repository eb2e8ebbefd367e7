"""Flat buffers: packed pieces are what torch.cat makes of them,
and no copy where they lie in turn already."""
from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import forward_ad

from shardlib.distributed.flat import Cut, copy, pack, plain

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
    assert (pack(x.split([4, 3, 5])).data_ptr() == x.data_ptr()
            and pack([x[2:6]]).data_ptr() == x[2:].data_ptr())
    assert pack([x[:4], x[5:]]).data_ptr() != x.data_ptr()              # a gap
    assert pack([x[:4].clone(), x[4:]]).data_ptr() != x.data_ptr()      # two storages
    assert torch.equal(pack([x[:4], x[:4]]), torch.cat([x[:4], x[:4]]))


def test_storages_that_happen_to_lie_in_turn_are_two() -> None:
    memory = bytearray(32)
    a, b = (torch.frombuffer(memory, dtype=torch.float32, count=4).fill_(1.0),
            torch.frombuffer(memory, dtype=torch.float32, count=4, offset=16).fill_(2.0))
    assert b.data_ptr() == a.data_ptr() + 16 and a.untyped_storage().nbytes() == 16
    assert pack([a, b]).tolist() == [1.0] * 4 + [2.0] * 4


@given(st.lists(st.integers(0, 3), min_size=1, max_size=4),
       st.lists(st.integers(0, 3), min_size=1, max_size=3), st.data())
def test_split_and_join_are_inverse(sizes: list[int], shape: list[int], data: st.DataObject) -> None:
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    shape[dim] = sum(sizes)
    cut, x = Cut.of(tuple(shape), dim, tuple(sizes)), torch.randn(shape)
    assert torch.equal(cut.join(cut.split(x)), x)
    assert torch.equal(cut.split(x), torch.cat([piece.flatten() for piece in x.split(sizes, dim)]))


def test_no_size_is_below_0() -> None:
    with pytest.raises(ValueError):
        Cut.of((4,), 0, (5, -1))


def test_plain_tensors_have_no_tangent_and_no_lazy_bits() -> None:
    x = torch.arange(4.0)
    with forward_ad.dual_level():
        assert forward_ad.unpack_dual(plain(forward_ad.make_dual(x, x))).tangent is None
    z = torch.complex(x, x + 1)
    for lazy in (z.conj(), z.conj().imag, torch._neg_view(x), torch._neg_view(z), torch._neg_view(z.conj())):
        got = plain(lazy)
        assert torch.equal(got, lazy) and not got.is_conj() and not got.is_neg()


def test_dtypes_that_torch_does_not_copy_lie_as_their_bytes_do() -> None:
    x = torch.arange(12, dtype=torch.uint8).view(3, 4)
    for dtype in (torch.uint1, torch.int7, torch.float4_e2m1fn_x2):
        y = x.view(dtype)
        for way in (lambda t: plain(t.t()), copy, lambda t: pack([t[:, 1:], t[:, :1]]),
                    lambda t: Cut.of((3, 4), 1, (1, 3)).split(t),
                    lambda t: Cut.of((3, 4), 1, (2, 2)).split(t),
                    lambda t: Cut.of((3, 4), 1, (1, 3)).join(t.flatten())):
            assert way(y).dtype == dtype and torch.equal(way(y).view(torch.uint8), way(x))
