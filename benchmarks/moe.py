"""Experts over the GPUs of one host: rows go to their experts and come home, and a whole layer of experts;
ours beside NCCL and torch, in one run, by graph replay.

    torchrun --nproc-per-node 4 benchmarks/moe.py           writes results/moe.json
    torchrun --nproc-per-node 4 benchmarks/moe.py vdev      adds torch's all_to_all_vdev_2d, whose symmetric
                                                            memory is NVSHMEM's, in processes of its own
    torchrun --nproc-per-node 2 benchmarks/moe.py           without GPUs: a rehearsal, in which all that is
                                                            measured beside each other has to give the same

bf16, d_model 4096. A figure is the median over rounds of the slowest rank's µs a call, of calls one after
another in a CUDA graph. T is the tokens of each rank.

dispatch, combine: each token to 2 of 8 experts; from tokens as they lie to rows sorted by expert, and from
those to the weighted sums of the own tokens. Peers are at their best: NCCL's all_to_all sends two rows a
token, evenly, that lie sorted, and sorts nothing; so does torch's; all_gather and reduce_scatter move all
tokens, and do no more. The floor is a copy of a token for each other rank that has an expert of it, at what a
copy engine reaches.
grouped matmul: rows times the matrices of one rank's experts. A loop of cuBLAS calls knows on the host where
the rows of each begin. The floor is the products at the rate of one of 8192 x 8192 x 8192, or the reading of
the matrices.
layer: each token to 6 of 64 experts of width 2048, from tokens and the router's logits to the sums. By NCCL's
all_to_all the host knows beforehand who sends how much to whom, and in which order. The floor is that of the
exchange, both ways, and that of the matmuls.
"""
from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from on_gpu import graph_us, read_bytes_per_us
from record import RESULTS, row, write
from torch import Tensor

from shardlib import Layout, Mesh, compile, sharded
from shardlib.distributed import connect
from shardlib.distributed.calibrate import time_on_gpu
from shardlib.distributed.communicators.protocol import ExchangingCommunicator
from shardlib.distributed.graph_capture import chained
from shardlib.distributed.group_coordinator import GroupCoordinator
from shardlib.distributed.runtime import Runtime
from shardlib.functions import silu
from shardlib.models.decoding import PASSES
from shardlib.ops import combine, dispatch, grouped_einsum, route
from shardlib.ops.expert_rows import chosen_rows, combined, grouped_product
from shardlib.ops.route import routed

GPU = torch.cuda.is_available()
D, WIDTH = (4096, 2048) if GPU else (32, 16)
TOKENS, LAYER_TOKENS = ((128, 512, 2048, 4096), (8, 128, 1024, 4096)) if GPU else ((6,), (5,))
EXCHANGED, LAYER = (8, 2), (64, 6)
"""(experts, experts of a token)."""
MATMULS = {"2 experts of 4096 x 14336": (2, 14336, 2), "16 experts of 4096 x 2048": (16, 2048, 6)}
"""name -> (experts of a rank, their width, its rows for each token of a rank)."""
SKEWS = {"all to the experts of one rank": 2, "half to those of one rank": 1}
"""name -> how many of a token's experts are of rank 0."""
LAUNCH_US, TRIP_US, BYTES_PER_US = 0.64, 0.75, 365_000.0
Calls = dict[str, Callable[[], Any]]


@sharded("B T D, B T E/1, E D F, E D F, E F D -> B T D")
def experts_layer(x, logits, gate, up, down, *, top_k):
    weights, chosen = route("B T E -> B T J, B T J", logits, top_k=top_k)
    rows, at = dispatch("B T D, B T J -> (E B T)~J D, (E B T)~J", x, chosen)
    gate = grouped_einsum("(E B T)~J D, (E B T)~J, E D F -> (E B T)~J F", rows, at, gate)
    up   = grouped_einsum("(E B T)~J D, (E B T)~J, E D F -> (E B T)~J F", rows, at, up)
    down = grouped_einsum("(E B T)~J F, (E B T)~J, E F D -> (E B T)~J D", silu(gate) * up, at, down)
    return combine("(E B T)~J D, (E B T)~J, B T J -> B T D", down, at, weights)


# -- what is exchanged ---------------------------------------------------------------------------------------

