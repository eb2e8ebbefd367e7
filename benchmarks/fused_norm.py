"""all_reduce + residual add + rms_norm between GPUs of one host:
one kernel beside a collective and a norm, in one run, by graph replay.

    torchrun --nproc-per-node 4 benchmarks/fused_norm.py          on the GPUs: writes results/fused_norm.json
    torchrun --nproc-per-node 4 benchmarks/fused_norm.py sweep    every grid: what `grid_of_rows` in
                                                                  shardlib/ops/nvlink_grids.py is taken from

A figure is the median over rounds of the slowest rank's µs a call, of 20 calls one after another in a CUDA
graph, bf16. The peers are torch's all_reduces, their input in symmetric memory already, each with our own
kernel of add + norm behind it, which is faster than F.rms_norm. The floor is that of an all_reduce, as in
collectives.py. RECORDED are figures of other libraries, measured before on 4 H200.
"""
from __future__ import annotations

import os
import sys
from collections.abc import Callable
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from collectives import floor
from record import row, write

from shardlib import Mesh
from shardlib.distributed import connect
from shardlib.distributed.calibrate import time_on_gpu
from shardlib.ops.nvlink import nvlink
from shardlib.ops.nvlink_grids import grid_of_rows, row_grid
from shardlib.triton_kernels.all_reduce_add_rms_norm import all_reduce_add_rms_norm
from shardlib.triton_kernels.rms_norm import add_rms_norm

ROWS, WIDTHS, CALLS, EPS = (1, 8, 32, 64, 128), (8192, 4096), 20, 1e-5
RECORDED = {
    "TRT-LLM (flashinfer 0.6.13)": {(1, 8192): 5.3, (8, 8192): 6.5, (32, 8192): 10.2, (128, 8192): 25.0,
                                    (1, 4096): 4.7, (8, 4096): 5.5, (32, 4096): 7.5, (128, 4096): 13.9},
    "vLLM custom all_reduce + norm": {(1, 8192): 7.5, (8, 8192): 8.5, (32, 8192): 13.8, (128, 8192): 21.7,
                                      (1, 4096): 6.6, (8, 4096): 7.5, (32, 4096): 9.4, (128, 4096): 14.6}}


def tensors(group: Any, rows: int, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return tuple(torch.randn(shape, device=group.device, dtype=torch.bfloat16)
                 for shape in ((rows, width), (rows, width), (width,)))


def contestants(group: Any, rows: int, width: int) -> dict[str, Callable[[], Any]]:
    import torch.distributed._symmetric_memory as symmetric_memory
    x, old, w = tensors(group, rows, width)
    made, pg = group.communicators[0], group.device_group
    buffer = symmetric_memory.empty(x.shape, dtype=x.dtype, device=x.device)
    symmetric_memory.rendezvous(buffer, pg)
    buffer.copy_(x)
    flat, where = buffer.view(-1), pg.group_name

    def nccl() -> torch.Tensor:
        dist.all_reduce(x, group=pg)
        return x

    def two_shot() -> torch.Tensor:
        torch.ops.symm_mem.two_shot_all_reduce_(flat, "sum", where)
        return buffer
    return {"ours": lambda: made.all_reduce_add_rms_norm(x, old, w, EPS),
            "our all_reduce + norm": lambda: add_rms_norm(made.all_reduce(x.view(-1), "sum").view(x.shape),
                                                          old, w, EPS),
            "NCCL + F.rms_norm": lambda: F.rms_norm(old + nccl(), (width,), w, EPS),
            "NCCL + norm": lambda: add_rms_norm(nccl(), old, w, EPS),
            "torch one-shot + norm": lambda: add_rms_norm(
                torch.ops.symm_mem.one_shot_all_reduce(flat, "sum", where).view(x.shape), old, w, EPS),
            "torch two-shot + norm": lambda: add_rms_norm(two_shot(), old, w, EPS)}


def sweep(group: Any) -> None:
    """Of all grids that leave room for a second channel."""
    for rows, width in product((*ROWS[:3], 16, *ROWS[3:]), WIDTHS):
        x, old, w = tensors(group, rows, width)
        workspace, us = group.communicators[0]._workspace(), {}
        for shots, split in product((1, 2), (1, 2, 4, 8)):
            grid = row_grid(rows, width // 8 // (1 if shots == 1 else group.world_size), split,
                            group.world_size, shots)
            for warps in {grid.warps, max(1, grid.warps // 2)} if split == 1 else {grid.warps}:
                us[shots, split, warps] = time_on_gpu(lambda: all_reduce_add_rms_norm(
                    x, old, w, EPS, workspace, grid._replace(warps=warps), split, shots),
                                                      group, CALLS, capturing=True)
        if group.rank == 0:
            print(f"{rows} x {width}, now {grid_of_rows(rows, width // 8, group.world_size)}: (shots, split, "
                  "warps) "
                  + "  ".join(f"{c} {us[c]:.2f}" for c in sorted(us, key=us.get)[:9]), flush=True)


def measure(group: Any) -> list[dict]:
    rows_ = []
    for rows, width in product(ROWS, WIDTHS):
        us = {who: time_on_gpu(call, group, CALLS, capturing=True)
              for who, call in contestants(group, rows, width).items()}
        least = floor("all_reduce", group.world_size, rows * width * 2)
        rows_.append(row(f"{rows} x {width}, {group.world_size} GPUs", "µs", us.pop("ours"), us, least)
                     | {"readme": width == WIDTHS[0],
                        "recorded on 4 H200": {who: known[rows, width] for who, known in RECORDED.items()
                                               if (rows, width) in known}})
    return rows_


def main(sweeps: bool) -> None:
    with connect(Mesh(tp=int(os.environ["WORLD_SIZE"])), "cuda", communicators=(nvlink,)) as runtime:
        runtime.create_groups([("tp",)])
        group = runtime.group(("tp",))
        if sweeps:
            sweep(group)
        rows, rank = [] if sweeps else measure(group), runtime.rank
    if rank == 0 and rows:
        write("fused_norm", rows)


if __name__ == "__main__":
    if "RANK" in os.environ:
        main(sys.argv[1:] == ["sweep"])
    else:
        print("fused_norm: measured on GPUs by torchrun --nproc-per-node 4 benchmarks/fused_norm.py")
