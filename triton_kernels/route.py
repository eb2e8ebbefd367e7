"""Which experts tokens go to, in one kernel: of softmax(logits) the J largest, the first among equals, NaN
larger than all; their weights add up to `scale` where they are renormalised.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shardlib.triton_kernels.early import await_before, let_next_start
from shardlib.triton_kernels.launching import Grid, launch

SMALL = tl.constexpr(1e-20)     # beside a sum of scores, that none is divided by 0


def route_reference(logits: Tensor, top_k: int, renormalise: bool = True,
                    scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """(weights, experts) of logits, (tokens, experts)."""
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
    experts = torch.sort(scores, dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights = scores.gather(-1, experts)
    total = weights.sum(-1, keepdim=True) + SMALL.value if renormalise else 1.0
    return weights / total * scale, experts


@triton.jit(do_not_specialize=["tokens", "E"])
def route_kernel(logits_ptr, weights_ptr, experts_ptr, tokens, E, scale, J: tl.constexpr,
                 RENORMALISE: tl.constexpr, EXPERTS: tl.constexpr, CHOICES: tl.constexpr, ROWS: tl.constexpr,
                 EARLY: tl.constexpr):
    """A block has ROWS tokens."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    e, choice = tl.arange(0, EXPERTS), tl.arange(0, CHOICES)
    await_before(EARLY)
    x = tl.load(logits_ptr + row[:, None] * E + e[None, :], mask=(row < tokens)[:, None] & (e < E)[None, :],
                other=float("-inf")).to(tl.float32)
    let_next_start(EARLY)
    odds = tl.exp(x - tl.max(x, 1)[:, None])
    scores = odds / tl.sum(odds, 1)[:, None]
    left = tl.where((e < E)[None, :], tl.where(scores != scores, float("inf"), scores), -1.0)
    weights, experts = tl.zeros((ROWS, CHOICES), tl.float32), tl.zeros((ROWS, CHOICES), tl.int32)
    for j in tl.static_range(J):
        best = tl.argmax(left, 1)
        taken = e[None, :] == best[:, None]
        weights = tl.where((choice == j)[None, :], tl.sum(tl.where(taken, scores, 0), 1)[:, None], weights)
        experts = tl.where((choice == j)[None, :], best[:, None], experts)
        left = tl.where(taken, -1.0, left)
    if RENORMALISE:
        weights = weights / (tl.sum(weights, 1)[:, None] + SMALL)
    at, there = row[:, None] * J + choice[None, :], (row < tokens)[:, None] & (choice < J)[None, :]
    tl.store(weights_ptr + at, weights * scale, mask=there)
    tl.store(experts_ptr + at, experts.to(tl.int64), mask=there)


def route(logits: Tensor, top_k: int, renormalise: bool = True, scale: float = 1.0,
          early: bool = False) -> tuple[Tensor, Tensor]:
    """(weights, float32, and experts, int64), (tokens, top_k). logits: (tokens, experts), contiguous, of
    16 or 32 bits. early: see `early`."""
    tokens, experts = logits.shape
    assert logits.is_contiguous() and 0 < top_k <= experts and logits.dtype.itemsize <= 4
    weights = torch.empty((tokens, top_k), dtype=torch.float32, device=logits.device)
    chosen = torch.empty((tokens, top_k), dtype=torch.int64, device=logits.device)
    wide = triton.next_power_of_2(experts)
    constants = dict(J=top_k, RENORMALISE=renormalise, EXPERTS=wide, CHOICES=triton.next_power_of_2(top_k),
                     ROWS=max(1, 32 // wide))
    if tokens:
        launch(route_kernel, (logits.dtype, logits.device, *constants.values(), logits.data_ptr() % 16),
               Grid(triton.cdiv(tokens, constants["ROWS"]), 1, early=early),
               (logits, weights, chosen, tokens, experts, scale), lambda: constants,
               logits.device.type == "cpu")
    return weights, chosen
