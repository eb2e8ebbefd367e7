"""The moves as one writes them: in explicit programs, and for a conversion at one place of a declarative one.

>>> from shardlib.language.trace import Function, trace
>>> print(trace(Function(lambda x: all_gather("T/tp D -> T D", x), "T/tp D -> T D")).steps[0].text)
T/tp D -> T D

What each does is in `shardlib.language.moves`.
"""
from __future__ import annotations

from shardlib.language.moves import (
    ALL_GATHER,
    ALL_REDUCE,
    ALL_TO_ALL,
    OWE,
    PERMUTE,
    REDUCE_SCATTER,
    RESHARD,
    SHARD,
)
from shardlib.language.value import Operand, Value, apply


def shard(text: str, x: Operand) -> Value:
    """`T D -> T/tp D`: of a whole value each rank keeps its own piece. Free.

    Refused: a value that owes over that axis.

    >>> import torch
    >>> from shardlib import EXPLICIT, Mesh, sharded, simulate
    >>> @sharded("T/tp D, T -> T/tp D", layout=EXPLICIT)
    ... def scaled(x, factor):
    ...     return x * shard("T -> T/tp", factor)
    >>> log = []
    >>> factor = torch.tensor([1.0, 2.0, 3.0])
    >>> simulate(scaled, None, torch.ones(3, 1), factor, mesh=Mesh(tp=2), log=log).flatten(), log
    (tensor([1., 2., 3.]), [])
    """
    return apply(SHARD, (x,), text)


def owe(text: str, x: Operand) -> Value:
    """`D -> D +tp`: a whole value stays at coordinate 0, the others have zeros. Free.

    `T/tp D -> T D +tp`: each rank pads its piece. So that a bias counts once, not once for every rank:

    >>> import torch
    >>> from shardlib import EXPLICIT, Mesh, einsum, sharded, simulate
    >>> @sharded("F/tp, F/tp D, D -> D", layout=EXPLICIT)
    ... def f(x, w, bias):
    ...     y = einsum("F/tp, F/tp D -> D +tp", x, w) + owe("D -> D +tp", bias)
    ...     return all_reduce("D +tp -> D", y)
    >>> simulate(f, None, torch.ones(4), torch.ones(4, 1), torch.tensor([10.0]), mesh=Mesh(tp=2))
    tensor([14.])
    """
    return apply(OWE, (x,), text)


def all_reduce(text: str, x: Operand) -> Value:
    """`T D +tp -> T D`: an owed sum (or max) is paid, on every rank.

    Refused where nothing is owed: it would count once for every rank.

    >>> import torch
    >>> from shardlib import EXPLICIT, Mesh, einsum, sharded, simulate
    >>> @sharded("T F/tp, F/tp D -> T D", layout=EXPLICIT)
    ... def f(x, w):
    ...     return all_reduce("T D +tp -> T D", einsum("T F/tp, F/tp D -> T D +tp", x, w))
    >>> log = []
    >>> simulate(f, None, torch.ones(2, 6), torch.ones(6, 1), mesh=Mesh(tp=3), log=log).flatten(), log
    (tensor([6., 6.]), [((0, 1, 2), 'all_reduce', 2)])
    """
    return apply(ALL_REDUCE, (x,), text)


def reduce_scatter(text: str, x: Operand) -> Value:
    """`T D +tp -> T/tp D`: an owed sum (or max) is paid, each rank its own piece.

    That moves half of what an all_reduce does. The gradient of a weight that is split at rest, from a batch
    that is split over the same axis:

    >>> import torch
    >>> from shardlib import EXPLICIT, Mesh, einsum, sharded, simulate
    >>> @sharded("B/dp D, B/dp F -> D/dp F", layout=EXPLICIT)
    ... def gradient(x, g):
    ...     return reduce_scatter("D F +dp -> D/dp F", einsum("B/dp D, B/dp F -> D F +dp", x, g))
    >>> x, g = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0], [10.0]])
    >>> simulate(gradient, None, x, g, mesh=Mesh(dp=2))
    tensor([[31.],
            [42.]])
    """
    return apply(REDUCE_SCATTER, (x,), text)


def all_gather(text: str, x: Operand) -> Value:
    """`T/tp D -> T D`: every rank gets all pieces of a dim.

    The axes that go are the last of that dim: T/x/y becomes T/x, or T. Refused: several dims at once.

    >>> import torch
    >>> from shardlib import EXPLICIT, Mesh, sharded, simulate
    >>> from shardlib.functions import softmax
    >>> @sharded("V/tp -> V", layout=EXPLICIT)
    ... def probabilities(logits):
    ...     return softmax(all_gather("V/tp -> V", logits), along="V")
    >>> simulate(probabilities, None, torch.zeros(5), mesh=Mesh(tp=2))
    tensor([0.2000, 0.2000, 0.2000, 0.2000, 0.2000])
    """
    return apply(ALL_GATHER, (x,), text)


def all_to_all(text: str, x: Operand) -> Value:
    """`T/tp K -> T K/tp`: a split moves from one dim to another. Pieces may be uneven.

    Heads in place of time, so that what runs along time has all of it (Jacobs et al. 2023):

    >>> import torch
    >>> from shardlib import EXPLICIT, Mesh, sharded, simulate
    >>> from shardlib.functions import softmax
    >>> @sharded("T/cp K -> T/cp K", layout=EXPLICIT)
    ... def over_time(scores):
    ...     by_head = softmax(all_to_all("T/cp K -> T K/cp", scores), along="T")
    ...     return all_to_all("T K/cp -> T/cp K", by_head)
    >>> simulate(over_time, None, torch.tensor([[0.0, 5.0], [0.0, 5.0]]), mesh=Mesh(cp=2))
    tensor([[0.5000, 0.5000],
            [0.5000, 0.5000]])
    """
    return apply(ALL_TO_ALL, (x,), text)


def reshard(text: str, x: Operand) -> Value:
    """From one spec to another of the same dims, by the moves that receive least, printed in its place.

    >>> from shardlib import EXPLICIT, Mesh, lower, sharded
    >>> @sharded("T/tp D +dp -> T D/dp", layout=EXPLICIT)
    ... def f(x):
    ...     return reshard("T/tp D +dp -> T D/dp", x)
    >>> lower(f, mesh=Mesh(dp=2, tp=2))
    @sharded("T/tp D +dp -> T D/dp", layout=EXPLICIT)
    def f(x):
        x2 = reduce_scatter("T/tp D +dp -> T/tp D/dp", x)
        x3 = all_gather("T/tp D/dp -> T D/dp", x2)
        return x3
    """
    return apply(RESHARD, (x,), text)


def permute(text: str, x: Operand) -> Value:
    """`T/x/y -> T/y/x`: the axes that split a dim change their order, and ranks the pieces that they hold.

    >>> import torch
    >>> from shardlib import EXPLICIT, Mesh, sharded, simulate
    >>> @sharded("T/x/y, T/y/x -> T/y/x", layout=EXPLICIT)
    ... def added(a, b):
    ...     return permute("T/x/y -> T/y/x", a) + b
    >>> log, one_to_four = [], torch.tensor([1.0, 2.0, 3.0, 4.0])
    >>> simulate(added, None, one_to_four, one_to_four, mesh=Mesh(x=2, y=2), log=log)
    tensor([2., 4., 6., 8.])
    >>> log
    [((0, 1, 2, 3), 'all_to_all', 1)]
    """
    return apply(PERMUTE, (x,), text)
