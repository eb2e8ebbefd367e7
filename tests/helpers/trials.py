"""Calls of the kernels between GPUs with data that is easy to get wrong,
on workspaces in the memory of the CPU."""
from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from shardlib.ops.expert_rows import combined
from shardlib.triton_kernels.all_reduce import all_reduce_reference, one_shot, two_shot
from shardlib.triton_kernels.all_reduce_add_rms_norm import all_reduce_add_rms_norm, filled_bytes
from shardlib.triton_kernels.exchange import (
    all_gather,
    all_gather_reference,
    all_to_all,
    all_to_all_reference,
)
from shardlib.triton_kernels.exchange import slot_bytes as moved_bytes
from shardlib.triton_kernels.expert_exchange import (
    combine_rows,
    combine_rows_reference,
    dispatch_rows,
    dispatch_rows_reference,
)
from shardlib.triton_kernels.expert_exchange import slot_bytes as exchanged_bytes
from shardlib.triton_kernels.expert_places import expert_places_reference
from shardlib.triton_kernels.lamport import EMPTY, SLOTS, STATE_WORDS
from shardlib.triton_kernels.launching import Grid
from shardlib.triton_kernels.reduce_scatter import reduce_scatter, reduce_scatter_reference
from shardlib.triton_kernels.split_argmax import filled_bytes as chosen_bytes
from shardlib.triton_kernels.split_argmax import split_argmax, split_argmax_reference
from shardlib.triton_kernels.workspace import Workspace

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SUMS, MOVES, NORMS = (("one_shot", "two_shot", "reduce_scatter"), ("all_gather", "all_to_all"),
                      ("norm", "two_shot_norm"))
CHOICES, EXPERTS = ("split_argmax",), ("dispatch_rows", "combine_rows")
FAMILIES = {"sums": SUMS, "moves": MOVES, "norms": NORMS, "choices": CHOICES, "experts": EXPERTS,
            "all": SUMS + MOVES + NORMS + CHOICES + EXPERTS}
EPS = 1e-5
WARPS = (1, 1, 2)
GUARD = 64
"""Words behind an arena that nobody may write."""
UNTOUCHED = 0x5EA1ED00


