"""The fusions of the models: what steps mean together, for the pass that looks for them.

    compile(f, layout, passes=(*DEFAULT, "rotate_scan", *fuse(FUSIONS, by_few_rows)))

Each is a function; x is any axis, or product of axes, and a name that no op looks at any number of dims.
"""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from shardlib import EXPLICIT, all_reduce, reduce_scatter, sharded
from shardlib.compiler.fusion import Fusion, Product, Site
from shardlib.distributed.communicators.protocol import FusingCommunicator
from shardlib.functions import argmax, max, silu
from shardlib.language.extremes import FROM_RANK, RANK_OF
from shardlib.language.value import apply
from shardlib.ops.attention import attention
from shardlib.ops.expert_exchange import EXCHANGES
from shardlib.ops.expert_ffn import FORMS, by_few_tokens
from shardlib.ops.few_rows import (
    FEW,
    FLOATS,
    attend_cached,
    attends_cached,
    choose_few,
    counts_of,
    differentiated,
    has_room,
    refuses_cached,
    refuses_turned,
    rows_matmul,
    starts_early,
    turns_cached,
)
from shardlib.ops.kv_cache import update_cache
from shardlib.ops.rms_norm import rms_norm
from shardlib.ops.rope import rope
from shardlib.triton_kernels.limits import MOST_WIDTH


@sharded("T D +x, T D, D -> T D, T D", layout=EXPLICIT)
def all_reduce_add_rms_norm(y, residual, w, *, eps):
    """What ends each half of a transformer's layer, with the norm that begins the next."""
    x = residual + all_reduce("T D +x -> T D", y)
    return x, rms_norm(x, w, eps)


@sharded("B T D +x, B T/x D, D -> B T/x D, B T/x D", layout=EXPLICIT)
def reduce_scatter_add_rms_norm(y, residual, w, *, eps):
    """The same under sequence parallelism."""
    x = residual + reduce_scatter("B T D +x -> B T/x D", y)
    return x, rms_norm(x, w, eps)


@sharded("T D, T D, D -> T D, T D", layout=EXPLICIT)
def add_rms_norm(y, residual, w, *, eps):
    """The same where no sum is owed."""
    x = residual + y
    return x, rms_norm(x, w, eps)


@sharded("F, F -> F", layout=EXPLICIT)
def gate_up(gate, up):
    """What stands between the matmuls of a gated feed-forward."""
    return silu(gate) * up


@sharded("B T K G H, B T K H, B T K H, B T H, B S K H, B S K H, B -> B T K G H, B S K H, B S K H",
         layout=EXPLICIT)
def cached_attention(q, k, v, angles, keys, values, start):
    """A step of decoding between the projections: rope, the cache, and attention over it."""
    q = rope("B T K G H, B T H -> B T K G H", q, angles)
    keys = update_cache("B S K H, B T K H, B -> B S K H", keys,
                        rope("B T K H, B T H -> B T K H", k, angles), start)
    values = update_cache("B S K H, B T K H, B -> B S K H", values, v, start)
    return attention("B T K G H, B S K H, B S K H, B -> B T K G H", q, keys, values, start), keys, values


@sharded("B T K G H, B T K H, B T K H, B T H, B S K H, B S K H, B -> "
         "B T K G H, B T K H, B S K H, B S K H", layout=EXPLICIT)
def rope_into_cache(q, k, v, angles, keys, values, start):
    """The same where attention is among the new tokens alone: the beginning of prompts."""
    q = rope("B T K G H, B T H -> B T K G H", q, angles)
    k = rope("B T K H, B T H -> B T K H", k, angles)
    keys = update_cache("B S K H, B T K H, B -> B S K H", keys, k, start)
    return q, k, keys, update_cache("B S K H, B T K H, B -> B S K H", values, v, start)


@sharded("B V -> B", layout=EXPLICIT)
def row_argmax(logits):
    """The choice of a token."""
    return argmax("B V -> B", logits)


@sharded("B V/x -> B", layout=EXPLICIT)
def split_argmax(logits):
    """The same, where the vocabulary is split."""
    top = all_reduce("B max:x -> B", max("B V/x -> B max:x", logits))
    back = apply(RANK_OF, (logits, top), "B V/x, B -> B max:x")
    return apply(FROM_RANK, (all_reduce("B max:x -> B", back),), "B -> B")


def by_communicator(site: Site) -> Callable | str:
    """The kernel of the first communicator that has one; or why none has. A sum over one rank is the rank's
    own: that of a norm.

    They know functions by name: it is that of FUSIONS, or none.
    """
    if site.ranks == 1 and site.function in (all_reduce_add_rms_norm, reduce_scatter_add_rms_norm):
        return by_norm(site)
    if site.ranks == 1 and site.function is split_argmax:
        return by_choice(site)
    if not any(site.function is fusion.function for fusion in FUSIONS):
        return f"{site.function.__name__} is another function than that of ops.fusions"
    answers = [c.fused(site.function.__name__, site.operands, site.static) for c in site.communicators
               if isinstance(c, FusingCommunicator)]
    said = [a for a in answers if isinstance(a, str)]
    return next((a for a in answers if not isinstance(a, str)), "; ".join(said) or "no communicator has one")


