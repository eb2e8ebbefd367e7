"""Mixtral once more, in plain torch on whole tensors, every token through every expert; and as transformers
has it."""
from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import transformers
from hypothesis import strategies as st
from torch import Tensor
from transformers import MixtralForCausalLM

from shardlib.models.decoding import weights_of
from shardlib.models.mixtral import MixtralConfig
from shardlib.params import fill, struct


@st.composite
def configs(draw: st.DrawFn) -> MixtralConfig:
    """Small ones: experts that no mesh divides, one expert a token to all of four."""
    experts = draw(st.integers(2, 7))
    return MixtralConfig(
        vocab_size=draw(st.integers(7, 23)), d_model=draw(st.integers(3, 9)),
        num_layers=draw(st.integers(1, 2)), num_kv_heads=draw(st.integers(1, 3)),
        queries_per_kv=draw(st.integers(1, 2)), head_dim=2 * draw(st.integers(1, 3)),
        d_ff=draw(st.integers(1, 7)), norm_eps=1e-5, rope_theta=1e4, rope_scaling=None,
        tied=draw(st.booleans()), max_context=64, num_experts=experts,
        top_k=draw(st.integers(1, min(4, experts))), window=draw(st.sampled_from((None, None, 1, 2, 3))),
        balance=draw(st.sampled_from((0.0, 0.5))), z_loss=draw(st.sampled_from((0.0, 0.25))))


def random_weights(config: MixtralConfig, seed: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Our leaves: large enough for tokens to differ in their experts."""
    g, out = torch.Generator().manual_seed(seed), {}
    for path, spec in struct(weights_of(config)).leaves(""):
        w = torch.randn([config.sizes[n] for n in spec.names], generator=g, dtype=torch.float64)
        fan_in = config.d_model if "D" in spec.names else 1
        out[path[1:]] = (1 + w / 4 if "norm" in path else w if path == ".embed"
                         else w * 2 / math.sqrt(fan_in)).to(dtype)
    return out


def tree(weights: Mapping[str, Tensor], config: MixtralConfig) -> object:
    return fill(weights_of(config), "", lambda path: weights[path[1:]])


def logits(w: Mapping[str, Tensor], ids: Tensor, config: MixtralConfig) -> Tensor:
    """Logits after every token, in the dtype of `w`; rotary tables in fp32, as everywhere."""
    return logits_and_routers(w, ids, config)[0]


def logits_and_routers(w: Mapping[str, Tensor], ids: Tensor, config: MixtralConfig) -> tuple[Tensor, Tensor]:
    """And what the routers say, layer by layer."""
    routers: list[Tensor] = []
    x, half = w["embed"][ids], config.head_dim // 2
    slow = config.rope_theta ** (-torch.arange(half, dtype=torch.float32) / half)
    turn = torch.arange(ids.shape[1], dtype=torch.float32)[:, None] * slow
    cos, sin = (torch.cat((f(turn),) * 2, -1).to(x.dtype)[None, :, None] for f in (torch.cos, torch.sin))
    causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    seen_by = causal if config.window is None else causal.triu(1 - config.window)

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * weight

    def rope(x: Tensor) -> Tensor:
        return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin
    for i in range(config.num_layers):
        l = {path[7:]: t[i] for path, t in w.items() if path.startswith("layers.")}
        h = norm(x, l["norm1"])
        k, v = rope(torch.einsum("btd,dkh->btkh", h, l["wk"])), torch.einsum("btd,dkh->btkh", h, l["wv"])
        for g in range(config.queries_per_kv):
            q = rope(torch.einsum("btd,dkh->btkh", h, l["wq"][:, :, g]))
            score = torch.einsum("btkh,bskh->bkts", q, k) / math.sqrt(config.head_dim)
            seen = score.masked_fill(~seen_by, -torch.inf).softmax(-1)
            x = x + torch.einsum("bkts,bskh,khd->btd", seen, v, l["wo"][:, g])
        h = norm(x, l["norm2"])
        routers.append(h @ l["router"])
        best, chosen = routers[-1].softmax(-1).topk(config.top_k, -1)
        inner = torch.nn.functional.silu(torch.einsum("btd,edf->btef", h, l["gate"]))
        every = torch.einsum("btef,efd->bted", inner * torch.einsum("btd,edf->btef", h, l["up"]), l["down"])
        share = torch.zeros(*h.shape[:2], config.num_experts, dtype=x.dtype).scatter(
            2, chosen, best / best.sum(-1, keepdim=True))
        x = x + torch.einsum("bte,bted->btd", share, every)
    return norm(x, w["norm"]) @ w.get("head", w["embed"]).T, torch.stack(routers)


def loss(w: Mapping[str, Tensor], ids: Tensor, labels: Tensor, config: MixtralConfig) -> Tensor:
    """Cross entropy; the load balancing loss as transformers has it; the z-loss by its formula."""
    found, routers = logits_and_routers(w, ids, config)
    ce = -found.log_softmax(-1).gather(-1, labels[..., None]).mean()
    rows = routers.flatten(0, 2)
    odds, n = rows.softmax(-1), config.num_experts
    load = torch.nn.functional.one_hot(odds.topk(config.top_k, -1).indices, n).sum(1).to(odds.dtype).mean(0)
    balance = n * (load * odds.mean(0)).sum()
    return ce + config.balance * balance + config.z_loss * rows.exp().sum(-1).log().square().mean()


def to_transformers(weights: Mapping[str, Tensor], config: MixtralConfig) -> MixtralForCausalLM:
    """The model of transformers with our leaves as weights, in their dtype."""
    model = MixtralForCausalLM(transformers.MixtralConfig(
        vocab_size=config.vocab_size, hidden_size=config.d_model, intermediate_size=config.d_ff,
        num_hidden_layers=config.num_layers, num_attention_heads=config.num_kv_heads * config.queries_per_kv,
        num_key_value_heads=config.num_kv_heads, head_dim=config.head_dim, rms_norm_eps=config.norm_eps,
        num_local_experts=config.num_experts, num_experts_per_tok=config.top_k, sliding_window=config.window,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        output_router_logits=config.balance > 0,
        router_aux_loss_coef=config.balance, tie_word_embeddings=config.tied,
        max_position_embeddings=config.max_context, bos_token_id=None, eos_token_id=None,
        attn_implementation="eager", experts_implementation="eager"))
    found = {"model.embed_tokens.weight": weights["embed"], "model.norm.weight": weights["norm"],
             "lm_head.weight": weights.get("head", weights["embed"])}
    for i in range(config.num_layers):
        l = {path[7:]: t[i] for path, t in weights.items() if path.startswith("layers.")}
        found |= {f"model.layers.{i}.{name}": t for name, t in {
            "input_layernorm.weight": l["norm1"], "post_attention_layernorm.weight": l["norm2"],
            "self_attn.q_proj.weight": l["wq"].flatten(1).T, "self_attn.k_proj.weight": l["wk"].flatten(1).T,
            "self_attn.v_proj.weight": l["wv"].flatten(1).T,
            "self_attn.o_proj.weight": l["wo"].flatten(0, 2).T,
            "mlp.gate.weight": l["router"].T, "mlp.experts.down_proj": l["down"].mT,
            "mlp.experts.gate_up_proj": torch.cat((l["gate"].mT, l["up"].mT), 1)}.items()}
    model.load_state_dict({name: t.contiguous() for name, t in found.items()})
    return model.to(weights["embed"].dtype).eval()
