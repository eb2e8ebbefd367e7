"""ViT: an image as patches, behind one learned vector that is classified (Dosovitskiy et al. 2020).

B batch  C channels  I J height and width of images  P Q of patches  Y X their places  N patches  O one
T query time, O and N  S key time  D d_model  L layers  K heads  G one query a head  H head_dim  F d_ff
V classes
"""
from __future__ import annotations

from torch import Tensor

from shardlib import Params, einsum, param, rearrange, rename, scan, sharded, stacked
from shardlib.functions import concat, gelu, stack, unbind, zeros
from shardlib.models.files.said import Said
from shardlib.models.files.weights import Weight
from shardlib.models.gallery.page import Config, Page
from shardlib.ops import attention, layer_norm, take


class Block(Params):
    norm1: Tensor = param("D", initial="ones")
    shift1: Tensor = param("D", initial="zeros")
    wq: Tensor = param("D K H")
    bq: Tensor = param("K H", initial="zeros")
    wk: Tensor = param("D K H")
    bk: Tensor = param("K H", initial="zeros")
    wv: Tensor = param("D K H")
    bv: Tensor = param("K H", initial="zeros")
    out: Tensor = param("K H D")
    out_bias: Tensor = param("D", initial="zeros")
    norm2: Tensor = param("D", initial="ones")
    shift2: Tensor = param("D", initial="zeros")
    up: Tensor = param("D F")
    up_bias: Tensor = param("F", initial="zeros")
    down: Tensor = param("F D")
    down_bias: Tensor = param("D", initial="zeros")


class Vit(Params):
    patch: Tensor = param("D C P Q")
    patch_bias: Tensor = param("D", initial="zeros")
    first: Tensor = param("D")
    places: Tensor = param("T D")
    layers: Block = stacked("L", Block)
    norm: Tensor = param("D", initial="ones")
    shift: Tensor = param("D", initial="zeros")
    head: Tensor = param("V D")
    head_bias: Tensor = param("V", initial="zeros")


@sharded("B T D, * -> B T D")
def block(x, w: Block, *, config):
    h = layer_norm(x, w.norm1, w.shift1, config.eps)
    q = stack("B T K H -> B T K G H",  einsum("B T D, D K H -> B T K H", h, w.wq) + w.bq)
    k = rename("B T K H -> B S K H",   einsum("B T D, D K H -> B T K H", h, w.wk) + w.bk)
    v = rename("B T K H -> B S K H",   einsum("B T D, D K H -> B T K H", h, w.wv) + w.bv)
    a = attention("B T K G H, B S K H, B S K H -> B T K G H", q, k, v, causal=False)
    x = x + einsum("B T K H, K H D -> B T D", unbind("B T K G H -> B T K H", a), w.out) + w.out_bias
    h = layer_norm(x, w.norm2, w.shift2, config.eps)
    h = gelu(einsum("B T D, D F -> B T F", h, w.up) + w.up_bias)
    return x + einsum("B T F, F D -> B T D", h, w.down) + w.down_bias


@sharded("B C I J, * -> B V")
def logits(images, w: Vit, *, config):
    x = rearrange("B C (Y P) (X Q) -> B C Y P X Q", rename("B C I J -> B C (Y P) (X Q)", images))
    x = einsum("B C Y P X Q, D C P Q -> B Y X D", x, w.patch) + w.patch_bias
    x = rename("B (Y X) D -> B N D", rearrange("B Y X D -> B (Y X) D", x))
    first = stack("B D -> B O D", zeros("B D") + w.first)
    x = concat("B O D, B N D -> B T D", first, x) + w.places
    x = layer_norm(scan(block, x, w.layers, config=config), w.norm, w.shift, config.eps)
    x = take("B T D, B -> B D", x, zeros("B", dtype="int64"))
    return einsum("B D, V D -> B V", x, w.head) + w.head_bias


PATCHES, LAYER = "vit.embeddings.patch_embeddings.projection.", "vit.encoder.layer.{L}."
ATTENTION = LAYER + "attention.attention."
ROWS = (
    Weight("patch",            "D C P Q", PATCHES + "weight",                   "D C P Q"),
    Weight("patch_bias",       "D",       PATCHES + "bias",                     "D"),
    Weight("first",            "D",       "vit.embeddings.cls_token",           "1 1 D"),
    Weight("places",           "T D",     "vit.embeddings.position_embeddings", "1 T D"),
    Weight("layers.norm1",     "L D",     LAYER + "layernorm_before.weight",    "D"),
    Weight("layers.shift1",    "L D",     LAYER + "layernorm_before.bias",      "D"),
    Weight("layers.wq",        "L D K H", ATTENTION + "query.weight",           "(K H) D"),
    Weight("layers.bq",        "L K H",   ATTENTION + "query.bias",             "(K H)"),
    Weight("layers.wk",        "L D K H", ATTENTION + "key.weight",             "(K H) D"),
    Weight("layers.bk",        "L K H",   ATTENTION + "key.bias",               "(K H)"),
    Weight("layers.wv",        "L D K H", ATTENTION + "value.weight",           "(K H) D"),
    Weight("layers.bv",        "L K H",   ATTENTION + "value.bias",             "(K H)"),
    Weight("layers.out",       "L K H D", LAYER + "attention.output.dense.weight", "D (K H)"),
    Weight("layers.out_bias",  "L D",     LAYER + "attention.output.dense.bias", "D"),
    Weight("layers.norm2",     "L D",     LAYER + "layernorm_after.weight",     "D"),
    Weight("layers.shift2",    "L D",     LAYER + "layernorm_after.bias",       "D"),
    Weight("layers.up",        "L D F",   LAYER + "intermediate.dense.weight",  "F D"),
    Weight("layers.up_bias",   "L F",     LAYER + "intermediate.dense.bias",    "F"),
    Weight("layers.down",      "L F D",   LAYER + "output.dense.weight",        "D F"),
    Weight("layers.down_bias", "L D",     LAYER + "output.dense.bias",          "D"),
    Weight("norm",             "D",       "vit.layernorm.weight",               "D"),
    Weight("shift",            "D",       "vit.layernorm.bias",                 "D"),
    Weight("head",             "V D",     "classifier.weight",                  "V D"),
    Weight("head_bias",        "V",       "classifier.bias",                    "V"),
)


def config(said: Said) -> Config:
    said.only("hidden_act", "gelu", default="gelu")
    said.only("qkv_bias", True, default=True)
    d_model, heads = said.size("hidden_size"), said.size("num_attention_heads")
    image, patch = said.size("image_size"), said.size("patch_size")
    patches, labels = said.whole(image, patch, "patches") ** 2, said.get("id2label", {"0": "", "1": ""})
    if not isinstance(labels, dict) or not labels:
        raise said.error("id2label is no table of labels")
    return Config(
        (("V", len(labels)), ("C", said.size("num_channels")), ("P", patch),
         ("Q", patch), ("T", patches + 1), ("D", d_model), ("L", said.size("num_hidden_layers")),
         ("K", heads), ("H", said.whole(d_model, heads, "elements a head")),
         ("F", said.size("intermediate_size"))),
        eps=said.number("layer_norm_eps", default=1e-12))


VIT = Page("vit", Vit, logits, config, lambda config: ROWS, takes="B C I J", gives="B V")
