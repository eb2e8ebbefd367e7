"""One step of an 8-rank MLP (TP x DP): the simulator, one process, beside 8 processes on the same machine,
which meet in shared memory."""
from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from record import row, write
from torch import Tensor

from shardlib import Layout, Mesh, Params, compile, einsum, init, lower, param, sharded
from shardlib.api import arg_types
from shardlib.distributed.runtime import connect
from shardlib.functions import silu
from shardlib.lowering.emit import Emitter
from shardlib.lowering.load import load
from shardlib.placement import place
from shardlib.run.simulate import run_ranks

MESH, LAYOUT = Mesh(dp=2, tp=4), Layout(B="dp", F="tp")
SIZES = dict(B=4, T=16, D=128, F=512)


class Mlp(Params):
    gate: Tensor = param("D F")
    up: Tensor = param("D F")
    down: Tensor = param("F D")


@sharded("B T D, * -> B T D")
def mlp(x, w: Mlp):
    gate, up = einsum("B T D, D F -> B T F", x, w.gate), einsum("B T D, D F -> B T F", x, w.up)
    return x + einsum("B T F, F D -> B T D", silu(gate) * up, w.down)


def simulated() -> float:
    """Median ms of a step of all 8 ranks in this process."""
    program = lower(mlp, LAYOUT, mesh=MESH)
    mains = []
    for rank in range(8):
        e = Emitter(MESH, rank, SIZES, yields=True)
        source = e.program(program)
        mains.append(load(source, {**e.helpers, **e.constants},
                          {n: MESH.group(a, rank) for a, n in e.groups.items()}, "mlp"))
    values = {n: place(torch.randn([SIZES[d] for d in k.labels]), k, SIZES, MESH)
              for n, k in program.arg_leaves()}
    times = []
    for _ in range(60):
        begin = time.perf_counter()
        run_ranks([main(*(v[r] for v in values.values())) for r, main in enumerate(mains)])
        times.append(time.perf_counter() - begin)
    return statistics.median(times[10:]) * 1e3


def worker() -> None:
    """One of 8 processes; rank 0 prints the median ms of a step."""
    with connect(MESH, "cpu") as runtime:
        step = compile(mlp, LAYOUT, runtime=runtime, sizes=SIZES)
        kinds = arg_types(step.lower(), "w")
        w = init(Mlp, SIZES, kinds, mesh=MESH, coordinate=runtime.coordinate)
        x = torch.randn(2, 16, 128)
        times = []
        for _ in range(30):
            begin = time.perf_counter()
            step(x, w)
            times.append(time.perf_counter() - begin)
        if runtime.rank == 0:
            print(statistics.median(times[5:]) * 1e3, flush=True)


def main() -> None:
    found = subprocess.run([str(Path(sys.executable).with_name("torchrun")), "--nproc-per-node", "8",
                            __file__, "worker"], capture_output=True, text=True,
                           check=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"})
    torch.set_num_threads(1)
    write("simulator", [row("8-rank MLP step (dp=2, tp=4)", "ms", simulated(),
                            {"8 processes through shared memory": float(found.stdout.split()[-1])})])


if __name__ == "__main__":
    worker() if sys.argv[1:] == ["worker"] else main()
