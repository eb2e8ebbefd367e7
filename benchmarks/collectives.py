"""Collectives between GPUs of one host: ours beside NCCL and torch's symmetric memory kernels, in one run,
by graph replay.

    torchrun --nproc-per-node 2 benchmarks/collectives.py       on the GPUs: adds the rows of groups of 2
                                                                to results/collectives.json
    torchrun --nproc-per-node 8 benchmarks/collectives.py sweep     every grid: of which shardlib/ops/
                                                                nvlink_grids.py has the best
    python benchmarks/collectives.py                            draws results/collectives.svg of what is there

A figure is the median over rounds of the slowest rank's µs a call, of calls one after another in a CUDA
graph. The floor is an empty kernel in a graph (0.64 µs), each trip from GPU to GPU (0.75 µs), and the bytes
at what a copy engine reaches (365 GB/s), all three measured on H200; of the ways to do a collective, the one
whose floor is lowest.
"""
from __future__ import annotations

import datetime
import json
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from record import RESULTS, commit, hardware, of_all, row, versions

NAMES = ("all_reduce", "reduce_scatter", "all_gather", "all_to_all")
SIZES = [2 ** k for k in range(11, 27)]
README = {2: (1 << 20,), 4: (8 << 10, 64 << 10, 1 << 20, 16 << 20, 64 << 20)}
"""GPUs -> the sizes that README.md shows."""
DTYPE = torch.bfloat16
LAUNCH_US, TRIP_US, BYTES_PER_US = 0.64, 0.75, 365_000.0


def floor(name: str, n: int, nbytes: int) -> float:
    once = LAUNCH_US + TRIP_US + (n - 1) / n * nbytes / BYTES_PER_US
    if name != "all_reduce":
        return once
    one_shot = LAUNCH_US + TRIP_US + (n - 1) * nbytes / BYTES_PER_US
    return min(one_shot, LAUNCH_US + 2 * TRIP_US + 2 * (n - 1) / n * nbytes / BYTES_PER_US)


