"""Mamba-2: a state per head in place of keys, written as the attention that it is (Dao and Gu 2024).

B batch  T time  U earlier time  D d_model  L layers  K groups  G heads of a group  H head_dim  N state
P taps of a convolution  O tokens that it keeps, one less  V vocab

In a group the heads share what is written to the state and read from it, as queries share a kv head.
"""
from __future__ import annotations

import sys

from torch import Tensor

from shardlib import Params, einsum, param, rename, stacked
from shardlib.functions import clamp, cumsum, exp, mean, rsqrt, silu, softplus, sub, sum, tril
from shardlib.models.causal import CausalLM
from shardlib.models.files.said import Said
from shardlib.models.files.weights import Weight
from shardlib.models.gallery.page import Config, Page
from shardlib.ops import rms_norm


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


class Kept(Params):
    taken: Tensor = param("B O K G H", initial="zeros")
    write: Tensor = param("B O K N", initial="zeros")
    read: Tensor = param("B O K N", initial="zeros")
    state: Tensor = param("B K G H N", initial="zeros")


class Cache(Params):
    layers: Kept = stacked("L", Kept)


def convolved(dims, x, w, taps, bias, past, config):
    """Channels made of x, then each by itself over the last P elements of time."""
    seen = past.windows(dims, einsum(f"B T D, D {dims} -> B T {dims}", x, w), config.sizes["P"])
    return silu(einsum(f"B T P {dims}, {dims} P -> B T {dims}", seen, taps) + bias)


def states(x, write, read, step, rate, past):
    """What is written at u is read at t >= u, decayed by exp(-rate step) for each element between them; so is
    the state, which is what was written before. A step of 0 neither decays nor writes."""
    age = cumsum(step * rate, along="T")
    then = rename("B T K G -> B U K G", age)
    x, write = rename("B T K G H -> B U K G H", x), rename("B T K N -> B U K N", write)
    end, step = sum("B T K G -> B K G", step * rate), rename("B T K G -> B U K G", step)

    def after(held):
        decay = exp(clamp(sub("B U K G, B K G -> B U K G", then, end), max=0.0))
        new = einsum("B U K N, B U K G, B U K G, B U K G H -> B K G H N", write, decay, step, x)
        return new if held is None else new + held * exp(-end)
    held = past.state(after)
    decay = exp(clamp(sub("B U K G, B T K G -> B T U K G", then, age), max=0.0)) * tril("T U")
    y = einsum("B T K N, B U K N, B T U K G, B U K G, B U K G H -> B T K G H", read, write, decay, step, x)
    if held is None:
        return y
    return y + einsum("B T K N, B K G H N, B T K G -> B T K G H", read, held, exp(-age))


def block(x, w, start, past, config):
    h = rms_norm(x, w.norm, config.eps)
    gate = silu(einsum("B T D, D K G H -> B T K G H", h, w.gate))
    taken = convolved("K G H", h, w.taken, w.taps, w.taps_bias, past, config)
    write = convolved("K N", h, w.write, w.write_taps, w.write_bias, past, config)
    read = convolved("K N", h, w.read, w.read_taps, w.read_bias, past, config)
    step = past.real(softplus(einsum("B T D, D K G -> B T K G", h, w.step) + w.step_bias))
    y = (states(taken, write, read, step, exp(w.log_rate), past) + taken * w.through) * gate
    y = y * rsqrt(mean("B T K G H -> B T K", y * y) + config.eps) * w.head_norm
    return x + einsum("B T K G H, K G H D -> B T D", y, w.out)


LM = CausalLM(Mamba2, dict(layers=block), Cache, angles=("B", lambda start, config: start), chunk=256)


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
    heads, groups, taps = said.size("num_heads"), said.size("n_groups"), said.size("conv_kernel")
    if heads * said.size("head_dim") != said.number("expand") * said.size("hidden_size"):
        raise said.error("num_heads and head_dim make another width than expand and hidden_size")
    return Config(
        (("V", said.size("vocab_size")), ("D", said.size("hidden_size")),
         ("L", said.size("num_hidden_layers")), ("K", groups),
         ("G", said.whole(heads, groups, "heads of a group")), ("H", said.size("head_dim")),
         ("N", said.size("state_size")), ("P", taps), ("O", taps - 1)),
        eps=said.number("layer_norm_epsilon"), tied=said.flag("tie_word_embeddings", default=False),
        max_context=sys.maxsize)


MAMBA2 = Page.of("mamba2", LM, config,
                 lambda config: tuple(row for row in ROWS if not (config.tied and row.path == "head")))
