"""The reduction in rank order, and the flat buffers that communicators see."""
from __future__ import annotations

import pytest
import torch
from conformance import DTYPES, REFUSED
from hypothesis import given
from hypothesis import strategies as st

from shardlib.distributed.flat import Cut, pack, plain
from shardlib.distributed.reduction import check_reducible, reduce_pieces
from shardlib.errors import SpecError


@pytest.mark.parametrize("op", ("sum", "max"))
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_dtype_is_reduced_or_refused(op: str, dtype: str) -> None:
    if (op, dtype) in REFUSED:
        with pytest.raises(SpecError, match=f"^{op} of {dtype} over ranks: not defined; convert it to "
                           "another dtype first$"):
            check_reducible(op, getattr(torch, dtype))
    else:
        x = torch.tensor([1, 0]).to(getattr(torch, dtype))
        assert reduce_pieces([x, x.clone()], op).dtype == x.dtype


def test_integers_wrap() -> None:
    for dtype in (torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64):
        info = torch.iinfo(dtype)
        got = reduce_pieces([torch.tensor([info.max], dtype=dtype), torch.tensor([1], dtype=dtype)], "sum")
        assert got.tolist() == [info.min]


def test_a_max_carries_nan_and_starts_below_everything() -> None:
    nan, low = torch.tensor([float("nan"), 1.0]), torch.tensor([1.0, -torch.inf])
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e5m2):
        got = reduce_pieces([low.to(dtype), nan.to(dtype), low.to(dtype)], "max").float()
        assert got[0].isnan() and got[1] == 1
        assert reduce_pieces([low.to(dtype)] * 2, "max").float()[1] == -torch.inf


@pytest.mark.parametrize("dtype, step", [(torch.bfloat16, 2.0 ** 8), (torch.float16, 2.0 ** 11),
                                         (torch.float8_e5m2, 8.0), (torch.float8_e4m3fn, 16.0)])
def test_a_sum_is_rounded_once(dtype: torch.dtype, step: float) -> None:
    """Ones beside a number whose next one is 2 further: each by itself would be rounded away.

    And in rank order: 2**25 swallows a one in float32.
    """
    ones = [torch.ones(1, dtype=dtype)] * 4
    assert reduce_pieces([torch.tensor([step], dtype=dtype), *ones], "sum").float().tolist() == [step + 4]
    big, small = torch.tensor([2.0 ** 25]), torch.ones(1)
    assert ([reduce_pieces(pieces, "sum").item() for pieces in ([big, small, -big], [big, -big, small])]
            == [0.0, 1.0])


def test_one_piece_is_copied() -> None:
    """And none is written to."""
    x, y = torch.ones(2), torch.full((2,), 3.0)
    for op, want in (("sum", 4.0), ("max", 3.0)):
        assert reduce_pieces([x], op).data_ptr() != x.data_ptr()
        assert (reduce_pieces([x, y], op).tolist() == [want] * 2 and x.tolist() == [1.0] * 2
                and y.tolist() == [3.0] * 2)


@given(shape=st.lists(st.integers(0, 4), min_size=1, max_size=4), data=st.data())
def test_split_and_join_are_inverse(shape: list[int], data: st.DataObject) -> None:
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    sizes = tuple(data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=4)))
    shape[dim] = sum(sizes)
    x, cut = torch.randn(shape), Cut.of(tuple(shape), dim, sizes)
    assert cut.whole == x.shape and sum(cut.counts) == x.numel()
    assert torch.equal(cut.join(cut.split(x)), x)
    assert torch.equal(cut.split(x), pack(x.split_with_sizes(sizes, dim)))


def test_plain_has_the_strides_of_its_shape() -> None:
    x = torch.randn(4, 6, requires_grad=True)
    for y in (x.t(), x[:, ::2], x[:1, :1], x[::5, ::7], x[:0],
              torch.view_as_complex(torch.randn(3, 2)).conj(),
              torch.view_as_complex(torch.randn(3, 2)).conj().imag):
        flat = plain(y)
        assert torch.equal(flat, y) and flat.stride() == torch.empty(y.shape).stride()
        assert not (flat.requires_grad or flat.is_conj() or flat.is_neg())
