"""How the kernels over NVLink are launched: blocks, warps and registers by size, as sweeps on GPUs have it.

    torchrun --nproc-per-node 8 benchmarks/collectives.py sweep
    torchrun --nproc-per-node 8 benchmarks/fused_norm.py sweep
"""
from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from shardlib.triton_kernels.launching import Grid

ONE_SHOT = 576 << 10
"""Bytes that a GPU sends in one shot, up to which groups of more than two add up in one: as the sweeps on 3,
4 and 8 H200 have it."""
MOST_BLOCKS, BLOCK_REGISTERS = 256, 16384
"""Blocks of a launch, and registers of a block: an SM of the H200 holds four of those, so that the kernels of
two channels are never in each other's way, nor NCCL's beside them. A kernel that waits for a peer while it
keeps another from running would wait for ever."""
WORD_A_WARP = 131072
"""Quads of a piece beyond which moved data has a word a block instead of a word a warp."""


class Launch(NamedTuple):
    """Of up to so many quads from one rank: at most so many blocks, of so many warps, whose threads have so
    many registers."""
    most: int
    blocks: int
    warps: int
    registers: int


ALL = 1 << 62
_FOUR = ((8192, 256, 1), (16384, 128, 4), (32768, 128, 8), (65536, 192, 8), (131072, 256, 8))
LAUNCHES = {
    4: ((*(Launch(*row, 32) for row in _FOUR), Launch(ALL, 256, 16, 32)),
        (*(Launch(*row, 64) for row in _FOUR), Launch(ALL, 256, 8, 64))),
    8: ((Launch(16384, 256, 1, 128), Launch(32768, 192, 4, 128), Launch(65536, 256, 4, 128),
         Launch(ALL, 256, 8, 64)),
        (Launch(1024, 256, 1, 128), Launch(8192, 64, 4, 128), Launch(65536, 192, 4, 128),
         Launch(ALL, 256, 4, 128)))}
"""Most ranks -> how sums are launched, and how what is moved: as the sweeps of 2026-11-22 on 2, 3 and 4 H200
and of 2026-11-27 on 8 have it. (128 blocks of 8 warps move 64 MB between eight 2 % faster, and spill.)"""


def launches_of(size: int) -> tuple[tuple[Launch, ...], tuple[Launch, ...]]:
    """Of sums, and of what is moved, between so many ranks."""
    return LAUNCHES[4 if size <= 4 else 8]


@lru_cache(maxsize=1024)
def grid_of(quads: int, launches: tuple[Launch, ...]) -> Grid:
    """For so many quads from each rank."""
    launch = next(launch for launch in launches if quads <= launch.most)
    return Grid(launch.blocks, launch.warps, launch.registers).over(quads)


ROW_GRIDS = ((2, 8, 1), (8, 2, 1), (1 << 30, 1, 2))
"""(most rows, blocks that share one, shots), as the sweep of benchmarks/fused_norm.py on 4 H100 has it."""
MOST_AT_ONCE = 4096
"""Quads of all rows, beyond which more than four ranks norm in two shots, as that sweep on 8 H200 has it."""


@lru_cache(maxsize=1024)
def grid_of_rows(rows: int, quads: int, size: int) -> tuple[Grid, int, int]:
    """For so many rows of so many quads, between so many ranks:
    the grid, how many blocks share a row, and how many shots."""
    split, shots = next((split, shots) for most, split, shots in ROW_GRIDS if rows <= most)
    if size > 4 and rows * quads > MOST_AT_ONCE:
        split, shots = 1, 2
    if size == 2 or quads % size:
        shots = 1
    return row_grid(rows, quads // (1 if shots == 1 else size), split, size, shots), split, shots


def row_grid(rows: int, owned: int, split: int, size: int, shots: int) -> Grid:
    """For so many rows, `split` blocks each, of so many quads that those share:
    one a thread, where there is room for as many."""
    registers = 64 if shots == 1 and size <= 4 else 128
    warps = min(2048 // registers, 1 << (-(-owned // (32 * split)) - 1).bit_length())
    most = min(MOST_BLOCKS, MOST_BLOCKS * BLOCK_REGISTERS // (32 * warps * registers))
    return Grid(min(rows, most // split) * split, warps, registers)


def grid_of_tokens(tokens: int, quads: int, size: int) -> Grid:
    """For rows of so many tokens of each rank, of so many quads each: blocks that are smaller where there
    are few, one part of a row each."""
    warps, registers = (8, 64) if size <= 4 else (4, 128)
    while warps > 1 and tokens * -(-quads // (32 * warps)) < MOST_BLOCKS // 2:
        warps //= 2
    return Grid(MOST_BLOCKS, warps, registers)
