"""Cross entropy on one GPU, forward and backward, of 4,096 rows of 128,256 logits, beside torch's.

    python benchmarks/cross_entropy.py

The gradient is that of the mean. torch's: `F.cross_entropy` of the logits in float32, as one writes it where
losses are not to be rounded to 16 bits, by autograd; and the same under torch.compile. The floor: logits read
twice, the gradient written once, at the rate of a sum of 2 GiB, measured in the same run.
"""
from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from on_gpu import read_bytes_per_us
from record import row, write
from torch import Tensor

from shardlib import Mesh, compile, sharded, value_and_grad
from shardlib.functions import mean
from shardlib.ops import cross_entropy

ROWS, V = 4096, 128256


@sharded("T V, T -> ()")
def loss(x, labels):
    return mean("T -> ()", cross_entropy("T V, T -> T", x, labels))


def by_torch(x: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(x.float(), labels)


def with_gradient(f: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], object]:
    def run(x: Tensor, labels: Tensor) -> object:
        x = x.detach().requires_grad_()
        value = f(x, labels)
        return value, torch.autograd.grad(value, x)[0]
    return run


def us(call: Callable[[], object]) -> float:
    """The median of calls one after another."""
    times = []
    for _ in range(12):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return statistics.median(times[2:])


def peak(call: Callable[[], object]) -> float:
    """GB that are held at most beside what was there."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return round((torch.cuda.max_memory_allocated() - before) / 1e9, 2)


def main() -> None:
    rate, rows = read_bytes_per_us(), []
    ours = compile(value_and_grad(loss, "x"), mesh=Mesh())
    ways = {"ours": ours, "torch": with_gradient(by_torch),
            "torch.compile": with_gradient(torch.compile(by_torch))}
    labels = torch.randint(V, (ROWS,), device="cuda")
    for dtype in (torch.bfloat16, torch.float32):
        x = 3 * torch.randn(ROWS, V, device="cuda", dtype=dtype)
        took = {name: us(lambda f=f, x=x: f(x, labels)) for name, f in ways.items()}
        held = {name: peak(lambda f=f, x=x: f(x, labels)) for name, f in ways.items()}
        mine = took.pop("ours")
        done = row(f"{ROWS} x {V}, {str(dtype)[6:]}", "µs", mine, took, 3 * x.nbytes / rate)
        rows.append(done | {"peak_gb": held})
        del x
    write("cross_entropy", rows, gb_per_s=round(rate / 1e3))


if __name__ == "__main__":
    main()
