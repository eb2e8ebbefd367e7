"""Who runs a call of attention on a rank, and why: what `explain` says of it, by what `attend` goes by.

A kernel of torch's that takes neither these dtypes nor these heads leaves it to blocks of queries.
"""
from __future__ import annotations

from typing import Any

import torch

from shardlib.language.exchanges import Site
from shardlib.ops import flash
from shardlib.ops.attend_lse import parts_of
from shardlib.ops.attention_form import Form
from shardlib.ops.seen import Seen

BLOCKS = "blocks of queries, whose scores are made anew in backward"


def runs(at: Site, kept: int = 0, graded: bool = True) -> str:
    """kept: operands that come last and are none of the call.  graded: whether a gradient is made of it."""
    form = Form.of(at.step, kept)
    (*sizes, h), v = at.shape(form.q), at.shape(form.v)[-1]
    seen = _seen(at, form)
    if 0 in (*sizes, h, seen.s):
        return "nothing: it is empty"
    who, why = _by(form, seen, graded)
    if not who.startswith("torch's"):
        return f"{who}: {why}"
    if v != h:
        return f"{BLOCKS}: keys have {h} elements a head, values {v}"
    if h % 8:
        return f"{BLOCKS} on GPUs: heads of {h} elements, which is no multiple of 8"
    ring = form.ring and at.mesh.size(form.axes) > 1
    return f"{who}: {why}{'; of other ranks by the same, while more travels' if ring else ''}"


def _seen(at: Site, form: Form) -> Seen:
    (offset, t), (first, s) = (at.mesh.rows(x.dims[1], at.sizes, at.here) for x in (form.q, form.k))
    some: Any = torch.empty(0, device="meta")
    given = {n: some for n in ("start", "mask", "lengths") if n in form.beside}
    return Seen(offset + form.ahead, t, first, s, form.causal, form.options.get("window"), **given)


def _by(form: Form, seen: Seen, graded: bool) -> tuple[str, str]:
    says = [n for n in ("start", "mask", "lengths") if n in form.beside]
    if form.options.get("softcap") is not None:
        return BLOCKS, "a softcap is between scores and softmax, where no fused kernel lets one"
    if not seen.known:
        why = f"what is seen is in {' and '.join(says)}"
        if graded or seen.window is not None or {"lengths", "bias", "sinks"} & {*form.beside}:
            return BLOCKS, f"{why}, not in sizes"
        few = "; few queries on GPUs by a kernel" if says == ["start"] and seen.causal else ""
        return "F.scaled_dot_product_attention, some queries at a time", f"{why}{few}"
    parts = parts_of(seen)
    if parts is None:
        return BLOCKS, (f"{seen.t} queries from {seen.offset} on and {seen.s} keys from {seen.first} on are "
                        "no call of a fused kernel")
    windows = any(part.near for part in parts)
    if "bias" in form.beside:
        if windows or not flash.BIASES:
            return BLOCKS, f"a bias{' beside a window' if windows else ''}"
        return "torch's efficient kernel on GPUs, blocks of queries on the CPU", "a bias"
    if windows:
        return "torch's flash kernel on GPUs, blocks of queries on the CPU", f"a window of {seen.window}"
    what = [f"keys {part.low} to {part.high - 1}{', causal' if part.causal else ''}" for part in parts]
    return "torch's fused kernel (on GPUs flash, cuDNN's or efficient, as torch chooses)", " and ".join(what)
