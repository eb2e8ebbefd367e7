"""What pages of models with experts share: the layer of these, its numbers, and the rows of its weights."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from shardlib import einsum
from shardlib.models.files.said import Said
from shardlib.models.files.weights import Weight
from shardlib.models.gallery.page import LAYER, Config, decoder_config
from shardlib.models.mixtral import through_experts
from shardlib.ops import route


@dataclass(frozen=True)
class ExpertsConfig(Config):
    """Also how `route` chooses: see there."""
    top_k: int = 1
    renormalise: bool = False
    weight_scale: float = 1.0
    groups: int = 1
    top_groups: int = 1


def moe(h, w, config):
    """What the experts of each token make of it."""
    weights, chosen = route("B T E -> B T J, B T J", einsum("B T D, D E/1 -> B T E/1", h, w.router),
                            top_k=config.top_k, renormalise=config.renormalise)
    return through_experts(h, weights, chosen, w)


def experts_config(said: Said, width: str, **more: Any) -> ExpertsConfig:
    """The config of such a decoder; what it calls the d_ff of an expert."""
    older = said.fields.get("num_experts") is None and said.fields.get("num_local_experts") is not None
    experts = said.size("num_local_experts" if older else "num_experts")
    chosen = top_k(said, experts)
    config = decoder_config(said, kind=ExpertsConfig, top_k=chosen,
                            renormalise=said.flag("norm_topk_prob", default=False), **more)
    return config.with_sizes(F=said.size(width), E=experts, J=chosen)


def top_k(said: Said, experts: int) -> int:
    chosen = said.size("num_experts_per_tok")
    if chosen > experts:
        raise said.error(f"num_experts_per_tok is {chosen}, of {experts} experts")
    return chosen


def expert_rows(layer: str = LAYER) -> tuple[Weight, ...]:
    """Each matrix of each expert is a tensor of its own."""
    mlp, expert = layer + "mlp.", layer + "mlp.experts.{E}."
    return (Weight("layers.router", "L D E",   mlp + "gate.weight",         "E D"),
            Weight("layers.gate",   "L E D F", expert + "gate_proj.weight", "F D"),
            Weight("layers.up",     "L E D F", expert + "up_proj.weight",   "F D"),
            Weight("layers.down",   "L E F D", expert + "down_proj.weight", "D F"))
