"""A mixture of experts over dp ranks, of which some have nothing to do, step after step.

    torchrun --nproc-per-node 3 tests/helpers/idle_worker.py STEPS [SKIPPED]

In each step any number of tokens lies on the ranks, zero on any of them, and on any rank all tokens may be
padding; each has the rows that a dense sum on one device has. SKIPPED: the step that the last rank, which is
idle in it, leaves out.
"""
from __future__ import annotations

import os
import random
import sys
import time

import torch

from shardlib import Layout, Mesh, compile, shard_of, sharded
from shardlib.distributed.runtime import connect
from shardlib.functions import silu
from shardlib.ops import combine, dispatch, grouped_einsum
from shardlib.spec import parse

D, F, E, J, MOST = 8, 6, 5, 2, 7
TIMEOUT_S = 10.0         # where a step is left out


@sharded("N D, N J, N J, E D F, E F D -> N D")
def experts(x, chosen, weights, up, down):
    rows, at = dispatch("N D, N J -> (E N)~J D, (E N)~J", x, chosen, ignore_index=-1)
    h = silu(grouped_einsum("(E N)~J D, (E N)~J, E D F -> (E N)~J F", rows, at, up))
    y = grouped_einsum("(E N)~J F, (E N)~J, E F D -> (E N)~J D", h, at, down)
    return combine("(E N)~J D, (E N)~J, N J -> N D", y, at, weights)


def drawn(n: int, chance: random.Random, ranks: int, mesh: Mesh) -> list[torch.Tensor]:
    """Tokens, whom they chose, none on ranks that have padding alone, and how much each counts."""
    g = torch.Generator().manual_seed(chance.randrange(1 << 30))
    chosen = torch.rand(n, E, generator=g).argsort(-1)[:, :J]
    for rank in range(ranks):
        if chance.random() < 0.3:
            begin, size = mesh.extent(n, ("dp",), {"dp": rank})
            chosen[begin:begin + size] = -1
    return [torch.randn(n, D, generator=g), chosen, torch.rand(n, J, generator=g)]


def dense(x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, up: torch.Tensor,
          down: torch.Tensor) -> torch.Tensor:
    y = torch.einsum("nef,efd->ned", torch.nn.functional.silu(torch.einsum("nd,edf->nef", x, up)), down)
    return torch.einsum("nj,nje,ned->nd", weights, (chosen[..., None] == torch.arange(E)).to(x.dtype), y)


def main(steps: int, skipped: int = -1) -> None:
    mesh = Mesh(dp=int(os.environ["WORLD_SIZE"]))
    with connect(mesh, "cpu", TIMEOUT_S if skipped >= 0 else None) as runtime:
        here, chance, idle = runtime.coordinate, random.Random(0), 0
        g = torch.Generator().manual_seed(1)
        matrices = [torch.randn(E, D, F, generator=g), torch.randn(E, F, D, generator=g)]
        f = compile(experts, Layout(N="dp", E="dp"), runtime=runtime)
        for step in range(-1, steps):       # the first has no token at all, as the one that is left out
            n = 0 if step in (-1, skipped) else chance.randrange(MOST + 1)
            whole = drawn(n, chance, mesh.world_size, mesh)
            parts = [shard_of(t, parse(kind), mesh, here) for t, kind in (
                *zip(whole, ("N/dp D", "N/dp J", "N/dp J")), *zip(matrices, ("E/dp D F", "E/dp F D")))]
            idle += not len(parts[0]) or bool((parts[1] < 0).all())
            if step == skipped and runtime.rank == mesh.world_size - 1:
                time.sleep(4 * TIMEOUT_S)
            made = f.at(N=n, E=E)(*parts)
            wanted = shard_of(dense(*whole, *matrices), parse("N/dp D"), mesh, here)
            torch.testing.assert_close(made, wanted, rtol=1e-5, atol=1e-5)
        print(f"rank {runtime.rank}: {steps} steps, idle in {idle}", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
