"""Mamba-2: a state per head in place of keys, written as the attention that it is (Dao and Gu 2024).

B batch  T time  S earlier time  D d_model  L layers  K groups  G heads of a group  H head_dim  N state
P taps of a convolution  V vocab

In a group the heads share what is written to the state and read from it, as queries share a kv head.
"""
from __future__ import annotations

from torch import Tensor

from shardlib import Params, einsum, param, rename, scan, sharded, stacked
from shardlib.functions import clamp, cumsum, exp, mean, rsqrt, silu, softplus, sub, tril, windows
from shardlib.models.files.said import Said
from shardlib.models.files.weights import Weight
from shardlib.models.gallery.page import Config, Page
from shardlib.ops import embedding, rms_norm


class Block(Params):
    norm: Tensor = param("D", initial="ones")
    gate: Tensor = param("D K G H")
    taken: Tensor = param("D K G H")
    write: Tensor = param("D K N")
    read: Tensor = param("D K N")
    step: Tensor = param("D K G")
    step_bias: Tensor = param("K G", initial="zeros")
    taps: Tensor = param("K G H P")
    taps_bias: Tensor = param("K G H", initial="zeros")
    write_taps: Tensor = param("K N P")
    write_bias: Tensor = param("K N", initial="zeros")
    read_taps: Tensor = param("K N P")
    read_bias: Tensor = param("K N", initial="zeros")
    log_rate: Tensor = param("K G", initial="zeros")
    through: Tensor = param("K G", initial="ones")
    head_norm: Tensor = param("K G H", initial="ones")
    out: Tensor = param("K G H D")


class Mamba2(Params):
    embed: Tensor = param("V D")
    layers: Block = stacked("L", Block)
    norm: Tensor = param("D", initial="ones")
    head: Tensor = param("V D")                     # absent where the embedding is tied


def convolved(dims, x, w, taps, bias, config):
    """Channels made of x, then each by itself over the last P elements of time."""
    x = einsum(f"B T D, D {dims} -> B T {dims}", x, w)
    seen = windows(f"B T {dims} -> B T P {dims}", x, before=config.sizes["P"] - 1)
    return silu(einsum(f"B T P {dims}, {dims} P -> B T {dims}", seen, taps) + bias)


def states(x, write, read, step, rate):
    """What is written at s is read at t >= s, decayed by exp(-rate step) for each element between them."""
    age = cumsum(step * rate, along="T")
    age = sub("B T K G, B S K G -> B T S K G", age, rename("B T K G -> B S K G", age))
    decay = exp(clamp(-age, max=0.0)) * tril("T S")
    x, write = rename("B T K G H -> B S K G H", x), rename("B T K N -> B S K N", write)
    step = rename("B T K G -> B S K G", step)
    return einsum("B T K N, B S K N, B T S K G, B S K G, B S K G H -> B T K G H", read, write, decay, step, x)


@sharded("B T D, * -> B T D")
def block(x, w: Block, *, config):
    h = rms_norm(x, w.norm, config.eps)
    gate = silu(einsum("B T D, D K G H -> B T K G H", h, w.gate))
    taken = convolved("K G H", h, w.taken, w.taps, w.taps_bias, config)
    write = convolved("K N", h, w.write, w.write_taps, w.write_bias, config)
    read = convolved("K N", h, w.read, w.read_taps, w.read_bias, config)
    step = softplus(einsum("B T D, D K G -> B T K G", h, w.step) + w.step_bias)
    y = (states(taken, write, read, step, exp(w.log_rate)) + taken * w.through) * gate
    y = y * rsqrt(mean("B T K G H -> B T K", y * y) + config.eps) * w.head_norm
    return x + einsum("B T K G H, K G H D -> B T D", y, w.out)


