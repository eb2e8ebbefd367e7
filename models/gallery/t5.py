"""T5: an encoder, a decoder that looks at it, biases by distance in place of positions (Raffel et al. 2019).

B batch  U encoder time  Z its keys  T decoder time  S its keys  C buckets of distances  D d_model  L layers
K heads  G one query a head  H head_dim  F d_ff  V vocab
"""
from __future__ import annotations

from math import ceil

from torch import Tensor

from shardlib import Params, einsum, param, rename, scan, sharded, stacked
from shardlib.functions import abs, arange, clamp, relu, zeros
from shardlib.models.files.said import Said
from shardlib.models.files.weights import Weight
from shardlib.models.gallery.page import Config, Page
from shardlib.ops import attention, embedding, rms_norm


class Encoder(Params):
    norm1: Tensor = param("D", initial="ones")
    wq: Tensor = param("D K G H")
    wk: Tensor = param("D K H")
    wv: Tensor = param("D K H")
    wo: Tensor = param("K G H D")
    norm2: Tensor = param("D", initial="ones")
    up: Tensor = param("D F")
    down: Tensor = param("F D")


class Decoder(Params):
    norm1: Tensor = param("D", initial="ones")
    wq: Tensor = param("D K G H")
    wk: Tensor = param("D K H")
    wv: Tensor = param("D K H")
    wo: Tensor = param("K G H D")
    across: Tensor = param("D", initial="ones")
    across_q: Tensor = param("D K G H")
    across_k: Tensor = param("D K H")
    across_v: Tensor = param("D K H")
    across_o: Tensor = param("K G H D")
    norm2: Tensor = param("D", initial="ones")
    up: Tensor = param("D F")
    down: Tensor = param("F D")


class T5(Params):
    embed: Tensor = param("V D")
    encoder: Encoder = stacked("L", Encoder)
    encoder_bias: Tensor = param("C K")
    encoder_norm: Tensor = param("D", initial="ones")
    decoder: Decoder = stacked("L", Decoder)
    decoder_bias: Tensor = param("C K")
    decoder_norm: Tensor = param("D", initial="ones")


def distances(t, s, table, config, both):
    """A bias of each head by the bucket of how far key s is before query t, or behind it."""
    buckets, longest = config.buckets
    far = zeros(f"{t} {s}", dtype="int64") + arange(t) - arange(s)
    count = buckets // 2 if both else buckets
    before, exact = abs(far) if both else clamp(far, min=0), count // 2
    bucket = clamp(before, max=exact)               # near ones by themselves, then ever more together
    for i in range(1, count - exact):
        first = ceil(exact * (longest / exact) ** (i / (count - exact)) - 1e-6)
        bucket = bucket + (before >= first) * 1
    bucket = bucket + (far < 0) * count if both else bucket
    return einsum(f"{t} {s} K -> K {t} {s}", embedding(f"{t} {s}, C K -> {t} {s} K", bucket, table))


@sharded("B U D, *, K U Z -> B U D")
def encode(x, w: Encoder, bias, *, config):
    h = rms_norm(x, w.norm1, config.eps)
    q = einsum("B U D, D K G H -> B U K G H", h, w.wq)
    k = rename("B U K H -> B Z K H", einsum("B U D, D K H -> B U K H", h, w.wk))
    v = rename("B U K H -> B Z K H", einsum("B U D, D K H -> B U K H", h, w.wv))
    a = attention("B U K G H, B Z K H, B Z K H, K U Z -> B U K G H", q, k, v, bias=bias, causal=False,
                  scale=1.0)
    x = x + einsum("B U K G H, K G H D -> B U D", a, w.wo)
    h = relu(einsum("B U D, D F -> B U F", rms_norm(x, w.norm2, config.eps), w.up))
    return x + einsum("B U F, F D -> B U D", h, w.down)


