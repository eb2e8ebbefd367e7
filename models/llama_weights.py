"""Llama checkpoints: what they call each weight, and how they store it.

>>> from shardlib.spec import parse
>>> shard = load("smollm2", {"layers.wq": parse("L D K/tp G H")}, Mesh(tp=2), {"tp": 1}, torch.float32)
>>> shard["layers.wq"].shape
torch.Size([30, 576, 1, 3, 64])

Where the head is tied to the embedding, a leaf `head` that is asked for is read from the embedding.
"""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from shardlib.mesh import Mesh
from shardlib.models.files.checkpoint import Checkpoint
from shardlib.models.files.model_files import open_checkpoint
from shardlib.models.files.weights import Weight, load_weights
from shardlib.models.llama import LlamaConfig
from shardlib.models.llama_config import config_of
from shardlib.spec import Spec


class Row(NamedTuple):
    """A leaf, its spec and its dims as stored; its name in Hugging Face folders and in GGUF files."""
    path: str
    spec: str
    stored: str
    huggingface: str
    gguf: str


HF, BLK = "model.layers.{L}.", "blk.{L}."
LLAMA = (
    Row("embed",        "V D",       "V D",
        "model.embed_tokens.weight",           "token_embd.weight"),
    Row("layers.norm1", "L D",       "D",
        HF + "input_layernorm.weight",          BLK + "attn_norm.weight"),
    Row("layers.wq",    "L D K G H", "(K G H) D",
        HF + "self_attn.q_proj.weight",         BLK + "attn_q.weight"),
    Row("layers.wk",    "L D K H",   "(K H) D",
        HF + "self_attn.k_proj.weight",         BLK + "attn_k.weight"),
    Row("layers.wv",    "L D K H",   "(K H) D",
        HF + "self_attn.v_proj.weight",         BLK + "attn_v.weight"),
    Row("layers.wo",    "L K G H D", "D (K G H)",
        HF + "self_attn.o_proj.weight",         BLK + "attn_output.weight"),
    Row("layers.norm2", "L D",       "D",
        HF + "post_attention_layernorm.weight", BLK + "ffn_norm.weight"),
    Row("layers.gate",  "L D F",     "F D",
        HF + "mlp.gate_proj.weight",            BLK + "ffn_gate.weight"),
    Row("layers.up",    "L D F",     "F D",
        HF + "mlp.up_proj.weight",              BLK + "ffn_up.weight"),
    Row("layers.down",  "L F D",     "D F",
        HF + "mlp.down_proj.weight",            BLK + "ffn_down.weight"),
    Row("norm",         "D",         "D",
        "model.norm.weight",                    "output_norm.weight"),
    Row("head",         "V D",       "V D",
        "lm_head.weight",                       "output.weight"),
)
# rotary halves interleaved
GGUF_STORED = {"layers.wq": "(K G H_pair H_half) D", "layers.wk": "(K H_pair H_half) D"}


def weights_of(config: LlamaConfig, format: str) -> tuple[Weight, ...]:
    """The table of weights of a checkpoint in `format`: "huggingface" or "gguf"."""
    names = {row.path: getattr(row, format) for row in LLAMA}
    if config.tied:
        names["head"] = names["embed"]
    stored = GGUF_STORED if format == "gguf" else {}
    return tuple(Weight(row.path, row.spec, names[row.path], stored.get(row.path, row.stored))
                 for row in LLAMA)


def load(source: str | Path | Checkpoint, types: Mapping[str, Spec], mesh: Mesh,
         coordinate: Mapping[str, int], dtype: torch.dtype,
         device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """What `coordinate` holds of each leaf of `types`, from a model's name,
    or headers that are already read."""
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    config = config_of(checkpoint)
    return load_weights(checkpoint, weights_of(config, checkpoint.format), config.sizes, types, mesh,
                        coordinate, dtype, device)
