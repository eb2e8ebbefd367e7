"""The conformance cases under torchrun, on CPU or GPU: one line at the end,
and exit status 1 if a case failed.

    torchrun --nproc-per-node 4 tests/distributed/torchrun_conformance.py dp=2,tp=2 cuda
"""
from __future__ import annotations

import sys
from itertools import permutations

import torch
from conformance import check, fixed_cases

from shardlib.distributed import connect
from shardlib.mesh import Mesh


def main(mesh: Mesh, device: str) -> int:
    products = [order for k in (1, 2) for order in permutations(mesh.axes, k)]
    with connect(mesh, device) as runtime:
        runtime.create_groups(products)
        cases = [case for axes in products for case in fixed_cases(axes, mesh.size(axes))]
        failures = [f"rank {runtime.rank}: {case}: {text}" for case in cases
                    for text in check(case, runtime.group(case.axes))]
        print("\n".join(failures[:20]), file=sys.stderr)
        world = runtime.group(tuple(mesh.axes)) if len(mesh.axes) < 3 else None
        total = world.all_reduce(torch.tensor(len(failures))).item() if world else len(failures)
    if runtime.rank == 0:
        print(f"{len(cases)} cases on {mesh} ({device}): {total} failures")
    return int(total > 0)


if __name__ == "__main__":
    sys.exit(main(Mesh.parse(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "cpu"))
