"""The decode step of Llama and Mixtral on GPUs in plain torch, written for speed by hand:
what captured generation is measured against.

One process a GPU. The same packed weights (those of a `Model`, so that both choose the same tokens), one
matmul for q, k and v, one for gate and up; what is pointwise between matmuls compiled by torch.compile;
attention by torch's own kernel over a static cache; two sums a layer, by NCCL or by torch's symmetric memory
in one shot or two; the whole step in a CUDA graph, which feeds itself. Experts are torch's grouped matmul, of
rows that are sorted by expert on the device.
"""
from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

SUMS = ("nccl", "one_shot", "two_shot")


@torch.compile(dynamic=True)
def add_norm(x: Tensor, y: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x = x + y
    wide = x.float()
    return x, (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * w


@torch.compile(dynamic=True)
def swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


@torch.compile(dynamic=True)
def gated(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


@torch.compile(dynamic=True)
def home(y: Tensor, row: Tensor, weights: Tensor, live: Tensor) -> Tensor:
    """Of each token the weighted sum of its rows: those of its choices, where these are here."""
    found = torch.where(live[..., None], y[row.flatten()].view(*row.shape, -1).float(), 0)
    return (found * weights[..., None]).sum(1).to(y.dtype)


@torch.compile(dynamic=True)
def turned(qk: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = qk.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


class PlainDecode:
    """Steps of `rows` sequences, with a cache of `slots`.

    `sums`: how the ranks add up; weights: `Model.weights`, packed.
    """

    def __init__(self, model: Any, rows: int, slots: int, sums: str, group: dist.ProcessGroup | None) -> None:
        self.c, self.rows, self.sums, self.group = model.config, rows, sums, group
        parts = dict(zip(model.weights.parts, model.weights.flat))
        device, dtype, c = model.runtime.device, model.dtype, model.config
        self.size, self.me = (group.size(), group.rank()) if group else (1, 0)
        self.kv = c.num_kv_heads // self.size
        self.experts = getattr(c, "num_experts", 0)
        ffn = ("router", "gate", "up", "down") if self.experts else ("gate|w.layers.up", "down")
        layers = ("norm1", "wq|w.layers.wk|w.layers.wv", "wo", "norm2", *ffn)
        self.layers = list(zip(*(parts[f"w.layers.{name}"] for name in layers)))
        self.embed, self.norm = parts["w.embed"], parts["w.norm"]
        self.head = parts.get("w.head", self.embed)
        self.cache = torch.zeros((c.num_layers, 2, rows, slots, self.kv, c.head_dim), dtype=dtype,
                                 device=device)
        self.inv = (1.0 / (c.rope_theta ** (
            torch.arange(0, c.head_dim, 2, device="cpu").float() / c.head_dim))).to(device)
        self.slot = torch.arange(slots, device=device)
        self.slot_of = torch.arange(rows * getattr(c, "top_k", 0), device=device)
        self.ids, self.position = (torch.zeros(rows, dtype=torch.int64, device=device) for _ in range(2))
        self.buffer = self._symmetric(rows * c.d_model, dtype, device) if group and sums != "nccl" else None

    def _symmetric(self, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
        import torch.distributed._symmetric_memory as symmetric_memory
        made = symmetric_memory.empty(count, dtype=dtype, device=device)
        symmetric_memory.rendezvous(made, self.group)
        return made.view(self.rows, -1)

    def mixed(self, n: Tensor, router: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        """Through the experts, all of part of their width or some whole, and added up."""
        here, k = len(gate), self.c.top_k
        scores, chosen = (n @ router).float().softmax(-1).topk(k, -1)
        own = chosen - (self.me * here if here < self.experts else 0)
        live = (own >= 0) & (own < here)
        sorted_, order = torch.where(live, own, here).flatten().sort(stable=True)
        ends = torch.searchsorted(sorted_, self.slot[:here], right=True).int()
        rows = n[order // k]
        h = gated(F.grouped_mm(rows, gate, offs=ends), F.grouped_mm(rows, up, offs=ends))
        row = torch.empty_like(order).scatter_(0, order, self.slot_of[:len(order)]).view(-1, k)
        made = home(F.grouped_mm(h, down, offs=ends), row, scores / scores.sum(-1, keepdim=True), live)
        return self.added(made)

    def summed(self, a: Tensor, w: Tensor) -> Tensor:
        """a @ w, added up over the ranks."""
        if self.group is None or self.buffer is None:
            return self.added(a @ w)
        return self.added(torch.mm(a, w, out=self.buffer))

    def added(self, y: Tensor) -> Tensor:
        if self.group is None:
            return y
        if self.buffer is None:
            dist.all_reduce(y, group=self.group)
            return y
        if y is not self.buffer:
            self.buffer.copy_(y)
        if self.sums == "one_shot":
            return torch.ops.symm_mem.one_shot_all_reduce(self.buffer, "sum", self.group.group_name)
        torch.ops.symm_mem.two_shot_all_reduce_(self.buffer, "sum", self.group.group_name)
        return self.buffer.clone()

    def embedded(self) -> Tensor:
        if self.group is None:
            return F.embedding(self.ids, self.embed)
        here = self.ids - self.me * self.embed.shape[0]
        inside = (here >= 0) & (here < self.embed.shape[0])
        x = F.embedding(here.clamp(0, self.embed.shape[0] - 1), self.embed) * inside[:, None]
        dist.all_reduce(x, group=self.group)
        return x

    def step(self) -> None:
        """Feeds `ids` at `position`, and puts what follows in their place."""
        c, b, kv, g, h = self.c, self.rows, self.kv, self.c.queries_per_kv, self.c.head_dim
        angle = self.position[:, None, None].float() * self.inv
        cos, sin = angle.cos().to(self.embed.dtype), angle.sin().to(self.embed.dtype)
        bias = torch.zeros((b, 1, 1, len(self.slot)), dtype=cos.dtype, device=cos.device).masked_fill_(
            (self.slot > self.position[:, None])[:, None, None], float("-inf"))
        where = self.position[:, None, None, None].expand(b, 1, kv, h)
        x, y = self.embedded(), None
        for (norm1, qkv, wo, norm2, *ffn), (ks, vs) in zip(self.layers, self.cache.unbind(0)):
            x, n = (add_norm(x, y, norm1, c.norm_eps) if y is not None
                    else (x, F.rms_norm(x, (c.d_model,), norm1, c.norm_eps)))
            qk, v = (n @ qkv).split((kv * (g + 1) * h, kv * h), -1)
            q, k = turned(qk.view(b, kv * (g + 1), h), cos, sin).split((kv * g, kv), 1)
            ks.scatter_(1, where, k[:, None])
            vs.scatter_(1, where, v.view(b, 1, kv, h))
            a = F.scaled_dot_product_attention(q.view(b, kv, g, h), ks.transpose(1, 2), vs.transpose(1, 2),
                                               attn_mask=bias)
            x, n = add_norm(x, self.summed(a.reshape(b, kv * g * h), wo), norm2, c.norm_eps)
            y = self.mixed(n, *ffn) if self.experts else self.summed(swiglu(n @ ffn[0]), ffn[1])
        _, n = add_norm(x, y, self.norm, c.norm_eps)
        best, index = F.linear(n, self.head).max(-1)
        if self.group is not None:
            mine = torch.stack((best.double(), (index + self.me * self.head.shape[0]).double()))
            all_of = torch.empty((self.size, *mine.shape), dtype=mine.dtype, device=mine.device)
            dist.all_gather_into_tensor(all_of, mine, group=self.group)
            index = all_of[:, 1].gather(0, all_of[:, 0].argmax(0, keepdim=True))[0].long()
        self.ids.copy_(index)
        self.position.add_(1)

    def capture(self) -> torch.cuda.CUDAGraph:
        """The step as a graph; it has run twice then."""
        graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self.step()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            self.step()
        return graph
