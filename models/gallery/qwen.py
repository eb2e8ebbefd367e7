"""Qwen 2 and 3: a Llama with biases of q, k, v, or with norms of queries and keys (Yang et al. 2024, 2025).

B batch  T query time  S key time  D d_model  L layers  K kv heads  G queries per kv head  H head_dim  F d_ff
V vocab
"""
from __future__ import annotations

from torch import Tensor

from shardlib import Params, einsum, param, stacked
from shardlib.models.causal import CausalLM
from shardlib.models.files.said import Said
from shardlib.models.files.weights import Weight
from shardlib.models.gallery.page import LAYER, Config, Page, decoder_config, decoder_rows
from shardlib.models.llama import feed_forward
from shardlib.ops import rms_norm, rope


class Block(Params):
    norm1: Tensor = param("D", initial="ones")
    wq: Tensor = param("D K G H")
    wk: Tensor = param("D K H")
    wv: Tensor = param("D K H")
    bq: Tensor = param("K G H", initial="zeros")    # of Qwen 2
    bk: Tensor = param("K H", initial="zeros")
    bv: Tensor = param("K H", initial="zeros")
    norm_q: Tensor = param("H", initial="ones")     # of Qwen 3
    norm_k: Tensor = param("H", initial="ones")
    wo: Tensor = param("K G H D")
    norm2: Tensor = param("D", initial="ones")
    gate: Tensor = param("D F")
    up: Tensor = param("D F")
    down: Tensor = param("F D")


class Qwen(Params):
    embed: Tensor = param("V D")
    layers: Block = stacked("L", Block)
    norm: Tensor = param("D", initial="ones")
    head: Tensor = param("V D")                     # absent where the embedding is tied


def heads(h, w, config):
    q = einsum("B T D, D K G H -> B T K G H", h, w.wq)
    k = einsum("B T D, D K H   -> B T K H",   h, w.wk)
    v = einsum("B T D, D K H   -> B T K H",   h, w.wv)
    if w.bq is not None:
        q, k, v = q + w.bq, k + w.bk, v + w.bv
    if w.norm_q is not None:
        q, k = rms_norm(q, w.norm_q, config.eps), rms_norm(k, w.norm_k, config.eps)
    return q, k, v


def block(x, w, angles, past, config):
    q, k, v = heads(rms_norm(x, w.norm1, config.eps), w, config)
    q, k = rope("B T K G H, B T H -> B T K G H", q, angles), rope("B T K H, B T H -> B T K H", k, angles)
    x = x + einsum("B T K G H, K G H D -> B T D", past.attention(q, k, v), w.wo)
    return x + feed_forward(rms_norm(x, w.norm2, config.eps), w)


LM = CausalLM(Qwen, dict(layers=block))
ATTENTION = LAYER + "self_attn."


def qwen2_rows(config: Config) -> tuple[Weight, ...]:
    return decoder_rows(config,
                        Weight("layers.bq", "L K G H", ATTENTION + "q_proj.bias", "(K G H)"),
                        Weight("layers.bk", "L K H",   ATTENTION + "k_proj.bias", "(K H)"),
                        Weight("layers.bv", "L K H",   ATTENTION + "v_proj.bias", "(K H)"))


def qwen3_rows(config: Config) -> tuple[Weight, ...]:
    return decoder_rows(config,
                        Weight("layers.norm_q", "L H", ATTENTION + "q_norm.weight", "H"),
                        Weight("layers.norm_k", "L H", ATTENTION + "k_norm.weight", "H"))


def config(said: Said) -> Config:
    said.only("use_sliding_window", False, default=False)
    said.only("attention_bias", False, default=False)
    return decoder_config(said.assuming(num_key_value_heads=32))


QWEN2 = Page.of("qwen2", LM, config, qwen2_rows)
QWEN3 = Page.of("qwen3", LM, config, qwen3_rows)
