"""A communicator that counts what it is asked, and does none of it."""
from __future__ import annotations

from shardlib.distributed.communicators.alone import Alone
from shardlib.distributed.communicators.protocol import Call


class Asked(Alone):
    """Takes nothing, and notes what it is asked."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def supports(self, call: Call) -> str | None:
        self.calls.append(call)
        return "noted"
