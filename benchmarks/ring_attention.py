"""Attention over a context that is split, forward and backward: the ring beside gathered keys, and beside
torch's context_parallel (GPUs alone, which has each rank take pieces from both ends).

    torchrun --nproc-per-node 2 benchmarks/ring_attention.py        writes results/ring_attention.json
    torchrun --nproc-per-node 2 benchmarks/ring_attention.py --times 64,128     these, printed; or on the CPU

16 heads of 128, bf16 (float32 on the CPU), causal. off: the largest difference of the ring's gradients from
those with gathered keys, of the largest element. peak: MiB above the operands.
"""
from __future__ import annotations

import argparse
import faulthandler
import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from attention import TEXT, measured, off
from record import row, write
from torch import Tensor

from shardlib import Layout, Mesh, compile, sharded, value_and_grad
from shardlib.distributed import connect
from shardlib.functions import sum
from shardlib.ops import attention

HEADS, WIDTH = 16, 128
TIMES = (16384, 32768, 65536, 131072)
LAYOUTS = {"ring": Layout(T="cp", S="cp"), "gathered keys": Layout(T="cp")}


@sharded("B T K G H, B S/cp K H, B S/cp K H, B T K G H -> ()")
def weighted(q, k, v, weight):
    return sum("B T K G H -> ()", attention(TEXT, q, k, v) * weight)


def operands(t: int, rank: int, ranks: int, device: torch.device) -> list[Tensor]:
    """This rank's pieces."""
    torch.manual_seed(rank)
    piece = t // ranks
    shapes = ((1, piece, HEADS, 1, WIDTH), *[(1, piece, HEADS, WIDTH)] * 2, (1, piece, HEADS, 1, WIDTH))
    kind = torch.bfloat16 if device.type == "cuda" else torch.float32
    return [torch.randn(shape, device=device, dtype=kind) for shape in shapes]


def ours(times: Sequence[int], ranks: int) -> tuple[list[dict], int, torch.device]:
    """A row for each length, this rank, and its device."""
    rows = []
    with connect(Mesh(cp=ranks)) as runtime:
        for t in times:
            args, ms, peaks, results = operands(t, runtime.rank, ranks, runtime.device), {}, {}, {}
            for name, layout in LAYOUTS.items():
                f = compile(value_and_grad(weighted, ("q", "k", "v")), layout, runtime=runtime,
                            sizes=dict(T=t, S=t))
                results[name] = f(*args)
                ms[name], peaks[name] = measured(f, args)
            ring = ms.pop("ring")
            rows.append(row(f"cp={ranks}, T={t}", "ms", ring, ms) | {
                "peak_MiB": {name: round(peak, 1) for name, peak in peaks.items()},
                "off": off(results["ring"], results["gathered keys"])})
            if runtime.rank == 0:
                print(rows[-1], flush=True)
        return rows, runtime.rank, runtime.device


def torchs(rows: list[dict], times: Sequence[int], rank: int, ranks: int, device: torch.device) -> None:
    """Adds torch's figures, from process groups of its own."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel
    dist.init_process_group("nccl", store=dist.FileStore(f"/tmp/ring-{os.environ['MASTER_PORT']}", ranks),
                            rank=rank, world_size=ranks, device_id=device)
    mesh = init_device_mesh("cuda", (ranks,))

    def run(q: Tensor, k: Tensor, v: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        q, k, v, weight = (x.reshape(1, -1, HEADS, WIDTH).transpose(1, 2).detach() for x in (q, k, v, weight))
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        divided = torch.empty(2 * ranks, device="cuda")         # context_parallel wants one to divide
        with context_parallel(mesh, buffers=[divided], buffer_seq_dims=[0], no_restore_buffers={divided}):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            loss = (out * weight).sum()
            return loss.detach(), *torch.autograd.grad(loss, (q, k, v))
    for t, r in zip(times, rows):
        ms, peak = measured(run, operands(t, rank, ranks, device))
        r["peers"]["context_parallel"], r["peak_MiB"]["context_parallel"] = round(ms, 3), round(peak, 1)
        if rank == 0:
            print(r, flush=True)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--times", type=lambda text: [int(n) for n in text.split(",")])
    chosen, ranks = parser.parse_args().times, int(os.environ["WORLD_SIZE"])
    faulthandler.enable()
    rows, rank, device = ours(chosen or TIMES, ranks)
    if device.type == "cuda":
        if rank == 0 and not chosen:
            write("ring_attention", rows)           # should torch fail, as it did within groups of ours
        torchs(rows, chosen or TIMES, rank, ranks, device)
        if rank == 0 and not chosen:
            write("ring_attention", rows)


if __name__ == "__main__":
    main()
