"""What a mixture of experts does with few tokens, in two kernels that read the weights of the experts that
are hit, and nothing of the others.

The first gives silu(x @ gate) * (x @ up) of each choice of each token, the second that @ down, weighted, and
added up by token. A block has one expert and a tile of its columns, and finds the rows itself: it looks at
what all tokens chose, so that no count ever goes to the host. It takes so many rows at a time as the number
of tokens says, never as many as there are: then a row's bits do not depend on the others; those that are
not there are not loaded. Products are added up in float32; of `down`, each choice has its own sums, which the
last block of a tile adds up in the order of the choices.

Experts of other ranks are none of these: `first` is the number of the first one here.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from shardlib.triton_kernels.early import await_before, let_next_start
from shardlib.triton_kernels.launching import Grid, launch
from shardlib.triton_kernels.limits import MOST_TOKENS, Tile
from shardlib.triton_kernels.splits import last_to_leave


def expert_ffn_reference(x: Tensor, chosen: Tensor, weights: Tensor, gate: Tensor, up: Tensor, down: Tensor,
                         first: int = 0) -> Tensor:
    """(tokens, D) of x, as wide; chosen and weights: (tokens, J); gate, up: (experts, D, F); down: (experts,
    F, D)."""
    total = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
    for e in range(len(gate)):
        here = (weights * (chosen == first + e)).sum(1, keepdim=True)
        total = total + here * (F.silu(x @ gate[e]) * (x @ up[e]) @ down[e])
    return total.to(x.dtype)


@triton.jit
def _rows_of(chosen_ptr, expert, tokens, J: tl.constexpr, TOKENS: tl.constexpr, CHOICES: tl.constexpr):
    """Of an expert: how many tokens chose it; and of each token whether it did, after how many others, and
    the number of that choice."""
    token, choice = tl.arange(0, TOKENS), tl.arange(0, CHOICES)
    chosen = tl.load(chosen_ptr + token[:, None] * J + choice[None, :],
                     mask=(token < tokens)[:, None] & (choice < J)[None, :], other=-1)
    at = tl.min(tl.where(chosen == expert, choice[None, :], CHOICES), 1)
    hit = (at < CHOICES).to(tl.int32)
    return tl.sum(hit, 0), hit, tl.cumsum(hit, 0) - hit, token * J + tl.minimum(at, J - 1)


@triton.jit
def _at_rows(begin, hit, place, pair, ROWS: tl.constexpr):
    """The choices that have the rows from `begin` on; 0 where there is no such row."""
    row = begin + tl.arange(0, ROWS)
    return tl.sum(tl.where((place[None, :] == row[:, None]) & (hit[None, :] != 0), pair[None, :], 0), 1)


@triton.jit
def _load(ptr, kept, WHOLE: tl.constexpr):
    if WHOLE:
        return tl.load(ptr)
    else:
        return tl.load(ptr, mask=kept, other=0)


@triton.jit
def _load_rows(ptr, there, left, WHOLE: tl.constexpr):
    if WHOLE:
        return tl.load(ptr, mask=there, other=0)
    else:
        return tl.load(ptr, mask=there & left, other=0)


@triton.jit(do_not_specialize=["tokens", "first", "tiles"])
def expert_gate_up_kernel(x_ptr, chosen_ptr, gate_ptr, up_ptr, out_ptr, tokens, first, tiles, K, N,
                          expert_stride, line_stride, column_stride, J: tl.constexpr, TOKENS: tl.constexpr,
                          CHOICES: tl.constexpr, ROWS: tl.constexpr, WHOLE: tl.constexpr,
                          COLUMNS: tl.constexpr, LINES: tl.constexpr, STAGES: tl.constexpr,
                          EARLY: tl.constexpr):
    """out: a row of N for each choice. WHOLE: LINES divides K, and COLUMNS N."""
    expert, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    await_before(EARLY)
    count, hit, place, pair = _rows_of(chosen_ptr, first + expert, tokens, J, TOKENS, CHOICES)
    column, line = tile * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, LINES)
    at = expert.to(tl.int64) * expert_stride + column[:, None] * column_stride + line[None, :] * line_stride
    kept = (column < N)[:, None]
    for begin in range(0, count, ROWS):
        row, there = _at_rows(begin, hit, place, pair, ROWS), begin + tl.arange(0, ROWS) < count
        x = x_ptr + (row // J)[None, :] * K + line[:, None]
        gates, ups = tl.zeros((COLUMNS, ROWS), tl.float32), tl.zeros((COLUMNS, ROWS), tl.float32)
        for start in tl.range(0, K, LINES, num_stages=STAGES):
            left = kept & (start + line < K)[None, :]
            xs = _load_rows(x + start, there[None, :], (start + line < K)[:, None], WHOLE)
            gates = tl.dot(_load(gate_ptr + at + start * line_stride, left, WHOLE), xs, gates)
            ups = tl.dot(_load(up_ptr + at + start * line_stride, left, WHOLE), xs, ups)
        y = gates / (1 + tl.exp(-gates)) * ups
        tl.store(out_ptr + row[None, :] * N + column[:, None], y.to(out_ptr.dtype.element_ty),
                 mask=there[None, :] & kept)
    let_next_start(EARLY)


@triton.jit(do_not_specialize=["tokens", "first", "experts"])
def expert_down_kernel(h_ptr, chosen_ptr, weights_ptr, down_ptr, out_ptr, parts_ptr, counts_ptr, tokens,
                       first, experts, K, N, expert_stride, line_stride, column_stride, J: tl.constexpr,
                       TOKENS: tl.constexpr, CHOICES: tl.constexpr, ROWS: tl.constexpr, WHOLE: tl.constexpr,
                       COLUMNS: tl.constexpr, LINES: tl.constexpr, STAGES: tl.constexpr, SPLITS: tl.constexpr,
                       SUMS: tl.constexpr, EARLY: tl.constexpr):
    """parts: float32, (SPLITS, choices, N), what each choice has of each split of the lines. SUMS: tokens
    whose choices the last block adds up at a time."""
    tile, share = tl.program_id(0) // (experts * SPLITS), tl.program_id(0) % (experts * SPLITS)
    expert, split = share // SPLITS, share % SPLITS
    await_before(EARLY)
    count, hit, place, pair = _rows_of(chosen_ptr, first + expert, tokens, J, TOKENS, CHOICES)
    column, line = tile * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, LINES)
    at = expert.to(tl.int64) * expert_stride + column[:, None] * column_stride + line[None, :] * line_stride
    each, kept = tl.cdiv(tl.cdiv(K, SPLITS), LINES) * LINES, (column < N)[:, None]
    end = tl.minimum(split * each + each, K)
    for begin in range(0, count, ROWS):
        row, there = _at_rows(begin, hit, place, pair, ROWS), begin + tl.arange(0, ROWS) < count
        h = h_ptr + row[None, :] * K + line[:, None]
        y = tl.zeros((COLUMNS, ROWS), tl.float32)
        for start in tl.range(split * each, end, LINES, num_stages=STAGES):
            left = (start + line < K)[None, :]
            hs = _load_rows(h + start, there[None, :], (start + line < K)[:, None], WHOLE)
            y = tl.dot(_load(down_ptr + at + start * line_stride, left & kept, WHOLE), hs, y)
        tl.store(parts_ptr + (split * tokens * J + row)[None, :] * N + column[:, None], y,
                 mask=there[None, :] & kept)
    let_next_start(EARLY)
    if last_to_leave(counts_ptr + tile, experts * SPLITS):
        for begin in range(0, tokens, SUMS):
            token, total = begin + tl.arange(0, SUMS), tl.zeros((SUMS, COLUMNS), tl.float32)
            for j in tl.static_range(J):
                own = tl.load(chosen_ptr + token * J + j, mask=token < tokens, other=-1) - first
                weight = tl.load(weights_ptr + token * J + j, mask=token < tokens, other=0)
                mine = ((own >= 0) & (own < experts))[:, None] & (column < N)[None, :]
                y = tl.zeros((SUMS, COLUMNS), tl.float32)
                for s in tl.static_range(SPLITS):
                    y += tl.load(parts_ptr + (s * tokens * J + token * J + j)[:, None] * N + column[None, :],
                                 mask=mine, other=0)
                total += weight[:, None] * y
            tl.store(out_ptr + token[:, None] * N + column[None, :], total.to(out_ptr.dtype.element_ty),
                     mask=(token < tokens)[:, None] & (column < N)[None, :])


def expert_ffn(x: Tensor, chosen: Tensor, weights: Tensor, gate: Tensor, up: Tensor, down: Tensor, first: int,
               tiles: tuple[Tile, Tile], counts: Tensor, early: bool = False) -> Tensor:
    """As the reference; of up to MOST_TOKENS tokens, in bfloat16 or float16, weights in float32.

    x, chosen (int64) and weights are contiguous; gate and up lie alike, by lines or by columns, and so does
    down. tiles: of gate and up, and of down, whose splits share its lines.  counts: int32 zeros, one for each
    tile of down, that no kernel on another stream uses meanwhile. early: see `early`.
    """
    (tokens, d), (experts, _, f), j = x.shape, gate.shape, chosen.shape[1]
    assert (0 < tokens <= MOST_TOKENS and experts and d and f and j and up.shape == gate.shape
            and down.shape == (experts, f, d) and gate.stride() == up.stride()
            and all(t.is_contiguous() for t in (x, chosen, weights)) and weights.dtype == torch.float32
            and x.dtype == gate.dtype == up.dtype == down.dtype and x.dtype.itemsize == 2
            and counts.numel() >= triton.cdiv(d, tiles[1].columns))
    h, out = x.new_empty(tokens * j, f), torch.empty_like(x)
    parts = x.new_empty(tiles[1].splits * tokens * j * d, dtype=torch.float32)
    sizes = dict(J=j, TOKENS=triton.next_power_of_2(tokens), CHOICES=triton.next_power_of_2(j))
    count = triton.cdiv(f, tiles[0].columns)
    _launch(expert_gate_up_kernel, (x, chosen, gate, up, h), (tokens, first, count), count * experts, d, f,
            sizes, tiles[0], early)
    _launch(expert_down_kernel, (h, chosen, weights, down, out, parts, counts), (tokens, first, experts),
            triton.cdiv(d, tiles[1].columns) * experts * tiles[1].splits, f, d,
            sizes | dict(SPLITS=tiles[1].splits, SUMS=min(16, sizes["TOKENS"])), tiles[1], early)
    return out


def rows_at_once(tokens: int) -> int:
    """That a block multiplies, of so many tokens, a power of two: an expert that more than half of them chose
    is read twice."""
    return max(8, tokens // 2)


def _launch(kernel: object, tensors: tuple[Tensor, ...], numbers: tuple[int, ...], blocks: int, lines: int,
            columns: int, sizes: dict[str, int], tile: Tile, early: bool) -> None:
    x, w = tensors[0], tensors[2 if len(tensors) == 5 else 3]
    constants = sizes | dict(ROWS=rows_at_once(sizes["TOKENS"]), COLUMNS=tile.columns, LINES=tile.lines,
                             STAGES=tile.stages,
                             WHOLE=lines % (tile.lines * tile.splits) == columns % tile.columns == 0)
    key = (x.dtype, x.device, *constants.values(), *(n % 16 for n in (lines, columns)),
           *((n % 16 == 0, n == 1, n < 2**31) for n in w.stride()), *(t.data_ptr() % 16 for t in tensors))
    launch(kernel, key, Grid(blocks, tile.warps, early=early),
           (*tensors, *numbers, lines, columns, *w.stride()), lambda: constants, x.device.type == "cpu")
