"""Llama's training as a pipeline in plain torch: torch.distributed.pipelining over modules that one writes
for it, torch's autograd, attention and cross entropy. What ours is measured against.

The same math, the same weights: `draw` makes a leaf of a layer, the same for both.
"""
from __future__ import annotations

import zlib

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import pipelining
from torch.distributed.pipelining import PipelineStage

SCHEDULES = {"1f1b": "Schedule1F1B", "interleaved": "ScheduleInterleaved1F1B",
             "zero_bubble": "ScheduleInterleavedZeroBubble", "zbv": "ScheduleZBVZeroBubble"}


def draw(path: str, layer: int | None, shape: tuple[int, ...], fan: int, dtype: torch.dtype,
         device: torch.device) -> Tensor:
    """A leaf, of one layer where it is stacked: the same wherever it is drawn on one kind of device."""
    made = torch.empty(shape, dtype=dtype, device=device)
    if len(shape) == 1:
        return made.fill_(1)
    seed = zlib.crc32(f"{path} {layer}".encode())
    return made.normal_(0, fan ** -0.5, generator=torch.Generator(device).manual_seed(seed))


class Layer(nn.Module):
    def __init__(self, c, layer: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.c, d, k, g, h = c, c.d_model, c.num_kv_heads, c.queries_per_kv, c.head_dim
        shapes = {"norm1": ((d,), d), "wq": ((d, k, g, h), d), "wk": ((d, k, h), d), "wv": ((d, k, h), d),
                  "wo": ((k, g, h, d), k * g * h), "norm2": ((d,), d), "gate": ((d, c.d_ff), d),
                  "up": ((d, c.d_ff), d), "down": ((c.d_ff, d), c.d_ff)}
        for name, (shape, fan) in shapes.items():
            setattr(self, name, nn.Parameter(draw(f"w.layers.{name}", layer, shape, fan, dtype, device)))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        c, (b, t, d) = self.c, x.shape
        n = F.rms_norm(x, (d,), self.norm1, c.norm_eps)
        q, k, v = ((n @ w.flatten(1)).view(b, t, -1, c.head_dim).transpose(1, 2)
                   for w in (self.wq, self.wk, self.wv))
        q, k = (y * cos + torch.cat((-y[..., c.head_dim // 2:], y[..., :c.head_dim // 2]), -1) * sin
                for y in (q, k))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + a.transpose(1, 2).reshape(b, t, -1) @ self.wo.flatten(0, 2)
        n = F.rms_norm(x, (d,), self.norm2, c.norm_eps)
        return x + (F.silu(n @ self.gate) * (n @ self.up)) @ self.down


class Part(nn.Module):
    """The layers of one stage; the first has the embedding, the last the norm and the head."""

    def __init__(self, c, stage: int, layers: tuple[int, ...], tokens: int, dtype: torch.dtype,
                 device: torch.device) -> None:
        super().__init__()
        first, stages = sum(layers[:stage]), len(layers)
        self.c, d, v = c, c.d_model, c.vocab_size
        self.layers = nn.ModuleList(Layer(c, i, dtype, device) for i in range(first, first + layers[stage]))
        self.embed = nn.Parameter(draw("w.embed", None, (v, d), d, dtype, device)) if stage == 0 else None
        self.norm = (nn.Parameter(draw("w.norm", None, (d,), d, dtype, device)) if stage == stages - 1
                     else None)
        self.head = (nn.Parameter(draw("w.head", None, (v, d), d, dtype, device)) if stage == stages - 1
                     else None)
        inv = 1.0 / (c.rope_theta ** (torch.arange(0, c.head_dim, 2, device=device).float() / c.head_dim))
        angle = torch.arange(tokens, device=device).float()[:, None] * inv
        self.turns = tuple(torch.cat((f(angle), f(angle)), -1).to(dtype) for f in (torch.cos, torch.sin))

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.embed is None else F.embedding(x, self.embed)
        for layer in self.layers:
            x = layer(x, *self.turns)
        return x if self.head is None else F.rms_norm(x, (self.c.d_model,), self.norm,
                                                      self.c.norm_eps) @ self.head.mT


def nats(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


class PlainPipeline:
    """One rank of a step: `step()` is the loss on the last stage's rank; gradients are left in `.grad`.
    layers: of each stage; (): alike."""

    def __init__(self, c, schedule: str, microbatches: int, ids: Tensor, labels: Tensor, dtype: torch.dtype,
                 device: torch.device, group: dist.ProcessGroup, layers: tuple[int, ...] = ()) -> None:
        ranks, rank = dist.get_world_size(), dist.get_rank()
        stages = ranks if schedule == "1f1b" else 2 * ranks
        mine = ([rank] if stages == ranks else [rank, stages - 1 - rank] if schedule == "zbv"
                else [rank, rank + ranks])
        each, more = divmod(c.num_layers, stages)
        layers = layers or tuple(each + (s < more) for s in range(stages))
        self.parts = [Part(c, s, layers, ids.shape[1], dtype, device) for s in mine]
        made = [PipelineStage(part, s, stages, device, group=group) for part, s in zip(self.parts, mine)]
        self.schedule = getattr(pipelining, SCHEDULES[schedule])(
            made[0] if len(made) == 1 else made, microbatches, loss_fn=nats)
        self.ids, self.labels, self.first, self.last = ids, labels, 0 in mine, stages - 1 in mine

    def step(self) -> Tensor | None:
        for part in self.parts:
            part.zero_grad(set_to_none=True)
        losses: list[Tensor] = []
        self.schedule.step(*([self.ids] if self.first else []),
                           **(dict(target=self.labels, losses=losses) if self.last else {}))
        return torch.stack([x.detach() for x in losses]).mean() if losses else None

    def gradient(self, name: str) -> Tensor | None:
        """Of embed or head, where this rank has it."""
        return next((getattr(p, name).grad for p in self.parts if getattr(p, name) is not None), None)
