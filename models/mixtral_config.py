"""The MixtralConfig that a config.json describes, or a refusal of what is not implemented.

>>> config = config_from_hf({"model_type": "mixtral", "vocab_size": 256, "hidden_size": 64,
...     "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
...     "num_local_experts": 8, "num_experts_per_tok": 2, "max_position_embeddings": 128})
>>> config.num_experts, config.top_k, config.rope_theta, config.norm_eps
(8, 2, 1000000.0, 1e-05)

Refused with a `CheckpointError`: other activations, biases, and quantised folders.
"""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shardlib.models.files.said import Said
from shardlib.models.llama_config import hf_rope
from shardlib.models.mixtral import MixtralConfig


def config_from_hf(config: Mapping[str, Any]) -> MixtralConfig:
    """The model of a config.json. What it leaves out is what transformers takes then."""
    said = Said({"num_key_value_heads": 8, "rope_theta": 1e6, **config}, "config.json")
    said.only("model_type", "mixtral")
    said.only("hidden_act", "silu", default="silu")
    said.only("attention_bias", False, default=False)
    said.only("quantization_config", None)
    d_model, heads = said.size("hidden_size"), said.size("num_attention_heads")
    kv_heads, context = said.size("num_key_value_heads"), said.size("max_position_embeddings")
    window = said.size("sliding_window", default=None)
    experts, top_k = said.size("num_local_experts", default=8), said.size("num_experts_per_tok", default=2)
    if top_k > experts:
        raise said.error(f"num_experts_per_tok is {top_k}, of {experts} experts")
    theta, scaling = hf_rope(said)
    balanced = (said.flag("output_router_logits", default=False)
                and said.fields.get("router_aux_loss_coef", 1e-3) != 0)
    return MixtralConfig(
        vocab_size=said.size("vocab_size"), d_model=d_model, num_layers=said.size("num_hidden_layers"),
        num_kv_heads=kv_heads, queries_per_kv=said.whole(heads, kv_heads, "query heads for each kv head"),
        head_dim=said.even(said.size("head_dim", default=None)
                           or said.whole(d_model, heads, "elements a head")),
        d_ff=said.size("intermediate_size"), norm_eps=said.number("rms_norm_eps", default=1e-5),
        rope_theta=theta, rope_scaling=scaling, tied=said.flag("tie_word_embeddings", default=False),
        max_context=context, num_experts=experts, top_k=top_k,
        window=window if window and window < context else None,
        balance=said.number("router_aux_loss_coef", default=1e-3) if balanced else 0.0)
