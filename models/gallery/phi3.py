"""Phi-3: a Llama whose q, k and v are stored as one tensor, gate and up as another (Abdin et al. 2024).

B batch  T query time  S key time  D d_model  L layers  K kv heads  G queries per kv head  H head_dim  F d_ff
V vocab  R elements of a head that are turned, where they are not all
"""
from __future__ import annotations

from torch import Tensor

from shardlib import Params, einsum, param
from shardlib.models.causal import CausalLM
from shardlib.models.files.rope_said import set_of
from shardlib.models.files.said import Said
from shardlib.models.files.weights import Weight
from shardlib.models.gallery.page import LAYER, Config, Page, decoder_config, decoder_rows
from shardlib.models.llama import Llama, feed_forward, heads
from shardlib.ops import rms_norm, rope, rope_table


class Phi3(Llama):
    """The weights of a Llama."""


class Angles(Params):
    whole: Tensor = param("B T/1 H")
    part: Tensor = param("B T/1 R")


def angles_at(start, config):
    numbers = dict(theta=config.theta, scaling=config.scaling)
    if "R" in config.sizes:
        return Angles(whole=None, part=rope_table("B -> B T/1 R", start, **numbers))
    return Angles(whole=rope_table("B -> B T/1 H", start, **numbers), part=None)


def turned_in_part(x, w, angles, config):
    h, part = rms_norm(x, w.norm1, config.eps), config.sizes["R"]
    q = einsum("B T D, D K G H -> B T K G H", h, w.wq)
    k = einsum("B T D, D K H   -> B T K H",   h, w.wk)
    v = einsum("B T D, D K H   -> B T K H",   h, w.wv)
    q = rope("B T K G H, B T R -> B T K G H", q, angles, part=part)
    return q, rope("B T K H, B T R -> B T K H", k, angles, part=part), v


def block(x, w, angles, past, config):
    q, k, v = (heads(x, w, angles.whole, config) if angles.part is None
               else turned_in_part(x, w, angles.part, config))
    x = x + einsum("B T K G H, K G H D -> B T D", past.attention(q, k, v), w.wo)
    return x + feed_forward(rms_norm(x, w.norm2, config.eps), w)


QKV, GATE_UP = LAYER + "self_attn.qkv_proj.weight", LAYER + "mlp.gate_up_proj.weight"
OF_QKV, OF_TWO = "K G H, K H, K H", "F, F"


def rows(config: Config) -> tuple[Weight, ...]:
    return decoder_rows(config,
                        Weight("layers.wq",   "L D K G H", QKV, "(K G H) D", beside=OF_QKV, part=0),
                        Weight("layers.wk",   "L D K H",   QKV, "(K H) D",   beside=OF_QKV, part=1),
                        Weight("layers.wv",   "L D K H",   QKV, "(K H) D",   beside=OF_QKV, part=2),
                        Weight("layers.gate", "L D F",     GATE_UP, "F D",   beside=OF_TWO, part=0),
                        Weight("layers.up",   "L D F",     GATE_UP, "F D",   beside=OF_TWO, part=1))


def config(said: Said) -> Config:
    """The models of 4k tokens; a window is refused where it is less than their context."""
    set_of(said).only("rope_type", "default")
    window, context = said.size("sliding_window", default=None), said.size("max_position_embeddings")
    if window is not None and window < context:
        raise said.error(f"sliding_window is {window} of {context}, which is not implemented")
    return decoder_config(said, eps=1e-5, partial=True)


PHI3 = Page.of("phi3", CausalLM(Phi3, dict(layers=block), angles=(Angles, angles_at)), config, rows)