def torch_kernels(group: Any, name: str, x: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """torch's own symmetric memory collectives, their input in symmetric memory already. No multicast."""
    import torch.distributed._symmetric_memory as symmetric_memory
    if name != "all_reduce" or x.nbytes > 16 << 20:
        return {}
    buffer = symmetric_memory.empty(x.numel(), dtype=x.dtype, device=x.device)
    symmetric_memory.rendezvous(buffer, group.device_group)
    buffer.copy_(x)
    where = group.device_group.group_name
    return {"torch one-shot": lambda: torch.ops.symm_mem.one_shot_all_reduce(buffer, "sum", where),
            "torch two-shot": lambda: torch.ops.symm_mem.two_shot_all_reduce_(buffer, "sum", where)}


def nccl_calls(group: Any, name: str, x: torch.Tensor) -> Callable[[], Any]:
    """NCCL through torch.distributed at its best: in place where it can be,
    into a buffer that is there already."""
    import torch.distributed as dist
    pg, n = group.device_group, group.world_size
    piece, out = x[:x.numel() // n].clone(), torch.empty_like(x)
    return {"all_reduce": lambda: dist.all_reduce(out, group=pg),
            "reduce_scatter": lambda: dist.reduce_scatter_tensor(piece, x, group=pg),
            "all_gather": lambda: dist.all_gather_into_tensor(out, piece, group=pg),
            "all_to_all": lambda: dist.all_to_all_single(out, x, group=pg)}[name]


def measure() -> None:
    """On every rank: all contestants of all sizes, in turn."""
    from shardlib import Mesh
    from shardlib.distributed import connect
    from shardlib.distributed.calibrate import call_of, time_on_gpu
    from shardlib.distributed.communicators.nccl import nccl
    from shardlib.ops.nvlink import nvlink
    n = int(os.environ["WORLD_SIZE"])
    rows = []
    with connect(Mesh(tp=n), "cuda", communicators=(nvlink, nccl)) as runtime:
        runtime.create_groups([("tp",)])
        group = runtime.group(("tp",))
        made = {c.name: c for c in group.communicators}
        ours, direct = made["NVLink"], made.get("NCCL")
        for name in NAMES:
            for nbytes in SIZES:
                # whole quads a piece
                x = torch.randn(nbytes // (16 * n) * 16 * n // DTYPE.itemsize, device=group.device,
                                dtype=DTYPE)
                contestants = {"ours": call_of(name, ours, group, x), "NCCL": nccl_calls(group, name, x),
                               **torch_kernels(group, name, x)}
                if direct is not None:
                    contestants["NCCL by nccl4py"] = call_of(name, direct, group, x)
                calls = 20 if nbytes <= 4 << 20 else 8
                us = {who: time_on_gpu(call, group, calls, capturing=True)
                      for who, call in contestants.items()}
                rows.append(row(f"{name}, {n} GPUs, {x.nbytes} B", "µs", us.pop("ours"), us,
                                floor(name, n, x.nbytes)) | {
                                    "collective": name, "gpus": n, "bytes": x.nbytes,
                                    "readme": nbytes in README.get(n, ())})
                if runtime.rank == 0:
                    r = rows[-1]
                    print(r["case"], r["ours"], r["peers"], "floor", r["floor"], flush=True)
        workspace, rank = ours.workspace_bytes, runtime.rank
    if rank == 0:
        save(rows, n, workspace)


SWEPT = [2 ** k for k in (13, 14, 15, 16, 17, 18, 20, 22, 24, 26)]
GRIDS = [(blocks, warps, registers) for warps, registers in ((1, 128), (4, 128), (8, 64), (4, 64))
         for blocks in (64, 128, 192, 256, 512)]
"""(blocks, warps, registers of a thread) that are tried, where two channels have room."""


def swept() -> None:
    """µs of each kernel, by grid, fastest first."""
    from shardlib import Mesh
    from shardlib.distributed import connect
    from shardlib.distributed.calibrate import time_on_gpu
    from shardlib.ops.nvlink import nvlink
    from shardlib.ops.nvlink_grids import BLOCK_REGISTERS, MOST_BLOCKS
    from shardlib.triton_kernels import exchange
    from shardlib.triton_kernels.all_reduce import one_shot, two_shot
    from shardlib.triton_kernels.launching import Grid
    from shardlib.triton_kernels.reduce_scatter import reduce_scatter
    n = int(os.environ["WORLD_SIZE"])
    kernels = {
        "one_shot": (256 << 10, one_shot), "two_shot": (64 << 20, two_shot),
        "reduce_scatter": (64 << 20, lambda x, w, grid: reduce_scatter(x.view(1, n, -1), w, grid)),
        "all_gather, a word a warp": (64 << 20, lambda x, w, grid: exchange.all_gather(
            x.view(n, -1)[:1], w, grid)),
        "all_gather, a word a block": (64 << 20, lambda x, w, grid: exchange.all_gather(
            x.view(n, -1)[:1], w, grid, grid.threads))}
    with connect(Mesh(tp=n), "cuda", communicators=(nvlink,)) as runtime:
        runtime.create_groups([("tp",)])
        group = runtime.group(("tp",))
        workspace = group.communicators[0]._workspace
        for name, (most, kernel) in kernels.items():
            for nbytes in (size for size in SWEPT if size <= most):
                x = torch.randn(nbytes // DTYPE.itemsize, device=group.device, dtype=DTYPE)
                found, seen, quads = [], set(), nbytes // 16 // (1 if name == "one_shot" else n)
                for blocks, warps, registers in GRIDS:
                    grid = Grid(blocks, warps, registers).over(quads)
                    if grid in seen or blocks * warps * 32 * registers > MOST_BLOCKS * BLOCK_REGISTERS:
                        continue
                    seen.add(grid)
                    us = time_on_gpu(lambda: kernel(x, workspace(), grid), group,       # noqa: B023
                                     20 if nbytes <= 4 << 20 else 5, capturing=True)
                    found.append((round(us, 2), *grid[:3]))
                if runtime.rank == 0:
                    print(f"{name}, {n} GPUs, {nbytes} B:", *sorted(found)[:6], "worst", max(found),
                          flush=True)


def save(rows: list[dict], n: int, workspace_bytes: int) -> None:
    file = RESULTS / "collectives.json"
    old = json.loads(file.read_text()) if file.exists() else {"rows": []}
    for r in rows:
        r.update(hardware=hardware(), commit=commit())
    rows = sorted([r for r in old["rows"] if r["gpus"] != n] + rows,
                  key=lambda r: (r["gpus"], NAMES.index(r["collective"]), r["bytes"]))
    record = {"hardware": of_all(rows, "hardware"),
              "versions": versions() | {"nccl": ".".join(map(str, torch.cuda.nccl.version()))},
              "commit": of_all(rows, "commit"), "date": datetime.date.today().isoformat(),
              "workspace_bytes": {**old.get("workspace_bytes", {}), str(n): workspace_bytes}, "rows": rows}
    RESULTS.mkdir(exist_ok=True)
    file.write_text(json.dumps(record, indent=1) + "\n")


def draw() -> None:
    """µs, and GB/s of the whole tensor, over bytes: a column for each collective,
    a pair of rows for each number of GPUs."""
    import matplotlib
    matplotlib.use("svg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"svg.hashsalt": "shardlib", "svg.fonttype": "none"})
    record = json.loads((RESULTS / "collectives.json").read_text())
    counts = sorted({r["gpus"] for r in record["rows"]})
    figure, axes = plt.subplots(2 * len(counts), len(NAMES), figsize=(4.2 * len(NAMES), 6.4 * len(counts)),
                                sharex=True, squeeze=False)
    styles = {"shardlib": ("C3", 2.2), "NCCL": ("C0", 1.4), "torch one-shot": ("C1", 1.4),
              "torch two-shot": ("C2", 1.4), "NCCL by nccl4py": ("C9", 1.0), "floor": ("0.6", 1.0)}
    for i, n in enumerate(counts):
        for j, name in enumerate(NAMES):
            rows = [r for r in record["rows"] if r["gpus"] == n and r["collective"] == name]
            series: dict[str, list[tuple[int, float]]] = {}
            for r in rows:
                for who, us in {"shardlib": r["ours"], **r["peers"], "floor": r["floor"]}.items():
                    series.setdefault(who, []).append((r["bytes"], us))
            for who, points in series.items():
                color, width = styles[who]
                sizes, times = zip(*points)
                style = dict(color=color, linewidth=width, label=who,
                             linestyle="--" if who == "floor" else "-")
                axes[2 * i][j].loglog(sizes, times, **style)
                axes[2 * i + 1][j].loglog(sizes, [b / t / 1e3 for b, t in points], **style)
            axes[2 * i][j].set_title(f"{name}, {n} GPUs")
            axes[2 * i + 1][j].set_xlabel("bytes")
        axes[2 * i][0].set_ylabel("µs")
        axes[2 * i + 1][0].set_ylabel("GB/s of the whole tensor")
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(RESULTS / "collectives.svg", metadata={"Date": None})


def main() -> None:
    if "RANK" in os.environ:
        swept() if sys.argv[1:] == ["sweep"] else measure()
    elif (RESULTS / "collectives.json").exists():
        draw()
    else:
        print("collectives: measured on GPUs by torchrun --nproc-per-node N benchmarks/collectives.py")


if __name__ == "__main__":
    main()
