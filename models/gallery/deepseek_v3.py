"""DeepSeek-V3: latent attention, experts chosen by sigmoid in groups, and one that all share (2024).

B batch  T query time  S key time  D d_model  L layers with experts  O dense layers, which come first
K heads  G queries per head, one  Q latent of queries  C latent of keys and values  V vocab
N elements of a head without positions  R with, of keys the same for all heads  H = N + R
A elements of a value  W = N + A  U = C + R, what is kept of a token  E experts  J experts a token
F d_ff of an expert  I of the shared ones together  M of a dense layer
"""
from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from shardlib import Params, einsum, param, stacked
from shardlib.functions import concat, mul, ones, silu, split, stack, stop_gradient, unbind
from shardlib.models.causal import CausalLM
from shardlib.models.files.rope_said import rope_of, set_of, yarn_mscale
from shardlib.models.files.said import Said
from shardlib.models.files.weights import Weight
from shardlib.models.gallery.experts import ExpertsConfig, expert_rows, top_k
from shardlib.models.gallery.page import Page, ends
from shardlib.models.mixtral import through_experts
from shardlib.ops import rms_norm, rope, rope_table, route

LATENT_EPS = 1e-6


class Attention(Params):
    norm1: Tensor = param("D", initial="ones")
    q_down: Tensor = param("D Q")
    q_norm: Tensor = param("Q", initial="ones")
    q_up: Tensor = param("Q K G H")
    kv_down: Tensor = param("D C")
    kv_norm: Tensor = param("C", initial="ones")
    kv_up: Tensor = param("C K W")
    k_turned: Tensor = param("D R")
    wo: Tensor = param("K G A D")
    norm2: Tensor = param("D", initial="ones")


class Dense(Attention):
    gate: Tensor = param("D M")
    up: Tensor = param("D M")
    down: Tensor = param("M D")


class Sparse(Attention):
    router: Tensor = param("D E/1")
    bias: Tensor = param("E/1", initial="zeros")    # takes part in the choice alone, and has no gradient
    gate: Tensor = param("E D F")
    up: Tensor = param("E D F")
    down: Tensor = param("E F D")
    shared_gate: Tensor = param("D I")
    shared_up: Tensor = param("D I")
    shared_down: Tensor = param("I D")


class DeepseekV3(Params):
    embed: Tensor = param("V D")
    dense: Dense = stacked("O", Dense)
    layers: Sparse = stacked("L", Sparse)
    norm: Tensor = param("D", initial="ones")
    head: Tensor = param("V D")                     # absent where the embedding is tied


class Latent(Params):
    kept: Tensor = param("B S U", initial="zeros")


class Cache(Params):
    dense: Latent = stacked("O", Latent)
    layers: Latent = stacked("L", Latent)


def latent_attention(x, w, angles, past, config):
    """What is kept of a token is its latent, and the turned part of its key. Over a cache, queries come to
    the latents, as to one kv head; else keys and values are made of them."""
    h = rms_norm(x, w.norm1, config.eps)
    q = rms_norm(einsum("B T D, D Q -> B T Q", h, w.q_down), w.q_norm, LATENT_EPS)
    q, turned = split("B T K G H -> B T K G N, B T K G R", einsum("B T Q, Q K G H -> B T K G H", q, w.q_up))
    turned = rope("B T K G R, B T R -> B T K G R", turned, angles, interleaved=config.interleaved)

    latent = rms_norm(einsum("B T D, D C -> B T C", h, w.kv_down), w.kv_norm, LATENT_EPS)
    k_turned = rope("B T R, B T R -> B T R", einsum("B T D, D R -> B T R", h, w.k_turned), angles,
                    interleaved=config.interleaved)
    kept = past.keep("B S U", concat("B T C, B T R -> B T U", latent, k_turned))
    to_k, to_v = split("C K W -> C K N, C K A", w.kv_up)
    if past.stored:
        a = over_latents(q, turned, kept, to_k, to_v, past, config)
    else:
        q = concat("B T K G N, B T K G R -> B T K G H", q, turned)
        k_turned = mul("B T R, K -> B T K R", k_turned, ones("K", dtype="int64"))    # the same for all heads
        k = einsum("B T C, C K N -> B T K N", latent, to_k)
        k = concat("B T K N, B T K R -> B T K H", k, k_turned)
        v = einsum("B T C, C K A -> B T K A", latent, to_v)
        a = past.over("B T K G H, B S K H, B S K A -> B T K G A", q, k, v, scale=config.scale)
    return x + einsum("B T K G A, K G A D -> B T D", a, w.wo)


