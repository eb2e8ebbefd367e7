"""Mistral: a Llama whose queries see the last W keys alone (Jiang et al. 2023).

B batch  T query time  S key time  D d_model  L layers  K kv heads  G queries per kv head  H head_dim  F d_ff
V vocab
"""
from __future__ import annotations

from torch import Tensor

from shardlib import Params, einsum, param, rename, scan, sharded, stacked
from shardlib.functions import silu, zeros
from shardlib.models.files.said import Said
from shardlib.models.gallery.page import Config, Page, decoder_config, decoder_rows
from shardlib.ops import attention, embedding, rms_norm, rope, rope_table


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


class Mistral(Params):
    embed: Tensor = param("V D")
    layers: Block = stacked("L", Block)
    norm: Tensor = param("D", initial="ones")
    head: Tensor = param("V D")                     # absent where the embedding is tied


@sharded("B T D, *, B T/1 H -> B T D")
def block(x, w: Block, angles, *, config):
    h = rms_norm(x, w.norm1, config.eps)
    q = rope("B T K G H, B T H -> B T K G H", einsum("B T D, D K G H -> B T K G H", h, w.wq), angles)
    k = rope("B T K H, B T H -> B T K H",     einsum("B T D, D K H   -> B T K H",   h, w.wk), angles)
    v =                                       einsum("B T D, D K H   -> B T K H",   h, w.wv)
    k, v = rename("B T K H -> B S K H", k), rename("B T K H -> B S K H", v)
    a = attention("B T K G H, B S K H, B S K H -> B T K G H", q, k, v, window=config.window)
    x = x + einsum("B T K G H, K G H D -> B T D", a, w.wo)
    h = rms_norm(x, w.norm2, config.eps)
    gate, up = einsum("B T D, D F -> B T F", h, w.gate), einsum("B T D, D F -> B T F", h, w.up)
    return x + einsum("B T F, F D -> B T D", silu(gate) * up, w.down)


@sharded("B T/1, * -> B T V")
def logits(ids, w: Mistral, *, config):
    angles = rope_table("B -> B T/1 H", zeros("B", dtype="int64"), theta=config.theta)
    x = scan(block, embedding("B T, V D -> B T D", ids, w.embed), w.layers, angles, config=config)
    x = rms_norm(x, w.norm, config.eps)
    return einsum("B T D, V D -> B T V", x, w.embed if w.head is None else w.head)


def config(said: Said) -> Config:
    return decoder_config(said, window=said.size("sliding_window", default=None))


MISTRAL = Page("mistral", Mistral, logits, config, decoder_rows)
