"""Llama once more, in plain torch on whole tensors: what the programs are held against, in fp64. And the way from the
weights of Hugging Face transformers to ours and back, written with einops and not with the loader.
"""
from __future__ import annotations

import math
from typing import Mapping

import torch
import transformers
from einops import rearrange
from torch import Tensor
from transformers import LlamaForCausalLM

from shardlib.models.llama import Llama, LlamaConfig
from shardlib.params import struct

LAYER = {"norm1": ("input_layernorm", "D -> D"), "norm2": ("post_attention_layernorm", "D -> D"),
         "wq": ("self_attn.q_proj", "(K G H) D -> D K G H"), "wk": ("self_attn.k_proj", "(K H) D -> D K H"),
         "wv": ("self_attn.v_proj", "(K H) D -> D K H"), "wo": ("self_attn.o_proj", "D (K G H) -> K G H D"),
         "gate": ("mlp.gate_proj", "F D -> D F"), "up": ("mlp.up_proj", "F D -> D F"), "down": ("mlp.down_proj", "D F -> F D")}
OUTER = {"embed": "model.embed_tokens.weight", "norm": "model.norm.weight", "head": "lm_head.weight"}


def from_transformers(tensors: Mapping[str, Tensor], config: LlamaConfig) -> dict[str, Tensor]:
    """Our leaves of a state dict, or of anything with its names, such as gradients; `head` only where it is not tied."""
    sizes = {n: config.sizes[n] for n in "KGH"}
    out = {path: tensors[name] for path, name in OUTER.items() if not (config.tied and path == "head")}
    for path, (name, pattern) in LAYER.items():
        known = {n: k for n, k in sizes.items() if n in pattern}
        out[f"layers.{path}"] = torch.stack([rearrange(tensors[f"model.layers.{i}.{name}.weight"], pattern, **known)
                                             for i in range(config.num_layers)])
    return out


def to_transformers(weights: Mapping[str, Tensor], config: LlamaConfig) -> LlamaForCausalLM:
    """The model of transformers with our leaves as weights, in their dtype."""
    tensors = {name: weights["embed" if config.tied and path == "head" else path] for path, name in OUTER.items()}
    for path, (name, pattern) in LAYER.items():
        back = " -> ".join(reversed(pattern.split(" -> ")))
        for i, w in enumerate(weights[f"layers.{path}"]):
            tensors[f"model.layers.{i}.{name}.weight"] = rearrange(w, back)
    with torch.device("meta"):
        model = LlamaForCausalLM(transformers_config(config))
    model.load_state_dict(tensors, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    if config.tied:
        model.tie_weights()
    return model.eval()


def transformers_config(config: LlamaConfig) -> transformers.LlamaConfig:
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if s := config.rope_scaling:
        rope.update(rope_type="llama3", factor=s.factor, low_freq_factor=s.low_freq_factor, high_freq_factor=s.high_freq_factor,
                    original_max_position_embeddings=s.original_context)
    return transformers.LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.d_model, intermediate_size=config.d_ff, num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_kv_heads * config.queries_per_kv, num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim, rms_norm_eps=config.norm_eps, rope_parameters=rope, tie_word_embeddings=config.tied,
        max_position_embeddings=config.max_context, attn_implementation="eager")


def logits(w: Mapping[str, Tensor], ids: Tensor, config: LlamaConfig, model: LlamaForCausalLM) -> Tensor:
    """Logits after every token, in the dtype of `w`. The rotary tables are those of `model`, which computes them in fp32."""
    x = w["embed"][ids]
    cos, sin = (t[:, :, None] for t in model.model.rotary_emb(x, torch.arange(ids.shape[1])[None]))

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * weight

    def rope(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat((-b, a), -1) * sin

    causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    for i in range(config.num_layers):
        l = {path: w[f"layers.{path}"][i] for path in LAYER}
        h = norm(x, l["norm1"])
        k, v = rope(torch.einsum("btd,dkh->btkh", h, l["wk"])), torch.einsum("btd,dkh->btkh", h, l["wv"])
        heads = []
        for g in range(config.queries_per_kv):
            q = rope(torch.einsum("btd,dkh->btkh", h, l["wq"][:, :, g]))
            score = torch.einsum("btkh,bskh->bkts", q, k) / math.sqrt(config.head_dim)
            heads.append(torch.einsum("bkts,bskh->btkh", score.masked_fill(~causal, -torch.inf).softmax(-1), v))
        x = x + torch.einsum("btkgh,kghd->btd", torch.stack(heads, 3), l["wo"])
        h = norm(x, l["norm2"])
        x = x + (torch.nn.functional.silu(h @ l["gate"]) * (h @ l["up"])) @ l["down"]
    return norm(x, w["norm"]) @ w["embed" if config.tied else "head"].T


def shuffled(w: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """The same model with the dims that are summed over in another order: other roundings, equally good."""
    leaves = [(path[1:], spec) for path, spec in struct(Llama).leaves("") if path[1:] in w]
    sizes = {n: k for path, spec in leaves for n, k in zip(spec.names, w[path].shape)}
    order = {n: torch.randperm(sizes[n], generator=generator) for n in "DFKG"}
    out = dict(w)
    for path, spec in leaves:
        for i, name in enumerate(spec.names):
            out[path] = out[path].index_select(i, order[name]) if name in order else out[path]
    return out


def loss(w: Mapping[str, Tensor], ids: Tensor, labels: Tensor, config: LlamaConfig, model: LlamaForCausalLM) -> Tensor:
    """Mean cross entropy in nats per token; no shift: labels[b, t] is what should follow ids[b, t]."""
    return -logits(w, ids, config, model).log_softmax(-1).gather(-1, labels[..., None]).mean()


def error(found: Tensor, truth: Tensor) -> float:
    """Root mean square of the difference."""
    return (found.double() - truth).square().mean().sqrt().item()
