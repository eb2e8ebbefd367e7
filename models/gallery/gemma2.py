"""Gemma 2: norms on both sides, capped scores, every other layer with a window (Gemma Team 2024).

B batch  T query time  S key time  D d_model  L pairs of layers  K kv heads  G queries per kv head  H head_dim
F d_ff  V vocab
"""
from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from shardlib import Params, einsum, param, rename, scan, sharded, stacked
from shardlib.functions import gelu, tanh, zeros
from shardlib.models.files.said import Said
from shardlib.models.files.weights import Weight
from shardlib.models.gallery.page import Config, Page, decoder_config, decoder_rows
from shardlib.ops import attention, embedding, rms_norm, rope, rope_table


class Block(Params):
    norm1: Tensor = param("D", initial="zeros")     # what a norm multiplies by, less 1
    wq: Tensor = param("D K G H")
    wk: Tensor = param("D K H")
    wv: Tensor = param("D K H")
    wo: Tensor = param("K G H D")
    norm2: Tensor = param("D", initial="zeros")
    norm3: Tensor = param("D", initial="zeros")
    gate: Tensor = param("D F")
    up: Tensor = param("D F")
    down: Tensor = param("F D")
    norm4: Tensor = param("D", initial="zeros")


class Gemma2(Params):
    embed: Tensor = param("V D")
    near: Block = stacked("L", Block)               # the first of each pair sees a window
    far: Block = stacked("L", Block)
    norm: Tensor = param("D", initial="zeros")


def layer(x, w, angles, window, config):
    h = rms_norm(x, 1.0 + w.norm1, config.eps)
    q = rope("B T K G H, B T H -> B T K G H", einsum("B T D, D K G H -> B T K G H", h, w.wq), angles)
    k = rope("B T K H, B T H -> B T K H",     einsum("B T D, D K H   -> B T K H",   h, w.wk), angles)
    v =                                       einsum("B T D, D K H   -> B T K H",   h, w.wv)
    k, v = rename("B T K H -> B S K H", k), rename("B T K H -> B S K H", v)
    a = attention("B T K G H, B S K H, B S K H -> B T K G H", q, k, v, window=window, scale=config.scale,
                  softcap=config.softcap)
    x = x + rms_norm(einsum("B T K G H, K G H D -> B T D", a, w.wo), 1.0 + w.norm2, config.eps)
    h = rms_norm(x, 1.0 + w.norm3, config.eps)
    gate, up = einsum("B T D, D F -> B T F", h, w.gate), einsum("B T D, D F -> B T F", h, w.up)
    h = einsum("B T F, F D -> B T D", gelu(gate, approximate="tanh") * up, w.down)
    return x + rms_norm(h, 1.0 + w.norm4, config.eps)


@sharded("B T D, *, *, B T/1 H -> B T D")
def pair(x, near: Block, far: Block, angles, *, config):
    return layer(layer(x, near, angles, config.window, config), far, angles, None, config)


@sharded("B T/1, * -> B T V")
def logits(ids, w: Gemma2, *, config):
    angles = rope_table("B -> B T/1 H", zeros("B", dtype="int64"), theta=config.theta)
    x = embedding("B T, V D -> B T D", ids, w.embed) * config.sizes["D"] ** 0.5
    x = rms_norm(scan(pair, x, (w.near, w.far), angles, config=config), 1.0 + w.norm, config.eps)
    x = einsum("B T D, V D -> B T V", x, w.embed)
    return x if config.final_softcap is None else tanh(x / config.final_softcap) * config.final_softcap


def rows(config: Config) -> tuple[Weight, ...]:
    """Each row of a layer twice: of layers 0, 2, 4 ... and of those between."""
    at = "model.layers.{L}."
    found = decoder_rows(
        config, Weight("layers.norm2", "L D", at + "post_attention_layernorm.weight", "D"),
        Weight("layers.norm3", "L D", at + "pre_feedforward_layernorm.weight", "D"),
        Weight("layers.norm4", "L D", at + "post_feedforward_layernorm.weight", "D"))
    return tuple(replace(row, path=row.path.replace("layers", which), name=row.name.replace("{L}", each))
                 for row in found for which, each in (("near", "{2L}"), ("far", "{2L+1}"))
                 if "{L}" in row.name or which == "near")


def config(said: Said) -> Config:
    said.only("attention_bias", False, default=False)
    layers = said.size("num_hidden_layers")
    pairs = said.whole(layers, 2, "pairs of layers")
    said.only("layer_types", None, ["sliding_attention", "full_attention"] * pairs)
    said.only("hidden_activation", "gelu_pytorch_tanh")
    said.only("tie_word_embeddings", True, default=True)
    fields = {**said.fields, "num_hidden_layers": pairs, "hidden_act": "silu", "tie_word_embeddings": True}
    return replace(
        decoder_config(Said(fields, said.where), window=said.size("sliding_window")),
        scale=said.number("query_pre_attn_scalar") ** -0.5,
        softcap=said.number("attn_logit_softcapping", default=None),
        final_softcap=said.number("final_logit_softcapping", default=None))


GEMMA2 = Page("gemma2", Gemma2, logits, config, rows)
