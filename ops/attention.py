"""Grouped-query attention: `B T K G H, B S K H, B S K H [, B | B T S] -> B T K G H`, with S,
the key time, its own letter.

On one axis: B and K on all operands; T and G on q alone; H whole. Only v may owe a sum. Where S is split,
results over each rank's keys are merged (`attend_over`); where T is split alike, keys come to queries, or
queries to keys, in rounds (`ring`).
By itself it is causal, query t seeing keys s <= t. With `start`, whose one dim is B, the queries stand
further on: query t of row b sees keys s <= start[b] + t, as over a cache. With a mask, it sees where that is
true. What else there is, a window, lengths, a bias, sinks, `attention_form` says; who runs it, `attend`. A
query that sees nothing gives zeros, and no gradient.

Where a gradient is made, forward is `attention_lse`, which keeps the log of the sum of exp of the scores, and
no scores.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shardlib.dtypes import widest
from shardlib.errors import SpecError
from shardlib.language.exchanges import Exchange, Exchanges, Site
from shardlib.language.local_code import LocalCode
from shardlib.language.steps import Steps
from shardlib.language.value import Operand, Value, apply
from shardlib.ops.attend import attend
from shardlib.ops.attend_lse import attend_lse
from shardlib.ops.attend_over import attend_pieces, of_pieces
from shardlib.ops.attend_ring import attend_ring, of_ring
from shardlib.ops.attention_form import BESIDE, Form, floats, members_code, scores_code, seen_code, told
from shardlib.ops.attention_runs import runs
from shardlib.ops.attention_vjp import ATTENTION_VJP, SINKS_VJP
from shardlib.program import Op, Program, Step
from shardlib.reference import Dims
from shardlib.rules import Rule
from shardlib.spec import Spec, parse_specs
from shardlib.wires import ALL_GATHER, ALL_TO_ALL


def _emit(helper: Any) -> Any:
    def emit(e: LocalCode, step: Step, args: list[str]) -> str:
        form = Form.of(step)
        more = [f", {n}={text}" for n in ("bias", "sinks") if (text := form.ordered(n, args))]
        text = f"{', '.join(args[:3])}, {seen_code(e, form, args)}, {scores_code(e, form)}{''.join(more)}"
        if e.mesh.size(form.axes) == 1:
            return f"{e.use(helper)}({text})"
        over = (e.exchanging(attend_ring, form.axes, [ALL_TO_ALL], f"{members_code(e, form)}, {text}")
                if form.ring else
                e.exchanging(attend_pieces, form.axes, [ALL_GATHER], f"{members_code(e, form)}, {text}"))
        return over if len(step.outs) == 2 else f"{over}[0]"
    return emit


def _rule(step: Step) -> Rule:
    form, every = Form.of(step), tuple(range(len(step.ins)))
    return Rule(linear=((2,),), whole=form.q.dims[4].names, met=form.k.dims[1].names, alike=form.alike,
                uses=(every, (0, 1, *every[3:]))[:len(step.outs)])


def _exchanges(at: Site) -> list[Exchange]:
    form, kind = Form.of(at.step), widest(*(at.dtypes[i] for i in floats(at.step.options)))
    if not form.ring:
        return of_pieces(at, str(kind))
    return of_ring(at, str(kind), form.ring_of(*(at.pieces(x.dims[1]) for x in (form.q, form.k))))


def _reads(dtypes: Sequence[str | None], attrs: dict[str, Any]) -> list[str | None]:
    """What says what is seen as it comes: `Seen` widens it."""
    kind = widest(*(dtypes[i] for i in floats(attrs)))
    return [kind if i in floats(attrs) else of for i, of in enumerate(dtypes)]


def _keeps(step: Step) -> tuple[Op, tuple[Spec, ...]]:
    return ATTENTION_LSE, (Spec(step.ins[0].whole().dims[:4]),)


def _vjp(b: Steps, step: Step, ct: Sequence[str]) -> list[str | None]:
    form, inputs, options = Form.of(step), list(step.inputs), dict(step.options)
    kind, over = b.types[ct[0]], () if form.ring else form.axes
    g = b.move(ct[0], kind.owing(*(o for o in kind.owed if o.axis not in over)), "each piece of S gets it")
    if len(step.outputs) == 1:
        op, more = _keeps(step)
        out, lse = b.call(op, inputs, outs=(step.outs[0].owing(), *more), **options)
    else:
        out, lse = step.outputs
    made: dict[int, str] = {}
    if "sinks" in form.beside:
        at = 3 + form.beside.index("sinks")
        made[at] = b.call(SINKS_VJP, [inputs.pop(at), out, lse, ct[0]], outs=(step.ins[at].owing(),))
        others = " ".join(n for n in form.beside if n != "sinks")
        options = {k: v for k, v in options.items() if k != "beside"} | ({"beside": others} if others else {})
    differentiated = [0, 1, 2, *(3 + i for i, n in enumerate(form.beside) if n == "bias")]
    kinds = tuple(step.ins[i].owing() for i in differentiated)
    made.update(zip(differentiated, b.call(ATTENTION_VJP, [*inputs, out, lse, g], outs=kinds, **options)))
    return [made.get(i) for i in range(len(step.inputs))]


def _mean(d: Dims, q: Tensor, k: Tensor, v: Tensor, *beside: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of v over the keys that a query sees, weighted by exp of the scores, 0 where it sees none; and
    the sum of the weights."""
    form = Form.of(d.step)
    given = dict(zip(form.beside, beside))
    score, seen = form.score(d, q, k, given)
    weight = torch.where(seen, torch.exp(score), 0)
    total = d.sum(weight, *form.k.dims[1].names)
    total = total + torch.exp(given["sinks"]) if "sinks" in given else total
    return d.sum(weight * v, *form.k.dims[1].names) / torch.where(total == 0, 1, total), total


