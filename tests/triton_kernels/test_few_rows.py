"""Norms, matmuls of few rows and attention by lengths, in the interpreter, whose bfloat16 is not one: at most
twice as far from float64 as torch."""
from __future__ import annotations

import numpy
import pytest
import torch
import torch.nn.functional as F
import triton
from accuracy import near
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shardlib.triton_kernels.decode_attention import decode_attention, decode_attention_reference
from shardlib.triton_kernels.gate_up import gate_up, gate_up_kernel, gate_up_reference
from shardlib.triton_kernels.launching import Grid, launch
from shardlib.triton_kernels.matmul_rows import (
    Tile,
    gated_matmul_rows,
    gated_matmul_rows_reference,
    matmul_rows,
    matmul_rows_reference,
)
from shardlib.triton_kernels.merge_two import merge_two, merge_two_reference, takes_two
from shardlib.triton_kernels.rms_norm import (
    add_rms_norm,
    add_rms_norm_reference,
    rms_norm,
    rms_norm_reference,
)

OLD = (tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
       and tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4))
pytestmark = [pytest.mark.usefixtures("one_thread"),
              pytest.mark.skipif(OLD, reason="the interpreter of Triton 3.6 runs no loops with numpy 2.4")]
EPS = 1e-5
some = settings(max_examples=settings.default.max_examples // 4)
dtypes, seeds = st.sampled_from((torch.float32, torch.float16)), st.integers(0, 2**31)


def normal(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape).to(dtype)


@some
@given(dtypes, seeds, st.integers(1, 3), st.integers(1, 300))
def test_norms(dtype: torch.dtype, seed: int, rows: int, width: int) -> None:
    """Of rows of any width; an added residual has the bits of an addition."""
    torch.manual_seed(seed)
    x, old, w = normal(dtype, rows, width), normal(dtype, rows, width), normal(dtype, width)
    assert near(rms_norm(x, w, EPS), rms_norm_reference(x, w, EPS),
                rms_norm_reference(x.double(), w.double(), EPS))
    total, normed = add_rms_norm(x, old, w, EPS)
    assert (torch.equal(total, add_rms_norm_reference(x, old, w, EPS)[0])
            and torch.equal(normed, rms_norm(total, w, EPS)))


@some
@given(dtypes, seeds, st.integers(1, 3), st.integers(1, 1100), st.integers(0, 3))
def test_gates(dtype: torch.dtype, seed: int, rows: int, width: int, apart: int) -> None:
    """Of halves of one matrix, and of rows that lie further apart."""
    torch.manual_seed(seed)
    gate, up = normal(dtype, rows, 2 * width + apart)[:, :2 * width].chunk(2, -1)
    made = gate_up(gate, up)
    assert near(made, gate_up_reference(gate, up), gate_up_reference(gate.double(), up.double()))
    for live in (0, 1, len(made)):
        part = gate_up(gate, up, torch.tensor([live], dtype=torch.int32))
        assert torch.equal(part[:live], made[:live])


@some
@given(dtypes, seeds, st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 20))
def test_two_sets_of_keys_are_merged(dtype: torch.dtype, seed: int, t: int, heads: int, g: int,
                                     h: int) -> None:
    """Heads first or tokens first, as kernels give them; where one sees nothing, or neither, too."""
    torch.manual_seed(seed)
    a, b = normal(dtype, 2, t, heads, g, h), normal(dtype, 2, heads * g, t, h)
    lse = [10 * torch.randn(2, heads * g, t).transpose(1, 2).unflatten(2, (heads, g)) for _ in range(2)]
    lse[seed % 2][0, 0, 0, 0] = lse[0][1, -1, -1, -1] = lse[1][1, -1, -1, -1] = -torch.inf
    given = a, lse[0], b.transpose(1, 2).unflatten(2, (heads, g)), lse[1]
    assert takes_two(*given)
    for got, torch_s, exact in zip(merge_two(*given), merge_two_reference(*given),
                                   merge_two_reference(*(x.double() for x in given))):
        none = exact == -torch.inf
        assert got.dtype == torch_s.dtype and torch.equal(got == -torch.inf, none)
        assert near(*(x.masked_fill(none, 0) for x in (got, torch_s, exact)))
    assert not takes_two(a.repeat_interleave(2, -1)[..., ::2], *given[1:])