class Routed(NamedTuple):
    """What the tokens of all ranks choose; places: of each rank, (at, place, ends)."""
    chosen: Tensor
    weights: Tensor
    experts: int
    most: int
    places: list[tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class Call:
    """One collective of all ranks. inner: quads of 16 bytes that lie side by side; outer: how often; line:
    quads of a line, where data is moved; warps: of a block; split: blocks that share a row, where there is a
    norm."""
    kernel: str
    dtype: torch.dtype
    outer: int
    inner: int
    blocks: int
    line: int = 32
    warps: int = 1
    split: int = 4

    def slot_bytes(self, world: int) -> int:
        """What a slot must hold."""
        quads = self.outer * self.inner
        if self.kernel in MOVES:
            return moved_bytes(quads, world, self.line)
        if self.kernel in CHOICES:
            return chosen_bytes(self.outer, world)
        if self.kernel in EXPERTS:
            return exchanged_bytes(self.outer, 16 * self.inner, world, Grid(self.blocks, self.warps))
        if self.kernel in NORMS:
            return filled_bytes(self.outer, 16 * self.inner, world, self.split, self.shots(world))
        return (world - 1) * 16 * (2 * -(-quads // world) if self.kernel == "two_shot" else quads)

    def shape(self, world: int) -> tuple[int, ...]:
        inner = self.inner * 16 // self.dtype.itemsize
        return {"reduce_scatter": (self.outer, world, inner), "all_gather": (self.outer, inner),
                "all_to_all": (world, self.outer * inner), "norm": (self.outer, inner),
                "two_shot_norm": (self.outer, inner), "dispatch_rows": (self.outer, inner),
                "combine_rows": (self.routed(world).most, inner) if self.kernel == "combine_rows" else (),
                "split_argmax": (self.outer, inner)}.get(self.kernel, (self.outer * inner,))

    def shots(self, world: int) -> int:
        """Of a norm."""
        return 2 if self.kernel == "two_shot_norm" and self.inner % world == 0 else 1

    def routed(self, world: int) -> Routed:
        """Of `outer` tokens of each rank, to two experts or three; at times all to those of one rank, or
        none."""
        draw = random.Random(self.inner * 7 + self.outer)
        experts, choices = draw.choice(((1, 2), (2, 2), (3, 3))) if world > 2 else (2, 2)
        tokens, all_experts = self.outer * world, experts * world
        only = draw.choice((None, None, 0, world - 1, -1))
        g = torch.Generator().manual_seed(self.inner)
        chosen = torch.rand(tokens, all_experts, generator=g).topk(choices).indices
        if only is not None:
            chosen = only * experts + torch.arange(choices).expand(tokens, choices) % max(experts, 1)
            chosen = torch.where(torch.arange(choices) < experts, chosen, -1) if only >= 0 else chosen * 0 - 1
        most = tokens * min(choices, experts)
        places = [expert_places_reference(chosen, r * experts, experts, most) for r in range(world)]
        return Routed(chosen, torch.rand(tokens, choices, generator=g), experts, most, places)

    def token_run(self) -> int:
        """How many tokens of a rank lie side by side among all ranks'."""
        return 1 if self.outer % 2 == 0 else self.outer

    def exchanged(self, x: Tensor, workspace: Workspace, grid: Grid) -> Tensor:
        """Of rows there, what means something."""
        routed, rank = self.routed(workspace.size), workspace.rank
        _, place, ends = routed.places[rank]
        if self.kernel == "combine_rows":
            return combine_rows(x, place, routed.weights, self.token_run(), workspace, grid)
        rows = dispatch_rows(x, routed.chosen, place, routed.experts, routed.most, self.token_run(),
                             workspace, grid)
        rows[int(ends[-1]):] = 0
        return rows

    def wanted_rows(self, xs: list[Tensor], rank: int) -> Tensor:
        routed = self.routed(len(xs))
        if self.kernel == "dispatch_rows":
            return dispatch_rows_reference(xs, routed.chosen, routed.places[rank][1], rank * routed.experts,
                                           routed.experts, routed.most, self.token_run())
        tokens, choices = routed.chosen.shape
        sums = [combined(x, at, routed.experts, tokens, choices, (tokens, x.shape[1]), routed.weights)
                for x, (at, _, _) in zip(xs, routed.places)]
        return combine_rows_reference(sums, rank, self.token_run())

    def replicated(self) -> tuple[Tensor, Tensor]:
        """The residual and the weight of a norm."""
        generator = torch.Generator().manual_seed(self.inner)
        residual, weight = (torch.randn(shape, generator=generator).to(self.dtype)
                            for shape in (self.shape(1), self.shape(1)[-1:]))
        return residual, weight

    def run(self, x: Tensor, workspace: Workspace) -> Tensor | tuple[Tensor, Tensor]:
        grid = Grid(self.blocks * self.split, self.warps)
        if self.kernel in EXPERTS:
            return self.exchanged(x, workspace, grid._replace(blocks=self.blocks))
        if self.kernel in CHOICES:
            return split_argmax(x, workspace, grid._replace(blocks=self.blocks))
        if self.kernel in NORMS:
            return all_reduce_add_rms_norm(x, *self.replicated(), EPS, workspace, grid, self.split,
                                           self.shots(workspace.size))
        if self.kernel in MOVES:
            return {"all_gather": all_gather,
                    "all_to_all": all_to_all}[self.kernel](x, workspace, grid, self.line)
        return {"one_shot": one_shot, "two_shot": two_shot,
                "reduce_scatter": reduce_scatter}[self.kernel](x, workspace, grid)

    def want(self, xs: list[Tensor], rank: int) -> Tensor | tuple[Tensor, Tensor]:
        if self.kernel in ("one_shot", "two_shot"):
            return all_reduce_reference(xs)
        if self.kernel == "all_gather":
            return all_gather_reference(xs)
        if self.kernel in CHOICES:
            return split_argmax_reference(xs)
        if self.kernel in EXPERTS:
            return self.wanted_rows(xs, rank)
        if self.kernel in NORMS:
            residual, weight = self.replicated()
            total = residual + all_reduce_reference(xs)
            return total, F.rms_norm(total.double(), weight.shape, weight.double(), EPS).to(self.dtype)
        return (reduce_scatter_reference(xs, rank) if self.kernel == "reduce_scatter"
                else all_to_all_reference(xs, rank))


def random_calls(family: str, draw: random.Random, count: int) -> list[Call]:
    """Lines of a part of a warp, of a warp and of a block, in blocks of one warp and of two."""
    def call() -> Call:
        kernel, dtype, outer, inner, blocks = (draw.choice(FAMILIES[family]), draw.choice(DTYPES),
                                               draw.randint(1, 3), draw.randint(1, 40), draw.randint(1, 3))
        warps = draw.choice(WARPS)
        line = draw.choice((8, 32, 32 * warps))
        if kernel in EXPERTS:
            return Call(kernel, dtype, min(outer, 2), inner if inner > 35 else 1 + inner // 5, min(blocks, 2))
        if kernel in NORMS:
            quads = 6 * (1 + inner // 21) if kernel == "two_shot_norm" else 1 + inner // 4
            return Call(kernel, dtype, min(outer, 2), quads, 1, line, warps, (1, 2, 4)[blocks - 1])
        return Call(kernel, dtype, outer, inner, blocks, line, warps)
    return [call() for _ in range(count)]


def data(calls: Sequence[Call], world: int, seed: int) -> list[list[Tensor]]:
    """For each call every rank's x: numbers of all sizes, and among them infinities, NaNs, -0.0 and, in some,
    words that equal EMPTY. Where there is a norm, those are in some rows alone: a norm of any of them says
    nothing of the rest."""
    generator = torch.Generator().manual_seed(seed)

    def x(call: Call) -> Tensor:
        values = (torch.randn(call.shape(world), generator=generator)
                  * 4.0 ** torch.randint(-6, 7, call.shape(world), generator=generator))
        special = torch.tensor([float("inf"), float("-inf"), float("nan"), -0.0])
        where = torch.randint(0, 64, values.shape, generator=generator)
        if call.kernel in NORMS:
            where[torch.rand(len(where), generator=generator) < 0.7] = 63
        words = torch.where(where < 4, special[where.clamp(max=3)], values).to(call.dtype).view(torch.int32)
        rarity = (1, 32, 512, 2**30)[int(torch.randint(0, 4, (), generator=generator))]
        words[torch.randint(0, rarity, words.shape, generator=generator) == 0] = EMPTY.value
        return words.view(call.dtype)
    return [[x(call) for _ in range(world)] for call in calls]


def workspaces(world: int, slot_bytes: int) -> list[Workspace]:
    """Every rank's, with a guard behind each arena."""
    words = SLOTS.value * slot_bytes // 4
    arenas = [torch.full((words + GUARD,), EMPTY.value, dtype=torch.int32) for _ in range(world)]
    for arena in arenas:
        arena[words:] = UNTOUCHED
    addresses = torch.tensor([a.data_ptr() for a in arenas])
    return [Workspace(r, world, addresses, arenas[r], torch.zeros(STATE_WORDS, dtype=torch.int32), slot_bytes)
            for r in range(world)]


def wrong(calls: Sequence[Call], xs: list[list[Tensor]], got: Sequence[Sequence[Any]],
          first_rank: int = 0) -> str | None:
    """What the ranks from `first_rank` on have got wrong. Moved bits are compared as such; of sums, any NaN
    is as good as another. A norm, beside the residual that has to have its bits, may be off by twice the
    rounding of its dtype."""
    for number, call in enumerate(calls):
        for rank, results in enumerate(got, first_rank):
            result, want = results[number], call.want(xs[number], rank)
            if call.kernel in NORMS:
                (result, normed), (want, exact) = result, want
                if not close(normed, exact):
                    return f"call {number}, {call}: wrong norm on rank {rank}"
            if call.kernel in SUMS + NORMS + EXPERTS:
                result, want = (torch.where(t.isnan(), float("nan"), t) for t in (result, want))
            if not torch.equal(result.view(torch.uint8), want.view(torch.uint8)):
                return f"call {number}, {call}: wrong on rank {rank}"
    return None


def close(got: Tensor, want: Tensor) -> bool:
    """Whether they differ by at most the distance between two neighbours of their dtype, four in float32:
    what it adds up has its own."""
    kind = torch.finfo(got.dtype)
    relative = (4 if got.dtype == torch.float32 else 1) * kind.eps
    return torch.allclose(got.double(), want.double(), rtol=relative, atol=kind.smallest_normal * kind.eps,
                          equal_nan=True)