def over_latents(q, turned, kept, to_k, to_v, past, config):
    """q (W_k c) = (W_k^T q) c: all heads share the latents c, as keys and as values."""
    q = concat("B T K G C, B T K G R -> B T K G U", einsum("B T K G N, C K N -> B T K G C", q, to_k), turned)
    q = stack("B T K U -> B T Z K U", unbind("B T K G U -> B T K U", q))
    c, _ = split("B S U -> B S C, B S R", kept)
    k, v = stack("B S U -> B S Z U", kept), stack("B S C -> B S Z C", c)
    a = past.over("B T Z K U, B S Z U, B S Z C -> B T Z K C", q, k, v, scale=config.scale)
    a = einsum("B T K C, C K A -> B T K A", unbind("B T Z K C -> B T K C", a), to_v)
    return stack("B T K A -> B T K G A", a)


def dense(x, w, angles, past, config):
    x = latent_attention(x, w, angles, past, config)
    h = rms_norm(x, w.norm2, config.eps)
    gate, up = einsum("B T D, D M -> B T M", h, w.gate), einsum("B T D, D M -> B T M", h, w.up)
    return x + einsum("B T M, M D -> B T D", silu(gate) * up, w.down)


def sparse(x, w, angles, past, config):
    x = latent_attention(x, w, angles, past, config)
    h = rms_norm(x, w.norm2, config.eps)
    scores, bias = einsum("B T D, D E/1 -> B T E/1", h, w.router), stop_gradient(w.bias)
    weights, chosen = route("B T E, E -> B T J, B T J", scores, bias, score="sigmoid", top_k=config.top_k,
                            renormalise=config.renormalise, scale=config.weight_scale,
                            groups=config.groups, top_groups=config.top_groups)
    gate, up = einsum("B T D, D I -> B T I", h, w.shared_gate), einsum("B T D, D I -> B T I", h, w.shared_up)
    shared = einsum("B T I, I D -> B T D", silu(gate) * up, w.shared_down)
    return x + through_experts(h, weights, chosen, w) + shared


def angles_at(start, config):
    return rope_table("B -> B T/1 R", start, theta=config.theta, scaling=config.scaling)


LM = CausalLM(DeepseekV3, dict(dense=dense, layers=sparse), Cache, angles=("B T/1 R", angles_at))


@dataclass(frozen=True)
class DeepseekConfig(ExpertsConfig):
    interleaved: bool = True


def config(said: Said) -> DeepseekConfig:
    for key, only in (("attention_bias", False), ("hidden_act", "silu"), ("scoring_func", "sigmoid")):
        said.only(key, only, default=only)
    experts, heads, layers = (said.size(key) for key in ("n_routed_experts", "num_attention_heads",
                                                         "num_hidden_layers"))
    said.assuming(num_key_value_heads=128).only("num_key_value_heads", heads, default=heads)
    width, plain, turned = (said.size(key) for key in ("moe_intermediate_size", "qk_nope_head_dim",
                                                       "qk_rope_head_dim"))
    dense, value, chosen = said.size("first_k_dense_replace"), said.size("v_head_dim"), top_k(said, experts)
    if dense >= layers:
        raise said.error(f"first_k_dense_replace is {dense}, of {layers} layers: none has experts")
    sizes = dict(V=said.size("vocab_size"), D=said.size("hidden_size"), L=layers - dense, O=dense, K=heads,
                 G=1, Q=said.size("q_lora_rank"), C=said.size("kv_lora_rank"), N=plain, R=said.even(turned),
                 H=plain + turned, A=value, W=plain + value,
                 U=said.size("kv_lora_rank") + turned, E=experts, J=chosen, F=width,
                 I=width * said.size("n_shared_experts"), M=said.size("intermediate_size"))
    theta, scaling = rope_of(said)
    return DeepseekConfig(
        tuple(sizes.items()), eps=said.number("rms_norm_eps", default=1e-6), theta=theta, scaling=scaling,
        scale=(plain + turned) ** -0.5 * longer_scale(said),
        max_context=said.size("max_position_embeddings"),
        tied=said.flag("tie_word_embeddings", default=False), top_k=chosen,
        renormalise=said.flag("norm_topk_prob", default=True), groups=said.size("n_group"),
        top_groups=said.size("topk_group"), weight_scale=said.number("routed_scaling_factor", default=2.5),
        interleaved=said.flag("rope_interleave", default=True))