class Routing(NamedTuple):
    """Of all ranks' tokens, one rank after another: the experts of each, and their weights."""
    experts: int
    chosen: Tensor
    weights: Tensor
    world: int

    @classmethod
    def drawn(cls, tokens: int, experts: int, top_k: int, world: int, device: torch.device,
              of_first: int = 0) -> Routing:
        """Alike on all ranks. of_first: how many of a token's experts are rank 0's, if not any."""
        g, here = torch.Generator().manual_seed(tokens), experts // world
        scores = torch.rand(tokens * world, experts, generator=g)
        if of_first:
            scores[:, here:] -= 2.0 * (of_first == top_k)
            scores[torch.arange(tokens * world), torch.arange(tokens * world) % here] += 1.0
        weights, chosen = scores.softmax(-1).topk(top_k, -1)
        return cls(experts, chosen.to(device), weights.to(device), world)

    def own(self, rank: int) -> tuple[Tensor, Tensor]:
        """A rank's part."""
        return self.chosen.chunk(self.world)[rank], self.weights.chunk(self.world)[rank]

    def copies(self) -> int:
        """Tokens that the busiest rank sends or gets, one for each other rank that has an expert of one."""
        owner = self.chosen // (self.experts // self.world)
        there = owner.new_zeros(len(owner), self.world).scatter(1, owner, 1)
        by_source = there.view(self.world, -1, self.world).sum(1).fill_diagonal_(0)
        return int(max(by_source.sum(0).max(), by_source.sum(1).max()))

    def floor(self) -> float:
        return LAUNCH_US + TRIP_US + self.copies() * D * 2 / BYTES_PER_US


