"""Mistral: a Llama whose queries see the last W keys alone (Jiang et al. 2023).

B batch  T query time  S key time  D d_model  L layers  K kv heads  G queries per kv head  H head_dim  F d_ff
V vocab
"""
from __future__ import annotations

from shardlib import einsum
from shardlib.models.causal import CausalLM
from shardlib.models.files.said import Said
from shardlib.models.gallery.page import Config, Page, decoder_config, decoder_rows
from shardlib.models.llama import Llama, feed_forward, heads
from shardlib.ops import rms_norm


class Mistral(Llama):
    """The weights of a Llama."""


def block(x, w, angles, past, config):
    a = past.attention(*heads(x, w, angles, config), window=config.window)
    x = x + einsum("B T K G H, K G H D -> B T D", a, w.wo)
    return x + feed_forward(rms_norm(x, w.norm2, config.eps), w)


def config(said: Said) -> Config:
    said = said.assuming(num_key_value_heads=8, sliding_window=4096)
    return decoder_config(said, window=said.size("sliding_window", default=None))


MISTRAL = Page.of("mistral", CausalLM(Mistral, dict(layers=block)), config, decoder_rows)
