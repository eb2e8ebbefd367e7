"""One rank of the tests of direct NCCL: `conformance`, `graphs`, `stress CALLS`, `tensors` or `close`.

Exit status 1 where anything is wrong.

    torchrun --nproc-per-node 2 tests/gpu/nccl_direct_worker.py stress 20000
"""
from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1] / "helpers"))
from conformance import Case, check, fixed_cases, only, quad_cases

from shardlib import Mesh
from shardlib.distributed import GroupCoordinator, connect
from shardlib.distributed.communicators.nccl import CLOSE_S, nccl
from shardlib.distributed.communicators.protocol import Call

DTYPES = (torch.bfloat16, torch.float32, torch.int32, torch.int64)
LARGEST = 1 << 20


# -- the kit -------------------------------------------------------------------------------------------------

def conformance(group: GroupCoordinator) -> int:
    """The kit with NCCL alone, but for what it refuses; roots on every member."""
    made, axes, n = group.communicators[0], (group.name,), group.world_size

    def taken(case: Case) -> bool:
        op = case.op if case.collective in ("all_reduce", "reduce_scatter") else None
        return made.supports(Call(case.collective, op, getattr(torch, case.dtype), "cuda", 0)) is None
    cases = [case for case in quad_cases(axes, n) + fixed_cases(axes, n) if taken(case)]
    failures = [f"rank {group.rank}: {case}: {text}" for case in cases for text in check(case, group)]
    print("\n".join(failures[:20]), file=sys.stderr)
    if group.rank == 0:
        print(f"{len(cases)} cases")
    return len(failures)


# -- graphs --------------------------------------------------------------------------------------------------