def by_norm(site: Site) -> Callable | str:
    """`add_rms_norm` in one kernel, of rows as wide as one block takes."""
    y, residual, w = site.operands
    if site.device != "cuda":
        return f"no kernel norms on {site.device}"
    if {x.dtype for x in (y, residual, w)} != {y.dtype} or y.dtype not in FLOATS:
        return "y, the residual and w are not of one dtype of 16 or 32 bits"
    if not 0 < len(w) <= MOST_WIDTH:
        return f"rows of {len(w)}"
    eps = site.static["eps"]

    def norm(y: Tensor, residual: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        from shardlib.triton_kernels import rms_norm as kernels
        if differentiated(y, residual, w):
            return kernels.add_rms_norm_reference(y, residual, w, eps)
        return kernels.add_rms_norm(y.contiguous(), residual.contiguous(), w.contiguous(), eps,
                                    starts_early(y.device, y.numel() // len(w)))
    return norm


def by_pointwise(site: Site) -> Callable | str:
    """`gate_up` in one kernel, where no matmul has taken it along."""
    gate, up = site.operands
    if site.device != "cuda":
        return f"no kernel gates on {site.device}"
    if gate.dtype != up.dtype or gate.dtype not in FLOATS or not gate.dim():
        return "gate and up are no rows of one dtype of 16 or 32 bits"

    def multiply(gate: Tensor, up: Tensor) -> Tensor:
        from shardlib.triton_kernels import gate_up as kernels
        if differentiated(gate, up):
            return kernels.gate_up_reference(gate, up)
        rows = [x if x.stride(-1) == 1 else x.contiguous() for x in (gate, up)]
        rows = [x.reshape(-1, x.shape[-1]) for x in rows]
        return kernels.gate_up(*rows).view(gate.shape)
    return multiply


def by_one_kernel(site: Site) -> Callable | str:
    """`cached_attention` of few queries; the cache is given up."""
    if site.device != "cuda":
        return f"no kernel attends on {site.device}"
    if why := refuses_cached(*site.operands):
        return why
    if not has_room(torch.device(site.device)):
        return "a block of this GPU has less shared memory than the kernel takes"

    def attend(q: Tensor, k: Tensor, v: Tensor, angles: Tensor, keys: Tensor, values: Tensor,
               start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if not attends_cached(q, k, v, angles, keys, values, start):
            # it lies otherwise, or has a derivative
            from shardlib.triton_kernels.cached_attention import cached_attention_reference
            return cached_attention_reference(q, k, v, angles, keys, values, start)
        out = attend_cached(q, k, v, angles, keys, values, start, counts_of(q.device))
        return out, keys, values
    return attend


def by_rope(site: Site) -> Callable | str:
    """`rope_into_cache` in one kernel; the cache is given up."""
    if site.device != "cuda":
        return f"no kernel turns on {site.device}"
    if why := refuses_turned(*site.operands):
        return why

    def turn(q: Tensor, k: Tensor, v: Tensor, angles: Tensor, keys: Tensor, values: Tensor,
             start: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        from shardlib.triton_kernels import rope_into_cache as kernels
        if not turns_cached(q, k, v, angles, keys, values, start):
            return kernels.rope_into_cache_reference(q, k, v, angles, keys, values, start)
        return (*kernels.rope_into_cache(q, k, v, angles, keys, values, start), keys, values)
    return turn


def by_choice(site: Site) -> Callable | str:
    """`row_argmax` by several blocks a row."""
    (logits,) = site.operands
    if site.device != "cuda":
        return f"no kernel chooses on {site.device}"
    if logits.dtype not in FLOATS or not 0 < logits.shape[-1] < 2**31:
        return f"no kernel chooses among {logits.shape[-1]} {str(logits.dtype)[6:]}"
    return lambda logits: choose_few(logits, counts_of(logits.device))


def by_few_rows(product: Product) -> Callable | str:
    """A kernel of few rows, which takes `gate_up` along."""
    if product.device != "cuda" or product.dtype not in ("bfloat16", "float16"):
        return f"no kernel multiplies {product.dtype} on {product.device}"
    if not 0 < product.rows <= FEW:
        return f"kernels of few rows take 1 to {FEW}"
    if not has_room(torch.device(product.device)):
        return "a block of this GPU has less shared memory than the kernels take"
    if product.then not in (None, gate_up):
        return f"no matmul takes {product.then.__name__} along"
    gated = product.then is gate_up

    def multiply(x: Tensor, w: Tensor) -> Tensor:
        return rows_matmul(x, w, counts_of(x.device), gated)
    return multiply


FUSIONS = (Fusion(all_reduce_add_rms_norm, kernel=by_communicator),
           Fusion(reduce_scatter_add_rms_norm, kernel=by_communicator),
           Fusion(split_argmax, kernel=by_communicator),
           *EXCHANGES, *(Fusion(form, kernel=by_few_tokens) for form in FORMS),
           Fusion(add_rms_norm, kernel=by_norm), Fusion(gate_up, kernel=by_pointwise),
           Fusion(cached_attention, kernel=by_one_kernel), Fusion(rope_into_cache, kernel=by_rope),
           Fusion(row_argmax, kernel=by_choice))
