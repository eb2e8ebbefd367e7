"""Kernels of few rows on GPUs: `one_gpu CASES [SEED]` on one, `norms CALLS` one rank of the tests of
all_reduce + add + rms_norm. Exit status 1 where anything is wrong.

    python tests/gpu/kernels_worker.py one_gpu 300
    torchrun --nproc-per-node 4 tests/gpu/kernels_worker.py norms 10000
"""
from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from shardlib.distributed.graph_capture import chained
from shardlib.ops.expert_ffn import tiles_of
from shardlib.triton_kernels.all_reduce_add_rms_norm import all_reduce_add_rms_norm_reference
from shardlib.triton_kernels.cached_attention import cached_attention, cached_attention_reference
from shardlib.triton_kernels.cross_entropy import (
    Labels,
    label_sums,
    label_sums_reference,
    label_sums_vjp,
    label_sums_vjp_reference,
    token_losses,
    token_losses_reference,
)
from shardlib.triton_kernels.decode_attention import decode_attention, decode_attention_reference
from shardlib.triton_kernels.expert_ffn import expert_ffn, expert_ffn_reference
from shardlib.triton_kernels.matmul_rows import (
    Tile,
    gated_matmul_rows,
    gated_matmul_rows_reference,
    matmul_rows,
)
from shardlib.triton_kernels.rms_norm import add_rms_norm, rms_norm
from shardlib.triton_kernels.route import route, route_reference

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
EPS = 1e-5
ONE_ROW = (Tile(1, 512, 2, 1), Tile(2, 512, 4, 2), Tile(2, 1024, 4, 4), Tile(4, 512, 8, 2),
           Tile(2, 4096, 4, 3, blocks=2), Tile(32, 128, 4, 3, 2))
MANY = (Tile(16, 64, 4, 4), Tile(32, 128, 4, 3, 2), Tile(64, 64, 4, 3), Tile(16, 128, 2, 3, 5))


def error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm().clamp(min=1e-30))


