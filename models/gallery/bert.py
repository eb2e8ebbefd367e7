"""BERT, with its head that fills in masked words: queries see all, norms stand behind (Devlin et al. 2018).

B batch  T query time  S key time  C positions  Y types of tokens  D d_model  L layers  K heads
G one query a head  H head_dim  F d_ff  V vocab
"""
from __future__ import annotations

from torch import Tensor

from shardlib import Params, einsum, param, rename, scan, sharded, stacked
from shardlib.functions import arange, gelu, stack, unbind, zeros
from shardlib.models.files.said import Said
from shardlib.models.files.weights import Weight
from shardlib.models.gallery.page import Config, Page
from shardlib.ops import attention, embedding, layer_norm


class Block(Params):
    wq: Tensor = param("D K H")
    bq: Tensor = param("K H", initial="zeros")
    wk: Tensor = param("D K H")
    bk: Tensor = param("K H", initial="zeros")
    wv: Tensor = param("D K H")
    bv: Tensor = param("K H", initial="zeros")
    out: Tensor = param("K H D")
    out_bias: Tensor = param("D", initial="zeros")
    norm1: Tensor = param("D", initial="ones")
    shift1: Tensor = param("D", initial="zeros")
    up: Tensor = param("D F")
    up_bias: Tensor = param("F", initial="zeros")
    down: Tensor = param("F D")
    down_bias: Tensor = param("D", initial="zeros")
    norm2: Tensor = param("D", initial="ones")
    shift2: Tensor = param("D", initial="zeros")


class Bert(Params):
    embed: Tensor = param("V D")
    places: Tensor = param("C D")
    types: Tensor = param("Y D")
    norm: Tensor = param("D", initial="ones")
    shift: Tensor = param("D", initial="zeros")
    layers: Block = stacked("L", Block)
    head: Tensor = param("D E")                     # E d_model again
    head_bias: Tensor = param("E", initial="zeros")
    head_norm: Tensor = param("E", initial="ones")
    head_shift: Tensor = param("E", initial="zeros")
    word_bias: Tensor = param("V", initial="zeros")


@sharded("B T D, * -> B T D")
def block(x, w: Block, *, config):
    q = stack("B T K H -> B T K G H",  einsum("B T D, D K H -> B T K H", x, w.wq) + w.bq)
    k = rename("B T K H -> B S K H",   einsum("B T D, D K H -> B T K H", x, w.wk) + w.bk)
    v = rename("B T K H -> B S K H",   einsum("B T D, D K H -> B T K H", x, w.wv) + w.bv)
    a = attention("B T K G H, B S K H, B S K H -> B T K G H", q, k, v, causal=False)
    a = einsum("B T K H, K H D -> B T D", unbind("B T K G H -> B T K H", a), w.out) + w.out_bias
    x = layer_norm(x + a, w.norm1, w.shift1, config.eps)
    h = gelu(einsum("B T D, D F -> B T F", x, w.up) + w.up_bias)
    h = einsum("B T F, F D -> B T D", h, w.down) + w.down_bias
    return layer_norm(x + h, w.norm2, w.shift2, config.eps)


@sharded("B T/1, * -> B T V")
def logits(ids, w: Bert, *, config):
    x = (embedding("B T, V D -> B T D", ids, w.embed) + embedding("T, C D -> T D", arange("T"), w.places)
         + embedding("T, Y D -> T D", zeros("T", dtype="int64"), w.types))
    x = scan(block, layer_norm(x, w.norm, w.shift, config.eps), w.layers, config=config)
    h = gelu(einsum("B T D, D E -> B T E", x, w.head) + w.head_bias)
    h = rename("B T E -> B T D", layer_norm(h, w.head_norm, w.head_shift, config.eps))
    return einsum("B T D, V D -> B T V", h, w.embed) + w.word_bias


LAYER, ATTENTION, HEAD = "bert.encoder.layer.{L}.", "bert.encoder.layer.{L}.attention.", "cls.predictions."
ROWS = (
    Weight("embed",            "V D",     "bert.embeddings.word_embeddings.weight",       "V D"),
    Weight("places",           "C D",     "bert.embeddings.position_embeddings.weight",   "C D"),
    Weight("types",            "Y D",     "bert.embeddings.token_type_embeddings.weight", "Y D"),
    Weight("norm",             "D",       "bert.embeddings.LayerNorm.weight",             "D"),
    Weight("shift",            "D",       "bert.embeddings.LayerNorm.bias",               "D"),
    Weight("layers.wq",        "L D K H", ATTENTION + "self.query.weight",                "(K H) D"),
    Weight("layers.bq",        "L K H",   ATTENTION + "self.query.bias",                  "(K H)"),
    Weight("layers.wk",        "L D K H", ATTENTION + "self.key.weight",                  "(K H) D"),
    Weight("layers.bk",        "L K H",   ATTENTION + "self.key.bias",                    "(K H)"),
    Weight("layers.wv",        "L D K H", ATTENTION + "self.value.weight",                "(K H) D"),
    Weight("layers.bv",        "L K H",   ATTENTION + "self.value.bias",                  "(K H)"),
    Weight("layers.out",       "L K H D", ATTENTION + "output.dense.weight",              "D (K H)"),
    Weight("layers.out_bias",  "L D",     ATTENTION + "output.dense.bias",                "D"),
    Weight("layers.norm1",     "L D",     ATTENTION + "output.LayerNorm.weight",          "D"),
    Weight("layers.shift1",    "L D",     ATTENTION + "output.LayerNorm.bias",            "D"),
    Weight("layers.up",        "L D F",   LAYER + "intermediate.dense.weight",            "F D"),
    Weight("layers.up_bias",   "L F",     LAYER + "intermediate.dense.bias",              "F"),
    Weight("layers.down",      "L F D",   LAYER + "output.dense.weight",                  "D F"),
    Weight("layers.down_bias", "L D",     LAYER + "output.dense.bias",                    "D"),
    Weight("layers.norm2",     "L D",     LAYER + "output.LayerNorm.weight",              "D"),
    Weight("layers.shift2",    "L D",     LAYER + "output.LayerNorm.bias",                "D"),
    Weight("head",             "D E",     HEAD + "transform.dense.weight",                "E D"),
    Weight("head_bias",        "E",       HEAD + "transform.dense.bias",                  "E"),
    Weight("head_norm",        "E",       HEAD + "transform.LayerNorm.weight",            "E"),
    Weight("head_shift",       "E",       HEAD + "transform.LayerNorm.bias",              "E"),
    Weight("word_bias",        "V",       HEAD + "bias",                                  "V"),
)


def config(said: Said) -> Config:
    said.only("hidden_act", "gelu", default="gelu")
    said.only("position_embedding_type", "absolute", default="absolute")
    said.only("tie_word_embeddings", True, default=True)
    d_model, heads = said.size("hidden_size"), said.size("num_attention_heads")
    return Config(
        (("V", said.size("vocab_size")), ("C", said.size("max_position_embeddings")),
         ("Y", said.size("type_vocab_size", default=2)), ("D", d_model), ("E", d_model),
         ("L", said.size("num_hidden_layers")), ("K", heads),
         ("H", said.whole(d_model, heads, "elements a head")), ("F", said.size("intermediate_size"))),
        eps=said.number("layer_norm_eps", default=1e-12))


BERT = Page("bert", Bert, logits, config, lambda config: ROWS)
