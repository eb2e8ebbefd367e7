"""The LlamaConfig that a checkpoint's own words describe, or a refusal:
nothing that is not implemented is passed over.

>>> config = config_from_hf({"model_type": "llama", "vocab_size": 256, "hidden_size": 64,
...     "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "rms_norm_eps": 1e-5,
...     "max_position_embeddings": 128})
>>> config.num_kv_heads, config.queries_per_kv, config.head_dim, config.rope_theta
(4, 1, 16, 10000.0)
>>> config_from_hf({"model_type": "qwen2"})
Traceback (most recent call last):
    ...
shardlib.models.files.checkpoint.CheckpointError: config.json: model_type is 'qwen2', which is not implemented; it may be 'llama'

Refused with a `CheckpointError`: other architectures, experts, biases, other activations, quantised Hugging
Face folders, and rotary embeddings other than those of `rope_said`.
"""  # noqa: E501
from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from shardlib.mesh import Mesh
from shardlib.models.files.checkpoint import Checkpoint, CheckpointError
from shardlib.models.files.rope_said import rope_of
from shardlib.models.files.said import Said
from shardlib.models.files.weights import Weight, load_weights
from shardlib.models.llama import LlamaConfig, RopeScaling
from shardlib.spec import parse

LLAMA3 = dict(low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192)    # of Llama 3.1 to 3.3


def refuse_biases(checkpoint: Checkpoint) -> None:
    for name in checkpoint.tensors:
        if name.endswith(".bias"):
            raise CheckpointError(f"tensor {name}: biases are not implemented")


def config_of(checkpoint: Checkpoint) -> LlamaConfig:
    """What the headers of a checkpoint say of its model."""
    refuse_biases(checkpoint)
    if checkpoint.format == "huggingface":
        return config_from_hf(checkpoint.metadata)
    embed = checkpoint.tensors.get("token_embd.weight")
    metadata = {"llama.vocab_size": embed.shape[0], **checkpoint.metadata} if embed else checkpoint.metadata
    config = config_from_gguf(metadata, tied="output.weight" not in checkpoint.tensors)
    return _with_rope_scaling(config, checkpoint) if "rope_freqs.weight" in checkpoint.tensors else config


def config_from_hf(config: Mapping[str, Any]) -> LlamaConfig:
    """The model of a config.json."""
    said = Said(config, "config.json")
    said.only("model_type", "llama")
    said.only("hidden_act", "silu", default="silu")
    said.only("attention_bias", False, default=False)
    said.only("mlp_bias", False, default=False)
    said.only("quantization_config", None)
    said.only("partial_rotary_factor", 1, default=1)
    d_model, heads = said.size("hidden_size"), said.size("num_attention_heads")
    kv_heads = said.size("num_key_value_heads", default=heads)
    theta, scaling = hf_rope(said)
    return LlamaConfig(
        vocab_size=said.size("vocab_size"), d_model=d_model, num_layers=said.size("num_hidden_layers"),
        num_kv_heads=kv_heads, queries_per_kv=said.whole(heads, kv_heads, "query heads for each kv head"),
        head_dim=said.even(said.size("head_dim", default=None)
                           or said.whole(d_model, heads, "elements a head")),
        d_ff=said.size("intermediate_size"), norm_eps=said.number("rms_norm_eps", default=1e-6),
        rope_theta=theta, rope_scaling=scaling, tied=said.flag("tie_word_embeddings", default=False),
        max_context=said.size("max_position_embeddings"))


def hf_rope(said: Said) -> tuple[float, RopeScaling | tuple[Any, ...] | None]:
    """Base and scaling, Llama 3's by name."""
    theta, scaling = rope_of(said)
    return theta, scaling if scaling is None or isinstance(scaling[0], str) else RopeScaling(*scaling)


def config_from_gguf(metadata: Mapping[str, Any], tied: bool) -> LlamaConfig:
    """The model of a GGUF file's metadata; `tied` where the file has no output.weight."""
    said = Said(metadata, "GGUF metadata")
    said.only("general.architecture", "llama")
    said.only("llama.expert_count", 0, default=0)
    said.only("llama.rope.scaling.type", "none", default="none")
    said.only("llama.rope.scale_linear", 1, default=1)
    said.only("llama.attention.sliding_window", 0, default=0)
    d_model, heads = said.size("llama.embedding_length"), said.size("llama.attention.head_count")
    kv_heads = said.size("llama.attention.head_count_kv", default=heads)
    head_dim = (said.size("llama.attention.key_length", default=None)
                or said.whole(d_model, heads, "elements a head"))
    said.only("llama.attention.value_length", head_dim, default=head_dim)
    said.only("llama.rope.dimension_count", head_dim, default=head_dim)
    return LlamaConfig(
        vocab_size=said.size("llama.vocab_size"), d_model=d_model, num_layers=said.size("llama.block_count"),
        num_kv_heads=kv_heads, queries_per_kv=said.whole(heads, kv_heads, "query heads for each kv head"),
        head_dim=said.even(head_dim), d_ff=said.size("llama.feed_forward_length"),
        norm_eps=said.number("llama.attention.layer_norm_rms_epsilon"),
        rope_theta=said.number("llama.rope.freq_base", default=10000.0), rope_scaling=None, tied=tied,
        max_context=said.size("llama.context_length"))


def _with_rope_scaling(config: LlamaConfig, checkpoint: Checkpoint) -> LlamaConfig:
    """The Llama 3 scaling whose frequency divisors the tensor rope_freqs holds;
    GGUF stores nothing else of it."""
    table, pairs = [Weight("rope_freqs", "P", "rope_freqs.weight", "P")], config.head_dim // 2
    loaded = load_weights(checkpoint, table, {"P": pairs}, {"rope_freqs": parse("P")}, Mesh(), {},
                          torch.float32)
    held = loaded["rope_freqs"].tolist()
    scaling = RopeScaling(factor=min(1e6, max(1.0, *held)), **LLAMA3)
    made = [_divisor(scaling, config.rope_theta ** (-pair / pairs)) for pair in range(pairs)]
    if not all(math.isclose(a, b, rel_tol=1e-3) for a, b in zip(held, made)):
        raise CheckpointError(
            "tensor rope_freqs.weight is not the scaling of Llama 3.1; others are not implemented")
    return replace(config, rope_scaling=None if scaling.factor == 1 else scaling)


def _divisor(scaling: RopeScaling, frequency: float) -> float:
    """By how much Llama 3 slows a rotary frequency: 1 for the fast ones, `factor` for the slow,
    between them a blend."""
    turns = scaling.original_context * frequency / (2 * math.pi)
    fast = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    fast = min(1.0, max(0.0, fast))
    return 1 / (fast + (1 - fast) / scaling.factor)
