"""Kernels that start before the one before them on the stream has ended: programmatic dependent launch, on
Hopper and later.

A kernel that is launched `early` (`Grid`) starts once every block of the one before has allowed it, or ended.
Then its blocks are there, and wait: each begins with

    await_before(EARLY)                 the kernel before has ended, and all that it wrote is seen

and only then reads and writes. Later comes

    let_next_start(EARLY)               the next kernel may start, once all blocks have come here

at once in kernels that wait themselves, for other ranks or for one load after another; in those that keep the
memory busy when they have read all.

Why nothing else has to be shown. A kernel has ended when all its blocks have, and each of them has waited for
the end of the kernel before: so after the wait every earlier kernel of the stream has ended, not the last one
alone, and whatever a kernel reads, writes, pushes, polls or clears it does as if they ran one after another.
A kernel that is launched otherwise, a library's, waits for the whole of the one before it; it lets the next
one start when it ends.

No kernel keeps an earlier one from running: all blocks of that have begun. But blocks that wait hold their
place on the GPU, so two streams of such kernels that wait for other ranks could wait for each other: at most
one may run at a time.
"""
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def await_before(EARLY: tl.constexpr):
    """Waits for the end of the kernel before, and with it of all before that one."""
    if EARLY:
        gdc_wait()


@triton.jit
def let_next_start(EARLY: tl.constexpr):
    """Not before `await_before`: one kernel waits at a time."""
    if EARLY:
        gdc_launch_dependents()