class Captured:
    """A call, its input, and a graph of it, which is replayed with new data
    and compared with an eager call."""

    def __init__(self, group: GroupCoordinator, x: Tensor,
                 call: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
        self.x, self.call, self.graph = x, call, torch.cuda.CUDAGraph()
        with group.graph_capture() as stream, torch.cuda.graph(self.graph, stream=stream):
            self.results = call(x)

    def wrong(self, generator: torch.Generator) -> int:
        """How many elements differ."""
        self.x.copy_(values(self.x.shape, self.x.dtype, generator))
        self.graph.replay()
        want = self.call(self.x)
        torch.cuda.synchronize()
        assert len(want) == len(self.results)
        return sum(int((got != w).sum()) for got, w in zip(self.results, want))


def values(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Small whole numbers, whose sums are exact in any order."""
    return torch.randint(-8, 9, shape, generator=generator, device=generator.device).to(dtype)


def one(x: Tensor | None) -> tuple[Tensor, ...]:
    return () if x is None else (x,)


def calls_to_capture(group: GroupCoordinator) -> dict[str, tuple[tuple[int, ...], torch.dtype,
                                                                 Callable[[Tensor], tuple[Tensor, ...]]]]:
    """What is called with a tensor of which shape and dtype."""
    n, me = group.world_size, group.rank_in_group
    sizes, even = tuple(range(1, n + 1)), (2,) * n
    rows = [[(i + 2 * j) % 4 for j in range(n)] for i in range(n)]
    lone = (3, *(0,) * (n - 1))

    def passed(x: Tensor) -> tuple[Tensor, ...]:
        if me == 0:
            group.send(x, 1)
        return one(group.recv(x.shape, x.dtype, 0) if me == 1 else None)
    return {
        "all_reduce": ((1000, 3), torch.bfloat16, lambda x: one(group.all_reduce(x))),
        "all_reduce max": ((70_001,), torch.int32, lambda x: one(group.all_reduce(x, "max"))),
        "all_reduce of 8 MB": ((1 << 21,), torch.float32, lambda x: one(group.all_reduce(x))),
        "all_gather": ((4, 2, 5), torch.int16, lambda x: one(group.all_gather(x, 1, even))),
        "all_gather, uneven": ((sizes[me], 5), torch.float16, lambda x: one(group.all_gather(x, 0, sizes))),
        "all_gather of one": ((lone[me], 5), torch.bool, lambda x: one(group.all_gather(x, 0, lone))),
        "reduce_scatter": ((3, 2 * n), torch.float32, lambda x: one(group.reduce_scatter(x, 1, even))),
        "reduce_scatter, uneven": ((3, sum(sizes)), torch.bfloat16,
                                   lambda x: one(group.reduce_scatter(x, 1, sizes))),
        "all_to_all": ((2 * n, 5), torch.bfloat16,
                       lambda x: group.all_to_all(x.split(2), [(2, 5)] * n, True)),
        "all_to_all, uneven": ((sum(rows[me]), 5), torch.uint8,
                               lambda x: group.all_to_all(x.split(rows[me]), [(row[me], 5) for row in rows])),
        "broadcast": ((7, 3), torch.int64, lambda x: one(group.broadcast(x, n - 1))),
        "gather": ((sizes[me], 2), torch.float64, lambda x: one(group.gather(x, n // 2, 0, sizes))),
        "send": ((9,), torch.complex64, passed)}


def graphs(group: GroupCoordinator) -> int:
    generator, total = torch.Generator(group.device).manual_seed(group.rank), 0
    captured = {name: Captured(group, torch.zeros(shape, dtype=dtype, device=group.device), call)
                for name, (shape, dtype, call) in calls_to_capture(group).items()}
    for _ in range(5):
        for name, graph in captured.items():
            wrong = graph.wrong(generator)
            total += wrong
            if wrong:
                print(f"rank {group.rank}: {name}: {wrong} wrong after a replay", file=sys.stderr)
    return total


# -- stress --------------------------------------------------------------------------------------------------

class Stress:
    """Random calls, whose results are compared on the device: every rank knows everybody's data.

    `others` calls in between.
    """

    def __init__(self, group: GroupCoordinator, others: GroupCoordinator, seed: int) -> None:
        self.group, self.others, self.random = group, others, random.Random(seed)
        self.me, self.n = group.rank_in_group, group.world_size
        generator = torch.Generator(group.device).manual_seed(seed)
        self.base = {dtype: [values((2 * LARGEST,), dtype, generator) for _ in range(self.n)]
                     for dtype in DTYPES}
        self.bad = torch.zeros(2, dtype=torch.int64, device=group.device)

    def call(self, group: GroupCoordinator, wrong: Tensor) -> None:
        """One collective of random kind, dtype, size and pieces;
        adds the number of wrong elements to `wrong`."""
        me, n, pick = self.me, self.n, self.random
        dtype, what, root = pick.choice(DTYPES), pick.randrange(6), pick.randrange(n)
        most = 2 ** pick.randrange(1, 18)
        rows = ([[pick.randrange(most)] * n] * n if pick.random() < 0.4
                else [[pick.choice((0, pick.randrange(most))) for _ in range(n)] for _ in range(n)])
        counts, start = rows[0], pick.randrange(LARGEST)
        xs = [b[start:start + sum(row)] for b, row in zip(self.base[dtype], rows)]
        whole = [b[start:start + sum(counts)] for b in self.base[dtype]]
        parts = [b[start:start + count] for b, count in zip(self.base[dtype], counts)]
        if what == 0:
            got, want = group.all_reduce(whole[me]), sum(whole)
        elif what == 1:
            got, want = group.reduce_scatter(whole[me], 0, counts), sum(w.split(counts)[me] for w in whole)
        elif what == 2:
            got, want = group.all_gather(parts[me], 0, counts), torch.cat(parts)
        elif what == 3:
            got = torch.cat(group.all_to_all(xs[me].split(rows[me]), [(row[me],) for row in rows]))
            want = torch.cat([x.split(row)[me] for x, row in zip(xs, rows)])
        elif what == 4:
            got, want = group.broadcast(whole[me], root), whole[root]
        else:
            got = group.gather(parts[me], root, 0, counts)
            got, want = (parts[me], parts[me]) if got is None else (got, torch.cat(parts))
        wrong += (got.view(torch.uint8) != want.to(dtype).view(torch.uint8)).sum()

    def run(self, calls: int) -> int:
        """Eager calls with late ranks, torch.distributed's between them, and replays."""
        captured = []
        for _ in range(4):
            graph = torch.cuda.CUDAGraph()
            with self.group.graph_capture() as stream, torch.cuda.graph(graph, stream=stream):
                for _ in range(8):
                    self.call(self.group, self.bad[1])
            captured.append(graph)
        done = 0
        while done < calls:
            late, cycles = self.random.randrange(self.n), self.random.randrange(1_000_000)
            if self.me == late:
                torch.cuda._sleep(cycles)
            for _ in range(24):
                self.call(self.others if self.random.random() < 0.1 else self.group, self.bad[0])
            self.random.choice(captured).replay()
            done += 32
        torch.cuda.synchronize()
        return int(self.bad.sum())


# -- tensors by name -----------------------------------------------------------------------------------------

def tensors(group: GroupCoordinator) -> int:
    """Tensors of the GPU and of the CPU in one dict, to the next member and to all;
    how many came otherwise."""
    generator = torch.Generator(group.device).manual_seed(0)
    whole = {"x": values((5, 3), torch.bfloat16, generator).t(), "step": torch.tensor(3),
             "none": values((0, 4), torch.float32, generator), "mask": values((7,), torch.bool, generator),
             "large": values((1 << 20,), torch.float32, generator)}
    given, got = {**whole, "carry": (whole["x"], "T B @tp:1")}, None
    if group.rank_in_group == 0:
        group.send_tensors(given, 1)
    elif group.rank_in_group == 1:
        got = group.recv_tensors(0)
    everywhere = group.broadcast_tensors(given if group.rank_in_group == 1 else None, 1)
    wrong = 0
    for answer in (everywhere, got) if got is not None else (everywhere,):
        wrong += list(answer) != list(given) or answer["carry"][1] != "T B @tp:1"
        for name, x in {**whole, "carry": whole["x"]}.items():
            y = answer[name][0] if name == "carry" else answer[name]
            wrong += not (y.device == x.device and y.dtype == x.dtype and torch.equal(y, x))
    return wrong


# -- the end -------------------------------------------------------------------------------------------------

def close(group: GroupCoordinator) -> int:
    """Whether the group can be destroyed in time while a graph holds calls of it,
    and what it gave stays right."""
    ones = torch.ones(1 << 20, device=group.device)
    graph = torch.cuda.CUDAGraph()
    with group.graph_capture() as stream, torch.cuda.graph(graph, stream=stream):
        group.all_reduce(ones)
    graph.replay()
    got, begin = group.all_reduce(ones), time.monotonic()
    group.communicators[0].close()
    took = time.monotonic() - begin
    print(f"rank {group.rank}: closed in {took:.2f} s", flush=True)
    return int(took > 2 * CLOSE_S + 2) + int((got != group.world_size).sum())


def main(what: str, *numbers: str) -> int:
    mesh = Mesh(tp=int(os.environ["WORLD_SIZE"]))
    with connect(mesh, communicators=(nccl,)) as runtime:
        runtime.create_groups([("tp",)])
        whole = runtime.group(("tp",))
        assert not whole.router.declined, whole.router.declined
        group, others = only("NCCL", whole), only("torch.distributed (nccl)", whole)
        wrong = (Stress(group, others, 1).run(int(numbers[0])) if what == "stress" else
                 tensors(whole) if what == "tensors" else
                 {"conformance": conformance, "graphs": graphs, "close": close}[what](group))
        if runtime.rank == 0:
            print(f"{what} {' '.join(numbers)} on {mesh}: {wrong} wrong; NCCL "
                  f"{whole.communicators[0].version}", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