def test_only_a_kernel_that_waits_starts_early() -> None:
    """One that does not would read what is not there yet."""
    x = torch.ones(4)
    with pytest.raises(AssertionError, match="it would not wait for the kernel before it"):
        launch(gate_up_kernel, (), Grid(1, early=True), (x, x, x, x, 4, 4, 4, 1),
               lambda: dict(LIVE=False, LANES=4), True)


def test_a_norm_of_nothing_and_of_nan() -> None:
    w = torch.ones(4)
    assert rms_norm(torch.empty(0, 4), w, EPS).shape == (0, 4)
    got = rms_norm(torch.tensor([[1.0, float("nan"), 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]), w, EPS)
    assert got[0].isnan().all() and (got[1] == 0).all()


@some
@given(dtypes, seeds, st.booleans(), st.sampled_from((1, 1, 2, 8, 9, 17)), st.integers(1, 150),
       st.integers(1, 40), st.sampled_from((16, 32)), st.sampled_from((2, 4, 16)), st.sampled_from((1, 1, 3)))
def test_matmuls(dtype: torch.dtype, seed: int, gated: bool, rows: int, lines: int, columns: int,
                 at_once: int, tile: int, splits: int) -> None:
    """Of any sizes, gated and not, split or not: tiles that do not divide them end where they do."""
    torch.manual_seed(seed)
    x, w = normal(dtype, rows, lines), normal(dtype, columns * (1 + gated), lines).mT
    ours, reference = ((gated_matmul_rows, gated_matmul_rows_reference) if gated
                       else (matmul_rows, matmul_rows_reference))
    counts = torch.zeros(8, dtype=torch.int32)
    chosen = Tile(tile if rows == 1 else 16, at_once, 4, 2, splits)
    if rows == 1 and splits > 1:                            # a block goes through many columns
        chosen = Tile(tile, 1 << (lines - 1).bit_length(), 4, 3, blocks=1)
    got = ours(x, w, chosen, counts)
    assert got.shape == (rows, columns) and got.dtype == dtype and (counts == 0).all()
    each = x.double().abs() @ w.double().abs()
    terms = each[:, :columns] * each[:, columns:] if gated else each
    assert near(got, reference(x, w), reference(x.double(), w.double()), lines, terms)


@some
@given(st.data(), dtypes, seeds, st.integers(1, 3), st.integers(1, 3), st.integers(1, 2), st.integers(1, 4),
       st.sampled_from((8, 16, 24)), st.integers(3, 90), st.sampled_from((1, 2, 3, 8)))
def test_attention_by_lengths(data: st.DataObject, dtype: torch.dtype, seed: int, rows: int, new: int,
                              heads: int, group: int, h: int, keys: int, splits: int) -> None:
    """Of rows of any lengths, more than there are keys and less than none too, cut into any number of splits.

    What lies behind a row's keys is not read, be it NaN; no keys give zeros. Counts are for splits.
    """
    torch.manual_seed(seed)
    q, k, v = (normal(dtype, rows, new, heads, group, h), normal(dtype, rows, keys, heads, h),
               normal(dtype, rows, keys, heads, h))
    lengths = torch.tensor([data.draw(st.integers(-new - 1, keys + 2)) for _ in range(rows)])
    exact = decode_attention_reference(*(x.double() for x in (q, k, v)), lengths)
    torchs = decode_attention_reference(q, k, v, lengths)
    behind = torch.arange(keys) >= (lengths + new - 1)[:, None]
    k[behind], v[behind] = float("nan"), float("nan")
    counts = torch.zeros(rows * heads, dtype=torch.int32) if splits > 1 else None
    got = decode_attention(q, k, v, lengths, counts, splits, block=16)
    assert near(got, torchs, exact) and (counts is None or (counts == 0).all())
    assert (got[lengths[:, None] + torch.arange(new) <= 0] == 0).all()


def test_the_reference_of_attention_is_that_of_torch() -> None:
    """With a mask, where every query sees something."""
    q, k, v, lengths = (torch.randn(2, 3, 2, 4, 8), torch.randn(2, 9, 2, 8), torch.randn(2, 9, 2, 8),
                        torch.tensor([1, 7]))
    seen = torch.arange(9) < lengths[:, None, None] + torch.arange(3)[:, None]
    want = F.scaled_dot_product_attention(q.permute(0, 2, 3, 1, 4).flatten(1, 2),
                                          *(x.transpose(1, 2).repeat_interleave(4, 1) for x in (k, v)),
                                          seen[:, None])
    torch.testing.assert_close(decode_attention_reference(q, k, v, lengths),
                               want.unflatten(1, (2, 4)).permute(0, 3, 1, 2, 4))
