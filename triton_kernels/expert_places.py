"""Where the rows of tokens lie among the rows of one rank's experts: in the order of the experts, within one
in the order of the tokens, as `ops/expert_rows.py` numbers them. A counting sort, in one kernel: each block
counts what comes before its own choices, so that none waits for another.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shardlib.triton_kernels.launching import Grid, launch
from shardlib.triton_kernels.limits import MOST_EXPERTS

COUNTED = 16384
"""Choices times experts that a block counts at once."""


def expert_places_reference(chosen: Tensor, first: int, experts: int,
                            most: int) -> tuple[Tensor, Tensor, Tensor]:
    """(at, place, ends): see `expert_places`."""
    here, n = chosen.reshape(-1) - first, chosen.numel()
    own = (here >= 0) & (here < experts)
    numbers = torch.where(own, here * n + torch.arange(n, device=chosen.device), experts * n)
    at, order = numbers.sort()
    place = torch.full_like(order, -1).scatter(0, order, torch.arange(n, device=chosen.device))
    ends = torch.searchsorted(at, torch.arange(1, experts + 1, device=chosen.device) * n)
    return at[:most], torch.where(own, place, -1).int(), ends.int()


@triton.jit
def _experts(chosen_ptr, at, n, first, experts):
    """Of choices at ..., the own expert of each; -1 where it is another rank's, or none."""
    e = tl.load(chosen_ptr + at, mask=at < n, other=-1)
    own = (e >= first) & (e < first + experts)
    return tl.where(own, e - first, -1).to(tl.int32)


@triton.jit(do_not_specialize=["n", "first", "most", "experts"])
def expert_places_kernel(chosen_ptr, at_ptr, place_ptr, ends_ptr, n, first, most, experts,
                         LANES: tl.constexpr, EXPERTS: tl.constexpr):
    """EXPERTS: a power of two, at least `experts`. A block has LANES choices."""
    lane, expert = tl.arange(0, LANES), tl.arange(0, EXPERTS)
    own_start = tl.program_id(0) * LANES
    before, after = tl.zeros((LANES, EXPERTS), tl.int32), tl.zeros((LANES, EXPERTS), tl.int32)
    for start in range(0, own_start, LANES):
        e = _experts(chosen_ptr, start + lane, n, first, experts)
        before += (e[:, None] == expert[None, :]).to(tl.int32)
    for start in range(own_start, n, LANES):
        e = _experts(chosen_ptr, start + lane, n, first, experts)
        after += (e[:, None] == expert[None, :]).to(tl.int32)
    earlier = tl.sum(before, 0)
    total = earlier + tl.sum(after, 0)
    ends = tl.cumsum(total, 0)
    e = _experts(chosen_ptr, own_start + lane, n, first, experts)
    own = (e[:, None] == expert[None, :]).to(tl.int32)
    row = tl.sum(own * (tl.cumsum(own, 0) - own + (earlier + ends - total)[None, :]), 1)
    at = own_start + lane
    tl.store(place_ptr + at, tl.where(e >= 0, row, -1), mask=at < n)
    tl.store(at_ptr + row, e.to(tl.int64) * n + at, mask=(e >= 0) & (row < most))
    if own_start == 0:
        tl.store(ends_ptr + expert, ends, mask=expert < experts)
    for start in range(tl.sum(total, 0) + own_start, most, tl.num_programs(0) * LANES):
        tl.store(at_ptr + start + lane, tl.zeros((LANES,), tl.int64) + experts.to(tl.int64) * n,
                 mask=start + lane < most)


def expert_places(chosen: Tensor, first: int, experts: int, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """(at, place, ends) of int64 choices, contiguous: of each row, as `chosen_rows` has it, which choice it
    is, and behind the last one experts * choices; of each choice its row, -1 where the expert is another
    rank's; where the rows of each expert end. place and ends are int32. Rows from `most` on are not in `at`.
    """
    n = chosen.numel()
    assert 0 < experts <= MOST_EXPERTS and chosen.is_contiguous() and n and experts * n < 2**62
    at, place, ends = (chosen.new_empty(size, dtype=kind) for size, kind in
                       ((most, torch.int64), (n, torch.int32), (experts, torch.int32)))
    width = triton.next_power_of_2(experts)
    lanes = min(1024, COUNTED // width)
    launch(expert_places_kernel, (width, lanes, n < 2**31, chosen.device), Grid(triton.cdiv(n, lanes), 16),
           (chosen, at, place, ends, n, first, most, experts), lambda: dict(LANES=lanes, EXPERTS=width),
           chosen.device.type == "cpu")
    return at, place, ends
