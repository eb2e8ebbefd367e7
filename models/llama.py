"""Llama, one page: the weights, one block, and the programs made of it.

B batch  T query time  S key time (cache slots)  P key time in a prompt  D d_model  L layers
K kv heads  G queries per kv head  H head_dim  F d_ff  V vocab

No line here knows of ranks or meshes. `Layout(K="tp", F="tp", V="tp")` makes it tensor parallel, `T="tp"`
after that sequence parallel, `B="dp"` before it data parallel, `D="dp"` at the end FSDP, `T="cp"` context
parallel.
"""
from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from shardlib import Params, einsum, param, rename, scan, sharded, stacked
from shardlib.functions import argmax, mean, silu
from shardlib.ops import (
    attention,
    cross_entropy,
    embedding,
    rms_norm,
    rope,
    rope_table,
    take,
    update_cache,
)


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's stretching of the rotary frequencies: slow ones are divided by `factor`, fast ones kept."""
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


@dataclass(frozen=True)
class LlamaConfig:
    """What a checkpoint says of its model. Sizes by letter: `config.sizes`."""
    vocab_size: int
    d_model: int
    num_layers: int
    num_kv_heads: int
    queries_per_kv: int
    head_dim: int
    d_ff: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    tied: bool
    max_context: int

    @property
    def sizes(self) -> dict[str, int]:
        return dict(V=self.vocab_size, D=self.d_model, L=self.num_layers, K=self.num_kv_heads,
                    G=self.queries_per_kv, H=self.head_dim, F=self.d_ff)


class Block(Params):
    norm1: Tensor = param("D", initial="ones")
    wq: Tensor = param("D K G H")
    wk: Tensor = param("D K H")
    wv: Tensor = param("D K H")
    wo: Tensor = param("K G H D")
    norm2: Tensor = param("D", initial="ones")
    gate: Tensor = param("D F")
    up: Tensor = param("D F")
    down: Tensor = param("F D")


class Llama(Params):
    embed: Tensor = param("V D")
    layers: Block = stacked("L", Block)
    norm: Tensor = param("D", initial="ones")
    head: Tensor = param("V D")                     # absent where the embedding is tied


class KeyValue(Params):
    k: Tensor = param("B S K H", initial="zeros")
    v: Tensor = param("B S K H", initial="zeros")


class Cache(Params):
    layers: KeyValue = stacked("L", KeyValue)


def heads(x, w, angles, config):
    h = rms_norm(x, w.norm1, config.norm_eps)
    q = rope("B T K G H, B T H -> B T K G H", einsum("B T D, D K G H -> B T K G H", h, w.wq), angles)
    k = rope("B T K H, B T H -> B T K H",     einsum("B T D, D K H -> B T K H", h, w.wk), angles)
    v = einsum("B T D, D K H -> B T K H", h, w.wv)
    return q, k, v


def rest(x, a, w, config):
    x = x + einsum("B T K G H, K G H D -> B T D", a, w.wo)
    h = rms_norm(x, w.norm2, config.norm_eps)
    gate, up = einsum("B T D, D F -> B T F", h, w.gate), einsum("B T D, D F -> B T F", h, w.up)
    return x + einsum("B T F, F D -> B T D", silu(gate) * up, w.down)


@sharded("B T D, *, B T/1 H -> B T D")
def block(x, w: Block, angles, *, config):
    q, k, v = heads(x, w, angles, config)
    k, v = rename("B T K H -> B S K H", k), rename("B T K H -> B S K H", v)
    return rest(x, attention("B T K G H, B S K H, B S K H -> B T K G H", q, k, v), w, config)


@sharded("B T D, *, *, B, B T/1 H -> B T D, *")
def cached_block(x, w: Block, cache: KeyValue, start, angles, *, config):
    q, k, v = heads(x, w, angles, config)
    k = update_cache("B S K H, B T K H, B -> B S K H", cache.k, k, start)
    v = update_cache("B S K H, B T K H, B -> B S K H", cache.v, v, start)
    a = attention("B T K G H, B S K H, B S K H, B -> B T K G H", q, k, v, start)
    return rest(x, a, w, config), KeyValue(k=k, v=v)


