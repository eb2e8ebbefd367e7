"""The conformance cases under torchrun, on CPU or GPU: one line at the end,
and exit status 1 if a case failed.

    torchrun --nproc-per-node 4 tests/helpers/torchrun_conformance.py dp=2,tp=2 cuda
    torchrun --nproc-per-node 4 tests/helpers/torchrun_conformance.py dp=2,tp=2 cuda bound

bound: the default group is there already, bound to this rank's GPU, so that groups of NCCL are split off it.
"""
from __future__ import annotations

import os
import sys
from itertools import permutations

import torch
import torch.distributed as dist
from conformance import check, fixed_cases

from shardlib.distributed import connect
from shardlib.mesh import Mesh


def main(mesh: Mesh, device: str = "cpu", bound: str = "") -> int:
    if bound:
        own = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(own)
        dist.init_process_group("nccl", device_id=own)
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
    if bound:
        dist.destroy_process_group()
    return int(total > 0)


if __name__ == "__main__":
    sys.exit(main(Mesh.parse(sys.argv[1]), *sys.argv[2:]))