@sharded("B T D, *, K T S, B U D -> B T D")
def decode(x, w: Decoder, bias, encoded, *, config):
    h = rms_norm(x, w.norm1, config.eps)
    q = einsum("B T D, D K G H -> B T K G H", h, w.wq)
    k = rename("B T K H -> B S K H", einsum("B T D, D K H -> B T K H", h, w.wk))
    v = rename("B T K H -> B S K H", einsum("B T D, D K H -> B T K H", h, w.wv))
    a = attention("B T K G H, B S K H, B S K H, K T S -> B T K G H", q, k, v, bias=bias, scale=1.0)
    x = x + einsum("B T K G H, K G H D -> B T D", a, w.wo)
    q = einsum("B T D, D K G H -> B T K G H", rms_norm(x, w.across, config.eps), w.across_q)
    k = einsum("B U D, D K H -> B U K H", encoded, w.across_k)
    v = einsum("B U D, D K H -> B U K H", encoded, w.across_v)
    a = attention("B T K G H, B U K H, B U K H -> B T K G H", q, k, v, causal=False, scale=1.0)
    x = x + einsum("B T K G H, K G H D -> B T D", a, w.across_o)
    h = relu(einsum("B T D, D F -> B T F", rms_norm(x, w.norm2, config.eps), w.up))
    return x + einsum("B T F, F D -> B T D", h, w.down)


@sharded("B U/1, B T/1, * -> B T V")
def logits(ids, answer, w: T5, *, config):
    """Of each next token of an answer, begun with the token that begins one."""
    near = distances("U", "Z", w.encoder_bias, config, both=True)
    x = scan(encode, embedding("B U, V D -> B U D", ids, w.embed), w.encoder, near, config=config)
    encoded = rms_norm(x, w.encoder_norm, config.eps)
    near = distances("T", "S", w.decoder_bias, config, both=False)
    x = scan(decode, embedding("B T, V D -> B T D", answer, w.embed), w.decoder, near, encoded, config=config)
    x = rms_norm(x, w.decoder_norm, config.eps) * config.sizes["D"] ** -0.5
    return einsum("B T D, V D -> B T V", x, w.embed)


def layer_rows(at: str, path: str, names: dict[str, str]) -> tuple[Weight, ...]:
    specs = {"q": ("D K G H", "(K G H) D"), "k": ("D K H", "(K H) D"), "v": ("D K H", "(K H) D"),
             "o": ("K G H D", "D (K G H)"), "layer_norm": ("D", "D"), "wi": ("D F", "F D"),
             "wo": ("F D", "D F")}
    return tuple(Weight(f"{path}.{leaf}", f"L {specs[name.split('.')[-1]][0]}", f"{at}{name}.weight",
                        specs[name.split(".")[-1]][1]) for leaf, name in names.items())


def attention_rows(at: str, q: str, norm: str) -> dict[str, str]:
    layer, _ = at.split(".")
    return {norm: f"{layer}.layer_norm", q.format("q"): f"{at}.q", q.format("k"): f"{at}.k",
            q.format("v"): f"{at}.v", q.format("o"): f"{at}.o"}


def mlp_rows(at: str) -> dict[str, str]:
    return {"norm2": f"{at}.layer_norm", "up": f"{at}.DenseReluDense.wi", "down": f"{at}.DenseReluDense.wo"}


OWN = attention_rows("0.SelfAttention", "w{}", "norm1")
BIAS = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
ROWS = (
    Weight("embed", "V D", "shared.weight", "V D"),
    *layer_rows("encoder.block.{L}.layer.", "encoder", {**OWN, **mlp_rows("1")}),
    Weight("encoder_bias", "C K", f"encoder.{BIAS}", "C K"),
    Weight("encoder_norm", "D", "encoder.final_layer_norm.weight", "D"),
    *layer_rows("decoder.block.{L}.layer.", "decoder", {
        **OWN, **attention_rows("1.EncDecAttention", "across_{}", "across"), **mlp_rows("2")}),
    Weight("decoder_bias", "C K", f"decoder.{BIAS}", "C K"),
    Weight("decoder_norm", "D", "decoder.final_layer_norm.weight", "D"),
)


def config(said: Said) -> Config:
    """The first T5, whose head is its embedding."""
    said.only("feed_forward_proj", "relu", default="relu")
    said.only("tie_word_embeddings", True, default=True)
    layers, buckets = said.size("num_layers"), said.size("relative_attention_num_buckets", default=32)
    said.only("num_decoder_layers", layers, default=layers)
    return Config(
        (("V", said.size("vocab_size")), ("D", said.size("d_model")), ("L", layers), ("C", buckets),
         ("K", said.size("num_heads")), ("G", 1), ("H", said.size("d_kv")), ("F", said.size("d_ff"))),
        eps=said.number("layer_norm_epsilon", default=1e-6),
        buckets=(buckets, said.size("relative_attention_max_distance", default=128)))


T5_PAGE = Page("t5", T5, logits, config, lambda config: ROWS, takes="B U/1, B T/1")
