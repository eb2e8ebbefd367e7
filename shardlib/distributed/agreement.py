"""What ranks must agree on: their plans, and in debug mode each collective, compared over a control group.

`share` gives every member's message to every member, so that all find the same difference, and raise the same
error:

>>> said = ["all_reduce sum of (4,) float32", "all_reduce sum of (5,) float32"]
>>> same_call("collective 3 of group tp (ranks 0 1)", (0, 1), Call(said[0]),
...           lambda mine: [[text, "", [], []] for text in said])
Traceback (most recent call last):
shardlib.errors.SpecError: collective 3 of group tp (ranks 0 1): its ranks do not call the same
  rank 0   all_reduce sum of (4,) float32
  rank 1   all_reduce sum of (5,) float32
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from shardlib.distributed.rank_error import listed
from shardlib.errors import SpecError

Share = Callable[[Any], list[Any]]


@dataclass(frozen=True)
class Call:
    """A collective as one member calls it.

    send, recv: elements to and from each member, where those are not equal everywhere.
    """
    text: str
    step: str = ""
    send: tuple[int, ...] = ()
    recv: tuple[int, ...] = ()


_FACTS = {"all_reduce": " {}", "broadcast": " {} from member {}", "all_gather": " to {} along dim {} by {}",
          "broadcast_message": " from member {}", "broadcast_tensors": " from member {}",
          "reduce_scatter": " {} along dim {} by {}", "gather": " to {} along dim {} by {} on member {}",
          "all_to_all": ", even: {}"}
"""How debug mode says what must be equal on all members."""


def said(name: str, op: str | None, dtype: Any, facts: Sequence[Any]) -> str:
    """A collective in words. facts: what must be equal on all members, beside the op and the dtype."""
    kind = "" if dtype is None else f" of {str(dtype).removeprefix('torch.')}"
    equal = [tuple(f) if isinstance(f, tuple | list) else f for f in facts]
    return name + (f" {op}" if op else "") + kind + _FACTS.get(name, " {}" * len(equal)).format(*equal)


def same_call(where: str, ranks: Sequence[int], mine: Call, share: Share) -> None:
    """SpecError, the same on all `ranks`, unless all call the same collective at the same step."""
    all_calls = [Call(text, step, tuple(send), tuple(recv))
                 for text, step, send, recv in share([mine.text, mine.step, mine.send, mine.recv])]
    said = [call.text + (f", at {call.step}" if call.step else "") for call in all_calls]
    if len(set(said)) > 1:
        raise SpecError("\n".join([f"{where}: its ranks do not call the same", *_rows(ranks, said)]))
    for i, a in enumerate(all_calls):
        for j, b in enumerate(all_calls if a.send else ()):
            if a.send[j] != b.recv[i]:
                raise SpecError(f"{where}, {said[0]}: rank {ranks[i]} sends {a.send[j]} elements to rank "
                                f"{ranks[j]}, which expects {b.recv[i]}")


def different_plans(title: str, plans: Sequence[str]) -> str:
    """The error of ranks whose `plans`, by rank, are not all the same."""
    lines = [plan.splitlines() for plan in plans]
    number, first = next((i, at) for i, at in enumerate(zip_longest(*lines, fillvalue="(nothing)"), 1)
                         if len(set(at)) > 1)
    return "\n".join([f"{title}: the ranks have different plans, first in line {number}",
                      *_rows(range(len(plans)), [line.strip() for line in first]),
                      "compile the same function with the same layout, mesh, sizes and dtypes on every rank"])


def _rows(ranks: Sequence[int], said: Sequence[str]) -> list[str]:
    """A line for each thing that was said, after the ranks that said it."""
    who: dict[str, list[int]] = {}
    for rank, text in zip(ranks, said):
        who.setdefault(text, []).append(rank)
    heads = [f"rank{'s' * (len(found) > 1)} {listed(found)}" for found in who.values()]
    return [f"  {head.ljust(max(map(len, heads)))}   {text}" for head, text in zip(heads, who)]
