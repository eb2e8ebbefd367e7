"""Qwen3-MoE: a Qwen 3 whose tokens go through a few of many small experts (Yang et al. 2025).

B batch  T query time  S key time  D d_model  L layers  K kv heads  G queries per kv head  H head_dim
E experts  J experts a token  F d_ff of an expert  V vocab
"""
from __future__ import annotations

from torch import Tensor

from shardlib import Params, einsum, param, stacked
from shardlib.models.causal import CausalLM
from shardlib.models.files.said import Said
from shardlib.models.files.weights import Weight
from shardlib.models.gallery.experts import ExpertsConfig, expert_rows, experts_config, moe
from shardlib.models.gallery.page import LAYER, Page, decoder_rows
from shardlib.ops import rms_norm, rope


class Block(Params):
    norm1: Tensor = param("D", initial="ones")
    wq: Tensor = param("D K G H")
    wk: Tensor = param("D K H")
    wv: Tensor = param("D K H")
    norm_q: Tensor = param("H", initial="ones")
    norm_k: Tensor = param("H", initial="ones")
    wo: Tensor = param("K G H D")
    norm2: Tensor = param("D", initial="ones")
    router: Tensor = param("D E/1")
    gate: Tensor = param("E D F")
    up: Tensor = param("E D F")
    down: Tensor = param("E F D")


class Qwen3Moe(Params):
    embed: Tensor = param("V D")
    layers: Block = stacked("L", Block)
    norm: Tensor = param("D", initial="ones")
    head: Tensor = param("V D")                     # absent where the embedding is tied


def block(x, w, angles, past, config):
    h = rms_norm(x, w.norm1, config.eps)
    q = rms_norm(einsum("B T D, D K G H -> B T K G H", h, w.wq), w.norm_q, config.eps)
    k = rms_norm(einsum("B T D, D K H   -> B T K H",   h, w.wk), w.norm_k, config.eps)
    v =          einsum("B T D, D K H   -> B T K H",   h, w.wv)
    q, k = rope("B T K G H, B T H -> B T K G H", q, angles), rope("B T K H, B T H -> B T K H", k, angles)
    x = x + einsum("B T K G H, K G H D -> B T D", past.attention(q, k, v), w.wo)
    return x + moe(rms_norm(x, w.norm2, config.eps), w, config)


def rows(config: ExpertsConfig) -> tuple[Weight, ...]:
    return decoder_rows(config, *expert_rows(),
                        Weight("layers.norm_q", "L H", LAYER + "self_attn.q_norm.weight", "H"),
                        Weight("layers.norm_k", "L H", LAYER + "self_attn.k_norm.weight", "H"))


def config(said: Said) -> ExpertsConfig:
    said.only("use_sliding_window", False, default=False)
    said.only("attention_bias", False, default=False)
    said.only("decoder_sparse_step", 1, default=1)
    said.only("mlp_only_layers", [], default=[])
    return experts_config(said.assuming(num_key_value_heads=4), "moe_intermediate_size")


QWEN3_MOE = Page.of("qwen3_moe", CausalLM(Qwen3Moe, dict(layers=block)), config, rows)
