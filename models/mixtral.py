"""Mixtral, one page: Llama's attention, and in place of its feed-forward layer experts, of which each token
goes through a few.

B batch  T query time  S key time (cache slots)  D d_model  L layers
K kv heads  G queries per kv head  H head_dim  X experts  J experts a token  F d_ff  V vocab
E slots of experts: as many, or, where w.slots says which are whose (X R, R replicas), more

No line here knows of ranks or meshes. `Layout(E="ep")` makes it expert parallel, `F="tp"` tensor parallel
within each expert, both lines both; `Layout(B="dp", E=("dp", "tp"))` has attention data parallel and experts
over all ranks: tokens go to their experts and come home.
"""
from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from shardlib import Params, einsum, param, scan, sharded, stacked
from shardlib.functions import silu
from shardlib.models.causal import CausalLM, angles_at, embed, head, mean_loss, norm
from shardlib.models.llama import LlamaConfig, heads
from shardlib.ops import (
    combine,
    dispatch,
    grouped_einsum,
    load_balancing_loss,
    rms_norm,
    route,
    router_z_loss,
    slots_of,
)
from shardlib.ops.past import Past


@dataclass(frozen=True)
class MixtralConfig(LlamaConfig):
    """What a checkpoint says of its model. d_ff: of each expert.  top_k: experts a token.

    window: how many keys a query sees at most, its own among them; None: all before it.
    num_slots: of experts' weights, where some have replicas; 0: each expert is there once.
    balance, z_loss: how much the load balancing loss counts in training, and the router's z-loss.
    """
    num_experts: int
    top_k: int
    window: int | None = None
    balance: float = 0.0
    z_loss: float = 0.0
    num_slots: int = 0

    @property
    def family(self) -> str:
        return "mixtral"

    @property
    def sizes(self) -> dict[str, int]:
        return {**super().sizes, "X": self.num_experts, "E": self.num_slots or self.num_experts,
                "J": self.top_k, "R": max(self.num_slots - self.num_experts, 0) + 1}


class Block(Params):
    norm1: Tensor = param("D", initial="ones")
    wq: Tensor = param("D K G H")
    wk: Tensor = param("D K H")
    wv: Tensor = param("D K H")
    wo: Tensor = param("K G H D")
    norm2: Tensor = param("D", initial="ones")
    router: Tensor = param("D X")
    gate: Tensor = param("E D F")
    up: Tensor = param("E D F")
    down: Tensor = param("E F D")
    slots = None                                    # each expert is there once


class Mixtral(Params):
    embed: Tensor = param("V D")
    layers: Block = stacked("L", Block)
    norm: Tensor = param("D", initial="ones")
    head: Tensor = param("V D")                     # absent where the embedding is tied


class PlacedBlock(Block):
    slots: Tensor = param("X R")                    # of each expert: see `slots_of`


class Placed(Mixtral):
    layers: PlacedBlock = stacked("L", PlacedBlock)


def through_experts(x, weights, chosen, w):
    rows, at = dispatch("B T D, B T J -> (E B T)~J D, (E B T)~J", x, chosen)
    gate = grouped_einsum("(E B T)~J D, (E B T)~J, E D F -> (E B T)~J F", rows, at, w.gate)
    up   = grouped_einsum("(E B T)~J D, (E B T)~J, E D F -> (E B T)~J F", rows, at, w.up)
    down = grouped_einsum("(E B T)~J F, (E B T)~J, E F D -> (E B T)~J D", silu(gate) * up, at, w.down)
    return combine("(E B T)~J D, (E B T)~J, B T J -> B T D", down, at, weights)


def moe(x, w, config):
    """What the experts make of x; what the router says, and whom it chose."""
    logits = einsum("B T D, D X -> B T X", x, w.router)
    weights, chosen = route("B T X -> B T J, B T J", logits, top_k=config.top_k)
    slots = chosen if w.slots is None else slots_of("X R, B T J -> B T J", w.slots, chosen)
    return through_experts(x, weights, slots, w), logits, chosen


def routed_block(x, w, angles, past, config):
    a = past.attention(*heads(x, w, angles, config), window=config.window)
    x = x + einsum("B T K G H, K G H D -> B T D", a, w.wo)
    y, *router = moe(rms_norm(x, w.norm2, config.eps), w, config)
    return x + y, *router


def block(x, w, angles, past, config):
    return routed_block(x, w, angles, past, config)[0]


LM = CausalLM(Mixtral, dict(layers=block))
logits_of, next_logits, next_token = LM.logits_of, LM.next_logits, LM.next_token


@sharded("B T D, *, B T/1 H -> B T D, B T X, B T J")
def balanced_block(x, w: Block, angles, *, config):
    return routed_block(x, w, angles, Past(), config)


@sharded("B T/1, B T/1, *, B -> ()")
def loss(ids, labels, w: Mixtral, start, *, config):
    """Mean cross entropy, in nats per token, and what `config` adds for its routers."""
    if not config.balance and not config.z_loss:
        return LM.loss(ids, labels, w, start, config=config)
    x, router, experts = scan(balanced_block, embed(ids, w, start, config), w.layers,
                              angles_at(start, config), config=config)
    return (mean_loss(head(norm(x, w, config), w, config), labels)
            + config.balance * load_balancing_loss("L B T X, L B T J -> ()", router, experts)
            + config.z_loss * router_z_loss("L B T X -> ()", router))
