"""One rank of the tests of NVLink: `conformance`, or `stress CALLS`. Exit status 1 where anything is wrong.

    torchrun --nproc-per-node 2 tests/gpu/nvlink_worker.py stress 100000
"""
from __future__ import annotations

import os
import random
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1] / "helpers"))
from conformance import check, fixed_cases, quad_cases

from shardlib import Mesh
from shardlib.distributed import GroupCoordinator, connect
from shardlib.distributed.routing import UNMEASURED
from shardlib.ops.expert_rows import combined
from shardlib.ops.nvlink import nvlink
from shardlib.triton_kernels.all_reduce import all_reduce_reference
from shardlib.triton_kernels.expert_exchange import combine_rows_reference, dispatch_rows_reference
from shardlib.triton_kernels.expert_places import expert_places, expert_places_reference
from shardlib.triton_kernels.lamport import EMPTY

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LARGEST = 1 << 22


def with_empty(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """x, and in it the word that an empty slot holds: in an eighth of it everywhere, in others often,
    seldom and never."""
    words = x.clone().view(torch.int32)
    for part, rarity in zip(words.chunk(8), (1, 4, 64, 512, 4096, 1 << 16)):
        part[torch.randint(0, rarity, part.shape, generator=generator, device=x.device) == 0] = EMPTY.value
    return words.view(x.dtype)

class Routed:
    """Rows of tokens that go to the ranks of their experts, and what has to come: every rank knows all."""

    def __init__(self, draw: random.Random, base: list[torch.Tensor], group: GroupCoordinator) -> None:
        self.kernels, n, me = group.communicators[0], len(base), group.rank_in_group
        tokens, width = draw.choice((1, 3, 40, 300)), 8 * draw.choice((1, 5, 64, 300))
        self.experts, choices = draw.choice((1, 2, 5)), draw.choice((1, 2, 3))
        self.run = draw.choice((1, tokens))
        g = torch.Generator().manual_seed(draw.randrange(1 << 30))
        scores, first = torch.rand(tokens * n, self.experts * n + 3, generator=g), draw.randrange(3 * n)
        if first < n:                                   # all that one rank has go first: nothing for others
            scores[:, first * self.experts:(first + 1) * self.experts] += 1
        chosen = scores.topk(choices).indices
        self.chosen = torch.where(chosen < self.experts * n, chosen, -1).to(group.device)
        self.weights = torch.rand(chosen.shape, generator=g).to(group.device)
        xs = [b[:tokens * width].view(tokens, width) for b in base]
        self.most, many = len(chosen) * min(choices, self.experts), (len(chosen), width)
        places = [expert_places_reference(self.chosen, r * self.experts, self.experts, self.most)
                  for r in range(n)]
        rows = [dispatch_rows_reference(xs, self.chosen, place, r * self.experts, self.experts, self.most,
                                        self.run) for r, (_, place, _) in enumerate(places)]
        sums = [combined(y, at, self.experts, len(chosen), choices, many, self.weights)
                for y, (at, _, _) in zip(rows, places)]
        self.x, self.rows, (self.at, self.place, self.ends) = xs[me], rows[me], places[me]
        self.first, self.home = me * self.experts, combine_rows_reference(sums, me, self.run)
        self.live = (torch.arange(self.most, device=group.device) < self.ends[-1]).unsqueeze(1)

    def check(self, wrong: torch.Tensor) -> None:
        found = expert_places(self.chosen, self.first, self.experts, self.most)
        for got, want in zip(found, (self.at, self.place, self.ends)):
            wrong += (got != want).sum()
        made = self.kernels.dispatch_rows(self.x, self.chosen, found[1], self.experts, self.most, self.run)
        wrong += (torch.where(self.live, made, 0).view(torch.uint8) != self.rows.view(torch.uint8)).sum()
        home = self.kernels.combine_rows(self.rows, found[1], self.weights, self.run)
        off = (home.float() - self.home.float()).abs()  # of three choices torch has another order
        wrong += (off > 2 ** -7 * self.home.float().abs() + 2 ** -6).sum()


def conformance(group: GroupCoordinator) -> int:
    cases = quad_cases((group.name,), group.world_size) + fixed_cases((group.name,), group.world_size)
    taken = {name: group.route(name, torch.empty(16 * group.world_size, device=group.device), op).name
             for name, op in (
                 ("all_reduce", "sum"), ("reduce_scatter", "sum"), ("all_gather", None),
                 ("all_to_all", None))}
    assert set(taken.values()) == {"NVLink"}, taken
    failures = [f"rank {group.rank}: {case}: {text}" for case in cases for text in check(case, group)]
    print("\n".join(failures[:20]), file=sys.stderr)
    return len(failures)


class Stress:
    """Random calls, whose results are compared on the device: every rank knows everybody's data."""

    def __init__(self, group: GroupCoordinator, seed: int) -> None:
        self.group, self.random, self.me, self.n = (group, random.Random(seed), group.rank_in_group,
                                                    group.world_size)
        generator = torch.Generator(group.device).manual_seed(seed)
        self.base = {dtype: [torch.randn(2 * LARGEST, generator=generator, device=group.device).to(dtype)
                             for _ in range(self.n)] for dtype in DTYPES}
        self.moved = {dtype: [with_empty(x, generator) for x in xs] for dtype, xs in self.base.items()}
        self.routed = [Routed(self.random, self.base[self.random.choice(DTYPES)], group) for _ in range(12)]
        self.bad = torch.zeros(2, dtype=torch.int64, device=group.device)

    def call(self, wrong: torch.Tensor) -> None:
        """One collective of random kind, dtype and size; adds the number of wrong elements to `wrong`."""
        dtype, what, most = (self.random.choice(DTYPES), self.random.randrange(5),
                             2 ** (self.random.randrange(7, 21) if self.random.randrange(50) else 23))
        if what == 4:
            return self.random.choice(self.routed).check(wrong)
        count = self.random.randrange(1, max(2, most // (16 * self.n))) * 8 * self.n
        start = self.random.randrange(LARGEST // 8) * 8
        xs = [b[start:start + count] for b in (self.base if what < 2 else self.moved)[dtype]]
        mine, share = xs[self.me], count // self.n
        cut = slice(self.me * share, (self.me + 1) * share)
        if what == 0:
            got, want = self.group.all_reduce(mine), all_reduce_reference(xs)
        elif what == 1:
            got, want = (self.group.reduce_scatter(mine, 0, (share,) * self.n),
                         all_reduce_reference([x[cut] for x in xs]))
        elif what == 2:
            got, want = self.group.all_gather(mine, 0, (count,) * self.n), torch.cat(xs)
        else:
            pieces = self.group.all_to_all(mine.split(share), [(share,)] * self.n, True)
            got, want = torch.cat(pieces), torch.cat([x[cut] for x in xs])
        wrong += (got.view(torch.uint8) != want.view(torch.uint8)).sum()

    def run(self, calls: int) -> int:
        """Eager calls with late ranks, replays of graphs between them and,
        on a stream of their own, beside them."""
        side = torch.cuda.Stream()
        graphs = []
        for _ in range(6):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=side):
                for _ in range(8):
                    self.call(self.bad[1])
            graphs.append(graph)
        done = 0
        while done < calls:
            late, graph, beside = (self.random.randrange(self.n), self.random.choice(graphs),
                                   self.random.random() < 0.5)
            if self.me == late:
                torch.cuda._sleep(self.random.randrange(1_000_000))
            else:
                self.random.randrange(1_000_000)
            if beside:
                with torch.cuda.stream(side):
                    graph.replay()
            for _ in range(24):
                self.call(self.bad[0])
            if beside:
                torch.cuda.current_stream().wait_stream(side)
            else:
                graph.replay()
            side.wait_stream(torch.cuda.current_stream())
            done += 32
        torch.cuda.synchronize()
        return int(self.bad.sum())


def main(what: str, *numbers: str) -> int:
    mesh = Mesh(tp=int(os.environ["WORLD_SIZE"]))
    with connect(mesh, communicators=(nvlink,)) as runtime:
        runtime.create_groups([("tp",)])
        group = runtime.group(("tp",))
        assert not group.router.declined, group.router.declined
        group.router.use(UNMEASURED)                # NVLink takes what it can, faster or not
        wrong = conformance(group) if what == "conformance" else Stress(group, 1).run(int(numbers[0]))
        if runtime.rank == 0:
            print(f"{' '.join((what, *numbers))} on {mesh}: {wrong} wrong; workspace "
                  f"{group.communicators[0].workspace_bytes >> 20} MB", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
