"""How kernels of few rows are launched: tiles and splits by shape, as sweeps on one H100 have them
(benchmarks/few_rows.py and decode_attention.py).

Counts are int32 zeros on the GPU, made once for each stream that calls: kernels share work by them, and leave
them zero.
"""
from __future__ import annotations

import torch
from torch import Tensor

from shardlib.triton_kernels.decode_attention import MOST_SPLITS, decode_attention
from shardlib.triton_kernels.matmul_rows import (
    MOST_ROWS,
    Tile,
    gated_matmul_rows,
    gated_matmul_rows_reference,
    matmul_rows,
)

COUNTS = 4096
"""Counts that the largest shapes need: a row's kv head of attention has one, and a tile of a matmul."""
NARROW = 2560
"""Columns up to which a matmul has too few tiles to keep every SM reading; then several blocks share one."""


def make_counts(device: torch.device) -> Tensor:
    return torch.zeros(COUNTS, dtype=torch.int32, device=device)


def tile_of(rows: int, lines: int, columns: int, gated: bool) -> Tile:
    """For x of so many rows, and w of so many lines and columns."""
    if rows == 1:
        if lines >= 4096 and lines % 2048 == 0:
            return Tile(2, 2048, 8, 2) if gated else Tile(1, 2048, 8, 4)
        return Tile(2, 512, 2, 1) if lines <= 4096 else Tile(2, 512, 4, 2)
    tile = Tile(32, 128, 2, 5) if rows <= 16 else Tile(64, 128, 4, 6)
    return tile._replace(splits=4 if lines <= 4096 else 2) if columns <= NARROW and lines >= 2048 else tile


def rows_matmul(x: Tensor, w: Tensor, counts: Tensor, gated: bool = False) -> Tensor:
    """x @ w; gated, silu of the first half of its columns times the second. x: (rows, K); w: (K, N). By
    kernels of its own where the rows are few and w lies by columns; by the library's elsewhere."""
    if (0 < len(x) <= MOST_ROWS and x.dtype in (torch.bfloat16, torch.float16) and w.mT.is_contiguous()
        and x.is_contiguous() and w.numel()):
        lines, columns = w.shape
        return (gated_matmul_rows if gated else matmul_rows)(x, w, tile_of(len(x), lines, columns, gated),
                                                             counts)
    return gated_matmul_rows_reference(x, w) if gated else x @ w


def splits_of(heads: int, keys: int) -> int:
    """Of the keys of a row, where all rows have so many kv heads:
    a power of two, of 256 keys at least, as long as SMs are idle."""
    return _power_of_two(min(MOST_SPLITS, 128 // heads, keys // 256))


def _power_of_two(count: int) -> int:
    """The largest that is no more; 1 of anything less."""
    return 1 << max(1, count).bit_length() - 1


def attend_lengths(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, counts: Tensor) -> Tensor:
    """`decode_attention`, split as fits."""
    return decode_attention(q, k, v, lengths, counts, splits_of(k.shape[0] * k.shape[2], k.shape[1]),
                            block=64, warps=4, stages=3)
