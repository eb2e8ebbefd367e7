"""Rows of a batch in groups: each is continued by itself, and a step is told once all groups have come to it.

>>> split_rows(5, None, stages=2)
[range(0, 3), range(3, 5)]
>>> told = Told([2, 1], print)
>>> told.say(0, [7, 8]); told.say(0, [9, None]); told.say(1, [5]); told.say(1, None)
[7, 8, 5]
[9, None, None]
"""
from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence

from shardlib import SpecError
from shardlib.models.decoder import Decoder
from shardlib.models.slots import Slots
from shardlib.run.turns import Requests

WORTH_MOVING, WORTH_CAPTURING = 4, 256
"""Steps that must be to come for rows to be moved into a smaller bucket;
where that has no graph yet, for one to be captured, too."""

New = Sequence[int | None]


def split_rows(rows: int, groups: int | None, stages: int) -> list[range]:
    """The rows of each group: as many groups as stages, or as are asked for, and none without a row."""
    if groups is not None and (type(groups) is not int or groups < 1):
        raise SpecError(f"generate: groups is {groups!r}; rows go into at least one")
    count = min(rows, groups or stages)
    each, more = divmod(rows, count)
    starts = [i * each + min(i, more) for i in range(count + 1)]
    return [range(a, b) for a, b in zip(starts, starts[1:])]


class Told:
    """Tells what the groups say, a step at a time. sizes: the rows of each."""

    def __init__(self, sizes: Sequence[int], tell: Callable[[list[int | None]], None]) -> None:
        self.sizes, self.tell = sizes, tell
        self.said: list[deque[New | None]] = [deque() for _ in sizes]

    def say(self, group: int, new: New | None) -> None:
        """The new token of each row of a group, None of one that is done; None where the group has ended."""
        self.said[group].append(new)
        while all(self.said) and any(said[0] is not None for said in self.said):
            news = [said[0] if said[0] is None else said.popleft() for said in self.said]
            self.tell([t for new, size in zip(news, self.sizes) for t in (new or [None] * size)])


def continued(decoder: Decoder, prompts: Sequence[Sequence[int]], first: int, max_new_tokens: int,
              eos_ids: Collection[int], say: Callable[[New | None], None]) -> Requests:
    """A group of rows from its prompts to its end: prompts and answers. first: the number of its first row.

    Where the decoder captures, the host follows one step behind.
    """
    tokens, ended, flying, launched = [list(p) for p in prompts], set(), deque(), 1
    slots = yield from decoder.beginning(prompts, max_new_tokens, sorted(eos_ids), first)
    flying.append((slots, decoder.fetch(slots)))
    while len(ended) < len(prompts) and (flying or launched < max_new_tokens):
        if len(flying) <= decoder.graph and launched < max_new_tokens:
            yield from decoder.advancing(slots)
            flying.append((slots, decoder.fetch(slots)))
            launched += 1
            continue
        new = _by_row(*flying.popleft(), len(prompts))
        say([None if row in ended else new[row] for row in range(len(prompts))])
        for row in {*range(len(prompts))} - ended:
            tokens[row].append(new[row])
        ended |= {row for row in range(len(prompts)) if row not in ended and new[row] in eos_ids}
        smaller = slots.without(ended) if decoder.graph and ended else None
        worth = WORTH_MOVING if smaller and decoder.captured(smaller.slots) else WORTH_CAPTURING
        if smaller and max_new_tokens - launched >= worth:
            decoder.compact(slots, smaller)
            slots = smaller.slots
    say(None)
    return tokens


def _by_row(slots: Slots, fetched: Callable[[], list[int]], rows: int) -> list[int | None]:
    """The token of each row, once it has come; None where the row has no slot any more."""
    new: list[int | None] = [None] * rows
    for row, token in zip(slots.rows, fetched()):
        if row is not None:
            new[row] = token
    return new
