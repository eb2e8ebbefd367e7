"""How kernels of few rows are launched: tiles and splits that fit,
and the library's where there is no kernel."""
from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shardlib.ops import few_rows
from shardlib.ops.few_rows import COUNTS, attend_lengths, rows_matmul, splits_of, tile_of
from shardlib.triton_kernels.decode_attention import MOST_SPLITS
from shardlib.triton_kernels.matmul_rows import MOST_ROWS, Tile

SHARED_BYTES = 227 << 10
"""Of a block of an H100 or H200."""


@given(st.integers(1, MOST_ROWS), st.integers(1, 32768), st.integers(1, 65536), st.booleans())
def test_tiles_fit(rows: int, lines: int, columns: int, gated: bool) -> None:
    """A gate beside its value in one tile; in shared memory what is under way; a count for each tile that is
    split, of lines that all splits have."""
    tile = tile_of(rows, lines, columns, gated)
    assert tile.columns > gated and all(n & (n - 1) == 0 for n in (tile.columns, tile.lines, tile.warps))
    if rows > 1:
        assert tile.stages * tile.lines * (tile.columns + max(8, rows)) * 2 <= SHARED_BYTES
        assert tile.splits == 1 or -(-columns // tile.columns) <= COUNTS and lines >= tile.splits * tile.lines
    else:
        assert tile.splits == 1 and tile.columns * tile.lines <= 32 * 32 * tile.warps


@given(st.integers(1, 4096), st.integers(1, 1 << 20))
def test_splits_are_powers_of_two_of_256_keys_at_least(heads: int, keys: int) -> None:
    splits = splits_of(heads, keys)
    assert splits & (splits - 1) == 0 and 1 <= splits <= MOST_SPLITS
    assert splits == 1 or heads * splits <= 128 and keys >= 256 * splits


@pytest.mark.parametrize("rows, dtype, by_columns, kernel", [
    (1, torch.bfloat16, True, "matmul_rows"), (32, torch.float16, True, "matmul_rows"),
    (33, torch.bfloat16, True, None), (0, torch.bfloat16, True, None), (1, torch.float32, True, None),
    (1, torch.bfloat16, False, None)])
def test_few_rows_of_16_bits_by_columns_have_kernels(rows: int, dtype: torch.dtype, by_columns: bool,
                                                     kernel: str | None,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """And what has none gives the same by the library."""
    seen: list[str] = []

    def record(name: str) -> Any:
        def launch(x: Tensor, w: Tensor, tile: Tile, counts: Tensor) -> Tensor:
            seen.append(name)
            return x @ w if name == "matmul_rows" else few_rows.gated_matmul_rows_reference(x, w)
        return launch
    for name in ("matmul_rows", "gated_matmul_rows"):
        monkeypatch.setattr(few_rows, name, record(name))
    x, w, counts = (torch.randn(rows, 8).to(dtype), torch.randn(6, 8).to(dtype).mT,
                    torch.zeros(1, dtype=torch.int32))
    w = w if by_columns else w.contiguous()
    assert torch.equal(rows_matmul(x, w, counts), x @ w)
    assert torch.equal(rows_matmul(x, w, counts, gated=True),
                       torch.nn.functional.silu((x @ w)[:, :3]) * (x @ w)[:, 3:])
    assert seen == ([] if kernel is None else [kernel, f"gated_{kernel}"])


def test_attention_is_split_by_its_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(few_rows, "decode_attention",
                        lambda q, k, v, lengths, counts, splits, **how: seen.append(splits))
    for rows, keys in ((1, 256), (1, 4096), (8, 4096), (1, 32768), (128, 256)):
        cache = torch.empty(rows, keys, 2, 128, device="meta")
        attend_lengths(torch.empty(rows, 1, 2, 4, 128, device="meta"), cache, cache,
                       torch.empty(rows, device="meta"), torch.empty(0, device="meta"))
    assert seen == [1, 16, 8, 64, 1]
