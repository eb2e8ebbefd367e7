"""A step of decoding between the projections on one GPU, rope and cache and attention: in one kernel, beside
the operations apart, caches back to back in a graph.

    python benchmarks/cached_attention.py           adds rows to results/cached_attention.json
    python benchmarks/cached_attention.py sweep     every number of splits with every tuning, in a minute:
                                                    what `attend_cached` in shardlib/ops/few_rows.py is
                                                    taken from

One token a row, bf16, of one rank of Llama-3-8B and 70B. Apart: rope of q and of k, two writes into the
cache, then attention, by torch with a bias or by lengths. The floor is the bytes that are read and written,
at the rate of a sum of 2 GiB.
"""
from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from typing import NamedTuple

import torch
import torch.nn.functional as F
from on_gpu import graph_us, read_bytes_per_us
from record import row, write
from torch import Tensor

from shardlib.ops.few_rows import attend_cached, attend_lengths, counts_of
from shardlib.ops.rope import rope_angles, turns
from shardlib.triton_kernels.cached_attention import cached_attention

WIDTH, LAYERS, MOST_BYTES = 128, 32, 2 << 30
MODELS = {"8B at tp=4": (2, 4), "8B": (8, 4), "70B at tp=4": (2, 8)}
"""(kv heads of a rank, queries of each)."""
CASES = [(1, 256), (8, 256), (32, 256), (128, 256), (1, 32768)]
"""(rows, keys of each)."""


class Step(NamedTuple):
    """q, k and v are parts of one projection. caches: keys and values of each layer. turn, slots, lengths,
    bias: what the operations apart share between layers."""
    q: Tensor
    k: Tensor
    v: Tensor
    angles: Tensor
    caches: list[tuple[Tensor, Tensor]]
    start: Tensor
    counts: Tensor | None
    turn: tuple[Tensor, Tensor]
    slots: Tensor
    lengths: Tensor
    bias: Tensor

    @property
    def nbytes(self) -> int:
        """Of a layer: all keys and values once, k and v in and out, q and the result, angles."""
        return (2 * self.caches[0][0].nbytes + 2 * (self.k.nbytes + self.v.nbytes) + 2 * self.q.nbytes
                + self.angles.nbytes)


