"""GPT-2: layer norms, learned positions, q, k and v in one weight (Radford et al. 2019).

B batch  T query time  S key time  C positions  D d_model  L layers  Q q, k and v  K heads  G one query a head
H head_dim  F d_ff  V vocab
"""
from __future__ import annotations

from torch import Tensor

from shardlib import Params, einsum, param, stacked
from shardlib.functions import add, arange, gelu, stack, unbind
from shardlib.models.causal import CausalLM
from shardlib.models.files.said import Said
from shardlib.models.files.weights import Weight
from shardlib.models.gallery.page import Config, Page
from shardlib.ops import embedding, layer_norm


class Block(Params):
    norm1: Tensor = param("D", initial="ones")
    shift1: Tensor = param("D", initial="zeros")
    qkv: Tensor = param("D Q K H")
    qkv_bias: Tensor = param("Q K H", initial="zeros")
    out: Tensor = param("K H D")
    out_bias: Tensor = param("D", initial="zeros")
    norm2: Tensor = param("D", initial="ones")
    shift2: Tensor = param("D", initial="zeros")
    up: Tensor = param("D F")
    up_bias: Tensor = param("F", initial="zeros")
    down: Tensor = param("F D")
    down_bias: Tensor = param("D", initial="zeros")


class Gpt2(Params):
    embed: Tensor = param("V D")
    places: Tensor = param("C D")
    layers: Block = stacked("L", Block)
    norm: Tensor = param("D", initial="ones")
    shift: Tensor = param("D", initial="zeros")
    head: Tensor = param("V D")                     # absent where the embedding is tied


def block(x, w, start, past, config):
    h = layer_norm(x, w.norm1, w.shift1, config.eps)
    h = einsum("B T D, D Q K H -> B T Q K H", h, w.qkv) + w.qkv_bias
    q, k, v = unbind("B T Q K H -> B T K H, B T K H, B T K H", h)
    a = unbind("B T K G H -> B T K H", past.attention(stack("B T K H -> B T K G H", q), k, v))
    x = x + einsum("B T K H, K H D -> B T D", a, w.out) + w.out_bias
    h = layer_norm(x, w.norm2, w.shift2, config.eps)
    h = gelu(einsum("B T D, D F -> B T F", h, w.up) + w.up_bias, approximate="tanh")
    return x + einsum("B T F, F D -> B T D", h, w.down) + w.down_bias


def embed(ids, w, start, config):
    places = embedding("B T, C D -> B T D", add("B, T -> B T", start, arange("T")), w.places)
    return embedding("B T, V D -> B T D", ids, w.embed) + places


LM = CausalLM(Gpt2, dict(layers=block), embed=embed, angles=("B", lambda start, config: start),
              norm=lambda x, w, config: layer_norm(x, w.norm, w.shift, config.eps))


LAYER = "transformer.h.{L}."
ROWS = (
    Weight("embed",            "V D",       "transformer.wte.weight",      "V D"),
    Weight("places",           "C D",       "transformer.wpe.weight",      "C D"),
    Weight("layers.norm1",     "L D",       LAYER + "ln_1.weight",         "D"),
    Weight("layers.shift1",    "L D",       LAYER + "ln_1.bias",           "D"),
    Weight("layers.qkv",       "L D Q K H", LAYER + "attn.c_attn.weight",  "D (Q K H)"),
    Weight("layers.qkv_bias",  "L Q K H",   LAYER + "attn.c_attn.bias",    "(Q K H)"),
    Weight("layers.out",       "L K H D",   LAYER + "attn.c_proj.weight",  "(K H) D"),
    Weight("layers.out_bias",  "L D",       LAYER + "attn.c_proj.bias",    "D"),
    Weight("layers.norm2",     "L D",       LAYER + "ln_2.weight",         "D"),
    Weight("layers.shift2",    "L D",       LAYER + "ln_2.bias",           "D"),
    Weight("layers.up",        "L D F",     LAYER + "mlp.c_fc.weight",     "D F"),
    Weight("layers.up_bias",   "L F",       LAYER + "mlp.c_fc.bias",       "F"),
    Weight("layers.down",      "L F D",     LAYER + "mlp.c_proj.weight",   "F D"),
    Weight("layers.down_bias", "L D",       LAYER + "mlp.c_proj.bias",     "D"),
    Weight("norm",             "D",         "transformer.ln_f.weight",     "D"),
    Weight("shift",            "D",         "transformer.ln_f.bias",       "D"),
    Weight("head",             "V D",       "lm_head.weight",              "V D"),
)


def config(said: Said) -> Config:
    said.only("activation_function", "gelu_new", default="gelu_new")
    said.only("scale_attn_weights", True, default=True)
    said.only("scale_attn_by_inverse_layer_idx", False, default=False)
    d_model, heads = said.size("n_embd"), said.size("n_head")
    return Config(
        (("V", said.size("vocab_size")), ("C", said.size("n_positions")), ("D", d_model),
         ("L", said.size("n_layer")), ("Q", 3), ("K", heads),
         ("H", said.whole(d_model, heads, "elements a head")),
         ("F", said.size("n_inner", default=None) or 4 * d_model)),
        eps=said.number("layer_norm_epsilon", default=1e-5),
        tied=said.flag("tie_word_embeddings", default=True), max_context=said.size("n_positions"))


GPT2 = Page.of("gpt2", LM, config,
               lambda config: tuple(row for row in ROWS if not (config.tied and row.path == "head")))
