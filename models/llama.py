"""Llama, one page: the weights, and one layer. `causal` makes the programs of it.

B batch  T query time  S key time (cache slots)  D d_model  L layers
K kv heads  G queries per kv head  H head_dim  F d_ff  V vocab

No line here knows of ranks or meshes. `Layout(K="tp", F="tp", V="tp")` makes it tensor parallel, `T="tp"`
after that sequence parallel, `B="dp"` before it data parallel, `D="dp"` at the end FSDP, `T="cp"` context
parallel.
"""
from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import Any

from torch import Tensor

from shardlib import Params, einsum, param, stacked
from shardlib.functions import silu
from shardlib.models.causal import CausalLM
from shardlib.ops import rms_norm, rope


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's stretching of the rotary frequencies: slow ones are divided by `factor`, fast ones kept."""
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


@dataclass(frozen=True)
class LlamaConfig:
    """What a checkpoint says of its model. Sizes by letter: `config.sizes`."""
    vocab_size: int
    d_model: int
    num_layers: int
    num_kv_heads: int
    queries_per_kv: int
    head_dim: int
    d_ff: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | tuple[Any, ...] | None
    tied: bool
    max_context: int

    @property
    def family(self) -> str:
        return "llama"

    @property
    def eps(self) -> float:
        return self.norm_eps

    @property
    def theta(self) -> float:
        return self.rope_theta

    @property
    def scaling(self) -> tuple[Any, ...] | None:
        """As `rope_table` has it."""
        return astuple(self.rope_scaling) if isinstance(self.rope_scaling, RopeScaling) else self.rope_scaling

    @property
    def sizes(self) -> dict[str, int]:
        return dict(V=self.vocab_size, D=self.d_model, L=self.num_layers, K=self.num_kv_heads,
                    G=self.queries_per_kv, H=self.head_dim, F=self.d_ff)


class Block(Params):
    norm1: Tensor = param("D", initial="ones")
    wq: Tensor = param("D K G H")
    wk: Tensor = param("D K H")
    wv: Tensor = param("D K H")
    wo: Tensor = param("K G H D")
    norm2: Tensor = param("D", initial="ones")
    gate: Tensor = param("D F")
    up: Tensor = param("D F")
    down: Tensor = param("F D")


class Llama(Params):
    embed: Tensor = param("V D")
    layers: Block = stacked("L", Block)
    norm: Tensor = param("D", initial="ones")
    head: Tensor = param("V D")                     # absent where the embedding is tied


def heads(x, w, angles, config):
    h = rms_norm(x, w.norm1, config.eps)
    q = rope("B T K G H, B T H -> B T K G H", einsum("B T D, D K G H -> B T K G H", h, w.wq), angles)
    k = rope("B T K H, B T H -> B T K H",     einsum("B T D, D K H -> B T K H", h, w.wk), angles)
    v = einsum("B T D, D K H -> B T K H", h, w.wv)
    return q, k, v


def feed_forward(h, w):
    gate, up = einsum("B T D, D F -> B T F", h, w.gate), einsum("B T D, D F -> B T F", h, w.up)
    return einsum("B T F, F D -> B T D", silu(gate) * up, w.down)


def block(x, w, angles, past, config):
    a = past.attention(*heads(x, w, angles, config))
    x = x + einsum("B T K G H, K G H D -> B T D", a, w.wo)
    return x + feed_forward(rms_norm(x, w.norm2, config.eps), w)


LM = CausalLM(Llama, dict(layers=block))
logits_of, loss = LM.logits_of, LM.loss
next_logits, prompt_logits, next_token, prompt_token = (LM.next_logits, LM.prompt_logits, LM.next_token,
                                                        LM.prompt_token)