def longer_scale(said: Said) -> float:
    """What scores are multiplied by for a longer context: twice what `mscale_all_dim` says of q and of k."""
    rope = set_of(said)
    weight = rope.fields.get("mscale_all_dim") if rope.fields["rope_type"] != "default" else None
    return yarn_mscale(rope.number("factor"), rope.number("mscale_all_dim")) ** 2 if weight else 1.0


def attention_rows(path: str, layer: str) -> tuple[Weight, ...]:
    a, o = layer + "self_attn.", "O" if path == "dense" else "L"
    both, beside = a + "kv_a_proj_with_mqa.weight", "C, R"
    norm1, norm2 = layer + "input_layernorm.weight", layer + "post_attention_layernorm.weight"
    return (Weight(f"{path}.norm1",    f"{o} D",       norm1,                       "D"),
            Weight(f"{path}.q_down",   f"{o} D Q",     a + "q_a_proj.weight",       "Q D"),
            Weight(f"{path}.q_norm",   f"{o} Q",       a + "q_a_layernorm.weight",  "Q"),
            Weight(f"{path}.q_up",     f"{o} Q K G H", a + "q_b_proj.weight",       "(K G H) Q"),
            Weight(f"{path}.kv_down",  f"{o} D C",     both,                        "C D", beside, 0),
            Weight(f"{path}.k_turned", f"{o} D R",     both,                        "R D", beside, 1),
            Weight(f"{path}.kv_norm",  f"{o} C",       a + "kv_a_layernorm.weight", "C"),
            Weight(f"{path}.kv_up",    f"{o} C K W",   a + "kv_b_proj.weight",      "(K W) C"),
            Weight(f"{path}.wo",       f"{o} K G A D", a + "o_proj.weight",         "D (K G A)"),
            Weight(f"{path}.norm2",    f"{o} D",       norm2,                       "D"))


def gated_rows(path: str, dims: str, mlp: str) -> tuple[Weight, ...]:
    o, width = dims.split()
    return (Weight(f"{path}gate", f"{o} D {width}", mlp + "gate_proj.weight", f"{width} D"),
            Weight(f"{path}up",   f"{o} D {width}", mlp + "up_proj.weight",   f"{width} D"),
            Weight(f"{path}down", f"{o} {width} D", mlp + "down_proj.weight", f"D {width}"))


def rows(config: DeepseekConfig) -> tuple[Weight, ...]:
    first, layer = "model.layers.{O}.", f"model.layers.{{L+{config.sizes['O']}}}."
    shared = layer + "mlp.shared_experts."
    found = (*attention_rows("dense", first), *gated_rows("dense.", "O M", first + "mlp."),
             *attention_rows("layers", layer), *gated_rows("layers.shared_", "L I", shared),
             *expert_rows(layer),
             Weight("layers.bias", "L E", layer + "mlp.gate.e_score_correction_bias", "E"))
    return (*ends(config), *found)


DEEPSEEK_V3 = Page.of("deepseek_v3", LM, config, rows)
