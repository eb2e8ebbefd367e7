"""Work that several blocks of one GPU share: each leaves its part in memory and counts,
and the last one to do so puts all together.

Which block is the last differs from run to run; it reads the parts in their order, so results do not. The
counts are zeros again at the end: they are made once, and serve one stream. A block waits for no other, so
there may be more of them than the GPU holds.
"""
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def last_to_leave(count_ptr, splits):
    """Whether all other blocks that count here have left their parts, `splits` with this one;
    then the count is zero again."""
    tl.debug_barrier()                              # all threads of the block have stored
    last = tl.atomic_add(count_ptr, 1, sem="acq_rel", scope="gpu") == splits - 1
    tl.debug_barrier()                              # what they load now, they load after the count
    if last:
        tl.store(count_ptr, 0)
    return last