@sharded("B T/1, * -> B T V")
def logits(ids, w: Mamba2, *, config):
    x = scan(block, embedding("B T, V D -> B T D", ids, w.embed), w.layers, config=config)
    x = rms_norm(x, w.norm, config.eps)
    return einsum("B T D, V D -> B T V", x, w.embed if w.head is None else w.head)


MIXER = "backbone.layers.{L}.mixer."
IN, TAPS = "K G H, K G H, K N, K N, K G", "K G H, K N, K N"
ROWS = (
    Weight("embed",             "V D",       "backbone.embeddings.weight",      "V D"),
    Weight("layers.norm",       "L D",       "backbone.layers.{L}.norm.weight", "D"),
    Weight("layers.gate",       "L D K G H", MIXER + "in_proj.weight",          "(K G H) D",   IN, 0),
    Weight("layers.taken",      "L D K G H", MIXER + "in_proj.weight",          "(K G H) D",   IN, 1),
    Weight("layers.write",      "L D K N",   MIXER + "in_proj.weight",          "(K N) D",     IN, 2),
    Weight("layers.read",       "L D K N",   MIXER + "in_proj.weight",          "(K N) D",     IN, 3),
    Weight("layers.step",       "L D K G",   MIXER + "in_proj.weight",          "(K G) D",     IN, 4),
    Weight("layers.step_bias",  "L K G",     MIXER + "dt_bias",                 "(K G)"),
    Weight("layers.taps",       "L K G H P", MIXER + "conv1d.weight",           "(K G H) 1 P", TAPS, 0),
    Weight("layers.write_taps", "L K N P",   MIXER + "conv1d.weight",           "(K N) 1 P",   TAPS, 1),
    Weight("layers.read_taps",  "L K N P",   MIXER + "conv1d.weight",           "(K N) 1 P",   TAPS, 2),
    Weight("layers.taps_bias",  "L K G H",   MIXER + "conv1d.bias",             "(K G H)",     TAPS, 0),
    Weight("layers.write_bias", "L K N",     MIXER + "conv1d.bias",             "(K N)",       TAPS, 1),
    Weight("layers.read_bias",  "L K N",     MIXER + "conv1d.bias",             "(K N)",       TAPS, 2),
    Weight("layers.log_rate",   "L K G",     MIXER + "A_log",                   "(K G)"),
    Weight("layers.through",    "L K G",     MIXER + "D",                       "(K G)"),
    Weight("layers.head_norm",  "L K G H",   MIXER + "norm.weight",             "(K G H)"),
    Weight("layers.out",        "L K G H D", MIXER + "out_proj.weight",         "D (K G H)"),
    Weight("norm",              "D",         "backbone.norm_f.weight",          "D"),
    Weight("head",              "V D",       "lm_head.weight",                  "V D"),
)


UNLIMITED = [0.0, float("inf")], [0.0, {"__float__": "Infinity"}]       # in json that has no infinity


def config(said: Said) -> Config:
    said.only("hidden_act", "silu", default="silu")
    said.only("use_bias", False, default=False)
    said.only("use_conv_bias", True, default=True)
    said.only("time_step_limit", *UNLIMITED, default=UNLIMITED[0])
    heads, groups = said.size("num_heads"), said.size("n_groups")
    if heads * said.size("head_dim") != said.number("expand") * said.size("hidden_size"):
        raise said.error("num_heads and head_dim make another width than expand and hidden_size")
    return Config(
        (("V", said.size("vocab_size")), ("D", said.size("hidden_size")),
         ("L", said.size("num_hidden_layers")), ("K", groups),
         ("G", said.whole(heads, groups, "heads of a group")), ("H", said.size("head_dim")),
         ("N", said.size("state_size")), ("P", said.size("conv_kernel"))),
        eps=said.number("layer_norm_epsilon"), tied=said.flag("tie_word_embeddings", default=False))


MAMBA2 = Page("mamba2", Mamba2, logits, config,
              lambda config: tuple(row for row in ROWS if not (config.tied and row.path == "head")))
