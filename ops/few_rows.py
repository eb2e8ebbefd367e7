"""How kernels of few rows are launched: tiles and splits by shape, as sweeps on one H100 have them
(benchmarks/few_rows.py and decode_attention.py).

Counts are int32 zeros on the GPU, those of one stream: kernels share work by them, and leave them zero.
"""
from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from threading import Lock

import torch
from torch import Tensor

from shardlib.distributed.graph_capture import is_chained
from shardlib.triton_kernels.limits import MOST_QUERIES, MOST_SPLITS, Tile

COUNTS = 4096
"""Counts that the largest shapes need: a row's kv head of attention has one, and a tile of a matmul."""
STREAMS = 128
"""Streams of a device that have counts."""
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
MOST_HEAD = 512
"""Bytes of a row of a head of attention."""
FEW_HEADS = 64
"""Kv heads of all rows, up to which a block of attention takes in 256 keys at once: there are SMs enough, and
one wait for memory is less."""
MOST_TURNED = 1 << 14
"""Elements of a token's queries that one block turns."""
SHARED = 227 << 10
"""Bytes of a block, on an H100 or H200."""
FEW = 32
"""Rows up to which our matmuls are faster than the library's."""
STREAMED, MOST_LINES = 28 << 20, 16384
"""For one row: bytes of a matrix from which on a block goes through many columns; lines that it takes at
once."""
NARROW = 2560
"""Columns up to which a matmul has too few tiles to keep every SM reading; then several blocks share one."""


@dataclass(frozen=True)
class Counts:
    """Of one device. zeros: a row for each of the first streams that ask; rows: which one, by stream."""
    zeros: Tensor
    rows: dict[int, int] = field(default_factory=dict)

    def of(self, stream: int) -> Tensor | None:
        row = self.rows.setdefault(stream, len(self.rows))
        return self.zeros[row] if row < len(self.zeros) else None


_COUNTS: dict[torch.device, Counts] = {}
_LOCK = Lock()


def counts_of(device: torch.device) -> Tensor | None:
    """The counts of the device's current stream. Those of all streams are made at the first call, so that a
    capture makes none: they outlive every graph. Graphs that were captured on one stream share its counts,
    and are replayed one after another.

    None beyond the first STREAMS streams, and in a capture before the first call outside of one.
    """
    stream = torch.cuda.current_stream(device)
    with _LOCK:
        if device not in _COUNTS:
            if torch.cuda.is_current_stream_capturing():
                return None
            _COUNTS[device] = Counts(torch.zeros((STREAMS, COUNTS), dtype=torch.int32, device=device))
            stream.synchronize()                        # they are zeros for every other stream, too
        return _COUNTS[device].of(stream.cuda_stream)


def tile_of(rows: int, lines: int, columns: int, gated: bool) -> Tile:
    """For x of so many rows, and w of so many lines and columns."""
    if rows == 1:
        if STREAMED <= 2 * lines * columns and lines <= MOST_LINES:
            return _streaming(_power_of_two(2 * lines - 1), gated)
        if lines >= 4096 and lines % 2048 == 0:
            return Tile(2, 2048, 8, 2) if gated else Tile(1, 2048, 8, 4)
        return Tile(2, 512, 2, 1) if lines <= 4096 else Tile(2, 512, 4, 2)
    if rows <= 16:
        tile = Tile(32, 128, 2, 5 if columns < 14000 else 4 if columns < 28000 else 3)
    else:
        tile = Tile(64, 128, 4, 6 if columns < 14000 else 4)
    if columns <= NARROW and lines >= 2048:
        return tile._replace(splits=4 if lines <= 4096 else 3)
    return tile._replace(splits=2) if columns <= 4096 and lines >= (4096 if rows <= 16 else 8192) else tile


