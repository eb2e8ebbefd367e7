"""Phi-3: a Llama whose q, k and v are stored as one tensor, gate and up as another (Abdin et al. 2024).

B batch  T query time  S key time  D d_model  L layers  K kv heads  G queries per kv head  H head_dim  F d_ff
V vocab
"""
from __future__ import annotations

from torch import Tensor

from shardlib import Params, einsum, param, rename, scan, sharded, stacked
from shardlib.functions import silu, zeros
from shardlib.models.files.said import Said
from shardlib.models.files.weights import Weight
from shardlib.models.gallery.page import LAYER, Config, Page, decoder_config, decoder_rows
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


class Phi3(Params):
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
    a = attention("B T K G H, B S K H, B S K H -> B T K G H", q, k, v)
    x = x + einsum("B T K G H, K G H D -> B T D", a, w.wo)
    h = rms_norm(x, w.norm2, config.eps)
    gate, up = einsum("B T D, D F -> B T F", h, w.gate), einsum("B T D, D F -> B T F", h, w.up)
    return x + einsum("B T F, F D -> B T D", silu(gate) * up, w.down)


@sharded("B T/1, * -> B T V")
def logits(ids, w: Phi3, *, config):
    angles = rope_table("B -> B T/1 H", zeros("B", dtype="int64"), theta=config.theta)
    x = scan(block, embedding("B T, V D -> B T D", ids, w.embed), w.layers, angles, config=config)
    x = rms_norm(x, w.norm, config.eps)
    return einsum("B T D, V D -> B T V", x, w.embed if w.head is None else w.head)


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
    said.only("rope_scaling", None)
    window, context = said.size("sliding_window", default=None), said.size("max_position_embeddings")
    if window is not None and window < context:
        raise said.error(f"sliding_window is {window} of {context}, which is not implemented")
    return decoder_config(said)


PHI3 = Page("phi3", Phi3, logits, config, rows)
