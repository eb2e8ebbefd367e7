"""OLMoE: 64 small experts, norms of all queries and all keys together (Muennighoff et al. 2024).

B batch  T query time  S key time  D d_model  L layers  K kv heads  G queries per kv head  H head_dim
E experts  J experts a token  F d_ff of an expert  V vocab
"""
from __future__ import annotations

from torch import Tensor

from shardlib import Params, einsum, param, rename, scan, sharded, stacked
from shardlib.functions import zeros
from shardlib.models.files.said import Said
from shardlib.models.files.weights import Weight
from shardlib.models.gallery.experts import ExpertsConfig, expert_rows, experts_config
from shardlib.models.gallery.olmo2 import all_heads_norm
from shardlib.models.gallery.page import LAYER, Page, decoder_rows
from shardlib.models.mixtral import through_experts
from shardlib.ops import attention, embedding, rms_norm, rope, rope_table, route


class Block(Params):
    norm1: Tensor = param("D", initial="ones")
    wq: Tensor = param("D K G H")
    wk: Tensor = param("D K H")
    wv: Tensor = param("D K H")
    norm_q: Tensor = param("K G H", initial="ones")
    norm_k: Tensor = param("K H", initial="ones")
    wo: Tensor = param("K G H D")
    norm2: Tensor = param("D", initial="ones")
    router: Tensor = param("D E/1")
    gate: Tensor = param("E D F")
    up: Tensor = param("E D F")
    down: Tensor = param("E F D")


class Olmoe(Params):
    embed: Tensor = param("V D")
    layers: Block = stacked("L", Block)
    norm: Tensor = param("D", initial="ones")
    head: Tensor = param("V D")                     # absent where the embedding is tied


@sharded("B T D, *, B T/1 H -> B T D")
def block(x, w: Block, angles, *, config):
    h = rms_norm(x, w.norm1, config.eps)
    q = all_heads_norm("B T K G H", einsum("B T D, D K G H -> B T K G H", h, w.wq), w.norm_q, config.eps)
    k = all_heads_norm("B T K H",   einsum("B T D, D K H   -> B T K H",   h, w.wk), w.norm_k, config.eps)
    v =                             einsum("B T D, D K H   -> B T K H",   h, w.wv)
    q, k = rope("B T K G H, B T H -> B T K G H", q, angles), rope("B T K H, B T H -> B T K H", k, angles)
    k, v = rename("B T K H -> B S K H", k), rename("B T K H -> B S K H", v)
    a = attention("B T K G H, B S K H, B S K H -> B T K G H", q, k, v)
    x = x + einsum("B T K G H, K G H D -> B T D", a, w.wo)
    h = rms_norm(x, w.norm2, config.eps)
    weights, chosen = route("B T E -> B T J, B T J", einsum("B T D, D E/1 -> B T E/1", h, w.router),
                            top_k=config.top_k, renormalise=config.renormalise)
    return x + through_experts(h, weights, chosen, w)


@sharded("B T/1, * -> B T V")
def logits(ids, w: Olmoe, *, config):
    angles = rope_table("B -> B T/1 H", zeros("B", dtype="int64"), theta=config.theta)
    x = scan(block, embedding("B T, V D -> B T D", ids, w.embed), w.layers, angles, config=config)
    x = rms_norm(x, w.norm, config.eps)
    return einsum("B T D, V D -> B T V", x, w.embed if w.head is None else w.head)


def rows(config: ExpertsConfig) -> tuple[Weight, ...]:
    return decoder_rows(config, *expert_rows(),
                        Weight("layers.norm_q", "L K G H", LAYER + "self_attn.q_norm.weight", "(K G H)"),
                        Weight("layers.norm_k", "L K H", LAYER + "self_attn.k_norm.weight", "(K H)"))


def config(said: Said) -> ExpertsConfig:
    said.only("clip_qkv", None)
    said.only("attention_bias", False, default=False)
    return experts_config(said, "intermediate_size", eps=1e-5)


OLMOE = Page("olmoe", Olmoe, logits, config, rows)
