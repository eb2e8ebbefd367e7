"""Llama's decode step in plain torch, written for speed by hand:
what the compiled program is measured against.

The same math on the same weight layout: q, k and v in one matrix, gate and up in one, one matmul each; q and
k turned together; cosines, slots and the mask made once a step. One process, no sharding.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _packed(*weights: Tensor) -> tuple[Tensor, ...]:
    """Side by side, a matrix a layer; those of 16 bits lie by columns."""
    whole = torch.cat(weights, -1)
    return (whole.mT.contiguous().mT if whole.dtype.itemsize == 2 else whole).unbind(0)


class PlainLlama:
    """Weights as `shardlib.models.llama.Llama` holds them, packed;
    a cache of `slots` for `rows` sequences."""

    def __init__(self, w, config, rows: int, slots: int) -> None:
        c, layers = config, w.layers
        n = c.num_layers
        self.c, self.embed, self.norm = c, w.embed, w.norm
        self.head = w.embed if w.head is None else w.head
        self.norm1, self.norm2 = layers.norm1.unbind(0), layers.norm2.unbind(0)
        self.qkv = _packed(layers.wq.flatten(2), layers.wk.flatten(2), layers.wv.flatten(2))
        self.wo, self.gate_up, self.down = (_packed(layers.wo.flatten(1, 3)), _packed(layers.gate, layers.up),
                                            _packed(layers.down))
        shape = (n, rows, slots, c.num_kv_heads, c.head_dim)
        self.k, self.v = torch.zeros(shape, dtype=w.embed.dtype), torch.zeros(shape, dtype=w.embed.dtype)
        self.ks, self.vs = self.k.unbind(0), self.v.unbind(0)
        self.inv = 1.0 / (c.rope_theta ** (torch.arange(0, c.head_dim, 2).float() / c.head_dim))

    def step(self, ids: Tensor, start: Tensor, last: Tensor) -> Tensor:
        """Logits (rows, vocabulary) after ids[b, last[b]]; ids (rows, t) stand at start[b] + t."""
        c = self.c
        b, t = ids.shape
        kv, g, h, d = c.num_kv_heads, c.queries_per_kv, c.head_dim, c.d_model
        now = start[:, None] + torch.arange(t)
        angle = now[..., None].float() * self.inv
        cos, sin = angle.cos().to(self.k.dtype), angle.sin().to(self.k.dtype)
        cos, sin = torch.cat((cos, cos), -1)[:, :, None], torch.cat((-sin, sin), -1)[:, :, None]
        where = now[:, :, None, None].expand(b, t, kv, h)
        seen = torch.arange(self.k.shape[2]) <= now[..., None]
        bias = torch.zeros(seen.shape, dtype=self.k.dtype).masked_fill_(~seen, float("-inf"))
        bias = (bias[:, None] if t == 1
                else bias[:, None, None].expand(b, 1, g, t, -1).reshape(b, 1, g * t, -1))
        x = F.embedding(ids, self.embed)
        cut, halves, heads, half = (kv * (g + 1) * h, kv * h), (c.d_ff, c.d_ff), (kv * g, kv), h // 2
        for n1, qkv, wo, n2, gate_up, down, ks, vs in zip(self.norm1, self.qkv, self.wo, self.norm2,
                                                          self.gate_up, self.down, self.ks, self.vs):
            qk, v = torch.matmul(F.rms_norm(x, (d,), n1, c.norm_eps), qkv).split(cut, -1)
            qk = qk.view(b, t, kv * (g + 1), h)
            q, k = torch.addcmul(qk * cos, qk.roll(half, -1), sin).split(heads, 2)
            ks.scatter_(1, where, k)
            vs.scatter_(1, where, v.view(b, t, kv, h))
            if t == 1:
                a = F.scaled_dot_product_attention(q.view(b, kv, g, h), ks.transpose(1, 2),
                                                   vs.transpose(1, 2), attn_mask=bias).view(b, 1, kv * g * h)
            else:
                rows = q.view(b, t, kv, g, h).permute(0, 2, 3, 1, 4).reshape(b, kv, g * t, h)
                a = F.scaled_dot_product_attention(rows, ks.transpose(1, 2), vs.transpose(1, 2),
                                                   attn_mask=bias)
                a = a.view(b, kv, g, t, h).permute(0, 3, 1, 2, 4).reshape(b, t, kv * g * h)
            x = x + torch.matmul(a, wo)
            gate, up = torch.matmul(F.rms_norm(x, (d,), n2, c.norm_eps), gate_up).split(halves, -1)
            x = x + torch.matmul(F.silu(gate) * up, down)
        x = F.rms_norm(x, (d,), self.norm, c.norm_eps)
        x = x.gather(1, last[:, None, None].expand(b, 1, d))[:, 0]
        return F.linear(x, self.head)
