"""Words on stderr of a process that is about to end: it must not wait for who reads them."""
from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from contextlib import suppress

SAYING_S = 1.0
"""Seconds that a report may take to be written: a pipe that nobody reads takes for ever."""
_WRITING: list[threading.Thread] = []


def say(rank: int, lines: list[str]) -> None:
    """Lines on stderr, in one write, so that those of other ranks do not come between.

    What is not printable is data gone wrong.
    """
    printable = ("".join(c if c.isprintable() else "?" for c in line) for line in lines)
    text = "".join(f"shardlib [rank {rank}] {line}\n" for line in printable)
    _shortly(lambda: print(text, end="", file=sys.stderr, flush=True))


def flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        _shortly(stream.flush)


def _shortly(write: Callable[[], None]) -> None:
    """Writes, if that is possible, and waits no longer than SAYING_S for it;
    not at all once something has waited that long."""
    def attempt() -> None:
        with suppress(OSError, ValueError):
            write()
    if not any(thread.is_alive() for thread in _WRITING):
        _WRITING[:] = [threading.Thread(target=attempt, daemon=True, name="shardlib says")]
        _WRITING[0].start()
        _WRITING[0].join(SAYING_S)
