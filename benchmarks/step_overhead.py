"""What one op costs above plain torch, called one by one:
step mode, and DTensor, on the same ops (one gloo process)."""
from __future__ import annotations

import os
import statistics
import time

import torch
import torch.distributed as dist
from record import row, write
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from shardlib import Layout, Mesh, einsum, step
from shardlib.functions import silu
from shardlib.language.trace import Function

N = 300


def per_call(body, prepare) -> float:
    """Median µs of one of N calls of `body` on what `prepare` gives, over 15 rounds."""
    state = prepare()
    body(state)
    rounds = []
    for _ in range(15):
        begin = time.perf_counter()
        for _ in range(N):
            body(state)
        rounds.append((time.perf_counter() - begin) / N * 1e6)
    return statistics.median(rounds)


def ours(op, specs: str, tensors) -> float:
    """Step mode's µs a call: the time of a function that calls the op N times,
    less that of one that calls it once."""
    def repeated(times: int):
        def unary(x):
            for _ in range(times):
                out = op(x)
            return out

        def binary(x, y):
            for _ in range(times):
                out = op(x, y)
            return out
        return unary if len(tensors) == 1 else binary

    def run(times: int) -> float:
        stepped = step(Function(repeated(times), specs), Layout(F="tp"), mesh=Mesh(tp=1))
        stepped(*tensors)
        rounds = []
        for _ in range(15):
            begin = time.perf_counter()
            stepped(*tensors)
            rounds.append(time.perf_counter() - begin)
        return statistics.median(rounds) * 1e6
    return (run(N) - run(1)) / (N - 1)


def main() -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29511")
    dist.init_process_group("gloo", rank=0, world_size=1)
    device_mesh = init_device_mesh("cpu", (1,))
    x, y, w = torch.randn(4, 64), torch.randn(4, 64), torch.randn(64, 64)

    def d(t, place):
        return DTensor.from_local(t, device_mesh, [place], run_check=False)
    cases = {
        "add": (lambda a, b: a + b, "B F, B F -> B F", (x, y), (d(x, Shard(1)), d(y, Shard(1))),
                lambda a, b: a + b),
        "silu": (silu, "B F -> B F", (x,), (d(x, Shard(1)),), torch.nn.functional.silu),
        "matmul": (lambda a, b: einsum("B D, D F -> B F", a, b), "B D, D F -> B F", (x, w),
                   (d(x, Replicate()), d(w, Shard(1))), torch.matmul),
    }
    rows = []
    with torch.inference_mode():
        for name, (op, specs, plain, tensors, function) in cases.items():
            base = per_call(lambda t: function(*t), lambda: plain)
            theirs = per_call(lambda t: function(*t), lambda: tensors)
            rows.append(row(f"{name} of 4 x 64, µs above plain torch ({base:.1f})", "µs",
                            ours(op, specs, plain) - base, {"DTensor": theirs - base}))
    write("step_overhead", rows)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
