"""Llama's prefill on GPUs in plain torch, written for speed by hand: what ours is measured against.

The same packed weights as `PlainDecode`, whose step this is for many tokens: pointwise parts compiled by
torch.compile, torch's flash attention over the prompt alone, a cache that is written behind it, two sums a
layer by NCCL; the head for the last token of each row.
"""
from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from plain_decode import PlainDecode, add_norm, swiglu, turned
from torch import Tensor


class PlainPrefill(PlainDecode):
    """Prompts of `length` tokens, `rows` of them."""

    def __init__(self, model: Any, rows: int, length: int, group: dist.ProcessGroup | None) -> None:
        super().__init__(model, rows, length, "nccl", group)
        self.prompts = torch.zeros((rows, length), dtype=torch.int64, device=self.ids.device)
        angle = torch.arange(length, device=self.ids.device)[:, None, None].float() * self.inv
        self.turns = angle.cos().to(model.dtype), angle.sin().to(model.dtype)

    def run(self) -> Tensor:
        """Takes in `prompts`; the token that follows each."""
        c, (b, t), kv, g, h = (self.c, self.prompts.shape, self.kv, self.c.queries_per_kv, self.c.head_dim)
        self.ids = self.prompts.view(-1)
        x, y = self.embedded(), None
        for (norm1, qkv, wo, norm2, gate_up, down), (ks, vs) in zip(self.layers, self.cache.unbind(0)):
            x, n = (add_norm(x, y, norm1, c.norm_eps) if y is not None
                    else (x, F.rms_norm(x, (c.d_model,), norm1, c.norm_eps)))
            qk, v = (n @ qkv).view(b, t, -1).split((kv * (g + 1) * h, kv * h), -1)
            q, k = turned(qk.unflatten(-1, (kv * (g + 1), h)), *self.turns).split((kv * g, kv), 2)
            v = v.unflatten(-1, (kv, h))
            ks.copy_(k)
            vs.copy_(v)
            a = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
                                               is_causal=True, enable_gqa=True)
            x, n = add_norm(x, self.summed(a.transpose(1, 2).reshape(b * t, -1), wo), norm2, c.norm_eps)
            y = self.summed(swiglu(n @ gate_up), down)
        _, n = add_norm(x.view(b, t, -1)[:, -1], y.view(b, t, -1)[:, -1], self.norm, c.norm_eps)
        logits = F.linear(n, self.head)
        if self.group is not None:
            parts = [torch.empty_like(logits) for _ in range(self.size)]
            dist.all_gather(parts, logits, group=self.group)
            logits = torch.cat(parts, -1)
        return logits.argmax(-1)
