"""What kernels of few rows take at most, and how a matmul is tiled: known where Triton is not."""
from __future__ import annotations

from typing import NamedTuple

MOST_ROWS = 128
"""Of a matmul."""
MOST_TOKENS = 128
"""Of experts' kernels."""
MOST_EXPERTS = 128
"""Of a rank whose rows are exchanged."""
MOST_QUERIES = 64
"""Of attention, rows of a product: T times the queries of one kv head."""
MOST_SPLITS = 64
MOST_WIDTH = 1 << 16
"""Of a row that is normed."""


class Tile(NamedTuple):
    """What a block of a matmul does: columns of w at a time, lines of them at once; warps of it; steps whose
    loads are under way (unrolled, where the tensor cores have no part). splits: blocks that share those
    columns, where the tensor cores have one. blocks: of an SM, each of which goes through many such
    columns, all their lines at once; 0 where a block has one."""
    columns: int
    lines: int
    warps: int
    stages: int
    splits: int = 1
    blocks: int = 0
