"""The end of a step of generation in one kernel: the tokens that were chosen become those that are fed next.

A row that lives goes on by one position; it ends with the first token that is one of `ends`, which is fed no
more: a row that does not live keeps its token and its position.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shardlib.triton_kernels.early import await_before, let_next_start
from shardlib.triton_kernels.launching import Grid, launch

ROWS = 32


def follow_reference(chosen: Tensor, ids: Tensor, position: Tensor, live: Tensor,
                     ends: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, position, live) afterwards."""
    going = live & (chosen[:, None] != ends).all(-1)
    return torch.where(going, chosen, ids), position + live, going


@triton.jit(do_not_specialize=["rows", "count"])
def follow_kernel(chosen_ptr, tokens_ptr, ids_ptr, position_ptr, live_ptr, ends_ptr, rows, count,
                  ROWS: tl.constexpr, ENDS: tl.constexpr, EARLY: tl.constexpr):
    """ENDS: a power of two that has room for the `count` ends."""
    await_before(EARLY)
    let_next_start(EARLY)
    row, i = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, ENDS)
    there = row < rows
    chosen = tl.load(chosen_ptr + row, mask=there, other=0)
    live = tl.load(live_ptr + row, mask=there, other=0) != 0
    position = tl.load(position_ptr + row, mask=there, other=0)
    ends = tl.load(ends_ptr + i, mask=i < count, other=0)
    met = tl.max(((chosen[:, None] == ends[None, :]) & (i < count)[None, :]).to(tl.int32), 1) != 0
    tl.store(tokens_ptr + row, chosen, mask=there)
    tl.store(position_ptr + row, position + 1, mask=there & live)
    tl.store(ids_ptr + row, chosen, mask=there & live & (met == 0))
    tl.store(live_ptr + row, (live & (met == 0)).to(live_ptr.dtype.element_ty), mask=there)


def follow(chosen: Tensor, tokens: Tensor, ids: Tensor, position: Tensor, live: Tensor, ends: Tensor,
           early: bool = False) -> None:
    """Writes `chosen` to tokens, and ids, position and live as `follow_reference` gives them.

    All (rows,) and contiguous, of int64, `live` of bool; ends: (ends,), int64.
    """
    state = (chosen, tokens, ids, position, ends)
    assert all(x.dtype == torch.int64 and x.is_contiguous() for x in state) and live.is_contiguous()
    assert chosen.shape == tokens.shape == ids.shape == position.shape == live.shape
    if len(chosen):
        wide, flags = triton.next_power_of_2(max(1, len(ends))), live.view(torch.uint8)
        launch(follow_kernel, (chosen.device, wide, *(x.data_ptr() % 16 for x in (*state, flags))),
               Grid(triton.cdiv(len(chosen), ROWS), 1, early=early),
               (chosen, tokens, ids, position, flags, ends, len(chosen), len(ends)),
               lambda: dict(ROWS=ROWS, ENDS=wide), chosen.device.type == "cpu")
