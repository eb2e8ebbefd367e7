"""OLMo 2: norms behind attention and MLP, and of all queries and all keys together (OLMo Team 2024).

B batch  T query time  S key time  D d_model  L layers  K kv heads  G queries per kv head  H head_dim  F d_ff
V vocab
"""
from __future__ import annotations

from torch import Tensor

from shardlib import Params, einsum, param, stacked
from shardlib.functions import mean, rsqrt
from shardlib.models.causal import CausalLM
from shardlib.models.files.said import Said
from shardlib.models.files.weights import Weight
from shardlib.models.gallery.page import LAYER, Config, Page, decoder_config, decoder_rows
from shardlib.models.llama import feed_forward
from shardlib.ops import rms_norm, rope


class Block(Params):
    wq: Tensor = param("D K G H")
    wk: Tensor = param("D K H")
    wv: Tensor = param("D K H")
    norm_q: Tensor = param("K G H", initial="ones")
    norm_k: Tensor = param("K H", initial="ones")
    wo: Tensor = param("K G H D")
    norm1: Tensor = param("D", initial="ones")
    gate: Tensor = param("D F")
    up: Tensor = param("D F")
    down: Tensor = param("F D")
    norm2: Tensor = param("D", initial="ones")


class Olmo2(Params):
    embed: Tensor = param("V D")
    layers: Block = stacked("L", Block)
    norm: Tensor = param("D", initial="ones")
    head: Tensor = param("V D")                     # absent where the embedding is tied


def all_heads_norm(text, x, w, eps):
    """rms_norm over heads and their elements: where heads are split, a mean of a number a token is joined."""
    return x * rsqrt(mean(f"{text} -> B T", x * x) + eps) * w


def heads(x, w, angles, config):
    q = all_heads_norm("B T K G H", einsum("B T D, D K G H -> B T K G H", x, w.wq), w.norm_q, config.eps)
    k = all_heads_norm("B T K H",   einsum("B T D, D K H   -> B T K H",   x, w.wk), w.norm_k, config.eps)
    v =                             einsum("B T D, D K H   -> B T K H",   x, w.wv)
    return rope("B T K G H, B T H -> B T K G H", q, angles), rope("B T K H, B T H -> B T K H", k, angles), v


def block(x, w, angles, past, config):
    a = past.attention(*heads(x, w, angles, config))
    x = x + rms_norm(einsum("B T K G H, K G H D -> B T D", a, w.wo), w.norm1, config.eps)
    return x + rms_norm(feed_forward(x, w), w.norm2, config.eps)


def rows(config: Config) -> tuple[Weight, ...]:
    return decoder_rows(config,
                        Weight("layers.norm_q", "L K G H", LAYER + "self_attn.q_norm.weight", "(K G H)"),
                        Weight("layers.norm_k", "L K H", LAYER + "self_attn.k_norm.weight", "(K H)"),
                        Weight("layers.norm1", "L D", LAYER + "post_attention_layernorm.weight", "D"),
                        Weight("layers.norm2", "L D", LAYER + "post_feedforward_layernorm.weight", "D"))


def config(said: Said) -> Config:
    said.only("attention_bias", False, default=False)
    return decoder_config(said, eps=1e-5)


OLMO2 = Page.of("olmo2", CausalLM(Olmo2, dict(layers=block)), config, rows)