def attention_of_torch(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    """By its own kernels, with a mask."""
    seen = (torch.arange(k.shape[1], device=q.device) < lengths[:, None, None]
            + torch.arange(q.shape[1], device=q.device)[:, None])
    k, v = (x.nan_to_num().transpose(1, 2).repeat_interleave(q.shape[3], 1) for x in (k, v))
    out = F.scaled_dot_product_attention(q.permute(0, 2, 3, 1, 4).flatten(1, 2), k, v, seen[:, None])
    return out.unflatten(1, q.shape[2:4]).permute(0, 3, 1, 2,
                                                  4).masked_fill(~seen.any(-1)[..., None, None, None], 0)


class OneGpu:
    """Cases of random sizes: each at most twice as far from float64 as torch's,
    its bits the same in a graph's replay."""

    def __init__(self, seed: int) -> None:
        self.random, self.failures = random.Random(seed), []
        torch.manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, device="cuda").to(self.dtype)

    def close(self, what: str, run: Callable[[], Tensor], reference: Callable[..., Tensor], *inputs: Tensor,
              torchs: Callable[..., Tensor] | None = None) -> None:
        got, again = run(), None
        graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=side):
            again = run()
        for _ in range(2):
            again.fill_(float("nan"))
            graph.replay()
            torch.cuda.synchronize()
            if not torch.equal(again.view(torch.uint8), got.view(torch.uint8)):
                self.failures.append(f"{what}: other bits in a graph")
        exact = reference(*(x.double() if x.is_floating_point() else x for x in inputs))
        ours, theirs = error(got, exact), error((torchs or reference)(*inputs), exact)
        if not ours <= 2 * theirs + 1e-7 or not bool(got.isfinite().all()):
            self.failures.append(f"{what}: error {ours:.3g}, torch's {theirs:.3g}")

    def norm(self) -> None:
        rows, width = self.random.randint(1, 40), self.random.choice(
            (8, 24, 100, 576, 1000, 4096, 8192, 16384, self.random.randint(1, 9000)))
        x, old, w = self.normal(rows, width), self.normal(rows, width), self.normal(width)
        self.close(f"rms_norm {rows} x {width} {self.dtype}", lambda: rms_norm(x, w, EPS),
                   lambda x, w: F.rms_norm(x, (width,), w, EPS), x, w)
        total, normed = add_rms_norm(x, old, w, EPS, early=True)
        if not torch.equal(total, old + x) or not torch.equal(normed, rms_norm(total, w, EPS)):
            self.failures.append(
                f"add_rms_norm {rows} x {width} {self.dtype}: other bits than add, then norm")

    def matmul(self) -> None:
        gated, rows = self.random.random() < 0.5, self.random.choice((1, 1, 2, 7, 8, 9, 16, 31, 32))
        lines, columns = 8 * self.random.randint(1, 300), self.random.randint(1, 700)
        tile = self.random.choice([t for t in (ONE_ROW if rows == 1 else MANY) if t.columns > gated])
        if self.dtype == torch.float32:
            tile = self.random.choice(ONE_ROW[1:4])
        x, w = self.normal(rows, lines), (self.normal(columns * (1 + gated), lines) * lines ** -0.5).mT
        counts = torch.zeros(128, dtype=torch.int32, device="cuda")
        ours, reference = ((gated_matmul_rows, gated_matmul_rows_reference) if gated
                           else (matmul_rows, torch.matmul))
        early = self.random.random() < 0.5
        self.close(f"matmul {rows} x {lines} x {columns} {gated} {tile} {early} {self.dtype}",
                   lambda: ours(x, w, tile, counts, early), reference, x, w)

    def attention(self) -> None:
        rows, new, heads, group = (self.random.randint(1, 9), self.random.choice((1, 1, 1, 2, 4)),
                                   self.random.randint(1, 4), self.random.choice((1, 3, 4, 8)))
        h, keys, splits = (self.random.choice((16, 64, 80, 128)), self.random.randint(new, 700),
                           self.random.choice((1, 1, 2, 5, 8, 16)))
        q, k, v = (self.normal(rows, new, heads, group, h), self.normal(rows, keys, heads, h),
                   self.normal(rows, keys, heads, h))
        lengths = torch.tensor(
            [self.random.choice((-3, 0, 1, keys - new + 1, keys + 5, self.random.randint(0, keys - new + 1)))
             for _ in range(rows)], device="cuda")
        behind = torch.arange(keys, device="cuda") >= (lengths + new - 1)[:, None]
        k[behind], v[behind] = float("nan"), float("nan")
        counts = torch.zeros(rows * heads, dtype=torch.int32, device="cuda")
        block, warps = ((32, 4) if self.dtype == torch.float32
                        else self.random.choice(((32, 4), (64, 4), (32, 2), (128, 4))))
        self.close(f"attention {rows} {new} {heads} {group} {h} {keys} {splits} {block} {warps} {self.dtype} "
                   f"{lengths.tolist()}",
                   lambda: decode_attention(q, k, v, lengths, counts, splits, block, warps),
                   decode_attention_reference, q, k, v, lengths, torchs=attention_of_torch)
        if bool(counts.any()):
            self.failures.append(f"attention: counts are left, {splits} splits")

    def cached(self) -> None:
        """The cache beyond start is NaN; afterwards it has rope of k there, whose last bit depends on how
        torch's addcmul rounds, and v; and all else to the bit."""
        rows, new, heads, group = (self.random.randint(1, 9), self.random.choice((1, 1, 1, 2, 3)),
                                   self.random.randint(1, 4), self.random.choice((1, 2, 4, 8)))
        h, slots, splits = (self.random.choice((16, 64, 80, 128)), self.random.randint(new, 700),
                            self.random.choice((1, 1, 2, 5, 8, 16)))
        q, k, v = self.normal(rows, new, heads * (group + 2) * h).split(
            [heads * group * h, heads * h, heads * h], -1)
        q, k, v = q.unflatten(-1, (heads, group, h)), k.unflatten(-1, (heads, h)), v.unflatten(-1, (heads, h))
        start = torch.tensor([self.random.choice((0, slots - new, self.random.randint(0, slots - new)))
                              for _ in range(rows)], device="cuda")
        radians = (start[:, None] + torch.arange(new, device="cuda"))[..., None] * torch.rand(
            h // 2, device="cuda")
        angles = torch.cat((radians.cos(), radians.sin()), -1)
        keys, values = (self.normal(rows, slots, heads, h) for _ in range(2))
        after = torch.arange(slots, device="cuda") - start[:, None]
        for cache in (keys, values):
            cache[after >= 0] = float("nan")
        before, counts = (keys.clone(), values.clone()), torch.zeros(64, dtype=torch.int32, device="cuda")
        block, warps = ((32, 4) if self.dtype == torch.float32
                        else self.random.choice(((32, 4), (64, 4), (32, 2), (128, 4))))
        what = (f"cached {rows} {new} {heads} {group} {h} {slots} {splits} {block} {warps} {self.dtype} "
                f"{start.tolist()}")
        self.close(what, lambda: cached_attention(q, k, v, angles, keys, values, start, counts, splits, block,
                                                  warps),
                   lambda *x: cached_attention_reference(*x)[0], q, k, v, angles, *before, start)
        turned = ((after >= 0) & (after < new))[..., None, None]
        for name, got, want in zip(("keys", "values"), (keys, values),
                                   cached_attention_reference(q, k, v, angles, *before, start)[1:]):
            got, want = got.nan_to_num(7.0), want.nan_to_num(7.0)
            off, one = (got - want).abs(), torch.finfo(self.dtype).eps * want.abs() + 2.0 ** -22
            if bool((off > (one * turned if name == "keys" else 0)).any()):
                self.failures.append(f"{what}: other {name}, by {float(off.max()):.3g}")
        if bool(counts.any()):
            self.failures.append(f"{what}: counts are left")

    def experts(self) -> None:
        """Of tokens that all chose one, of experts of other ranks, and of tiles that do not divide."""
        tokens, count = self.random.choice((1, 2, 7, 8, 16, 31, 32, 64, 100, 128)), self.random.choice((3, 8))
        d, f = 8 * self.random.randint(1, 90), 8 * self.random.randint(1, 90)
        j, first = self.random.randint(1, 3), self.random.choice((0, 0, 1))
        if self.dtype == torch.float32:
            self.dtype = torch.bfloat16
        scores = torch.rand(tokens, count, device="cuda")
        scores[:, 1] += self.random.choice((0, 0, 1))
        chosen, weights = scores.argsort(-1, descending=True)[:, :j].contiguous(), torch.rand(tokens, j,
                                                                                           device="cuda")
        gate, up, down = (self.normal(count - first, *shape) * shape[0] ** -0.5
                          for shape in ((d, f), (d, f), (f, d)))
        if self.random.random() < 0.3:
            gate, up, down = (w.mT.contiguous().mT for w in (gate, up, down))
        tiles = self.random.choice((tiles_of(tokens, f), (Tile(32, 128, 4, 3), Tile(64, 32, 4, 3, 3)),
                                    (Tile(128, 64, 8, 3), Tile(128, 64, 8, 3))))
        counts, early = torch.zeros(64, dtype=torch.int32, device="cuda"), self.random.random() < 0.5
        self.close(f"experts {tokens} {count} {first} {j} {d} {f} {tiles} {early} {self.dtype}",
                   lambda: expert_ffn(x, chosen, weights, gate, up, down, first, tiles, counts, early),
                   lambda x, *more: expert_ffn_reference(x, chosen, weights.to(more[0].dtype), *more, first),
                   x := self.normal(tokens, d), gate, up, down)
        if bool(counts.any()):
            self.failures.append(f"experts: counts are left, {tiles}")

    def routes(self) -> None:
        tokens, count = self.random.randint(1, 300), self.random.choice((3, 8, 64, 128, 160))
        j = self.random.randint(1, min(8, count))
        logits = self.normal(tokens, count)
        weights, chosen = route(logits, j)
        want, experts = route_reference(logits, j)
        same = chosen == experts                # softmax may round otherwise where two are as good as equal
        if same.float().mean() < 0.99 or float((weights - want).abs().max()) > 1e-5:
            self.failures.append(f"route {tokens} {count} {j} {self.dtype}")

    def losses(self) -> None:
        """Whole rows and pieces of them, some without a label, and the derivative."""
        rows, v = self.random.randint(1, 60), self.random.choice((1, 15, 1000, 2049, 32064, 128256))
        start, ignored = self.random.choice((0, 7)), self.random.choice((None, -100, 3))
        x = (self.normal(rows, v) * self.random.choice((0.1, 5, 30))).to(self.dtype)
        index = torch.randint(-2, start + v + 2, (rows,), device="cuda")
        labels = Labels(index, start, start + v - 1, ignored)
        whole = labels._replace(index=labels.index.clamp(0, v - 1), start=0)
        what = f"{rows} {v} {start} {ignored} {self.dtype}"
        g = torch.randn(2, rows, device="cuda")
        top = x.amax(1).float()
        self.close(f"token_losses {what}", lambda: token_losses(x, whole)[0],
                   lambda x: token_losses_reference(x, whole)[0], x)
        self.close(f"label_sums {what}", lambda: label_sums(x, labels, top, True)[0],
                   lambda x, top: label_sums_reference(x, labels, top, True)[0], x, top)
        self.close(f"label_sums_vjp {what}", lambda: label_sums_vjp(x, labels, top, *g),
                   lambda x, top, *g: label_sums_vjp_reference(x, labels, top, *g), x, top, *g)

    def run(self, cases: int) -> int:
        kinds = (self.norm, self.matmul, self.attention, self.cached, self.experts, self.routes, self.losses)
        for i in range(cases):
            self.dtype = DTYPES[i // len(kinds) % 3]
            kinds[i % len(kinds)]()
        print("\n".join(self.failures[:20]), file=sys.stderr)
        return len(self.failures)


def one_gpu(cases: int, seed: int = 1) -> int:
    wrong = OneGpu(seed).run(cases)
    print(f"one_gpu {cases}: {wrong} wrong", flush=True)
    return wrong


class Norms:
    """Random calls of all_reduce + add + rms_norm among others on the same channel:
    every rank knows everybody's data."""

    MOST = 1 << 20

    def __init__(self, group, seed: int) -> None:
        self.group, self.made, self.random, self.me, self.n = (
            group, group.communicators[0], random.Random(seed), group.rank_in_group, group.world_size)
        generator = torch.Generator(group.device).manual_seed(seed)

        def normal() -> dict[torch.dtype, Tensor]:
            return {d: torch.randn(2 * self.MOST, generator=generator, device=group.device).to(d)
                    for d in DTYPES}
        self.xs, self.old, self.weight = [normal() for _ in range(self.n)], normal(), normal()
        self.bad = torch.zeros(2, 2, dtype=torch.int64, device=group.device)

    def call(self, wrong: Tensor) -> None:
        """Adds the elements of residuals that are wrong to wrong[0],
        and the rows whose norm is further off than it may be to wrong[1]."""
        dtype, width = (self.random.choice(DTYPES),
                        8 * self.random.choice((1, 3, 72, 512, 513, 1024, self.random.randint(1, 1024))))
        rows = self.random.randint(1, min(self.random.choice((1, 4, 32, 64, 200)), self.MOST // width))
        start, count = 8 * self.random.randrange(self.MOST // 8), rows * width

        def part(x: dict[torch.dtype, Tensor]) -> Tensor:
            return x[dtype][start:start + count].view(rows, width)
        xs, old, weight = [part(x) for x in self.xs], part(self.old), self.weight[dtype][start:start + width]
        if self.random.random() < 0.2:
            wrong[0] += (self.made.all_reduce(xs[self.me].reshape(-1), "sum").view(rows, width) + old
                      != all_reduce_add_rms_norm_reference(xs, old, weight, EPS)[0]).sum()
            return
        total, normed = self.made.all_reduce_add_rms_norm(xs[self.me], old, weight, EPS)
        want, want_normed = all_reduce_add_rms_norm_reference(xs, old, weight, EPS)
        exact = F.rms_norm(want.double(), weight.shape, weight.double(), EPS)

        def error(x: Tensor) -> Tensor:
            return (x.double() - exact).norm(dim=-1)
        wrong[0] += (total != want).sum()
        # rsqrt is that good in float32
        wrong[1] += (error(normed) > 2 * error(want_normed) + 2.0 ** -22 * exact.norm(dim=-1)).sum()

    def run(self, calls: int) -> int:
        """Eager calls with late ranks, and replays of graphs between them."""
        side, graphs, done = torch.cuda.Stream(), [], 0
        for _ in range(4):
            graph = torch.cuda.CUDAGraph()
            with chained(), torch.cuda.graph(graph, stream=side):
                for _ in range(16):
                    self.call(self.bad[1])
            graphs.append(graph)
        while done < calls:
            late, cycles, graph = (self.random.randrange(self.n), self.random.randrange(1_000_000),
                                   self.random.choice(graphs))
            if self.me == late:
                torch.cuda._sleep(cycles)
            for _ in range(16):
                self.call(self.bad[0])
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    graph.replay()
            torch.cuda.current_stream().wait_stream(side)
            done += 64
        torch.cuda.synchronize()
        if int(self.bad.sum()):
            print(f"rank {self.me}: wrong residuals, norms: eager {self.bad[0].tolist()}, in graphs "
                  f"{self.bad[1].tolist()}", file=sys.stderr, flush=True)
        return int(self.bad.sum())


def norms(calls: int) -> int:
    from shardlib import Mesh
    from shardlib.distributed import connect
    from shardlib.ops.nvlink import nvlink
    mesh = Mesh(tp=int(os.environ["WORLD_SIZE"]))
    with connect(mesh, communicators=(nvlink,)) as runtime:
        runtime.create_groups([("tp",)])
        group = runtime.group(("tp",))
        assert not group.router.declined, group.router.declined
        wrong = Norms(group, 1).run(calls)
        if runtime.rank == 0:
            print(f"norms {calls} on {mesh}: {wrong} wrong", flush=True)
    return wrong


if __name__ == "__main__":
    sys.exit({"one_gpu": one_gpu, "norms": norms}[sys.argv[1]](*map(int, sys.argv[2:])) > 0)
