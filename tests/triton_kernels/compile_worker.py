"""Compiles the kernels between GPUs for sm_90, as they are launched there, on a machine that needs no GPU; writes what came out as JSON.

    python compile_worker.py FILE        each: kernel, kind, world, unroll, warps, the PTX, registers and stack bytes of a thread
"""
from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Iterator

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from shardlib.triton_kernels.all_reduce import one_shot_kernel, two_shot_kernel
from shardlib.triton_kernels.exchange import chunks_kernel, packets_kernel, spin_packets
from shardlib.triton_kernels.lamport import spin
from shardlib.triton_kernels.quads import KINDS
from shardlib.triton_kernels.reduce_scatter import reduce_scatter_kernel

KERNELS = {"one_shot": one_shot_kernel, "two_shot": two_shot_kernel, "reduce_scatter": reduce_scatter_kernel, "chunks": chunks_kernel,
           "packets": packets_kernel}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
ALIGNED = [["tt.divisibility", 16]]


def launches() -> Iterator[dict[str, Any]]:
    """The launches with the most threads, which `ops/nvlink.py` makes for the largest tensors, and packets."""
    for world in (2, 3, 4, 8):
        for kernel in ("one_shot", "two_shot", "reduce_scatter"):
            for kind in KINDS.values():
                yield dict(kernel=kernel, kind=kind, world=world, warps=16, unroll=1)
        yield dict(kernel="chunks", kind="any", world=world, warps=16, unroll=4)
        yield dict(kernel="packets", kind="any", world=world, warps=4, unroll=1)


def compiled(kernel: str, kind: str, world: int, warps: int, unroll: int) -> dict[str, Any]:
    function = KERNELS[kernel]
    counts = "*i64" if kernel in ("chunks", "packets") else "*i32"
    types = {"x_ptr": "*i32", "out_ptr": "*i32", "addresses_ptr": "*i64", "flags_ptr": "*i64", "state_ptr": counts}
    values = {"RANK": 1, "W": world, "P": triton.next_power_of_2(world), "KIND": kind, "FLAT": False, "UNROLL": unroll, "BLOCK": 32 * warps,
              "INTERPRET": False, **(spin_packets(world - 1) if kernel == "packets" else spin(world - 1))}
    names = function.arg_names
    signature = {name: "constexpr" if name in values else types.get(name, "i32") for name in names}
    aligned = {(i,): ALIGNED for i, name in enumerate(names) if name in types or name == "slot_bytes"}
    source = ASTSource(function, signature, constexprs={name: values[name] for name in names if name in values}, attrs=aligned)
    result = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(result.asm["cubin"])
        cubin.flush()
        usage = subprocess.run([CUOBJDUMP, "-res-usage", cubin.name], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"\b{what}:(\d+)", usage)[1]) for what in ("REG", "STACK"))
    return dict(kernel=kernel, kind=kind, world=world, warps=warps, unroll=unroll, ptx=result.asm["ptx"], registers=registers, stack=stack)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps([compiled(**launch) for launch in launches()]))
