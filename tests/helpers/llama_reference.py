"""Llama once more, in plain torch on whole tensors: what the programs are held against, in fp64. And the way
from the weights of Hugging Face transformers to ours and back, written with einops and not with the loader.

Tolerances are torch's own error, the worst of several runs that differ in the order and the parts in which
sums are made.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import cache

import torch
import transformers
from einops import rearrange
from torch import Tensor
from transformers import LlamaForCausalLM

from shardlib.models.llama import Llama, LlamaConfig
from shardlib.params import struct

transformers.utils.logging.disable_progress_bar()

LAYER = {"norm1": ("input_layernorm", "D -> D"), "norm2": ("post_attention_layernorm", "D -> D"),
         "wq": ("self_attn.q_proj", "(K G H) D -> D K G H"), "wk": ("self_attn.k_proj", "(K H) D -> D K H"),
         "wv": ("self_attn.v_proj", "(K H) D -> D K H"), "wo": ("self_attn.o_proj", "D (K G H) -> K G H D"),
         "gate": ("mlp.gate_proj", "F D -> D F"), "up": ("mlp.up_proj", "F D -> D F"),
         "down": ("mlp.down_proj", "D F -> F D")}
OUTER = {"embed": "model.embed_tokens.weight", "norm": "model.norm.weight", "head": "lm_head.weight"}
ORDERS, MORE_ORDERS = 8, 64


# -- to and from transformers --------------------------------------------------------------------------------

def transformers_config(config: LlamaConfig) -> transformers.LlamaConfig:
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if s := config.rope_scaling:
        rope.update(rope_type="llama3", factor=s.factor, low_freq_factor=s.low_freq_factor,
                    high_freq_factor=s.high_freq_factor, original_max_position_embeddings=s.original_context)
    return transformers.LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.d_model, intermediate_size=config.d_ff,
        num_hidden_layers=config.num_layers, num_attention_heads=config.num_kv_heads * config.queries_per_kv,
        num_key_value_heads=config.num_kv_heads, head_dim=config.head_dim, rms_norm_eps=config.norm_eps,
        rope_parameters=rope, tie_word_embeddings=config.tied, max_position_embeddings=config.max_context,
        attn_implementation="eager", bos_token_id=None, eos_token_id=None)


def random_weights(config: LlamaConfig, seed: int) -> dict[str, Tensor]:
    """Our leaves in fp32, large enough for attention to prefer some keys, no norm weight like another."""
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for path, spec in struct(Llama).leaves(""):
        if not (config.tied and path == ".head"):
            w = torch.randn([config.sizes[n] for n in spec.names], generator=generator)
            fan_in = config.d_model if "D" in spec.names else 1
            out[path[1:]] = (1 + w / 4 if "norm" in path else w if path == ".embed"
                             else w * 2 / math.sqrt(fan_in))
    return out


def from_transformers(tensors: Mapping[str, Tensor], config: LlamaConfig) -> dict[str, Tensor]:
    """Our leaves of a state dict, or of anything with its names, such as gradients;
    `head` only where it is not tied."""
    sizes = {n: config.sizes[n] for n in "KGH"}
    out = {path: tensors[name] for path, name in OUTER.items() if not (config.tied and path == "head")}
    for path, (name, pattern) in LAYER.items():
        known = {n: k for n, k in sizes.items() if n in pattern}
        out[f"layers.{path}"] = torch.stack(
            [rearrange(tensors[f"model.layers.{i}.{name}.weight"], pattern, **known)
             for i in range(config.num_layers)])
    return {path: out[path] for path in _specs(out)}


def to_transformers(weights: Mapping[str, Tensor], config: LlamaConfig) -> LlamaForCausalLM:
    """The model of transformers with our leaves as weights, in their dtype."""
    tensors = {name: weights["embed" if config.tied and path == "head" else path]
               for path, name in OUTER.items()}
    for path, (name, pattern) in LAYER.items():
        back = " -> ".join(reversed(pattern.split(" -> ")))
        for i, w in enumerate(weights[f"layers.{path}"]):
            tensors[f"model.layers.{i}.{name}.weight"] = rearrange(w, back).contiguous()
    with torch.device("meta"):
        model = LlamaForCausalLM(transformers_config(config))
    model.load_state_dict(tensors, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    if config.tied:
        model.tie_weights()
    return model.eval()


# -- plain torch ---------------------------------------------------------------------------------------------

def logits(w: Mapping[str, Tensor], ids: Tensor, config: LlamaConfig, parts: int = 1) -> Tensor:
    """Logits after every token, in the dtype of `w`.

    The rotary tables are those of transformers, computed in fp32.

    parts: in how many the sums over heads and over d_ff are cut and added up, as tensor-parallel ranks would.
    """
    x = w["embed"][ids]
    cos, sin = (t[:, :, None] for t in _rotary(config)(x, torch.arange(ids.shape[1])[None]))

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * weight

    def rope(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat((-b, a), -1) * sin

    def product(a: Tensor, b: Tensor) -> Tensor:
        products = [i @ j for i, j in zip(a.chunk(parts, -1), b.chunk(parts))]
        return sum(products[1:], products[0])

    causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    for i in range(config.num_layers):
        l = {path: w[f"layers.{path}"][i] for path in LAYER}
        h = norm(x, l["norm1"])
        k, v = rope(torch.einsum("btd,dkh->btkh", h, l["wk"])), torch.einsum("btd,dkh->btkh", h, l["wv"])
        heads = []
        for g in range(config.queries_per_kv):
            q = rope(torch.einsum("btd,dkh->btkh", h, l["wq"][:, :, g]))
            score = torch.einsum("btkh,bskh->bkts", q, k) / math.sqrt(config.head_dim)
            heads.append(
                torch.einsum("bkts,bskh->btkh", score.masked_fill(~causal, -torch.inf).softmax(-1), v))
        x = x + product(torch.stack(heads, 3).flatten(2), l["wo"].flatten(0, 2))
        h = norm(x, l["norm2"])
        x = x + product(torch.nn.functional.silu(h @ l["gate"]) * (h @ l["up"]), l["down"])
    return norm(x, w["norm"]) @ w["embed" if config.tied else "head"].T


@cache
def _rotary(config: LlamaConfig) -> torch.nn.Module:
    return transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(transformers_config(config))


def loss(w: Mapping[str, Tensor], ids: Tensor, labels: Tensor, config: LlamaConfig, parts: int = 1) -> Tensor:
    """Mean cross entropy in nats per token; no shift: labels[b, t] is what should follow ids[b, t]."""
    return -logits(w, ids, config, parts).log_softmax(-1).gather(-1, labels[..., None]).mean()


def gradients(w: Mapping[str, Tensor], ids: Tensor, labels: Tensor, config: LlamaConfig,
              order: int = 0) -> dict[str, Tensor]:
    """d loss / d leaf of every leaf, by autograd."""
    leaves = {path: t.detach().requires_grad_() for path, t in w.items()}
    found = torch.autograd.grad(loss(shuffled(leaves, order), ids, labels, config, 1 + order % 4),
                                list(leaves.values()))
    return dict(zip(leaves, found))


# -- torch's own error ---------------------------------------------------------------------------------------

def _specs(w: Mapping[str, Tensor]) -> dict[str, tuple[str, ...]]:
    return {path[1:]: spec.names for path, spec in struct(Llama).leaves("") if path[1:] in w}


def shuffled(w: Mapping[str, Tensor], order: int) -> dict[str, Tensor]:
    """The same model with the dims that are summed over in another order:
    other roundings, equally good. 0: as it is."""
    if order == 0:
        return dict(w)
    specs, generator = _specs(w), torch.Generator().manual_seed(order)
    sizes = {n: k for path, names in specs.items() for n, k in zip(names, w[path].shape)}
    place = {n: torch.randperm(sizes[n], generator=generator) for n in "DFKG"}
    out = dict(w)
    for path, names in specs.items():
        for i, name in enumerate(names):
            out[path] = out[path].index_select(i, place[name]) if name in place else out[path]
    return out


def error(found: Tensor, truth: Tensor) -> float:
    """The median over tokens of the root mean square of the difference: where a token's last residual is
    close to zero, the norm after it magnifies any rounding, and one such token would outweigh all others."""
    return (found.double() - truth).square().mean(-1).sqrt().median().item()


def is_as_good(found: float, errors: Callable[[torch.dtype, int], list[float]], dtype: torch.dtype) -> bool:
    """Whether an error is at most twice the worst of torch's own. errors(dtype, orders):
    torch's, with sums in so many orders.

    Eight orders tell that mostly: the worst of eight errors of one model differs by more than twice from the
    worst of eight others once in some 700 models, so where eight do not tell, 64 do."""
    return any(found <= 2 * _worst(lambda of: errors(of, orders), dtype) for orders in (ORDERS, MORE_ORDERS))


def _worst(errors: Callable[[torch.dtype], list[float]], dtype: torch.dtype) -> float:
    """The worst of torch's own errors at `dtype`. At fp64, also of those at fp32, as much smaller as fp64 is
    finer, and twice that: what is called true was computed at fp64, and is as wrong as what is measured by
    it."""
    if dtype != torch.float64:
        return max(errors(dtype))
    finer = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    return 2 * max(errors(dtype) + [e * finer for e in errors(torch.float32)])


@torch.no_grad()
def logits_of_torch(w: Mapping[str, Tensor], ids: Tensor, config: LlamaConfig, dtype: torch.dtype,
                    orders: int = ORDERS) -> list[Tensor]:
    """The logits by transformers and by plain torch at `dtype`;
    at fp64, where transformers computes some steps in fp32, by the latter."""
    models = [shuffled({path: t.to(dtype) for path, t in w.items()}, order) for order in range(orders)]
    theirs = [to_transformers(model, config)(ids).logits for model in models[:orders // 2]
              if dtype != torch.float64]
    return [*(logits(model, ids, config, parts=1 + order % 4) for order, model in enumerate(models)), *theirs]


def gradients_error(found: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> float:
    """The norm of the difference of all gradients, relative to their norm:
    at fp64, a leaf that is wrong by a millionth stands out."""
    def norm(leaves: Iterable[Tensor]) -> float:
        return sum(t.double().square().sum().item() for t in leaves) ** 0.5
    return norm(found[path].double() - t for path, t in truth.items()) / norm(truth.values())
