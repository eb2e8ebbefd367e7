"""Grouped-query attention: `B T K G H, B S K H, B S K H [, B | B T S] -> B T K G H`, with S,
the key time, its own letter.

On one axis: B and K on all operands; T and G on q alone; S and H whole. Only v may owe a sum. By itself it is
causal, query t seeing keys s <= t. With `start`, whose one dim is B, the queries stand further on: query t of
row b sees keys s <= start[b] + t, as over a cache. With a mask, B T S, it sees where that is true. A query
that sees nothing gives zeros, and no gradient.

With `start`, the code chooses when it runs: few queries on a GPU go to a kernel that reads the keys they see
and makes no mask (`few_rows.attend_lengths`); all others have the mask's bias.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shardlib.dtypes import widest
from shardlib.errors import SpecError
from shardlib.language.local_code import LocalCode
from shardlib.language.steps import Steps
from shardlib.language.value import Operand, Value, apply
from shardlib.ops.few_rows import attend_lengths, attends_lengths, counts_of
from shardlib.ops.kv_cache import slots_seen
from shardlib.program import Op, Step
from shardlib.reference import Dims
from shardlib.rules import Rule
from shardlib.spec import parse_specs


def causal(q: Tensor, k: Tensor, offset: int) -> Tensor:
    """(b, t, s), true where s <= offset + t."""
    t = torch.arange(offset, offset + q.shape[1], device=q.device)
    return (torch.arange(k.shape[1], device=q.device) <= t[:, None]).expand(q.shape[0], -1, -1)


def bias(mask: Tensor, g: int, dtype: torch.dtype) -> Tensor:
    """What is added to the scores: 0 where the mask is true, -inf elsewhere; (b, 1, g t, s)."""
    b, t, s = mask.shape
    out = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))
    return (out[:, None] if t == 1 or g == 1
            else out[:, None, None].expand(b, 1, g, t, s).reshape(b, 1, g * t, s))


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """softmax(q k / sqrt(h) + bias) v of local tensors; the queries of one kv head run as more rows of it."""
    if q.shape[-1] == 0:
        # a product over nothing is 0: all keys that are seen weigh the same
        q, k = F.pad(q, (0, 1)), F.pad(k, (0, 1))
    b, t, heads, g, h = q.shape
    if q.numel() == 0 or k.shape[1] == 0:
        return q.new_zeros((b, t, heads, g, v.shape[-1]))
    rows = q.permute(0, 2, 3, 1, 4).reshape(b, heads, g * t, h)
    out = F.scaled_dot_product_attention(rows, k.transpose(1, 2), v.transpose(1, 2), attn_mask=bias)
    return out.view(b, heads, g, t, -1).permute(0, 3, 1, 2, 4)


def attend_causal(q: Tensor, k: Tensor, v: Tensor, offset: int) -> Tensor:
    """Query t sees keys s <= offset + t.

    From the beginning no mask is made: torch's own causal form is top-left aligned, as this one is.
    """
    b, t, heads, g, h = q.shape
    if offset or t != k.shape[1] or q.numel() == 0:
        return attend(q, k, v, bias(causal(q, k, offset), g, q.dtype))
    k, v = (x if g == 1 else x.repeat_interleave(g, 2) for x in (k, v))
    out = F.scaled_dot_product_attention(q.flatten(2, 3).transpose(1, 2), k.transpose(1, 2),
                                         v.transpose(1, 2), is_causal=True)
    return out.transpose(1, 2).unflatten(2, (heads, g))


@dataclass(frozen=True, eq=False)
class Seen:
    """What t queries from `offset` on see of s keys, by the `start` of each row: in each form that is asked
    for, made once. g, dtype: of the queries, for `bias`."""
    start: Tensor
    offset: int
    t: int
    s: int
    g: int
    dtype: torch.dtype

    @cached_property
    def mask(self) -> Tensor:
        """(b, t, s), true where a key is seen."""
        return slots_seen(self.start, self.offset, self.t, 0, self.s)

    @cached_property
    def bias(self) -> Tensor:
        return bias(slots_seen(self.start, self.offset, self.t, 0, self.s), self.g, self.dtype)

    @cached_property
    def lengths(self) -> Tensor:
        """(b,): how many keys the first query sees, each later one seeing one more; below 0 or above s no
        further than it takes to say that none are seen, or all, so that int32 has room for them."""
        return (self.start + (self.offset + 1)).clamp(-self.t, self.s)


def attend_seen(q: Tensor, k: Tensor, v: Tensor, seen: Seen) -> Tensor:
    if attends_lengths(q, k, v):
        return attend_lengths(q, k, v, seen.lengths, counts_of(q.device))
    return attend(q, k, v, seen.bias)


def attend_vjp(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The cotangents of q, k and v; scores, the softmax and its derivative in at least float32.

    A query that sees nothing has a weight on all keys, which are finite then, and no cotangent.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    scale, seen = max(1, q.shape[-1]) ** -0.5, mask.any(-1)
    g = g.masked_fill(~seen[:, :, None, None, None], 0)
    unseen = torch.zeros(seen.shape, dtype=wide, device=q.device).masked_fill_(seen, float("-inf"))
    score = torch.einsum("btkgh,bskh->bkgts", q.to(wide), k.to(wide)) * scale
    p = torch.where(mask[:, None, None], score, unseen[:, None, None, :, None]).softmax(-1)
    dv = torch.einsum("bkgts,btkgh->bskh", p.to(g.dtype), g)
    dp = torch.einsum("btkgh,bskh->bkgts", g, v).to(wide)
    ds = (p * (dp - (dp * p).sum(-1, keepdim=True)) * scale).to(q.dtype)
    return torch.einsum("bkgts,bskh->btkgh", ds, k), torch.einsum("bkgts,btkgh->bskh", ds, q), dv


def attend_causal_vjp(q: Tensor, k: Tensor, v: Tensor, g: Tensor,
                      offset: int) -> tuple[Tensor, Tensor, Tensor]:
    return attend_vjp(q, k, v, causal(q, k, offset), g)


def _whole(step: Step) -> tuple[str, ...]:
    q, k = step.ins[:2]
    return (q.names[-1], *(n for n in k.names if n not in q.names))


def _offset(e: LocalCode, step: Step) -> int:
    return e.rows(step.ins[0].dims[1])[0]


def _has_start(step: Step) -> bool:
    """Whether the operand behind v says where the queries stand: a mask, and a cotangent, has more dims."""
    return len(step.ins) > 3 and len(step.ins[3].dims) == 1


def _seen(e: LocalCode, step: Step, start: str) -> str:
    """What the code calls the `Seen` of `start`."""
    q, k = step.ins[:2]
    (offset, t), kind = e.rows(q.dims[1]), widest(*(e.dtypes[n] for n in step.inputs[:3]))
    return e.hoist(start, f"{e.use(Seen)}({{x}}.long(), {offset}, {t}, {e.shape(k)[1]}, {e.shape(q)[3]}, "
                          f"torch.{kind})")


def _emit(e: LocalCode, step: Step, args: list[str]) -> str:
    if _has_start(step):
        return f"{e.use(attend_seen)}({', '.join(args[:3])}, {_seen(e, step, args[3])})"
    if len(args) == 4:
        b, t, heads, g, h = e.shape(step.ins[0])
        added = e.hoist(args[3],
                        f"{e.use(bias)}({{x}}, {g}, torch.{widest(*(e.dtypes[n] for n in step.inputs[:3]))})")
        if t == 1 and min(b, heads, g, *e.shape(step.ins[1])) > 0:
            k, v = (f"{x}.transpose(1, 2)" for x in args[1:3])
            out = (f"F.scaled_dot_product_attention({e.view(args[0], (b, heads, g, h))}, {k}, {v}, "
                   f"attn_mask={added}).contiguous()")
            # some kernels of CUDA give the queries of a head one after another
            return e.view(out, e.shape(step.outs[0]))
        return f"{e.use(attend)}({', '.join(args[:3])}, {added})"
    return f"{e.use(attend_causal)}({', '.join(args)}, {_offset(e, step)})"


def _emit_vjp(e: LocalCode, step: Step, args: list[str]) -> str:
    if _has_start(step):
        return f"{e.use(attend_vjp)}({', '.join(args[:3])}, {_seen(e, step, args[3])}.mask, {args[4]})"
    if len(args) == 5:
        return f"{e.use(attend_vjp)}({', '.join(args)})"
    return f"{e.use(attend_causal_vjp)}({', '.join(args)}, {_offset(e, step)})"


def _takes(step: Step) -> tuple[str, ...]:
    return ("float", "float", "float", "index" if _has_start(step) else "mask")


def _reads(dtypes: Sequence[str | None], attrs: dict[str, Any]) -> list[str | None]:
    """start as it comes: `Seen` widens it."""
    kind = widest(*dtypes[:3])
    return [kind, kind, kind, *dtypes[3:]]


def _reads_vjp(dtypes: Sequence[str | None], attrs: dict[str, Any]) -> list[str | None]:
    q, k, v, *seen, g = dtypes
    kind = widest(q, k, v, g)
    return [kind, kind, kind, *seen, kind]


def _rule_vjp(step: Step) -> Rule:
    """The cotangents of q and k are linear in v, that of v does not depend on it."""
    q, _, v = step.ins[:3]
    operands = tuple(range(len(step.ins)))
    return Rule(linear=((2,), operands[-1:]), whole=_whole(step), sums=(q.names[1], q.names[3], v.names[-1]),
                uses=(operands, operands, (0, 1, *operands[3:])))


def _vjp(b: Steps, step: Step, ct: Sequence[str]) -> list[str | None]:
    made = b.call(ATTENTION_VJP, [*step.inputs, ct[0]], outs=tuple(s.owing() for s in step.ins[:3]))
    return [*made, *[None] * (len(step.inputs) - 3)]


def _reference(d: Dims, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None) -> Tensor:
    """The mean of v over the keys that a query sees, weighted by exp(q k / sqrt(h)); 0 where it sees none."""
    (*_, time, _, _, head), (*_, key, _, _) = (s.names for s in d.step.ins[:2])
    if seen is None or _has_start(d.step):
        seen = d.index(time) + (0 if seen is None else seen) - d.index(key) >= 0
    weight = torch.where(seen, torch.exp(d.sum(q * k, head) / math.sqrt(max(1, d.count(head)))), 0)
    total = d.sum(weight, key)
    return d.sum(weight * v, key) / torch.where(total == 0, 1, total)


def _reference_vjp(d: Dims, q: Tensor, k: Tensor, v: Tensor, *seen_and_g: Tensor) -> tuple[Tensor, ...]:
    *seen, g = seen_and_g
    return d.vjp(_reference, (q, k, v, *seen), g, d.step.ins[-1])


ATTENTION = Op("attention", rule=lambda s: Rule(linear=((2,),), whole=_whole(s)), emit=_emit, vjp=_vjp,
               index=(3,), looks=lambda e, step, args: "None", takes=_takes, reads=_reads,
               reference=_reference)
ATTENTION_VJP = Op("attention_vjp", rule=_rule_vjp, emit=_emit_vjp,
                   takes=("float", "float", "float", "any", "float"), reads=_reads_vjp,
                   reference=_reference_vjp)


def attention(text: str, q: Operand, k: Operand, v: Operand, seen: Operand | None = None) -> Value:
    """The mean of v over the keys that a query sees, weighted by exp(q k / sqrt(H)) (Vaswani et al. 2017).

    Specs are those of "B T K G H, B S K H, B S K H [, B | B T S] -> B T K G H": G queries share a kv head,
    and v's last dim may have a letter of its own. S is whole. Query t sees keys s <= t; where `seen` is a
    start, B, integers, keys s <= start[b] + t, which is `causal_mask` without a mask; where it is a mask,
    B T S, those where it is true.

    >>> import torch
    >>> from shardlib import Layout, Mesh, sharded, simulate
    >>> @sharded("B T K G H, B S K H, B S K V -> B T K G V")
    ... def f(q, k, v):
    ...     return attention("B T K G H, B S K H, B S K V -> B T K G V", q, k, v)
    >>> q, k = torch.zeros(1, 3, 1, 1, 2), torch.zeros(1, 3, 1, 2)         # all keys weigh alike
    >>> v = torch.tensor([1.0, 3.0, 8.0]).view(1, 3, 1, 1)
    >>> simulate(f, Layout(T="cp"), q, k, v, mesh=Mesh(cp=2)).flatten()
    tensor([1., 2., 4.])

    The last two of three tokens, over a cache of three; the same where nothing is in it yet:

    >>> @sharded("B T K G H, B S K H, B S K V, B -> B T K G V")
    ... def later(q, k, v, start):
    ...     return attention("B T K G H, B S K H, B S K V, B -> B T K G V", q, k, v, start)
    >>> simulate(later, Layout(T="cp"), q[:, 1:], k, v, torch.tensor([1]), mesh=Mesh(cp=2)).flatten()
    tensor([2., 4.])
    >>> simulate(later, Layout(T="cp"), q[:, 1:], k, v, torch.tensor([-1]), mesh=Mesh(cp=2)).flatten()
    tensor([0., 1.])
    """
    meant = (f'attention "{text}": the specs are those of "B T K G H, B S K H, B S K H -> B T K G H", with a '
             f'fourth, "B" of a start or "B T S" of a mask, where one is given')
    ins, outs = parse_specs(text, meant)
    ranks = [len(s.dims) for s in (*ins, *outs)]
    if ranks not in ([5, 4, 4, 5], [5, 4, 4, 1, 5], [5, 4, 4, 3, 5]) or (len(ins) == 4) != (seen is not None):
        raise SpecError(meant)
    (row, *_), *_, (of, *others) = (s.labels for s in ins)
    if not others and of != row:
        raise SpecError(f'attention "{text}": a start says where the queries of each {row} stand; its dim is '
                        f'{row}, not {of}')
    return apply(ATTENTION, (q, k, v) if seen is None else (q, k, v, seen), text)


TABLE = {op.name: op for op in (ATTENTION, ATTENTION_VJP)}
