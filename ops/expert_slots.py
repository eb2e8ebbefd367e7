"""Experts in slots: which slot a token's row goes to, where experts have replicas.

    weights, chosen = route("B T X -> B T J, B T J", logits, top_k=2)
    chosen = slots_of("X R, B T J -> B T J", table, chosen)
    rows, at = dispatch("B T D, B T J -> (E B T)~J D, (E B T)~J", x, chosen)

X are the model's experts, E the slots that hold their weights, of which several may hold one. `table` has for
each expert its slots, and -1 behind them (`shardlib.models.expert_placement`). Tokens take the replicas in
turn, by their number in the batch: so the choice is the same under every layout, and no count is needed.
Weights of replicas are equal, so what a token gets does not depend on the table.

On one axis tokens and choices may be split; the table is whole. Choices that are -1, none, stay so.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shardlib.errors import SpecError
from shardlib.language.local_code import LocalCode
from shardlib.language.value import Operand, Value, apply
from shardlib.lowering.index_check import IndexSite
from shardlib.program import Op, Step
from shardlib.reference import Dims
from shardlib.rules import Rule
from shardlib.spec import parse_specs

NONE = -1


def slot_of(table: Tensor, chosen: Tensor, tokens: Sequence[tuple[int, int, int]], site: IndexSite) -> Tensor:
    """The slots of what was chosen. tokens: of each dim of tokens where its piece begins, and its size, and
    how many tokens the next one is away."""
    site.look(chosen)
    number = torch.zeros((), dtype=torch.int64, device=chosen.device)
    for begin, size, stride in tokens:
        number = number.unsqueeze(-1) + torch.arange(begin, begin + size, device=chosen.device) * stride
    expert = chosen.clamp(0, len(table) - 1)
    count = (table >= 0).sum(1).clamp(min=1)
    return torch.where(chosen < 0, NONE, table[expert, number.unsqueeze(-1) % count[expert]])


def _emit(e: LocalCode, step: Step, args: list[str]) -> str:
    expert, tokens, stride = step.ins[0].dims[0], step.ins[1].dims[:-1], 1
    places: list[tuple[int, int, int]] = []
    for dim in reversed(tokens):
        places.insert(0, (*e.rows(dim), stride))
        stride *= e.count(dim)
    site = e.index_site(step, 1, args[1], expert, "experts", ignored=NONE)
    return f"{e.use(slot_of)}({args[0]}, {args[1]}, {places}, {site})"


def _reference(d: Dims, table: Tensor, chosen: Tensor) -> Tensor:
    x, r = d.step.ins[0].names
    if bool((chosen >= d.count(x)).any()):
        raise ValueError("none of the experts")
    own = d.index(x) == chosen
    turn = d.index(*d.step.ins[1].names[:-1]) % d.sum((table >= 0).long(), r).clamp(min=1)
    return d.sum(torch.where(own & (d.index(r) == turn), table + 1, 0), x, r) - 1


SLOTS_OF = Op("slots_of", index=(0, 1), takes=("index", "index"), emit=_emit, constant=True,
              rule=lambda s: Rule(whole=s.ins[0].names),
              reads=lambda d, o: [d[0] and "int64", d[1] and "int64"], dtype=lambda d, o: ["int64"],
              reference=_reference)


def slots_of(text: str, table: Operand, experts: Operand) -> Value:
    """The slot of each choice: of the expert's slots in `table`, the one whose turn it is.

    Refused, where it runs: an expert outside of X; -1 is none, and stays.

    >>> import torch
    >>> from shardlib import Layout, Mesh, sharded, simulate
    >>> @sharded("X R, T J -> T J")
    ... def placed(table, chosen):
    ...     return slots_of("X R, T J -> T J", table, chosen)
    >>> table = torch.tensor([[0, 3], [1, -1], [2, -1]])                    # expert 0 is in slots 0 and 3
    >>> simulate(placed, Layout(T="dp"), table, torch.tensor([[0, 1], [0, 2], [0, 1]]), mesh=Mesh(dp=2))
    tensor([[0, 1],
            [3, 2],
            [0, 1]])
    """
    said = f'slots_of "{text}": the specs are those of "X R, B T J -> B T J"'
    ins, outs = parse_specs(text, said)
    if ([len(ins), len(outs)] != [2, 1] or len(ins[0].dims) != 2 or ins[1].labels != outs[0].labels
            or not ins[1].dims or {*ins[0].names} & {*ins[1].names}):
        raise SpecError(said)
    return apply(SLOTS_OF, (table, experts), text)


TABLE = {SLOTS_OF.name: SLOTS_OF}
