"""Capacity of experts: each takes so many rows, what comes beyond is dropped, and counted.

    weights, chosen = route("B T E -> B T J, B T J", logits, top_k=2)
    chosen, dropped = within_capacity("B T J -> B T J, E", chosen, capacity=64)
    rows, at = dispatch("B T D, B T J -> (E B T)~J D, (E B T)~J", x, chosen, ignore_index=-1)

A choice that is dropped is -1, none: its row goes nowhere, `combine` adds nothing for it, gradients are 0.
Who is first, is taken: the first choices of all tokens before all second ones, within these by token, as in
GShard (arXiv:2006.16668, algorithm 1). That is said of the whole batch, so that what is dropped depends on no
layout: on one axis tokens and J are whole (some integers a token, gathered where tokens are split), and E,
which counts what each expert has lost, may be split.

Without this op nothing is dropped, ever: rows for which a rank has no room are an error (`experts`).
"""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from shardlib.errors import SpecError
from shardlib.language.local_code import LocalCode
from shardlib.language.value import Operand, Value, apply
from shardlib.ops.expert_rows import each_once
from shardlib.ops.route import ROUTE
from shardlib.program import Op, Step
from shardlib.reference import Dims
from shardlib.rules import Rule
from shardlib.spec import parse_specs

NONE = -1


def kept_within(chosen: Tensor, capacity: int, start: int, size: int,
                look: Callable[[Tensor], None] | None = None) -> tuple[Tensor, Tensor]:
    """What was chosen, NONE in place of what is dropped; and how much of the experts from `start` on is.

    >>> kept_within(torch.tensor([[0, 2], [2, 0], [2, 1]]), 2, 0, 3)
    (tensor([[ 0, -1],
            [ 2,  0],
            [ 2,  1]]), tensor([0, 0, 1]))
    """
    if look is not None:
        look(each_once(chosen, NONE))
    choices = chosen.movedim(-1, 0)
    ordered, by = choices.reshape(-1).sort(stable=True)
    before = torch.arange(len(ordered), device=chosen.device) - torch.searchsorted(ordered, ordered)
    kept = torch.where(before < capacity, ordered, NONE)
    kept = torch.empty_like(ordered).scatter(0, by, kept).view(choices.shape).movedim(0, -1)
    ends = torch.searchsorted(ordered, torch.arange(start, start + size + 1, device=chosen.device))
    return kept.contiguous(), (ends.diff() - capacity).clamp(min=0)


def _emit(e: LocalCode, step: Step, args: list[str]) -> str:
    (expert,), maker = step.outs[1].dims, e.maker(step.inputs[0])
    known = maker is not None and maker.op is ROUTE and e.count(maker.ins[0].dims[-1]) <= e.count(expert)
    look = "None" if known else e.index_site(
        step, 0, args[0], expert, "experts", ignored=NONE,
        hint="; -1 is none, and an expert that a token has twice counts as -2") + ".look"
    start, size = e.rows(expert)
    return f"{e.use(kept_within)}({args[0]}, {step.options['capacity']}, {start}, {size}, {look})"


def _reference(d: Dims, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """By counting, for each expert, the choices before each."""
    *tokens, choice = d.step.ins[0].names
    (expert,) = d.step.outs[1].names
    if bool((chosen >= d.count(expert)).any()):
        raise ValueError("none of the experts")
    order = d.index(choice, *tokens)
    kept, dropped = torch.full_like(chosen, NONE), torch.zeros_like(d.index(expert))
    for e in range(d.count(expert)):
        own = chosen == e
        firsts = order.expand(own.shape)[own].sort().values[:d.options["capacity"]]
        kept = torch.where(own & torch.isin(order, firsts), e, kept)
        dropped = torch.where(d.index(expert) == e, own.sum() - len(firsts), dropped)
    return kept, dropped


WITHIN_CAPACITY = Op("within_capacity", index=(0,), takes=("index",), emit=_emit, constant=True,
                     keywords={"capacity": lambda n: isinstance(n, int) and n is not True and n >= 0},
                     rule=lambda s: Rule(whole=s.ins[0].names), reads=lambda d, o: [d[0] and "int64"],
                     dtype=lambda d, o: ["int64", "int64"], reference=_reference)


def within_capacity(text: str, experts: Operand, *, capacity: int) -> tuple[Value, Value]:
    """(chosen, dropped): the choices that are among the first `capacity` of their expert, -1 in place of
    others; and of each expert how many it has lost. Both are int64, and the same under every layout.

    Refused, where it runs: an expert outside of E, and one that a token has twice; -1 is none.

    >>> import torch
    >>> from shardlib import Layout, Mesh, sharded, simulate
    >>> from shardlib.ops import combine, dispatch
    >>> @sharded("T D, T J, E -> T D, E")
    ... def limited(x, chosen, like):
    ...     chosen, dropped = within_capacity("T J -> T J, E", chosen, capacity=1)
    ...     rows, at = dispatch("T D, T J -> (E T)~J D, (E T)~J", x, chosen, ignore_index=-1)
    ...     return combine("(E T)~J D, (E T)~J -> T D", rows, at), dropped
    >>> x, chosen = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[0], [2], [0]])
    >>> simulate(limited, Layout(T="dp", E="dp"), x, chosen, torch.zeros(3), mesh=Mesh(dp=2))
    (tensor([[1.],
            [2.],
            [0.]]), tensor([1, 0, 0]))
    """
    said = f'within_capacity "{text}": the specs are those of "B T J -> B T J, E"'
    ins, outs = parse_specs(text, said)
    if ([len(ins), len(outs)] != [1, 2] or not ins[0].dims or ins[0].labels != outs[0].labels
            or len(outs[1].dims) != 1 or outs[1].names[0] in ins[0].names):
        raise SpecError(said)
    return apply(WITHIN_CAPACITY, (experts,), text, capacity=capacity)


TABLE = {WITHIN_CAPACITY.name: WITHIN_CAPACITY}
