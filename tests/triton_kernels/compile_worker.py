"""Compiles the kernels between GPUs for sm_90, as they are launched there, on a machine that needs no GPU; writes what came out as JSON.

    python compile_worker.py FILE        each: kernel, kind, world, line, warps, most (registers of a thread, as asked for), the PTX,
                                         layouts of what is pushed, registers and stack bytes of a thread, bytes of shared memory of a block
"""
from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Iterator

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from shardlib.ops.nvlink import CAPACITY, QUAD, NVLink, grid_of
from shardlib.triton_kernels.all_reduce import one_shot_kernel, two_shot_kernel
from shardlib.triton_kernels.exchange import exchange_kernel, spin_lines
from shardlib.triton_kernels.lamport import spin
from shardlib.triton_kernels.quads import KINDS
from shardlib.triton_kernels.reduce_scatter import reduce_scatter_kernel

KERNELS = {"one_shot": one_shot_kernel, "two_shot": two_shot_kernel, "reduce_scatter": reduce_scatter_kernel, "exchange": exchange_kernel}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
ALIGNED = [["tt.divisibility", 16]]


def registers(world: int) -> tuple[int, int]:
    """Of a thread, as `ops/nvlink.py` has them between so many ranks: for sums, and for what is moved."""
    control = SimpleNamespace(barrier=lambda: None)
    made = NVLink(SimpleNamespace(name="tp", me=0, size=world, device=torch.device("cpu"), ranks=tuple(range(world)), control=control), [])
    return made._sums, made._moves


def launches() -> Iterator[dict[str, Any]]:
    """The launches with the most threads, which `ops/nvlink.py` makes for the largest tensors, and those with a line a warp. On a rank in the
    middle, where two shots between four spill most."""
    for world in (2, 3, 4, 8):
        sums, moves = registers(world)
        for kernel in ("one_shot", "two_shot", "reduce_scatter"):
            for kind in KINDS.values():
                yield dict(kernel=kernel, kind=kind, world=world, line=0, warps=grid_of(CAPACITY // QUAD, sums).warps, most=sums)
        widest = grid_of(CAPACITY // QUAD, moves).warps
        for line, warps in ((32, 1), (32, widest), (32 * widest, widest)):
            yield dict(kernel="exchange", kind="any", world=world, line=line, warps=warps, most=moves)


def compiled(kernel: str, kind: str, world: int, line: int, warps: int, most: int) -> dict[str, Any]:
    function = KERNELS[kernel]
    types = {"x_ptr": "*i32", "out_ptr": "*i32", "addresses_ptr": "*i64", "state_ptr": "*i32"}
    values = {"RANK": world // 2, "W": world, "KIND": kind, "FLAT": False, "LINE": line, "BLOCK": 32 * warps, "INTERPRET": False,
              **(spin_lines if kernel == "exchange" else spin)(world - 1)}
    names = function.arg_names
    signature = {name: "constexpr" if name in values else types.get(name, "i32") for name in names}
    aligned = {(i,): ALIGNED for i, name in enumerate(names) if name in types or name == "slot_bytes"}
    source = ASTSource(function, signature, constexprs={name: values[name] for name in names if name in values}, attrs=aligned)
    result = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "maxnreg": most})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(result.asm["cubin"])
        cubin.flush()
        usage = subprocess.run([CUOBJDUMP, "-res-usage", cubin.name], capture_output=True, text=True, check=True).stdout
    used, stack = (int(re.search(rf"\b{what}:(\d+)", usage)[1]) for what in ("REG", "STACK"))
    return dict(kernel=kernel, kind=kind, world=world, line=line, warps=warps, most=most, ptx=result.asm["ptx"], layouts=layouts(result.asm["ttgir"]),
                registers=used, stack=stack, shared=result.metadata.shared)


def layouts(ttgir: str) -> list[str]:
    """Which threads have which lane of a block, wherever something is pushed."""
    named = dict(re.findall(r"^(#\w+) = (#ttg\..*)$", ttgir, re.MULTILINE))
    return sorted({named[name] for line in ttgir.splitlines() if "st.relaxed" in line for name in re.findall(r"tensor<\w+, (#\w+)>", line)})


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps([compiled(**launch) for launch in launches()]))
