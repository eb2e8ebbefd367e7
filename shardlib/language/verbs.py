"""The moves as one writes them: in explicit programs, and for a conversion at one place of a declarative one.

>>> from shardlib.language.trace import Function, trace
>>> print(trace(Function(lambda x: all_gather("T/tp D -> T D", x), "T/tp D -> T D")).steps[0].text)
T/tp D -> T D

What each does is in `shardlib.moves`.
"""
from __future__ import annotations

from typing import Any

from shardlib.language.moves import ALL_GATHER, ALL_REDUCE, ALL_TO_ALL, OWE, PERMUTE, REDUCE_SCATTER, RESHARD, SHARD
from shardlib.language.trace import apply


def shard(text: str, x: Any) -> Any:
    """Keep the own piece of a whole value: shard("T D -> T/tp D", x). Free."""
    return apply(SHARD, (x,), text)


def owe(text: str, x: Any) -> Any:
    """Make a whole or split value an owed sum. Free.

    owe("D -> D +tp", x) keeps it at coordinate 0, owe("T/tp D -> T D +tp", x) pads.
    """
    return apply(OWE, (x,), text)


def all_reduce(text: str, x: Any) -> Any:
    """Pay an owed sum (or max) on every rank: all_reduce("T D +tp -> T D", x)."""
    return apply(ALL_REDUCE, (x,), text)


def reduce_scatter(text: str, x: Any) -> Any:
    """Pay an owed sum, each rank its own piece: reduce_scatter("T D +tp -> T/tp D", x)."""
    return apply(REDUCE_SCATTER, (x,), text)


def all_gather(text: str, x: Any) -> Any:
    """Collect the pieces of a split dim: all_gather("T/tp D -> T D", x)."""
    return apply(ALL_GATHER, (x,), text)


def all_to_all(text: str, x: Any) -> Any:
    """Move a split from one dim to another: all_to_all("T/tp K -> T K/tp", x)."""
    return apply(ALL_TO_ALL, (x,), text)


def reshard(text: str, x: Any) -> Any:
    """Whatever moves lead from one spec to the other, cheapest first: reshard("T/tp D +dp -> T D/dp", x)."""
    return apply(RESHARD, (x,), text)


def permute(text: str, x: Any) -> Any:
    """Change the order of the axes that split a dim: permute("T/x/y -> T/y/x", x)."""
    return apply(PERMUTE, (x,), text)
