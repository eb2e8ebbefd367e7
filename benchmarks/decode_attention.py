"""Attention of one new token over a cache by lengths, on one GPU:
ours beside torch's attention with a mask, caches back to back in a graph.

    python benchmarks/decode_attention.py           adds rows to results/decode_attention.json
    python benchmarks/decode_attention.py sweep     every number of splits: what `splits_of` in
                                                    shardlib/ops/few_rows.py is taken from

The shapes are those of one rank of Llama-3-8B (2 kv heads of 4 queries) and 70B (of 8) at tp=4, bf16. The
floor is the bytes of the keys and values that are seen, at the rate of a sum of 2 GiB.
"""
from __future__ import annotations

import sys
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context

import torch
import torch.nn.functional as F
from on_gpu import graph_us, read_bytes_per_us
from record import row, write
from torch import Tensor

from shardlib.ops.few_rows import attend_lengths
from shardlib.triton_kernels.decode_attention import decode_attention

HEADS, WIDTH, LAYERS = 2, 128, 32
CASES = [(1, 256), (8, 256), (32, 256), (128, 256), (1, 4096), (8, 4096), (1, 32768)]
"""(rows, keys of each)."""
GROUPS = {"8B": 4, "70B": 8}


def tensors(rows: int, keys: int, group: int,
            most: int = LAYERS) -> tuple[Tensor, list[tuple[Tensor, Tensor]], Tensor, Tensor]:
    """q, caches of every layer, lengths, and counts."""
    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    layers = max(2, min(most, (2 << 30) // (rows * keys * HEADS * WIDTH * 4)))
    caches = [(random(rows, keys, HEADS, WIDTH), random(rows, keys, HEADS, WIDTH)) for _ in range(layers)]
    return (random(rows, 1, HEADS, group, WIDTH), caches, torch.full((rows,), keys - 1, device="cuda"),
            torch.zeros(rows * HEADS, dtype=torch.int32, device="cuda"))


def torch_us(q: Tensor, caches: list[tuple[Tensor, Tensor]], lengths: Tensor) -> float:
    """As the compiled program has it: the queries of one kv head are rows, under a bias."""
    keys = caches[0][0].shape[1]
    seen = torch.arange(keys, device="cuda") < lengths[:, None]
    bias = torch.zeros(seen.shape, dtype=q.dtype,
                       device="cuda").masked_fill_(~seen, float("-inf"))[:, None, None]
    return graph_us([lambda k=k, v=v: F.scaled_dot_product_attention(
        q[:, 0], k.transpose(1, 2), v.transpose(1, 2), attn_mask=bias) for k, v in caches])


TUNED = ((32, 4, 2), (64, 4, 2), (64, 4, 3), (128, 4, 2), (32, 2, 3))
"""(keys at once, warps, stages)."""


def compile_ahead(group: int, tuned: tuple[int, int, int]) -> None:
    """In a process of its own: Triton keeps what it compiles on disk."""
    q, ((k, v), _), lengths, counts = tensors(1, 256, group, 2)
    for splits in (1, 2):
        decode_attention(q, k, v, lengths, counts, splits, *tuned)


def sweep() -> None:
    jobs = list(product(GROUPS.values(), TUNED))
    with ProcessPoolExecutor(len(jobs), mp_context=get_context("spawn")) as pool:
        list(pool.map(compile_ahead, *zip(*jobs)))
    rate = read_bytes_per_us()
    print(f"{torch.cuda.get_device_name()} reads {rate / 1e6:.3f} TB/s", flush=True)
    for (rows, keys), (name, group) in product(CASES, GROUPS.items()):
        q, caches, lengths, counts = tensors(rows, keys, group)
        us = {}
        for splits, (block, warps, stages) in product((1, 2, 4, 8, 16, 32, 64), TUNED):
            if splits * block <= 2 * keys and rows * HEADS * splits <= 2048:
                us[splits, block, warps, stages] = graph_us(
                    [lambda k=k, v=v: decode_attention(q, k, v, lengths, counts, splits, block, warps, stages)
                     for k, v in caches], 3)
        best = sorted(us, key=us.get)[:6]
        print(f"{name} {rows} x {keys}: floor {2 * caches[0][0].nbytes / rate:.2f} torch "
              f"{torch_us(q, caches, lengths):.2f}  "
              + "  ".join(f"{c} {us[c]:.2f}" for c in best), flush=True)


def main() -> None:
    rate, rows_ = read_bytes_per_us(), []
    for (rows, keys), (name, group) in product(CASES, GROUPS.items()):
        q, caches, lengths, counts = tensors(rows, keys, group)
        us = graph_us([lambda k=k, v=v: attend_lengths(q, k, v, lengths, counts) for k, v in caches])
        rows_.append(row(f"{name}, {rows} row{'s' * (rows > 1)} of {keys} keys", "µs", us,
                         {"torch": torch_us(q, caches, lengths)}, 2 * caches[0][0].nbytes / rate)
                     | {"readme": name == "8B"})
    write("decode_attention", rows_, read_TB_s=round(rate / 1e6, 3))


if __name__ == "__main__":
    if not torch.cuda.is_available():
        print("decode_attention: measured on a GPU by python benchmarks/decode_attention.py")
    elif sys.argv[1:] == ["sweep"]:
        sweep()
    else:
        main()
