"""Who takes a call of one group: of the communicators that support it, the fastest by the routing table.

>>> from shardlib.distributed.communicators.alone import Alone
>>> import torch
>>> router = Router("tp", 1, (Alone(),))
>>> router.choice(Call("all_reduce", "sum", torch.float32, "cpu", 1024)).why
'alone, the first that takes it'
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf
from typing import NamedTuple

from shardlib.distributed.communicators.protocol import Call, Communicator
from shardlib.distributed.routing import UNMEASURED, Table
from shardlib.errors import SpecError

REMEMBERED = 4096


class Choice(NamedTuple):
    """Which communicator takes a call. us: what the routing table says, if it knows."""
    communicator: str
    us: float | None
    why: str


class Router:
    """Of the group `name` of `size` members. deterministic:
    only those add up that do so in rank order, rounding once.

    declined: communicators that could not be made for this group, and why.
    """

    def __init__(self, name: str, size: int, communicators: Sequence[Communicator], table: Table = UNMEASURED,
                 deterministic: bool = False, declined: Mapping[str, str] | None = None) -> None:
        self.name, self.size, self.communicators, self.table = name, size, tuple(communicators), table
        self.deterministic, self.declined = deterministic, dict(declined or {})
        self.known: dict[Call, Communicator] = {}
        """Who took earlier calls: a look-up by the tuple of what a Call holds saves making one."""

    def use(self, table: Table) -> None:
        """From now on routes by another table; all members do so between the same two calls."""
        self.table = table
        self.known.clear()

    def route(self, call: Call) -> Communicator:
        """The communicator that takes the call. SpecError with every reason where there is none."""
        known = self.known.get(call)
        if known is None:
            if len(self.known) >= REMEMBERED:
                self.known.clear()
            known = self.known[call] = self._choose(call)
        return known

    def _choose(self, call: Call) -> Communicator:
        reasons = [self._reason(c, call) for c in self.communicators]
        able = [c for c, reason in zip(self.communicators, reasons) if reason is None]
        if not able:
            raise SpecError(f"{call.name} over {self.name}: "
                            f"{'; '.join(map(str, dict.fromkeys(reasons))) or 'the group was destroyed'}")
        best = self.table.order(call, self.size, [c.name for c in able])[0]
        return next(c for c in able if c.name == best)

    def choice(self, call: Call) -> Choice:
        """Who takes the call, the µs it should take, and why it is that one: in words, for `explain`."""
        chosen = self.route(call)
        us = {c.name: self.table.us(call, self.size, c.name) for c in self.communicators
              if self._reason(c, call) is None}
        times = ", ".join(f"{name} {t:.3g} µs"
                          for name, t in sorted(us.items(), key=lambda item: item[1] or inf) if t is not None)
        others = {c.name: reason for c in self.communicators
                  if (reason := self._reason(c, call)) and c.name != chosen.name}
        why = (f"measured: {times}" if us[chosen.name] is not None
               else f"{chosen.name}, the first that takes it")
        return Choice(chosen.name, us[chosen.name],
                      "; ".join([why, *others.values(), *(f"no {n}: {r}" for n, r in self.declined.items())]))

    def _reason(self, communicator: Communicator, call: Call) -> str | None:
        if self.deterministic and call.op is not None and not communicator.deterministic:
            return f"{communicator.name} does not add up in rank order"
        return communicator.supports(call)
