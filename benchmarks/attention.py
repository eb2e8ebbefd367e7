"""Attention forward and backward on one GPU: ours beside torch's, F.scaled_dot_product_attention, of the same
operands.

    python benchmarks/attention.py                  writes results/attention.json
    python benchmarks/attention.py --times 64,128   these lengths, printed alone; on the CPU, too

The shape is a layer of Llama-3-8B on one GPU (8 kv heads of 4 queries, of 128 elements), bf16, causal; and
the same with a sliding window, beside torch's flash kernel called with one; with a bias of each head, query
and key (up to T=4096); and with a softcap, which torch does not have. ours is the compiled program of
`value_and_grad`. peak: MiB above the operands, which is to be linear in T.
"""
from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from record import row, write
from torch import Tensor

from shardlib import compile, sharded, value_and_grad
from shardlib.functions import sum
from shardlib.ops import attention

HEADS, GROUP, WIDTH = 8, 4, 128
TIMES = (1024, 4096, 16384)
TEXT = "B T K G H, B S K H, B S K H -> B T K G H"
WINDOW = 1024
FORMS: dict[str, dict[str, Any]] = {"causal": {}, "window 1024": dict(window=WINDOW), "bias": {},
                                    "softcap 50": dict(softcap=50.0)}


def ours(**options: Any) -> Callable:
    @sharded("B T K G H, B S K H, B S K H, B T K G H -> ()")
    def weighted(q, k, v, weight):
        return sum("B T K G H -> ()", attention(TEXT, q, k, v, **options) * weight)
    return compile(value_and_grad(weighted, ("q", "k", "v")))


def ours_biased() -> Callable:
    @sharded("B T K G H, B S K H, B S K H, K G T S, B T K G H -> ()")
    def weighted(q, k, v, bias, weight):
        out = attention(f"{TEXT.split(' -> ')[0]}, K G T S -> B T K G H", q, k, v, bias=bias)
        return sum("B T K G H -> ()", out * weight)
    return compile(value_and_grad(weighted, ("q", "k", "v", "bias")))


def torchs_biased(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """With the mask in the bias, as F.scaled_dot_product_attention wants it."""
    q, k, v, bias = (x.detach().requires_grad_() for x in (q, k, v, bias))
    rows, keys, values = q.flatten(2, 3).transpose(1, 2), *(
        x.repeat_interleave(GROUP, 2).transpose(1, 2) for x in (k, v))
    later = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool, device=q.device).triu(1)
    added = bias.flatten(0, 1).masked_fill(later, float("-inf"))[None]
    out = F.scaled_dot_product_attention(rows, keys, values, added)
    loss = (out.transpose(1, 2).unflatten(2, (k.shape[2], -1)) * weight).sum()
    return loss.detach(), *torch.autograd.grad(loss, (q, k, v, bias))


def torchs_window(q: Tensor, k: Tensor, v: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    t = q.shape[1]
    out, *_ = torch.ops.aten._flash_attention_forward(
        q.flatten(2, 3), k, v, None, None, t, t, 0.0, True, False, window_size_left=WINDOW - 1,
        window_size_right=0)
    loss = (out.unflatten(2, (k.shape[2], -1)) * weight).sum()
    return loss.detach(), *torch.autograd.grad(loss, (q, k, v))


def torchs(q: Tensor, k: Tensor, v: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out = F.scaled_dot_product_attention(q.flatten(2, 3).transpose(1, 2), k.transpose(1, 2),
                                         v.transpose(1, 2), is_causal=True, enable_gqa=True)
    loss = (out.transpose(1, 2).unflatten(2, (k.shape[2], -1)) * weight).sum()
    return loss.detach(), *torch.autograd.grad(loss, (q, k, v))


PEERS = {"causal": torchs, "window 1024": torchs_window, "bias": torchs_biased}
MOST_BIASED = 4096


def operands(t: int, device: str) -> list[Tensor]:
    queries, keys = (1, t, HEADS, GROUP, WIDTH), (1, t, HEADS, WIDTH)
    return [torch.randn(shape, device=device, dtype=torch.bfloat16)
            for shape in (queries, keys, keys, queries)]


def measured(f: Callable, args: list[Tensor], rounds: int = 7) -> tuple[float, float]:
    """(ms, MiB above what was there at most) of a call."""
    on_gpu, times = args[0].is_cuda, []
    f(*args)
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if on_gpu else 0
    for _ in range(rounds):
        start = time.perf_counter()
        f(*args)
        if on_gpu:
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times), (torch.cuda.max_memory_allocated() - before) / 2**20 if on_gpu else 0.0


def off(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> float:
    """The largest difference of a gradient, of its largest element."""
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(got[1:], want[1:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--times", type=lambda text: [int(n) for n in text.split(",")])
    chosen, rows = parser.parse_args().times, []
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for t in chosen or TIMES:
        args = operands(t, device)
        for name, options in FORMS.items():
            biased = name == "bias"
            if biased and t > MOST_BIASED or name == "window 1024" and t <= WINDOW:
                continue
            given = [*args[:3], torch.randn(HEADS, GROUP, t, t, device=device, dtype=torch.bfloat16),
                     args[3]] if biased else args
            f = ours_biased() if biased else ours(**options)
            ms, peak = measured(f, given)
            peers, notes = {}, {"peak_MiB": round(peak, 1)}
            if device == "cuda" and (peer := PEERS.get(name)):
                peers["torch"], peak = measured(peer, given)
                notes |= {"torch_peak_MiB": round(peak, 1), "off_torch": off(f(*given), peer(*given))}
            rows.append(row(f"{name}, T={t}", "ms", ms, peers) | notes)
            print(rows[-1], flush=True)
    if device == "cuda" and not chosen:
        write("attention", rows)


if __name__ == "__main__":
    main()
