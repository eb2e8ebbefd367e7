"""A gated feed-forward layer of experts whose tokens are split over the experts' axis, as one fused step:
each token's row goes to the ranks that have experts of it, and each of these sends one sum home.

As its body says it, all tokens go to all ranks, are filtered there, and a reduce_scatter adds up. Few tokens
do: then the body runs, its middle by the kernels of `expert_ffn`.
"""
from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from shardlib import EXPLICIT, all_gather, reduce_scatter, sharded
from shardlib.compiler.fusion import Fusion, Site
from shardlib.distributed.communicators.protocol import ExchangingCommunicator
from shardlib.functions import silu
from shardlib.language.trace import Function
from shardlib.ops.expert_rows import grouped_product, takes_grouped
from shardlib.ops.experts import combine, dispatch, grouped_einsum
from shardlib.ops.few_rows import FLOATS
from shardlib.triton_kernels.limits import MOST_EXPERTS, MOST_TOKENS


def _form(name: str, b: str = "", t: str = "", f: str = "") -> Function:
    """Over x, where it stands in b or t, tokens are split, and experts; over `f` what is between gate and
    down."""
    rows, owed = "(E/x B T)~J", f" +{f[1:]}" if f else ""

    def exchanged(x, experts, weights, gate, up, down):
        x = all_gather(f"B{b} T{t} D -> B T D", x)
        moved, at = dispatch(f"B T D, B T J -> {rows} D, {rows}", x, experts)
        gate = grouped_einsum(f"{rows} D, {rows}, E/x D F{f} -> {rows} F{f}", moved, at, gate)
        up = grouped_einsum(f"{rows} D, {rows}, E/x D F{f} -> {rows} F{f}", moved, at, up)
        y = grouped_einsum(f"{rows} F{f}, {rows}, E/x F{f} D -> {rows} D{owed}", silu(gate) * up, at, down)
        y = combine(f"{rows} D{owed}, {rows}, B T J -> B T D +x{owed}", y, at, weights)
        return reduce_scatter(f"B T D +x{owed} -> B{b} T{t} D{owed}", y)
    exchanged.__name__ = name
    return sharded(f"B{b} T{t} D, B T J, B T J, E/x D F{f}, E/x D F{f}, E/x F{f} D -> B{b} T{t} D{owed}",
                   layout=EXPLICIT)(exchanged)


FORMS = (_form("exchange_rows", b="/x"), _form("exchange_rows_by_width", b="/x", f="/y"),
         _form("exchange_tokens", t="/x"), _form("exchange_tokens_by_width", t="/x", f="/y"))


def by_exchange(site: Site) -> Callable | str:
    """Any of FORMS, rows by the first communicator that takes them."""
    x, chosen, weights, gate, up, down = site.operands
    (b, t, width), experts, choices, tokens = x.shape, len(gate), chosen.shape[2], chosen.shape[:2].numel()
    if site.device != "cuda":
        return f"no kernel exchanges rows on {site.device}"
    if {w.dtype for w in (x, gate, up, down)} != {x.dtype} or x.dtype not in FLOATS:
        return "tokens and experts are not of one dtype of 16 or 32 bits"
    if weights.dtype != torch.float32:
        return f"the weights are {str(weights.dtype)[6:]}"
    if tokens <= MOST_TOKENS:
        return f"{tokens} tokens, of which all go everywhere"
    if not 0 < experts <= MOST_EXPERTS or not choices or not gate.shape[2]:
        return f"{experts} experts here, {choices} of a token: kernels take some, at most {MOST_EXPERTS} here"
    answers = [(c, c.refuses_rows(b * t, width, x.dtype)) for c in site.communicators
               if isinstance(c, ExchangingCommunicator)]
    made = next((c for c, refusal in answers if refusal is None), None)
    if made is None:
        return "; ".join(refusal for _, refusal in answers if refusal) or "no communicator exchanges rows"
    side_by_side = t if t < chosen.shape[1] else b * t          # of a rank's tokens, among those of all
    most = tokens * min(choices, experts)

    def run(x: Tensor, chosen: Tensor, weights: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        from shardlib.triton_kernels.expert_places import expert_places
        picked, shares = (each.reshape(tokens, choices).contiguous() for each in (chosen, weights))
        at, place, ends = expert_places(picked, experts * made.me, experts, most)
        rows = made.dispatch_rows(x.reshape(b * t, width).contiguous(), picked, place, experts, most,
                                  side_by_side)
        y = through_experts(rows, at, ends, gate, up, down, tokens, choices)
        return made.combine_rows(y, place, shares, side_by_side).view(x.shape)
    return run


def through_experts(rows: Tensor, at: Tensor, ends: Tensor, gate: Tensor, up: Tensor, down: Tensor,
                    tokens: int, choices: int) -> Tensor:
    """Rows through the matrices of their experts; what is behind the last of them means nothing."""
    if not takes_grouped(rows, gate) or not takes_grouped(rows, up):
        sizes = len(gate), tokens, choices
        h = F.silu(grouped_product(rows, at, gate, *sizes)) * grouped_product(rows, at, up, *sizes)
        return grouped_product(h, at, down, *sizes)
    from shardlib.triton_kernels.gate_up import gate_up
    h = gate_up(F.grouped_mm(rows, gate, offs=ends), F.grouped_mm(rows, up, offs=ends), ends[-1:])
    return (F.grouped_mm(h, down, offs=ends) if takes_grouped(h, down) else
            grouped_product(h, at, down, len(gate), tokens, choices))


EXCHANGES = tuple(Fusion(form, kernel=by_exchange, mark="dispatch") for form in FORMS)
"""In a table of fusions before those of `expert_ffn`, which take what is left of them for few tokens."""