def _streaming(lines: int, gated: bool) -> Tile:
    """A tile for one row: of one column, or a gate and its value; 96 kB under way on each SM."""
    warps = max(2, lines * (1 + gated) // 2048)
    return Tile(1 + gated, lines, warps, 3, blocks=min(8, -(-(96 << 10) // (4 * lines * (1 + gated)))))


def starts_early(device: torch.device, rows: int) -> bool:
    """Whether a kernel of so many rows is launched before the one before it has ended: in a chain of our own.
    A matmul of the library's lets none start, and what is launched early behind it begins 0.5 µs later."""
    return rows <= FEW and is_chained(device)


def differentiated(*operands: Tensor) -> bool:
    """Whether autograd is to see what is made of these: a kernel's results have no derivative."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in operands)


def rows_matmul(x: Tensor, w: Tensor, counts: Tensor | None, gated: bool = False) -> Tensor:
    """x @ w; gated, silu of the first half of its columns times the second. x: (rows, K); w: (K, N). By
    kernels of its own where the rows are few, w lies by columns and nobody wants a derivative; by the
    library's elsewhere. Without counts no tile is split."""
    from shardlib.triton_kernels import matmul_rows as kernels
    if (0 < len(x) <= FEW and x.dtype in (torch.bfloat16, torch.float16) and w.mT.is_contiguous()
        and x.is_contiguous() and w.numel() and not differentiated(x, w)):
        lines, columns = w.shape
        tile = tile_of(len(x), lines, columns, gated)
        tile = tile if counts is not None else tile._replace(splits=1)
        multiply = kernels.gated_matmul_rows if gated else kernels.matmul_rows
        return multiply(x, w, tile, counts, starts_early(x.device, len(x)))
    return kernels.gated_matmul_rows_reference(x, w) if gated else x @ w


def splits_of(heads: int, keys: int) -> int:
    """Of the keys of a row, where all rows have so many kv heads:
    a power of two, of 256 keys at least, as long as SMs are idle."""
    return _power_of_two(min(MOST_SPLITS, 128 // max(1, heads), keys // 256))


def _power_of_two(count: int) -> int:
    """The largest that is no more; 1 of anything less."""
    return 1 << max(1, count).bit_length() - 1


@cache
def has_room(device: torch.device) -> bool:
    """Whether a block has the shared memory of an H100's there."""
    return (device.type == "cuda" and
            getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0) >= SHARED)


def attends_lengths(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `attend_lengths` takes these: few queries, on a GPU, without a derivative; a row of a head is
    512 bytes at most, of which the keys and values that are under way fit into shared memory."""
    return (q.shape[1] * q.shape[3] <= MOST_QUERIES and 0 < q.shape[-1] * q.itemsize <= MOST_HEAD
            and q.dtype in FLOATS and q.dtype == k.dtype == v.dtype
            and k.shape == v.shape and k.stride() == v.stride() and k.stride(-1) == 1
            and not differentiated(q, k, v) and has_room(q.device))


def attend_lengths(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, counts: Tensor | None) -> Tensor:
    """`decode_attention`, split as fits; without counts not at all."""
    from shardlib.triton_kernels.decode_attention import decode_attention
    splits = 1 if counts is None else splits_of(k.shape[0] * k.shape[2], k.shape[1])
    return decode_attention(q.contiguous(), k, v, lengths, counts, splits, **_launched(q.dtype))


def _launched(dtype: torch.dtype) -> dict[str, int]:
    """Keys of a block at a time, its warps, the loads under way. float32 takes as many bytes in smaller
    blocks, and has no room in the registers of four warps."""
    return dict(block=32, warps=8, stages=2) if dtype == torch.float32 else dict(block=64, warps=4, stages=3)


def refuses_cached(q: Tensor, k: Tensor, v: Tensor, angles: Tensor, keys: Tensor, values: Tensor,
                   start: Tensor) -> str | None:
    """Why `attend_cached` takes none of these sizes and dtypes; None where it does. What is under way fits
    into shared memory, as above; with the keys and values of several new tokens, where H is at most 128."""
    new, g, h = q.shape[1], q.shape[3], q.shape[4]
    if new * g > MOST_QUERIES:
        return f"more than {MOST_QUERIES} queries of a kv head"
    if not 0 < h * q.itemsize <= MOST_HEAD or h % 2 or new > 1 and h > 128:
        return f"heads of {h} {str(q.dtype)[6:]}"
    if len({x.dtype for x in (q, k, v, keys, values)}) > 1 or q.dtype not in FLOATS:
        return "q, k, v and the cache are not of one dtype of 16 or 32 bits"
    return None if angles.dtype == torch.float32 else f"the angles are {str(angles.dtype)[6:]}"


def refuses_turned(q: Tensor, k: Tensor, v: Tensor, angles: Tensor, keys: Tensor, values: Tensor,
                   start: Tensor) -> str | None:
    """Why `rope_into_cache` takes none of these sizes and dtypes; None where it does."""
    heads, g, h = q.shape[2:]
    if h % 2 or not 0 < heads * g * h <= MOST_TURNED:
        return f"{heads * g} heads of {h}"
    if len({x.dtype for x in (q, k, v, keys, values)}) > 1 or q.dtype not in FLOATS:
        return "q, k, v and the cache are not of one dtype of 16 or 32 bits"
    return None if angles.dtype == torch.float32 else f"the angles are {str(angles.dtype)[6:]}"


def turns_cached(q: Tensor, k: Tensor, v: Tensor, angles: Tensor, keys: Tensor, values: Tensor,
                 start: Tensor) -> bool:
    """Whether kernels take these as they lie, of whatever device: without a derivative."""
    from shardlib.triton_kernels.cached_attention import dense
    (rows, new, heads, _, h), cache = q.shape, keys.shape
    return (all(map(dense, (q, k, v))) and k.shape == v.shape == (rows, new, heads, h)
            and angles.shape == (rows, new, h)
            and cache == values.shape == (rows, cache[1], heads, h) and start.shape == (rows,)
            and angles.is_contiguous() and start.is_contiguous()
            and keys.stride() == values.stride() and keys.stride(-1) == 1
            and not differentiated(q, k, v, angles, keys, values))


def attends_cached(q: Tensor, k: Tensor, v: Tensor, angles: Tensor, keys: Tensor, values: Tensor,
                   start: Tensor) -> bool:
    """Whether `attend_cached` takes these as they lie: on a GPU, without a derivative."""
    return (has_room(q.device) and refuses_cached(q, k, v, angles, keys, values, start) is None
            and turns_cached(q, k, v, angles, keys, values, start))


def attend_cached(q: Tensor, k: Tensor, v: Tensor, angles: Tensor, keys: Tensor, values: Tensor,
                  start: Tensor, counts: Tensor | None) -> Tensor:
    """`cached_attention`, split as fits; without counts, not at all."""
    from shardlib.triton_kernels.cached_attention import cached_attention
    splits = 1 if counts is None else splits_of(keys.shape[0] * keys.shape[2], keys.shape[1])
    launched = _launched(q.dtype)
    if q.itemsize == 2 and q.shape[1] == 1 and q.shape[-1] <= 128 and len(q) * q.shape[2] <= FEW_HEADS:
        launched = dict(block=256, warps=8, stages=2)
    return cached_attention(q, k, v, angles, keys, values, start, counts, splits, **launched,
                            early=starts_early(q.device, len(q)))


def choose_few(x: Tensor, counts: Tensor | None) -> Tensor:
    """`row_argmax` of the last dim, by some 256 blocks; by one a row without counts, or for many rows."""
    from shardlib.triton_kernels.row_argmax import row_argmax
    rows = x.numel() // x.shape[-1]
    parts = 256 // max(1, rows) if counts is not None and rows <= COUNTS else 1
    made = row_argmax(x.contiguous().view(rows, -1), counts, max(1, parts), starts_early(x.device, rows))
    return made.view(x.shape[:-1])
