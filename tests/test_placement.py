"""What the pieces of all ranks denote, and that copies which should be equal are compared, each of them."""
from __future__ import annotations

import pytest
import torch

from shardlib import Layout, Mesh, compile, local, place, sharded, simulate
from shardlib.placement import NotReplicated, join
from shardlib.spec import parse


@pytest.mark.parametrize("other", (0, 1, 2, 3))
def test_a_copy_that_differs_is_seen_on_whichever_rank_it_is(other: int) -> None:
    mesh, pieces = Mesh(x=4), [torch.ones(3, dtype=torch.float64) for _ in range(4)]
    assert torch.equal(join(pieces, parse("D"), dict(D=3), mesh), torch.ones(3, dtype=torch.float64))
    pieces[other][2] += 1e-6
    with pytest.raises(NotReplicated, match="^D: the copies on different ranks differ$"):
        join(pieces, parse("D"), dict(D=3), mesh)


@sharded("B -> ()")
def last_of(x):
    """Wrongly asserted: each rank gives the last of its own."""
    return local("B/x -> ()", lambda piece: piece[-1] * 1.0, x)


def test_a_wrong_assertion_that_one_rank_alone_betrays_is_seen() -> None:
    x = torch.tensor([0.0, 5.0, 5.0, 5.0, 1.0, 7.0])
    with pytest.raises(NotReplicated):
        simulate(last_of, Layout(), x, mesh=Mesh(x=3))


def test_what_is_placed_is_a_copy() -> None:
    run, whole = compile(sharded("B -> B")(lambda x: x + 1), mesh=Mesh()), torch.zeros(2)
    place(run, "x", whole).add_(5)
    assert torch.equal(whole, torch.zeros(2))
