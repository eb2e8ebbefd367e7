"""A gated feed-forward layer of experts, of few tokens, as one fused step: from the choice of experts to the
weighted sum, by kernels that read the experts that are hit, each once.

It is looked for in four forms, which `FORMS` holds: experts and their width split or whole. What a rank's
experts, or its part of their width, do not give is owed.
"""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from shardlib import EXPLICIT, sharded
from shardlib.compiler.fusion import Site
from shardlib.functions import silu
from shardlib.language.trace import Function
from shardlib.ops.experts import combine, dispatch, grouped_einsum
from shardlib.ops.few_rows import COUNTS, counts_of, differentiated, has_room, starts_early
from shardlib.triton_kernels.limits import MOST_TOKENS, Tile


def _form(name: str, e: str = "", f: str = "") -> Function:
    """Over `e` the experts are split, over `f` what is between gate and down; as in "/x"."""
    rows, owed = f"(E{e} B T)~J", "".join(f" +{axis[1:]}" for axis in (e, f) if axis)

    def expert_ffn(x, experts, weights, gate, up, down):
        moved, at = dispatch(f"B T D, B T J -> {rows} D, {rows}", x, experts)
        gate = grouped_einsum(f"{rows} D, {rows}, E{e} D F{f} -> {rows} F{f}", moved, at, gate)
        up = grouped_einsum(f"{rows} D, {rows}, E{e} D F{f} -> {rows} F{f}", moved, at, up)
        y, sums = silu(gate) * up, f" +{f[1:]}" if f else ""
        y = grouped_einsum(f"{rows} F{f}, {rows}, E{e} F{f} D -> {rows} D{sums}", y, at, down)
        return combine(f"{rows} D{sums}, {rows}, B T J -> B T D{owed}", y, at, weights)
    expert_ffn.__name__ = name
    return sharded(f"B T D, B T J, B T J, E{e} D F{f}, E{e} D F{f}, E{e} F{f} D -> B T D{owed}",
                   layout=EXPLICIT)(expert_ffn)


FORMS = (_form("expert_ffn"), _form("expert_ffn_by_experts", e="/x"), _form("expert_ffn_by_width", f="/x"),
         _form("expert_ffn_by_both", e="/x", f="/y"))


def by_few_tokens(site: Site) -> Callable | str:
    """Any of FORMS by the kernels of `expert_ffn`."""
    x, chosen, weights, gate, up, down = site.operands
    tokens, tiles = x.shape[0] * x.shape[1], tiles_of(x.shape[0] * x.shape[1], gate.shape[2])
    if site.device != "cuda":
        return f"no kernel has experts on {site.device}"
    if {t.dtype for t in (x, gate, up, down)} != {x.dtype} or x.dtype not in (torch.bfloat16, torch.float16):
        return "tokens and experts are not of one dtype of 16 bits"
    if weights.dtype != torch.float32:
        return f"the weights are {str(weights.dtype)[6:]}"
    if not 0 < tokens <= MOST_TOKENS:
        return f"{tokens} tokens, and the kernels take 1 to {MOST_TOKENS}"
    if not gate.numel() or not chosen.numel() or x.shape[2] > COUNTS * tiles[1].columns:
        return "no experts here, or none that a kernel takes"
    if not has_room(torch.device(site.device)):
        return "a block of this GPU has less shared memory than the kernels take"
    first = site.begins[3][0]

    def run(x: Tensor, chosen: Tensor, weights: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        from shardlib.triton_kernels import expert_ffn as kernels
        rows, chosen, weights = (t.reshape(tokens, -1).contiguous() for t in (x, chosen, weights))
        counts = counts_of(x.device)
        if counts is None or differentiated(x, weights, gate, up, down) or gate.stride() != up.stride():
            made = kernels.expert_ffn_reference(rows, chosen, weights, gate, up, down, first)
        else:
            made = kernels.expert_ffn(rows, chosen, weights, gate, up, down, first, tiles, counts,
                                      starts_early(x.device, tokens))
        return made.view(x.shape)
    return run


def tiles_of(tokens: int, width: int) -> tuple[Tile, Tile]:
    """Of gate and up, and of down, whose lines several blocks share; as sweeps on an H200 and an H100 have
    them (benchmarks/experts.py)."""
    if tokens == 1:
        return Tile(128, 64, 8, 3) if width > 7168 else Tile(32, 64, 4, 5), Tile(64, 64, 4, 5, splits=4)
    if tokens <= 16:
        return ((Tile(64, 64, 4, 3), Tile(64, 64, 4, 5, splits=2)) if width > 7168 else
                (Tile(128, 64, 8, 3), Tile(128, 64, 8, 4)))
    return Tile(128, 32, 8, 5), Tile(128, 64, 8, 4, splits=2 if tokens <= 32 or width > 7168 else 1)