@sharded("B T D, *, *, B, B T/1 H -> B T D, *")
def prompt_block(x, w: Block, cache: KeyValue, start, angles, *, config):
    """The same where nothing is in the cache yet: attention is causal among the new tokens."""
    q, k, v = heads(x, w, angles, config)
    kept = KeyValue(k=update_cache("B S K H, B T K H, B -> B S K H", cache.k, k, start),
                    v=update_cache("B S K H, B T K H, B -> B S K H", cache.v, v, start))
    k, v = rename("B T K H -> B P K H", k), rename("B T K H -> B P K H", v)
    return rest(x, attention("B T K G H, B P K H, B P K H -> B T K G H", q, k, v), w, config), kept


def angles_at(start, config):
    scaling = config.rope_scaling and (config.rope_scaling.factor, config.rope_scaling.low_freq_factor,
                                       config.rope_scaling.high_freq_factor,
                                       config.rope_scaling.original_context)
    return rope_table("B -> B T/1 H", start, theta=config.rope_theta, scaling=scaling)


@sharded("B T/1, *, *, B, B -> B V/1, *")
def next_logits(ids, w: Llama, cache: Cache, start, last, *, config):
    """Logits after ids[b, last[b]], where ids[b, t] stands at position start[b] + t."""
    x = embedding("B T, V D -> B T D", ids, w.embed)
    x, layers = scan(cached_block, x, (w.layers, cache.layers), start, angles_at(start, config),
                     config=config)
    return logits_at(x, w, last, config), Cache(layers=layers)


@sharded("B T/1, *, *, B, B -> B V/1, *")
def prompt_logits(ids, w: Llama, cache: Cache, start, last, *, config):
    """The same at the beginning of prompts: `start` is 0 everywhere."""
    x = embedding("B T, V D -> B T D", ids, w.embed)
    x, layers = scan(prompt_block, x, (w.layers, cache.layers), start, angles_at(start, config),
                     config=config)
    return logits_at(x, w, last, config), Cache(layers=layers)


def logits_at(x, w, last, config):
    h = take("B T D, B -> B D", rms_norm(x, w.norm, config.norm_eps), last)
    return einsum("B D, V D -> B V", h, w.embed if w.head is None else w.head)


@sharded("B T/1, *, *, B, B -> B/1, *")
def next_token(ids, w: Llama, cache: Cache, start, last, *, config):
    """The greedy choice among the same logits, made without gathering them."""
    logits, cache = next_logits(ids, w, cache, start, last, config=config)
    return argmax("B V -> B", logits), cache


@sharded("B T/1, *, *, B, B -> B/1, *")
def prompt_token(ids, w: Llama, cache: Cache, start, last, *, config):
    """The greedy choice after a prompt's beginning."""
    logits, cache = prompt_logits(ids, w, cache, start, last, config=config)
    return argmax("B V -> B", logits), cache


@sharded("B T/1, *, B -> B T V")
def logits_of(ids, w: Llama, start, *, config):
    """Logits after every token, without a cache: training, scoring."""
    x = embedding("B T, V D -> B T D", ids, w.embed)
    x = scan(block, x, w.layers, angles_at(start, config), config=config)
    return einsum("B T D, V D -> B T V", rms_norm(x, w.norm, config.norm_eps),
                  w.embed if w.head is None else w.head)


@sharded("B T/1, B T/1, *, B -> ()")
def loss(ids, labels, w: Llama, start, *, config):
    """Mean cross entropy, in nats per token."""
    return mean("B T -> ()",
                cross_entropy("B T V, B T -> B T", logits_of(ids, w, start, config=config), labels))
