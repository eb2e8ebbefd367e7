"""The simulator refuses what real ranks would hang on, or fail at:
members of one collective that do not say the same of it."""
from __future__ import annotations

from typing import Any

import pytest
import torch

from shardlib.errors import SpecError
from shardlib.run.simulate import perform, run_ranks

PAIR = (0, 1)
X, Y = torch.arange(2.0), torch.arange(3.0)


@pytest.mark.parametrize("method, one, other, says", [
    ("all_reduce", (X, "sum"), (X, "max"),
     "all_reduce: the ranks say ('sum',) and ('max',) of one collective"),
    ("all_reduce", (X, "sum"), (X.long(), "sum"), "all_reduce: the ranks bring float32 and int64"),
    ("all_reduce", (X, "sum"), (Y, "sum"), "all_reduce: the ranks bring shapes [(2,), (3,)]"),
    ("all_gather", (X, 0, (2, 3)), (Y, 0, (3, 2)),
     "all_gather: the ranks say (0, (2, 3)) and (0, (3, 2)) of one collective"),
    ("all_gather", (X, 0, (3, 2)), (Y, 0, (3, 2)),
     "all_gather: the ranks hold [2, 3] rows, the program says [3, 2]"),
    ("reduce_scatter", (X, 0, (1, 1), "sum"), (X, 0, (2, 0), "sum"),
     "reduce_scatter: the ranks say (0, (1, 1), 'sum') and (0, (2, 0), 'sum') of one collective"),
    ("all_to_all", ((X, X), ((2,), (2,)), True), ((X, X), ((2,), (2,))),
     "all_to_all: the ranks say (True,) and () of one collective"),
    ("all_to_all", ((X, X), ((2,), (2,))), ((X, Y), ((2,), (2,))),
     "all_to_all: member 1 expects pieces of shapes ((2,), (2,)); ((2,), (3,)) come"),
    ("all_to_all", ((X, X), ((2,), (2,)), True), ((X, Y), ((2,), (3,)), True),
     "all_to_all: pieces of [[2, 2], [2, 3]] elements are not even"),
    ("all_to_all", ((X, X), ((2,), (2,))), ((X.int(), X), ((2,), (2,))),
     "all_to_all: the ranks bring float32 and int32")])
def test_members_that_do_not_fit(method: str, one: tuple, other: tuple, says: str) -> None:
    with pytest.raises(SpecError) as refused:
        perform([(PAIR, method, *one), (PAIR, method, *other)])
    assert str(refused.value) == says


def test_members_that_fit() -> None:
    assert [y.tolist() for y in perform([(PAIR, "all_gather", X, 0, (2, 3)),
                                         (PAIR, "all_gather", Y, 0, (2, 3))])] == [[0, 1, 0, 1, 2]] * 2
    assert ([y.tolist() for y in perform([(PAIR, "reduce_scatter", Y, 0, (1, 2), "sum"),
                                          (PAIR, "reduce_scatter", -3 * Y, 0, (1, 2), "sum")])]
            == [[0], [-2, -4]])
    assert ([y.tolist() for y in perform([(PAIR, "all_reduce", Y, "max"), (PAIR, "all_reduce", -Y, "max")])]
            == [[0, 1, 2]] * 2)
    sent = [((X, Y), ((2,), (1,))), ((X[:1], Y + 5), ((3,), (3,)))]
    assert ([[p.tolist() for p in y] for y in perform([(PAIR, "all_to_all", *s) for s in sent])]
            == [[[0, 1], [0]], [[0, 1, 2], [5, 6, 7]]])


def rank(*methods: str) -> Any:
    got = yield from (() for _ in ())
    for method in methods:
        got = yield PAIR, method, X, "sum"
    return (got,)


def test_ranks_that_part_ways() -> None:
    with pytest.raises(SpecError) as refused:
        run_ranks([rank("all_reduce"), rank("all_reduce", "all_reduce")])
    assert str(refused.value) == (
        "the ranks part ways: rank 0 has ended; rank 1 waits in all_reduce of ranks [0, 1]")
    with pytest.raises(SpecError) as refused:
        run_ranks([rank("all_reduce"), rank("all_gather")])
    assert str(refused.value) == "the ranks part ways: all_gather, all_reduce in one group at once"
    ((mine,), (theirs,)) = run_ranks([rank("all_reduce"), rank("all_reduce")])
    assert torch.equal(mine, 2 * X) and torch.equal(theirs, mine) and mine.data_ptr() != theirs.data_ptr()


def test_ranks_that_wait_in_different_groups_are_not_joined() -> None:
    def in_group(*members: int) -> Any:
        got = yield members, "all_reduce", X, "sum"
        return (got,)
    with pytest.raises(SpecError) as refused:
        run_ranks([in_group(0, 1), in_group(1, 2), in_group(0, 2)])
    assert str(refused.value) == (
        "the ranks part ways: rank 0 waits in all_reduce of ranks [0, 1]; "
        "rank 1 waits in all_reduce of ranks [1, 2]; rank 2 waits in all_reduce of ranks [0, 2]")
    made = run_ranks([in_group(0, 2), in_group(1), in_group(0, 2)])
    assert [y.tolist() for y, in made] == [[0, 2], [0, 1], [0, 2]]


def test_the_log_counts_the_largest_piece() -> None:
    def gathering(x: torch.Tensor) -> Any:
        got = yield PAIR, "all_gather", x, 0, (len(X), len(Y))
        return (got,)
    log: list[Any] = []
    run_ranks([gathering(X), gathering(Y)], log)
    assert log == [(PAIR, "all_gather", 3)]
