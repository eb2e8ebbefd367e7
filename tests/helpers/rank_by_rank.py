"""The proof as one would write it first: every rank's collectives, matched from rank 0 on after each one.

`shardlib.prove` is held against it.
"""
from __future__ import annotations

from collections.abc import Sequence
from math import prod

from shardlib.errors import SpecError
from shardlib.reports.project import Call


def match(ranks: Sequence[Sequence[Call]]) -> int:
    """How many collectives these are. SpecError, naming ranks and steps, where the ranks cannot all end."""
    for rank, calls in enumerate(ranks):
        for call in calls:
            mine = dict(zip(call.group, call.shapes)).get(rank)
            if mine is not None and call.numel != prod(mine):
                raise SpecError(f"{_say(rank, call)}; its piece has shape {mine}")
    at, done = [0] * len(ranks), 0
    while any(i < len(calls) for i, calls in zip(at, ranks)):
        for rank, calls in enumerate(ranks):
            if at[rank] == len(calls):
                continue
            call = calls[at[rank]]
            heads = [ranks[m][at[m]] if at[m] < len(ranks[m]) else None for m in call.group]
            if all(h is not None and h.group == call.group for h in heads):
                wrong = next((m for m, h in zip(call.group, heads) if not call.same(h)), None)
                if wrong is not None:
                    raise SpecError(
                        f"ranks {rank} and {wrong} meet in different collectives: {_say(rank, call)}; "
                        f"{_say(wrong, ranks[wrong][at[wrong]])}")
                for m in call.group:
                    at[m] += 1
                done += 1
                break
        else:
            raise SpecError("the ranks part ways: " + "; ".join(
                _say(r, calls[i]) if i < len(calls) else f"rank {r} has ended"
                for r, (i, calls) in enumerate(zip(at, ranks))))
    return done


def _say(rank: int, call: Call) -> str:
    return f"rank {rank} is in {call}{f' at {call.step}' if call.step else ''}"
