"""Routing: which experts each token goes to, and how much each of them counts.

`route("B T E -> B T J, B T J", logits, top_k=2)`: of E experts the J best, and their weights. The scores are
softmax(logits), or sigmoid(logits); the best are chosen by score, or by score plus a bias (DeepSeek-V3, whose
bias balances load and takes no part in the weights), in `groups`, of which the `top_groups` count whose two
best experts are best together.

    weights, experts = route("B T E -> B T J, B T J", logits, top_k=2)                          # Mixtral
    weights, experts = route(..., top_k=8, renormalise=False)                                   # OLMoE
    weights, experts = route("B T E, E -> B T J, B T J", logits, bias, top_k=8, score="sigmoid", groups=8,
                             top_groups=4, scale=2.5)                                           # DeepSeek-V3

On one axis: E and J are whole, logits owe nothing; tokens may be split. Weights are float32 at least; experts
are distinct for each token, among equals the first ones.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shardlib.dtypes import as_they_come, widest
from shardlib.errors import SpecError
from shardlib.language.local_code import LocalCode
from shardlib.language.sorting import order
from shardlib.language.steps import Steps
from shardlib.language.topk import largest
from shardlib.language.value import Operand, Value, apply
from shardlib.ops.few_rows import FLOATS, differentiated, starts_early
from shardlib.program import Op, Step, number
from shardlib.reference import Dims
from shardlib.rules import Rule
from shardlib.spec import Spec, parse_specs

MOST_EXPERTS = 1024     # of a kernel that has a token's scores in registers
SMALL = 1e-20       # beside a sum of scores, that a token whose scores are all 0 has weights


def scores_of(logits: Tensor, score: str) -> Tensor:
    wide = logits.float() if logits.dtype.itemsize < 4 else logits
    return wide.softmax(-1) if score == "softmax" else wide.sigmoid()


def within_groups(choice: Tensor, groups: int, top_groups: int) -> Tensor:
    """What experts are chosen by, -inf outside of the groups whose two best are best together."""
    grouped = choice.unflatten(-1, (groups, -1))
    best = largest(grouped, -1, min(2, grouped.shape[-1]))[0].sum(-1)
    kept = torch.zeros_like(best, dtype=torch.bool).scatter(-1, largest(best, -1, top_groups)[1], True)
    return grouped.masked_fill(~kept.unsqueeze(-1), -torch.inf).flatten(-2)


def routed(logits: Tensor, bias: Tensor | None, top_k: int, score: str, renormalise: bool, scale: float,
           groups: int, top_groups: int) -> tuple[Tensor, Tensor]:
    """Weights and experts of each token."""
    if score == "softmax" and bias is None and groups == 1 and _kernel_takes(logits):
        from shardlib.triton_kernels.route import route as by_kernel
        rows = logits.reshape(-1, logits.shape[-1]).contiguous()
        made = by_kernel(rows, top_k, renormalise, scale, starts_early(logits.device, len(rows)))
        weights, experts = (x.view(*logits.shape[:-1], top_k) for x in made)
        return weights, experts
    scores = scores_of(logits, score)
    choice = scores if bias is None else scores + bias
    if groups > 1:
        choice = within_groups(choice, groups, top_groups)
    experts = largest(choice, choice.ndim - 1, top_k)[1]
    weights = scores.gather(-1, experts)
    return (weights / (weights.sum(-1, keepdim=True) + SMALL) if renormalise else weights) * scale, experts


def _kernel_takes(logits: Tensor) -> bool:
    return (logits.is_cuda and logits.dtype in FLOATS and 0 < logits.shape[-1] <= MOST_EXPERTS
            and not differentiated(logits))


def routed_vjp(logits: Tensor, experts: Tensor, g: Tensor, score: str, renormalise: bool,
               scale: float) -> Tensor:
    """The cotangent of the logits, of that of the weights."""
    scores, g = scores_of(logits, score), g * scale
    if renormalise:
        weights = scores.gather(-1, experts)
        total = weights.sum(-1, keepdim=True) + SMALL
        g = (g - (g * weights).sum(-1, keepdim=True) / total) / total
    d = torch.zeros_like(scores).scatter(-1, experts, g.to(scores.dtype))
    d = scores * (d - (d * scores).sum(-1, keepdim=True)) if score == "softmax" else d * scores * (1 - scores)
    return d.to(logits.dtype)


# -- as ops --------------------------------------------------------------------------------------------------

def _whole(step: Step) -> tuple[str, ...]:
    return tuple(dict.fromkeys((step.ins[0].names[-1], step.outs[0].names[-1])))


def _emit(e: LocalCode, step: Step, args: list[str]) -> str:
    o, experts = step.options, e.count(step.ins[0].dims[-1])
    if o["top_k"] > experts // o["groups"] * o["top_groups"] or experts % o["groups"]:
        raise SpecError(f"route: top_k is {o['top_k']}, of {experts} experts in {o['groups']} groups, of "
                        f"which {o['top_groups']} count")
    bias = args[1] if len(args) > 1 else None
    return (f"{e.use(routed)}({args[0]}, {bias}, {o['top_k']}, {o['score']!r}, {o['renormalise']}, "
            f"{o['scale']!r}, {o['groups']}, {o['top_groups']})")


def _emit_vjp(e: LocalCode, step: Step, args: list[str]) -> str:
    o = step.options
    return f"{e.use(routed_vjp)}({', '.join(args)}, {o['score']!r}, {o['renormalise']}, {o['scale']!r})"


def _vjp(b: Steps, step: Step, ct: Sequence[str]) -> list[str | None]:
    o = {name: step.options[name] for name in ("score", "renormalise", "scale")}
    made = b.call(ROUTE_VJP, [step.inputs[0], step.outputs[1], ct[0]], outs=(step.ins[0].owing(),), **o)
    return [made, *[None] * (len(step.inputs) - 1)]


def _rule_vjp(step: Step) -> Rule:
    """Weights that are not renormalised have cotangents of their own, which are summed up."""
    (expert, chosen), joined = (step.ins[0].names[-1], step.ins[1].names[-1]), step.options["renormalise"]
    return Rule(linear=((2,),), whole=(expert, *[chosen] * joined), sums=() if joined else (chosen,))


def _scores(d: Dims, logits: Tensor, name: str) -> Tensor:
    if d.options["score"] == "sigmoid":
        return 1 / (1 + torch.exp(-logits))
    odds = torch.exp(logits - d.fold(torch.maximum, -torch.inf, logits.detach(), name))
    return odds / d.sum(odds, name)


def _chosen(d: Dims, scores: Tensor, at: int) -> Tensor:
    """The experts in order of preference, along the dim of experts."""
    o, n = d.options, scores.shape[at]
    if n % o["groups"] or o["top_k"] > n // o["groups"] * o["top_groups"]:
        raise ValueError("more than there are")
    grouped = scores.movedim(at, -1).unflatten(-1, (o["groups"], -1))
    best = grouped.sort(-1).values[..., -2:].sum(-1)
    rank = order(best, best.ndim - 1, descending=True).argsort(-1)
    open_ = grouped - torch.where(rank < o["top_groups"], 0, torch.inf)[..., None]
    return order(open_.flatten(-2).movedim(-1, at), at, descending=True)


def _reference(d: Dims, logits: Tensor, bias: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
    (e, j), top_k = (d.names.index(n) for n in _whole(d.step)), d.options["top_k"]
    scores = _scores(d, logits, d.names[e])
    experts = _chosen(d, (scores + bias).detach(), e).narrow(e, 0, top_k).transpose(e, j)
    weights = d.sum(torch.where(d.index(d.names[e]) == experts, scores, 0), d.names[e])
    if d.options["renormalise"]:
        weights = weights / d.sum(weights, d.names[j])
    return weights * d.options["scale"], experts


def _reference_vjp(d: Dims, logits: Tensor, experts: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    (e, j) = (d.step.ins[0].names[-1], d.step.ins[1].names[-1])

    def weights(d: Dims, logits: Tensor, experts: Tensor) -> Tensor:
        w = d.sum(torch.where(d.index(e) == experts, _scores(d, logits, e), 0), e)
        return d.options["scale"] * (w / d.sum(w, j) if d.options["renormalise"] else w)
    return d.vjp(weights, (logits, experts), g, d.step.ins[2])


_SCORE = {"score": lambda v: v in ("softmax", "sigmoid"), "renormalise": lambda v: isinstance(v, bool),
          "scale": number}
_COUNTS = dict.fromkeys(("top_k", "groups", "top_groups"),
                        lambda v: number(v) and isinstance(v, int) and v > 0)
ROUTE = Op("route", keywords={**_SCORE, **_COUNTS}, rule=lambda s: Rule(whole=_whole(s)), emit=_emit,
           vjp=_vjp, index=(1,), takes=("float",), reads=as_they_come, reference=_reference,
           dtype=lambda d, o: [widest(d[0], "float32"), "int64"],
           lengths=lambda s: (s.outs[0].dims[-1], (), s.options["top_k"]))
ROUTE_VJP = Op("route_vjp", keywords=_SCORE, emit=_emit_vjp, index=(1,),
               reads=lambda d, o: [d[0], d[1] and "int64", d[2]],
               rule=_rule_vjp, takes=("float", "index", "float"), dtype=lambda d, o: d[:1],
               reference=_reference_vjp)


def route(text: str, logits: Operand, bias: Operand | None = None, *, top_k: int, score: str = "softmax",
          renormalise: bool = True, scale: float = 1.0, groups: int = 1,
          top_groups: int = 1) -> tuple[Value, Value]:
    """(weights, experts) of each token: of the experts, the last dim of the logits, the `top_k` best.

    bias: added to the scores where experts are chosen, in `groups` of equal size of which `top_groups` count;
    it has no gradient.  renormalise: the weights of a token add up to `scale`.
    Refused: more experts for a token than those groups have.

    >>> import torch
    >>> from shardlib import Layout, Mesh, sharded, simulate
    >>> @sharded("T E -> T J, T J")
    ... def routing(logits):
    ...     return route("T E -> T J, T J", logits, top_k=2)
    >>> logits = torch.tensor([[1.0, 2.0, 2.0, 0.0], [9.0, -9.0, -9.0, 0.0]])
    >>> simulate(routing, Layout(T="dp"), logits, mesh=Mesh(dp=2))
    (tensor([[5.0000e-01, 5.0000e-01],
            [9.9988e-01, 1.2339e-04]]), tensor([[1, 2],
            [0, 3]]))
    """
    meant = (f'route "{text}": the specs are those of "B T E -> B T J, B T J", or of "B T E, E -> B T J, '
             'B T J"')
    ins, outs = parse_specs(text, meant)
    operands = (logits,) if bias is None else (logits, bias)
    if not _means_routing(ins, outs) or len(ins) != len(operands):
        raise SpecError(meant)
    return apply(ROUTE, operands, text, top_k=top_k, score=score, renormalise=renormalise,
                 scale=float(scale), groups=groups, top_groups=top_groups)


def _means_routing(ins: Sequence[Spec], outs: Sequence[Spec]) -> bool:
    if len(ins) not in (1, 2) or len(outs) != 2 or not ins[0].dims or not outs[0].dims:
        return False
    (*tokens, expert), (*same, chosen) = ins[0].labels, outs[0].labels
    return (tokens == same and chosen not in ins[0].names and outs[0].labels == outs[1].labels
            and all(s.labels == (expert,) for s in ins[1:]))


TABLE: dict[str, Any] = {op.name: op for op in (ROUTE, ROUTE_VJP)}