def step(rows: int, keys: int, heads: int, group: int, device: str = "cuda", layers: int = LAYERS,
         dtype: torch.dtype = torch.bfloat16) -> Step:
    """The one that fills caches of so many keys."""
    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)
    layers = max(2, min(layers, MOST_BYTES // (rows * keys * heads * WIDTH * 4)))
    caches = [(random(rows, keys, heads, WIDTH), random(rows, keys, heads, WIDTH)) for _ in range(layers)]
    q, k, v = random(rows, 1, heads * (group + 2) * WIDTH).split(
        [heads * group * WIDTH, heads * WIDTH, heads * WIDTH], -1)
    start = torch.full((rows,), keys - 1, device=device)
    inverse = 5e5 ** -(torch.arange(0, WIDTH, 2, device=device) / WIDTH)
    angles = rope_angles(start, 0, 1, inverse, torch.float32)
    bias = torch.zeros(rows, 1, 1, keys, device=device, dtype=dtype)
    return Step(q.unflatten(-1, (heads, group, WIDTH)), k.unflatten(-1, (heads, WIDTH)),
                v.unflatten(-1, (heads, WIDTH)), angles, caches, start,
                counts_of(torch.device(device)) if device == "cuda" else None, turns(angles),
                start[:, None, None, None].expand(rows, 1, heads, WIDTH), start + 1, bias)


def rope_and_write(x: Step, keys: Tensor, values: Tensor) -> Tensor:
    """As the compiled program has it; q, turned."""
    (cos, sin), half = x.turn, WIDTH // 2
    cos4, sin4, cos5, sin5 = cos[:, :, None], sin[:, :, None], cos[:, :, None, None], sin[:, :, None, None]
    k = torch.addcmul(x.k * cos4, x.k.roll(half, -1), sin4).to(x.k.dtype)
    keys.scatter_(1, x.slots, k)
    values.scatter_(1, x.slots, x.v)
    return torch.addcmul(x.q * cos5, x.q.roll(half, -1), sin5).to(x.q.dtype)


def by_torch(x: Step, keys: Tensor, values: Tensor) -> Tensor:
    """The queries of one kv head are rows, under a bias."""
    q = rope_and_write(x, keys, values)
    return F.scaled_dot_product_attention(q[:, 0], keys.transpose(1, 2), values.transpose(1, 2),
                                          attn_mask=x.bias)[:, None]


def by_lengths(x: Step, keys: Tensor, values: Tensor) -> Tensor:
    q = rope_and_write(x, keys, values)
    return attend_lengths(q, keys, values, x.lengths, x.counts)


def in_one(x: Step, keys: Tensor, values: Tensor) -> Tensor:
    return attend_cached(x.q, x.k, x.v, x.angles, keys, values, x.start, x.counts)


def us(way: Callable[[Step, Tensor, Tensor], Tensor], x: Step, replays: int = 7) -> float:
    return graph_us([lambda keys=keys, values=values: way(x, keys, values) for keys, values in x.caches],
                    replays)


TUNED = ((32, 2, 2), (32, 4, 2), (32, 4, 4), (64, 4, 2), (64, 4, 3), (64, 8, 3), (128, 4, 2), (128, 8, 2))
"""(keys at once, warps, stages)."""
DEADLINE_S = 55.0


def configurations(rows: int, keys: int, heads: int) -> Iterator[tuple[int, int, int, int]]:
    """(splits, keys at once, warps, stages): no split without keys, and none where the GPU is full anyway."""
    for splits, tuned in product((1, 2, 4, 8, 16, 32, 64), TUNED):
        if splits == 1 or splits * tuned[0] <= 2 * keys and rows * heads * splits <= 2048:
            yield splits, *tuned


def tuned(how: tuple[int, int, int, int]) -> Callable[[Step, Tensor, Tensor], Tensor]:
    return lambda x, keys, values: cached_attention(x.q, x.k, x.v, x.angles, keys, values, x.start, x.counts,
                                                    *how)


def compile_ahead(group: int, how: tuple[int, int, int]) -> str:
    """In a process of its own: Triton keeps what it compiles on disk. What went wrong, if anything."""
    try:
        x = step(1, 256, 2, group, layers=2)
        for splits in (1, 2):
            tuned((splits, *how))(x, *x.caches[0])
        torch.cuda.synchronize()
    except Exception as error:                          # too much shared memory, say
        return f"{how} of {group}: {str(error)[:100]}"
    return ""


def sweep() -> None:
    """What fails is said, and left out; after DEADLINE_S, so is what is left."""
    begin = time.perf_counter()
    jobs = list(product(sorted({group for _, group in MODELS.values()}), TUNED))
    try:
        with ProcessPoolExecutor(len(jobs), mp_context=get_context("spawn")) as pool:
            print(*filter(None, pool.map(compile_ahead, *zip(*jobs))), sep="\n", flush=True)
    except Exception as error:
        print(f"compiling ahead: {error}", flush=True)
    rate = read_bytes_per_us()
    print(f"{torch.cuda.get_device_name()} reads {rate / 1e6:.3f} TB/s; compiled in "
          f"{time.perf_counter() - begin:.0f} s", flush=True)
    for (rows, keys), (name, (heads, group)) in product(CASES, MODELS.items()):
        if time.perf_counter() - begin > DEADLINE_S:
            print(f"{name} {rows} x {keys}: no time left", flush=True)
            continue
        x, times = step(rows, keys, heads, group), {}
        off = float((in_one(x, *x.caches[0]).double() - by_torch(x, *x.caches[0]).double()).abs().max())
        for how in configurations(rows, keys, heads):
            try:
                times[how] = us(tuned(how), x, 3)
            except Exception as error:
                print(f"{name} {rows} x {keys} {how}: {str(error)[:100]}", flush=True)
        best = sorted(times, key=times.get)[:6]
        print(f"{name} {rows} x {keys}: floor {x.nbytes / rate:.2f} torch {us(by_torch, x, 3):.2f} lengths "
              f"{us(by_lengths, x, 3):.2f} ours {us(in_one, x, 3):.2f} (off by {off:.2g})  "
              + "  ".join(f"{how} {times[how]:.2f}" for how in best), flush=True)


def main() -> None:
    rate, rows_ = read_bytes_per_us(), []
    for (rows, keys), (name, (heads, group)) in product(CASES, MODELS.items()):
        x = step(rows, keys, heads, group)
        rows_.append(row(f"{name}, {rows} row{'s' * (rows > 1)} of {keys} keys", "µs", us(in_one, x),
                         {"torch": us(by_torch, x), "by lengths": us(by_lengths, x)}, x.nbytes / rate)
                     | {"readme": name != "8B"})
    write("cached_attention", rows_, read_TB_s=round(rate / 1e6, 3))


if __name__ == "__main__":
    if not torch.cuda.is_available():
        print("cached_attention: measured on a GPU by python benchmarks/cached_attention.py")
    elif sys.argv[1:] == ["sweep"]:
        sweep()
    else:
        main()
