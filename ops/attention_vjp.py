"""The derivative of attention, from what forward kept: its result, and the log of the sum of exp of scores.

On one axis: B and K on all operands, T and G on those that have them; where S is split, what comes back to q
is owed, unless T is split alike (`attend_ring`). It is linear in v and the
result together, and in the cotangent.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shardlib.dtypes import widest
from shardlib.language.exchanges import Exchange, Exchanges, Site
from shardlib.language.local_code import LocalCode
from shardlib.ops.attend_ring import attend_ring_vjp, of_ring
from shardlib.ops.attend_vjp import attend_vjp, sinks_vjp
from shardlib.ops.attention_form import Form, floats, members_code, scores_code, seen_code
from shardlib.ops.attention_runs import runs
from shardlib.program import Op, Step
from shardlib.reference import Dims
from shardlib.rules import Rule
from shardlib.wires import ALL_TO_ALL

KEPT = 3
"""Operands behind those of forward: its result, its lse, the cotangent."""


def own_dims(made: tuple[Tensor, ...], order: tuple[int, ...]) -> tuple[Tensor, ...]:
    """The last of `made`, (b, k, g, t, s), with the dims in `order` alone."""
    *others, x = made
    gone = tuple(i for i in range(5) if i not in order)
    return *others, x.permute(*order, *gone).flatten(len(order) - 1) if gone else x.permute(*order)


def _emit(e: LocalCode, step: Step, args: list[str]) -> str:
    form = Form.of(step, KEPT)
    bias = form.ordered("bias", args)
    if form.ring and e.mesh.size(form.axes) > 1:
        told = f"{', '.join(args[:3])}, {seen_code(e, form, args)}, {scores_code(e, form)}"
        return e.exchanging(attend_ring_vjp, form.axes, [ALL_TO_ALL],
                            f"{members_code(e, form)}, {told}, {', '.join(args[-KEPT:])}")
    text = (f"{e.use(attend_vjp)}({', '.join(args[:3])}, {seen_code(e, form, args)}, {scores_code(e, form)}, "
            f"{bias or None}, {', '.join(args[-KEPT:])})")
    return f"{e.use(own_dims)}({text}, {form.order('bias')})" if bias else text


def _rule(step: Step) -> Rule:
    """The cotangents of q and k are linear in v, that of v does not depend on it."""
    form, last = Form.of(step, KEPT), len(step.ins) - 1
    every, out = tuple(range(len(step.ins))), last - 2
    of_v = tuple(i for i in every if i not in (2, out))
    q, k, v = step.ins[:3]
    met = (*q.dims[1].names, *k.dims[1].names) if form.ring else ()
    return Rule(linear=((2, out), (last,)), whole=q.dims[4].names, met=met, alike=form.alike,
                sums=tuple(dict.fromkeys(n for d in (*q.dims[:4], k.dims[1], v.dims[3]) for n in d.names)),
                uses=(every, every, of_v, *([every] if "bias" in form.beside else [])))


def _exchanges(at: Site) -> list[Exchange]:
    kind = _reads(at.dtypes, at.step.options)[0]
    form = Form.of(at.step, KEPT)
    return of_ring(at, str(kind), form.ring_of(*(at.pieces(x.dims[1]) for x in (form.q, form.k))), back=True)


def _takes(step: Step) -> tuple[str, ...]:
    return (*Form.of(step, KEPT).takes, "float", "float", "float")


def _reads(dtypes: Sequence[str | None], attrs: dict[str, Any]) -> list[str | None]:
    computed = [*floats(attrs), len(dtypes) - 3, len(dtypes) - 1]
    kind = widest(*(dtypes[i] for i in computed))
    return [kind if i in computed else of for i, of in enumerate(dtypes)]


def _reference(d: Dims, q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
    """By autograd of the sum of weights, exp(score - lse), times g (v - out), where `out` and `lse` stand for
    themselves."""
    form = Form.of(d.step, KEPT)
    *given, out, lse, g = (x.detach() for x in (q, k, v, *more))
    wanted = [0, 1, 2, *([3 + form.beside.index("bias")] if "bias" in form.beside else [])]
    given = [x.requires_grad_(i in wanted) for i, x in enumerate(given)]
    with torch.enable_grad():
        q, k, v, *beside = given
        score, seen = form.score(d, q, k, dict(zip(form.beside, beside)))
        weight = torch.where(seen, torch.exp(torch.where(seen, score - lse, 0)), 0)
        total = (weight * (g * v - g * out)).sum()
    return torch.autograd.grad(total, [given[i] for i in wanted])


def _sinks_reference(d: Dims, sinks: Tensor, out: Tensor, lse: Tensor, g: Tensor) -> Tensor:
    return d.sum(-torch.exp(sinks - lse) * g * out)


def _sinks_emit(e: LocalCode, step: Step, args: list[str]) -> str:
    """The sinks as (k, g), each 1 or all, and back."""
    heads = step.ins[1].labels[2:4]
    index = ", ".join(":" if n in step.ins[0].labels else "None" for n in heads)
    back = ", ".join(":" if n in step.ins[0].labels else "0" for n in heads)
    turn = ".mT" if step.ins[0].labels == heads[::-1] else ""
    return f"{e.use(sinks_vjp)}({args[0]}{turn}[{index}], {', '.join(args[1:])})[{back}]{turn}"


EXCHANGES = Exchanges(lambda s: Form.of(s, KEPT).axes if Form.of(s, KEPT).ring else (), _exchanges)
ATTENTION_VJP = Op("attention_vjp", exchanges=EXCHANGES, rule=_rule, emit=_emit, takes=_takes, reads=_reads,
                   runs=lambda site: runs(site, KEPT), keywords=Form.KEYWORDS, reference=_reference)
SINKS_VJP = Op("attention_sinks_vjp", takes=("float",), emit=_sinks_emit, reference=_sinks_reference,
               rule=lambda s: Rule(linear=((1,), (3,)), sums=s.ins[1].names))
TABLE = {op.name: op for op in (ATTENTION_VJP, SINKS_VJP)}
