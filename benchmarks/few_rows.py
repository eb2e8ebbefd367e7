"""Matmuls of few rows and norms on one GPU: ours beside cuBLAS and torch,
against the rate at which the GPU reads.

    python benchmarks/few_rows.py             adds rows to results/few_rows.json
    python benchmarks/few_rows.py sweep       every tile for every shape: what `tile_of` in
                                              shardlib/ops/few_rows.py is taken from

The shapes are those of one rank of Llama-3-8B and 70B at tp=4, bf16, by columns; weights are distinct, back
to back in a CUDA graph. gate+up has its silu(gate) * up in it, on both sides. The floor is the bytes of the
weight at the rate of a sum of 2 GiB, measured in the same run.
"""
from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context

import torch
import torch.nn.functional as F
from on_gpu import graph_us, read_bytes_per_us
from record import row, write
from torch import Tensor

from shardlib.ops.few_rows import counts_of, rows_matmul
from shardlib.triton_kernels.matmul_rows import (
    Tile,
    gated_matmul_rows,
    gated_matmul_rows_reference,
    matmul_rows,
)
from shardlib.triton_kernels.rms_norm import add_rms_norm, rms_norm

SHAPES = {"8B qkv": (4096, 1536, False), "8B o": (1024, 4096, False), "8B gate+up": (4096, 3584, True),
          "8B down": (3584, 4096, False), "8B head": (4096, 32064, False), "70B qkv": (8192, 2560, False),
          "70B o": (2048, 8192, False), "70B gate+up": (8192, 7168, True), "70B down": (7168, 8192, False),
          "70B head": (8192, 32064, False)}
"""name -> (K, columns of the result, gated)."""
ROWS = (1, 8, 32)
AT_LEAST = 768 << 20
"""Bytes of distinct weights: many times L2."""
ONE_ROW = [Tile(*t, s) for t in ((1, 512, 1), (1, 1024, 2), (1, 1024, 4), (1, 2048, 8), (2, 512, 2),
                                 (2, 512, 4), (2, 1024, 4), (2, 1024, 8), (2, 2048, 8),
                                 (4, 512, 4), (4, 512, 8), (4, 1024, 8)) for s in (1, 2, 4)]
MANY = ([Tile(*t) for t in ((8, 512, 4, 4), (16, 256, 2, 4), (16, 256, 4, 4), (16, 256, 4, 6),
                            (16, 512, 4, 3), (16, 512, 4, 4), (16, 512, 8, 4), (32, 128, 2, 5),
                            (32, 128, 4, 5), (32, 256, 4, 3), (32, 256, 4, 4), (32, 512, 8, 3),
                            (64, 64, 4, 6), (64, 128, 4, 4), (64, 128, 4, 6), (64, 256, 8, 3),
                            (128, 64, 4, 6), (128, 128, 8, 4))])
MANY += [tile._replace(splits=splits) for tile in MANY[1:15] for splits in (2, 4, 8)]


def tiles(rows: int, gated: bool) -> list[Tile]:
    return [t for t in (ONE_ROW if rows == 1 else MANY) if t.columns > gated and (t.splits == 1 or not gated)]


def counts() -> Tensor | None:
    return counts_of(torch.device("cuda"))


def weights(lines: int, columns: int) -> list[Tensor]:
    count = max(4, -(-AT_LEAST // (2 * lines * columns)))
    return [(torch.randn(columns, lines, device="cuda", dtype=torch.bfloat16) * lines ** -0.5).mT
            for _ in range(count)]


def inputs(rows: int, lines: int) -> Tensor:
    return torch.randn(rows, lines, device="cuda", dtype=torch.bfloat16)


def ours(gated: bool) -> Callable[..., Tensor]:
    return gated_matmul_rows if gated else matmul_rows


def theirs(gated: bool) -> Callable[..., Tensor]:
    return gated_matmul_rows_reference if gated else torch.matmul


def cases() -> Iterator[tuple[str, int, bool, Tensor, list[Tensor]]]:
    for name, (lines, columns, gated) in SHAPES.items():
        ws = weights(lines, columns * (1 + gated))
        for rows in ROWS:
            yield name, rows, gated, inputs(rows, lines), ws


def compile_ahead(jobs: list[tuple[int, int, bool, Tile]]) -> int:
    """In a process of its own: Triton keeps what it compiles on disk."""
    for lines, rows, gated, tile in jobs:
        try:
            ours(gated)(inputs(rows, lines), torch.randn(256, lines, device="cuda", dtype=torch.bfloat16).mT,
                        tile, counts())
        except Exception as error:                      # too much shared memory, say: the sweep says so again
            print(tile, str(error)[:80], flush=True)
    return len(jobs)


def sweep() -> None:
    rate = read_bytes_per_us()
    print(f"{torch.cuda.get_device_name()} reads {rate / 1e6:.3f} TB/s", flush=True)
    kinds = {(lines, gated) for lines, _, gated in SHAPES.values()}
    jobs = [(lines, rows, gated, tile) for (lines, gated), rows in product(sorted(kinds), ROWS)
            for tile in tiles(rows, gated) if tile.splits < 4]
    workers = max(1, (os.cpu_count() or 2) - 2)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        list(pool.map(compile_ahead, [jobs[i::workers] for i in range(workers)]))
    for name, rows, gated, x, ws in cases():
        floor, us, zeros = ws[0].nbytes / rate, {}, counts()
        cublas = graph_us([lambda w=w: theirs(gated)(x, w) for w in ws])
        for tile in tiles(rows, gated):
            try:
                us[tile] = graph_us([lambda w=w: ours(gated)(x, w, tile, zeros) for w in ws], 3)
            except Exception:
                continue
        best = sorted(us, key=us.get)[:5]
        print(f"{name} {rows}: floor {floor:.2f} cuBLAS {cublas:.2f}  "
              + "  ".join(f"{tuple(t)} {us[t]:.2f}" for t in best), flush=True)


def norms() -> Iterator[dict]:
    for width, rows in product((4096, 8192), (1, 8, 32, 128)):
        x, old, w = inputs(rows, width), inputs(rows, width), inputs(1, width)[0]
        ours = {False: lambda: rms_norm(x, w, 1e-5), True: lambda: add_rms_norm(x, old, w, 1e-5)}
        torchs = {False: lambda: F.rms_norm(x, (width,), w, 1e-5),
                  True: lambda: F.rms_norm(old + x, (width,), w, 1e-5)}
        for adds in (False, True):
            yield row(f"{'add, ' * adds}rms_norm of {rows} x {width}", "µs", graph_us([ours[adds]] * 20),
                      {"torch": graph_us([torchs[adds]] * 20)}) | {"readme": rows == 1}


def main() -> None:
    rate, zeros = read_bytes_per_us(), counts()
    rows_ = list(norms())
    for name, rows, gated, x, ws in cases():
        rows_.append(row(f"{name}, {rows} row{'s' * (rows > 1)}", "µs",
                         graph_us([lambda w=w: rows_matmul(x, w, zeros, gated) for w in ws]),
                         {"cuBLAS": graph_us([lambda w=w: theirs(gated)(x, w) for w in ws])},
                         ws[0].nbytes / rate) | {"readme": rows == 1 or "qkv" in name})
    write("few_rows", rows_, read_TB_s=round(rate / 1e6, 3))


if __name__ == "__main__":
    if not torch.cuda.is_available():
        print("few_rows: measured on a GPU by python benchmarks/few_rows.py")
    elif sys.argv[1:] == ["sweep"]:
        sweep()
    else:
        main()