def _reference(d: Dims, q: Tensor, k: Tensor, v: Tensor, *beside: Tensor) -> Tensor:
    return _mean(d, q, k, v, *beside)[0]


def _lse_reference(d: Dims, q: Tensor, k: Tensor, v: Tensor, *beside: Tensor) -> tuple[Tensor, Tensor]:
    out, total = _mean(d, q, k, v, *beside)
    return out, total.log()


EXCHANGES = Exchanges(lambda step: Form.of(step).axes, _exchanges)
ATTENTION = Op("attention", exchanges=EXCHANGES, rule=_rule, emit=_emit(attend), vjp=_vjp, keeps=_keeps,
               reads=_reads, looks=lambda e, step, args: "None", takes=lambda s: Form.of(s).takes,
               runs=lambda site: runs(site, graded=False), keywords=Form.KEYWORDS, reference=_reference)
ATTENTION_LSE = Op("attention_lse", exchanges=EXCHANGES, rule=_rule, emit=_emit(attend_lse),
                   takes=lambda s: Form.of(s).takes, reads=_reads, keywords=Form.KEYWORDS,
                   dtype=lambda d, o: [_reads(d, o)[0], widest(_reads(d, o)[0], "float32")],
                   runs=runs, reference=_lse_reference)


def placed(program: Program) -> bool:
    """Whether places alone say what queries see in all attention of a program: see `Form.placed`."""
    return all(Form.of(step).placed for p in (program, *program.bodies()) for step in p.steps
               if step.op is ATTENTION)


def attention(text: str, q: Operand, k: Operand, v: Operand, seen: Operand | None = None, *,
              mask: Operand | None = None, lengths: Operand | None = None, bias: Operand | None = None,
              sinks: Operand | None = None, causal: bool | None = None, window: int | None = None,
              softcap: float | None = None, scale: float | None = None, ahead: int = 0) -> Value:
    """The mean of v over the keys that a query sees, weighted by exp(q k / sqrt(H)) (Vaswani et al. 2017).

    Specs are those of "B T K G H, B S K H, B S K H [, B | B T S] -> B T K G H": G queries share a kv head,
    and v's last dim may have a letter of its own. Query t sees keys s <= t; where `seen` is a start, B,
    integers, keys s <= start[b] + t, which is `causal_mask` without a mask; where it is a mask, those where
    it is true.

    What else is given stands behind, in this order, in the text and here:

    mask: any of B K G T S, with S; beside a start.
    lengths: B; of row b keys s < lengths[b] are seen, as of prompts that are padded.
    bias: any of B K G T S, with S; is added to the scores, and has a gradient: T5's "K G T S"; ALiBi's slopes
        times s, "K G S", since what is the same for all keys changes nothing.
    sinks: of K G; the score of one more key of each head, whose value is 0 (Xiao et al. 2023, GPT-OSS).

    causal: whether later keys are hidden; by default unless there is a mask.
    window: keys `window` or more places away are hidden (Mistral's sliding window counts the query's own).
    softcap: scores become softcap * tanh(score / softcap) (Gemma 2), before a bias.
    scale: in place of 1 / sqrt(H).
    ahead: query t stands at ahead + t: what a start says that is one number, known when it is lowered.

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

    The same by a number, for which there are fused kernels:

    >>> @sharded("B T K G H, B S K H, B S K V -> B T K G V")
    ... def behind_one(q, k, v):
    ...     return attention("B T K G H, B S K H, B S K V -> B T K G V", q, k, v, ahead=1)
    >>> simulate(behind_one, Layout(T="cp"), q[:, 1:], k, v, mesh=Mesh(cp=2)).flatten()
    tensor([2., 4.])

    A window of two, and a sink that weighs as much as a key:

    >>> @sharded("B T K G H, B S K H, B S K V, K G -> B T K G V")
    ... def near(q, k, v, sinks):
    ...     return attention("B T K G H, B S K H, B S K V, K G -> B T K G V", q, k, v, sinks=sinks, window=2)
    >>> simulate(near, Layout(T="cp"), q, k, v, torch.zeros(1, 1), mesh=Mesh(cp=2)).flatten()
    tensor([0.5000, 1.3333, 3.6667])
    """
    who = f'attention "{text}"'
    meant = (f'{who}: the specs are those of "B T K G H, B S K H, B S K H -> B T K G H", with a '
             f'fourth, "B" of a start or "B T S" of a mask, where one is given')
    ins, outs = parse_specs(text, meant)
    given: dict[str, Operand | None] = dict(mask=mask, lengths=lengths, bias=bias, sinks=sinks)
    if seen is not None:
        name = told(ins[3]) if len(ins) > 3 else "mask"
        if given.get(name) is not None:
            raise SpecError(f"{who}: two masks are given; one mask is both, as `a & b`")
        given[name] = seen
    beside = [n for n in BESIDE if given.get(n) is not None]
    if len(ins) != 3 + len(beside) or len(outs) != 1:
        raise SpecError(meant)
    options: dict[str, Any] = dict(causal=None if causal == ("mask" not in beside) else causal, window=window,
                                   softcap=softcap, scale=scale, ahead=ahead or None,
                                   beside=" ".join(beside))
    Form.checked(ins, options, outs, who)
    if not beside or beside == [told(ins[3])]:
        del options["beside"]
    return apply(ATTENTION, (q, k, v, *(given[n] for n in beside)), text,
                 **{name: value for name, value in options.items() if value is not None})


TABLE = {op.name: op for op in (ATTENTION, ATTENTION_LSE)}
