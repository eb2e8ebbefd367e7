"""Gemma 2: norms on both sides, capped scores, every other layer with a window (Gemma Team 2024).

B batch  T query time  S key time  D d_model  L pairs of layers  K kv heads  G queries per kv head  H head_dim
F d_ff  V vocab
"""
from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from shardlib import Params, einsum, nested, param, stacked
from shardlib.functions import gelu, tanh
from shardlib.models import causal
from shardlib.models.causal import CausalLM, KeyValue
from shardlib.models.files.said import Said
from shardlib.models.files.weights import Weight
from shardlib.models.gallery.page import Config, Page, decoder_config, decoder_rows
from shardlib.ops import rms_norm, rope


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


class Pair(Params):
    near: Block = nested(Block)                     # the first of each pair sees a window
    far: Block = nested(Block)


class Gemma2(Params):
    embed: Tensor = param("V D")
    layers: Pair = stacked("L", Pair)
    norm: Tensor = param("D", initial="zeros")


class Kept(Params):
    near: KeyValue = nested(KeyValue)
    far: KeyValue = nested(KeyValue)


class Cache(Params):
    layers: Kept = stacked("L", Kept)


def norm(x, weight, config):
    return rms_norm(x, 1.0 + weight, config.eps)


def layer(x, w, angles, past, config, window):
    h = norm(x, w.norm1, config)
    q = rope("B T K G H, B T H -> B T K G H", einsum("B T D, D K G H -> B T K G H", h, w.wq), angles)
    k = rope("B T K H, B T H -> B T K H",     einsum("B T D, D K H   -> B T K H",   h, w.wk), angles)
    v =                                       einsum("B T D, D K H   -> B T K H",   h, w.wv)
    a = past.attention(q, k, v, window=window, scale=config.scale, softcap=config.softcap)
    x = x + norm(einsum("B T K G H, K G H D -> B T D", a, w.wo), w.norm2, config)
    h = norm(x, w.norm3, config)
    gate, up = einsum("B T D, D F -> B T F", h, w.gate), einsum("B T D, D F -> B T F", h, w.up)
    h = einsum("B T F, F D -> B T D", gelu(gate, approximate="tanh") * up, w.down)
    return x + norm(h, w.norm4, config)


def pair(x, w, angles, past, config):
    return layer(layer(x, w.near, angles, past, config, config.window), w.far, angles, past, config, None)


def embed(ids, w, start, config):
    return causal.embed(ids, w, start, config) * config.sizes["D"] ** 0.5


def head(h, w, config):
    logits = einsum("... D, V D -> ... V", h, w.embed)
    cap = config.final_softcap
    return logits if cap is None else tanh(logits / cap) * cap


LM = CausalLM(Gemma2, dict(layers=pair), Cache, embed=embed, head=head,
              norm=lambda x, w, config: norm(x, w.norm, config))


def rows(config: Config) -> tuple[Weight, ...]:
    """Each row of a layer twice: of layers 0, 2, 4 ... and of those between."""
    at = "model.layers.{L}."
    found = decoder_rows(
        config, Weight("layers.norm2", "L D", at + "post_attention_layernorm.weight", "D"),
        Weight("layers.norm3", "L D", at + "pre_feedforward_layernorm.weight", "D"),
        Weight("layers.norm4", "L D", at + "post_feedforward_layernorm.weight", "D"))
    ends = tuple(row for row in found if "{L}" not in row.name)
    return (*ends, *(replace(row, path=row.path.replace("layers", f"layers.{which}"),
                             name=row.name.replace("{L}", each))
                     for row in found if "{L}" in row.name
                     for which, each in (("near", "{2L}"), ("far", "{2L+1}"))))


def config(said: Said) -> Config:
    said = said.assuming(num_key_value_heads=4, head_dim=256, attn_logit_softcapping=50.0,
                         final_logit_softcapping=30.0)
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


GEMMA2 = Page.of("gemma2", LM, config, rows)
