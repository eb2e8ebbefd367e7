"""OLMoE: 64 small experts, norms of all queries and all keys together (Muennighoff et al. 2024).

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
from shardlib.models.gallery.olmo2 import heads
from shardlib.models.gallery.page import LAYER, Page, decoder_rows
from shardlib.ops import rms_norm


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


def block(x, w, angles, past, config):
    a = past.attention(*heads(rms_norm(x, w.norm1, config.eps), w, angles, config))
    x = x + einsum("B T K G H, K G H D -> B T D", a, w.wo)
    return x + moe(rms_norm(x, w.norm2, config.eps), w, config)


def rows(config: ExpertsConfig) -> tuple[Weight, ...]:
    return decoder_rows(config, *expert_rows(),
                        Weight("layers.norm_q", "L K G H", LAYER + "self_attn.q_norm.weight", "(K G H)"),
                        Weight("layers.norm_k", "L K H", LAYER + "self_attn.k_norm.weight", "(K H)"))


def config(said: Said) -> ExpertsConfig:
    said.only("clip_qkv", None)
    said.only("attention_bias", False, default=False)
    return experts_config(said, "intermediate_size", eps=1e-5)


OLMOE = Page.of("olmoe", CausalLM(Olmoe, dict(layers=block)), config, rows)