class Sent(NamedTuple):
    """What the host knows of a routing beforehand, of one rank. order: the own choices sorted by expert;
    sizes: of them for each rank, and of each; by_expert: of what has come, the order by expert; ends: where
    the rows of each own expert end."""
    order: Tensor
    to: list[int]
    come: list[int]
    by_expert: Tensor
    ends: Tensor

    @classmethod
    def of(cls, routing: Routing, rank: int) -> Sent:
        here, world = routing.experts // routing.world, routing.world
        parts = [part.reshape(-1).cpu() for part in routing.chosen.chunk(world)]
        own = parts[rank].sort(stable=True)
        come = torch.cat([part[part // here == rank].sort(stable=True).values for part in parts])
        counts = [[int((part // here == r).sum()) for r in range(world)] for part in parts]
        by_expert, device = come.sort(stable=True), routing.chosen.device
        ends = torch.searchsorted(by_expert.values, torch.arange(rank * here + 1, (rank + 1) * here + 1))
        return cls(own.indices.to(device), counts[rank], [c[rank] for c in counts],
                   by_expert.indices.to(device), ends.int().to(device))


def grouped(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    if x.is_cuda:
        return F.grouped_mm(x, w, offs=ends)
    return torch.cat([part @ m for part, m in zip(x.tensor_split(ends[:-1].tolist()), w)])


def gathered(x: Tensor, group: GroupCoordinator) -> Tensor:
    return group.all_gather(x, 0, (len(x),) * group.world_size)


class Exchange:
    """One rank's tensors of a routing, and who moves them."""

    def __init__(self, group: GroupCoordinator, tokens: int, of_first: int = 0) -> None:
        self.group, self.tokens, (experts, self.top_k) = group, tokens, EXCHANGED
        self.world, self.here = group.world_size, experts // group.world_size
        self.n = tokens * self.world
        self.most = self.n * min(self.top_k, self.here)
        self.kernels = next((c for c in group.communicators if isinstance(c, ExchangingCommunicator)), None)
        self.routing = Routing.drawn(tokens, experts, self.top_k, self.world, group.device, of_first)
        self.chosen, self.weights = self.routing.own(group.rank_in_group)
        self.x = torch.randn(tokens, D, device=group.device, dtype=torch.bfloat16)
        self.sent = Sent.of(self.routing, group.rank_in_group)

    def ours(self) -> tuple[Tensor, Tensor]:
        """Rows by expert, and where each choice lies."""
        chosen, first = gathered(self.chosen, self.group), self.here * self.group.rank_in_group
        if self.kernels is None:
            rows, at = chosen_rows(gathered(self.x, self.group), chosen, self.here, self.n, self.top_k, first,
                                   self.most)
            return rows, at
        from shardlib.triton_kernels.expert_places import expert_places
        _, place, _ = expert_places(chosen, first, self.here, self.most)
        return self.kernels.dispatch_rows(self.x, chosen, place, self.here, self.most, self.tokens), place

    def ours_home(self, rows: Tensor, where: Tensor) -> Tensor:
        weights = gathered(self.weights, self.group)
        if self.kernels is None:
            y = combined(rows, where, self.here, self.n, self.top_k, (self.n, D), weights)
            return self.group.reduce_scatter(y, 0, (self.tokens,) * self.world)
        return self.kernels.combine_rows(rows, where, weights, self.tokens)

    def nccl(self, rows: Tensor, out: Tensor, to: list[int] | None = None,
             come: list[int] | None = None) -> Callable[[], Any]:
        return lambda: dist.all_to_all_single(out, rows, come, to, group=self.group.device_group)

    def calls(self) -> tuple[Calls, Calls]:
        """There, and home."""
        pg, (rows, where) = self.group.device_group, self.ours()
        two, whole = (torch.randn(k, D, device=self.x.device, dtype=self.x.dtype)
                      for k in (self.tokens * self.top_k, self.n))
        mine, there = self.x.clone(), self.x.new_empty(sum(self.sent.come), D)
        known = self.x[self.sent.order // self.top_k]
        even = {"NCCL all_to_all, even": self.nccl(two, torch.empty_like(two))} if self.of_even() else {}
        return ({"ours": self.ours, **even,
                 "NCCL all_to_all, counts known": self.nccl(known, there, self.sent.to, self.sent.come),
                 "NCCL all_gather": lambda: dist.all_gather_into_tensor(whole, mine, group=pg)},
                {"ours": lambda: self.ours_home(rows, where), **even,
                 "NCCL all_to_all, counts known": self.nccl(there, known, self.sent.come, self.sent.to),
                 "NCCL reduce_scatter": lambda: dist.reduce_scatter_tensor(mine, whole, group=pg)})

    def of_even(self) -> bool:
        return self.tokens * self.top_k % self.world == 0

    def check(self) -> None:
        """Rows by all_to_all are ours, and come home to the weighted sums."""
        rows, where = self.ours()
        known = self.x[self.sent.order // self.top_k]
        there = self.x.new_empty(sum(self.sent.come), D)
        self.nccl(known, there, self.sent.to, self.sent.come)()
        assert torch.equal(rows[:len(there)], there[self.sent.by_expert])
        want = (self.x.float().unsqueeze(1) * self.weights.unsqueeze(2)).sum(1)
        assert torch.allclose(self.ours_home(rows, where).float(), want, rtol=2 ** -6, atol=2 ** -6)


# -- a layer -------------------------------------------------------------------------------------------------

class Layer:
    """One rank's tokens and experts, and who takes them through."""

    def __init__(self, runtime: Runtime, group: GroupCoordinator, tokens: int) -> None:
        self.group, self.tokens, (experts, self.top_k) = group, tokens, LAYER
        self.world, self.here = group.world_size, experts // group.world_size
        self.n, device = tokens * self.world, group.device
        g = torch.Generator(device).manual_seed(group.rank_in_group)

        def normal(*shape: int) -> Tensor:
            made = torch.empty(shape, device=device, dtype=torch.bfloat16)
            return made.normal_(0, shape[-2] ** -0.5, generator=g)
        self.x, self.logits = normal(tokens, D), normal(tokens, experts)
        self.gate, self.up = normal(self.here, D, WIDTH), normal(self.here, D, WIDTH)
        self.down = normal(self.here, WIDTH, D)
        weights, chosen = self.routed()
        self.routing = Routing(experts, gathered(chosen, group), gathered(weights, group), self.world)
        self.sent = Sent.of(self.routing, group.rank_in_group)
        self.step = compile(experts_layer, Layout(B="ep", E="ep"), runtime=runtime, passes=PASSES,
                            sizes=dict(B=self.world, E=experts), top_k=self.top_k)

    def routed(self) -> tuple[Tensor, Tensor]:
        return routed(self.logits, None, self.top_k, "softmax", True, 1.0, 1, 1)

    def ours(self) -> Tensor:
        return self.step(self.x.unsqueeze(0), self.logits.unsqueeze(0), self.gate, self.up, self.down)[0]

    def through(self, rows: Tensor, ends: Tensor) -> Tensor:
        return grouped(F.silu(grouped(rows, self.gate, ends)) * grouped(rows, self.up, ends), self.down, ends)

    def by_all_to_all(self) -> Tensor:
        pg, sent, (weights, _) = self.group.device_group, self.sent, self.routed()
        there, home = self.x.new_empty(sum(sent.come), D), self.x.new_empty(self.tokens * self.top_k, D)
        dist.all_to_all_single(there, self.x[sent.order // self.top_k], sent.come, sent.to, group=pg)
        made = torch.empty_like(there)
        made[sent.by_expert] = self.through(there[sent.by_expert], sent.ends)
        dist.all_to_all_single(home, made, sent.to, sent.come, group=pg)
        by_choice = torch.empty_like(home)
        by_choice[sent.order] = home
        return (by_choice.view(self.tokens, self.top_k, D) * weights.unsqueeze(2)).sum(1).to(self.x.dtype)

    def by_all_gather(self) -> Tensor:
        pg, (weights, chosen), sizes = self.group.device_group, self.routed(), (self.here, self.n, self.top_k)
        all_x, all_chosen, all_weights = (t.new_empty(self.n, t.shape[1]) for t in (self.x, chosen, weights))
        for whole, part in ((all_x, self.x), (all_chosen, chosen), (all_weights, weights)):
            dist.all_gather_into_tensor(whole, part, group=pg)
        rows, at = chosen_rows(all_x, all_chosen, *sizes, self.here * self.group.rank_in_group,
                               self.n * min(self.top_k, self.here))
        h = F.silu(grouped_product(rows, at, self.gate, *sizes)) * grouped_product(rows, at, self.up, *sizes)
        y = combined(grouped_product(h, at, self.down, *sizes), at, *sizes, (self.n, D), all_weights)
        own = torch.empty_like(self.x)
        dist.reduce_scatter_tensor(own, y, group=pg)
        return own

    def calls(self) -> Calls:
        return {"ours": self.ours, "NCCL all_to_all + grouped mm": self.by_all_to_all,
                "NCCL all_gather, reduce_scatter + grouped mm": self.by_all_gather}

    def check(self) -> None:
        want = self.by_all_to_all().float()
        for name, call in self.calls().items():
            off = (call().float() - want).abs().max() / want.abs().max()
            assert off < 2 ** -5, f"{name} is off by {off}"

    def floor(self, rate: float, flops: float) -> float:
        rows = max(int(self.sent.ends[-1]), 1)
        hit = int(self.sent.ends.diff(prepend=self.sent.ends.new_zeros(1)).count_nonzero())
        return 2 * self.routing.floor() + max(6 * D * WIDTH * hit / rate, 6 * rows * D * WIDTH / flops)


# -- matmuls on one GPU --------------------------------------------------------------------------------------

def flops_per_us() -> float:
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192 ** 3 / graph_us([lambda: a @ b] * 4)


def matmul_rows(rate: float, flops: float) -> list[dict]:
    made = []
    for name, (experts, width, times) in MATMULS.items():
        w = [torch.randn(experts, D, width, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
        for tokens in TOKENS:
            x = torch.randn(tokens * times, D, device="cuda", dtype=torch.bfloat16)
            g = torch.Generator().manual_seed(tokens)
            counts = torch.rand(experts, generator=g).add(1)
            ends = (counts.cumsum(0) / counts.sum() * len(x)).round().int()
            parts, on_gpu = [0, *ends.tolist()], ends.cuda()

            def loop(m: Tensor, x: Tensor = x, parts: Sequence[int] = parts) -> None:
                for a, b, each in zip(parts, parts[1:], m):
                    torch.mm(x[a:b], each)
            us = graph_us([lambda m=m, x=x: grouped(x, m, on_gpu) for m in w])
            peers = {"loop of cuBLAS, counts known": graph_us([lambda m=m: loop(m) for m in w])}
            made.append(row(f"grouped matmul, {name}, {len(x)} rows", "µs", us, peers,
                            max(2 * len(x) * D * width / flops, w[0].nbytes / rate)) | {"by": "torch's"})
    return made


# -- a run ---------------------------------------------------------------------------------------------------

def timed(calls: Calls, group: GroupCoordinator, count: int) -> dict[str, float]:
    with chained():
        return {who: time_on_gpu(call, group, count, capturing=True) for who, call in calls.items()}


def exchange_rows(group: GroupCoordinator) -> list[dict]:
    made = []
    cases = [(tokens, "", 0) for tokens in TOKENS] + [(2048, f", {name}", k) for name, k in SKEWS.items()]
    for tokens, name, of_first in cases:
        case = Exchange(group, tokens, of_first)
        case.check()
        for what, calls in zip(("dispatch", "combine"), case.calls()):
            us = timed(calls, group, 10)
            made.append(row(f"{what}, {tokens} tokens{name}, {group.world_size} GPUs", "µs", us.pop("ours"),
                            us, case.routing.floor()))
            say(group, made[-1])
    return made


def layer_rows(runtime: Runtime, group: GroupCoordinator, rate: float, flops: float) -> list[dict]:
    made = []
    for tokens in LAYER_TOKENS:
        case = Layer(runtime, group, tokens)
        case.check()
        us = timed(case.calls(), group, 4)
        made.append(row(f"layer, {tokens} tokens, {group.world_size} GPUs", "µs", us.pop("ours"), us,
                        case.floor(rate, flops)))
        say(group, made[-1])
    return made


def say(group: GroupCoordinator, row: dict) -> None:
    if group.rank_in_group == 0:
        print(row["case"], row["ours"], row["peers"], "floor", row["floor"], flush=True)


def measure(parts: Sequence[str]) -> None:
    from shardlib.distributed.communicators.nccl import nccl
    from shardlib.ops.nvlink import nvlink
    with connect(Mesh(ep=int(os.environ["WORLD_SIZE"])), "cuda", communicators=(nvlink, nccl)) as runtime, \
            torch.inference_mode():
        runtime.create_groups([("ep",)])
        group, rows = runtime.group(("ep",)), []
        rate, flops = read_bytes_per_us(), flops_per_us()
        if "exchange" in parts:
            rows += exchange_rows(group)
        if "layer" in parts:
            rows += layer_rows(runtime, group, rate, flops)
        group.barrier()
        if "matmul" in parts and runtime.rank == 0:
            rows += matmul_rows(rate, flops)
        group.barrier()
        rank = runtime.rank
    if rank == 0:
        write("moe", rows, read_TB_s=round(rate / 1e6, 3), TFLOP_s=round(flops / 1e6, 1))


def rehearse() -> None:
    """On the CPU: all that is measured, once, and what it gives."""
    with connect(Mesh(ep=int(os.environ["WORLD_SIZE"])), "cpu") as runtime, torch.inference_mode():
        runtime.create_groups([("ep",)])
        group = runtime.group(("ep",))
        for tokens, of_first in ((6, 0), (6, 1), (6, 2), (1, 2)):
            case = Exchange(group, tokens, of_first)
            case.check()
            for calls in case.calls():
                for call in calls.values():
                    call()
        for tokens in LAYER_TOKENS:
            case = Layer(runtime, group, tokens)
            case.check()
            assert case.floor(1.0, 1.0) > 0
        if runtime.rank == 0:
            print("all give the same", flush=True)


def vdev() -> None:
    """Adds torch's all_to_all_vdev_2d, there and home, to the rows that are there."""
    os.environ["TORCH_SYMMMEM"] = "NVSHMEM"
    import torch.distributed._symmetric_memory as symmetric_memory
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.empty(1, device=device)
    dist.init_process_group("nccl", device_id=device)
    symmetric_memory.set_backend("NVSHMEM")
    name, found, (experts, top_k) = dist.group.WORLD.group_name, {}, EXCHANGED

    def symmetric(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        made = symmetric_memory.empty(shape, dtype=dtype, device=device)
        symmetric_memory.rendezvous(made, group=name)
        return made
    for tokens in TOKENS:
        routing = Routing.drawn(tokens, experts, top_k, world, device)
        rows, most = tokens * top_k, tokens * world * top_k
        there, back, sizes = symmetric(rows, D), symmetric(most, D), symmetric(experts, dtype=torch.int64)
        come, home = (symmetric(2, experts, dtype=torch.int64) for _ in range(2))
        sizes.copy_(routing.own(rank)[0].reshape(-1).bincount(minlength=experts))
        op = torch.ops.symm_mem
        calls = {"dispatch": lambda: op.all_to_all_vdev_2d(there, back, sizes, come, name),
                 "combine": lambda: op.all_to_all_vdev_2d_offset(back, there, come, home, name)}
        for what, call in calls.items():
            us = torch.tensor(graph_us([call] * 10), device=device)
            dist.all_reduce(us, dist.ReduceOp.MAX)
            found[f"{what}, {tokens} tokens, {world} GPUs"] = float(us)
    dist.destroy_process_group()
    if rank == 0:
        print(found, flush=True)
        file = RESULTS / "moe.json"
        record = json.loads(file.read_text())
        for each in record["rows"]:
            if each["case"] in found:
                each["peers"]["torch all_to_all_vdev_2d"] = float(f"{found[each['case']]:.4g}")
        file.write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    if "RANK" not in os.environ:
        print("moe: measured on GPUs by torchrun --nproc-per-node 4 benchmarks/moe.py")
    elif not GPU:
        rehearse()
    elif sys.argv[1:] == ["vdev"]:
        vdev()
    else:
        measure(sys.argv[1:] or ("exchange", "layer", "matmul"))


if __name__ == "__main__":
    main()
