"""Defects found in the code of other libraries: each is pinned by a test that is named
after what goes right here.

Others of them are pinned where their subject is: a member that cannot make a shared segment is a reason on
all members, and none waits (test_segment); a group of one copies as larger ones do (test_conformance, over
"alone"); messages come from any member, with a queue and without (test_message_queue,
test_group_coordinator).
"""
from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conformance import COLLECTIVES, LAYOUTS, Case, fixed_cases, quad_cases
from family import family
from here import HELPERS
from pool import Pool, World

from shardlib.distributed import GroupCoordinator
from shardlib.distributed.communicators.alone import Alone
from shardlib.distributed.communicators.shared_memory import TAKES
from shardlib.distributed.segment import unsupported
from shardlib.lowering.index_check import IndexSite
from shardlib.mesh import Mesh

GLOO, SHARED = "torch.distributed (gloo)", "shared memory"
BOTH = pytest.mark.parametrize("communicator", (GLOO, pytest.param(
    SHARED, marks=pytest.mark.skipif(unsupported() is not None, reason=str(unsupported())))))


@pytest.fixture(scope="module")
def pair(pool: Pool) -> World:
    return pool.connect("tp=2", [("tp",)], 2)


@pytest.fixture(scope="module")
def square(pool: Pool) -> World:
    return pool.connect("dp=2,tp=2", [("tp",), ("dp",), ("dp", "tp"), ("tp", "dp")], 4)


@BOTH
@pytest.mark.parametrize("dim", (2, -1, 1, 0))
def test_reduce_scatter_cuts_the_dim_it_is_told(pair: World, communicator: str, dim: int) -> None:
    """A movedim in the wrong direction is right for dims 0 and 1 alone:
    (4, 6, 8) along dim 2 became (8, 4, 3)."""
    shape = (4, 6, 8)
    assert pair.check(Case("reduce_scatter", ("tp",), "float32", shape, dim, (shape[dim] // 2,) * 2),
                      communicator=communicator) == []


def test_every_collective_has_cases_and_every_scenario_is_run() -> None:
    """The one test of reduce_scatter was never called."""
    assert {case.collective for case in fixed_cases(("tp",), 2)} == set(COLLECTIVES)
    assert ({case.layout for case in fixed_cases(("tp",), 2)}
            == {case.layout for case in quad_cases(("tp",), 2)} == set(LAYOUTS))
    folder = Path(__file__).parent
    written = re.findall(r"^def (\w+)\(runtime: Runtime", (HELPERS / "scenarios.py").read_text(),
                         re.MULTILINE)
    called = set(
        re.findall(r'\.run\("(\w+)"', "".join(path.read_text() for path in folder.glob("test_*.py"))))
    assert written and set(written) == called


def test_messages_tensors_and_sums_stay_in_the_group_that_was_asked(square: World) -> None:
    """A group argument was ignored; and an op was bound to the first group that was made,
    whichever was asked."""
    products = [["tp"], ["dp"], ["dp", "tp"], ["tp", "dp"]]
    mesh = Mesh(dp=2, tp=2)
    for rank, answers in enumerate(square.run("own_groups", products)):
        groups = [mesh.group(tuple(axes), rank) for axes in (*products, *products[::-1])]
        assert answers == [[ranks[-1], ranks[-1], sum(ranks), ranks[-1]] for ranks in groups]


class Loud(Alone):
    """Fails where it is used, whatever it promises."""

    name = "loud"

    def broadcast(self, x: torch.Tensor, root: int) -> torch.Tensor:
        raise AssertionError("a message went over the device's group")

    barrier = broadcast


def test_messages_and_barriers_do_not_go_over_the_devices_group() -> None:
    """Messages were pickled through NCCL."""
    group = GroupCoordinator("tp", (0,), 0, 0, torch.device("cpu"), (Loud(), Alone()), Alone())
    assert group.route("broadcast", torch.ones(1)).name == "loud"
    assert group.broadcast_message({"step": 3}, 0) == {"step": 3}
    assert group.broadcast_tensors({"none": torch.ones(0)}, 0)["none"].shape == (0,)
    group.barrier()


def strided(layout: str) -> list[Case]:
    """Each collective of tensors that are 4 x 4 or so, and lie in memory like this."""
    return [Case(c, ("tp",), dtype, (4, 4), dim=dim, sizes=(2, 2), rows=((2, 2), (2, 2)), layout=layout)
            for c in COLLECTIVES for dtype in ("float32", "int16") for dim in (0, 1)]


@BOTH
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_views_are_taken_for_what_they_show(pair: World, communicator: str, layout: str) -> None:
    """x[:, :2] of a 4 x 4 was reduced as its first 8 elements in memory;
    a view whose elements share memory passed as dense."""
    cases = [case for case in strided(layout) if communicator == GLOO or case.collective in TAKES]
    assert pair.check(*cases, communicator=communicator) == []


def test_a_slice_is_copied_and_a_dense_tensor_is_not() -> None:
    seen: list[torch.Tensor] = []

    class Watching(Alone):
        def all_reduce(self, x: torch.Tensor, op: str) -> torch.Tensor:
            seen.append(x)
            return x.clone()
    group, x = (GroupCoordinator("tp", (0,), 0, 0, torch.device("cpu"), (Watching(),), Alone()),
                torch.arange(16.0).view(4, 4))
    for view in (x, x[:2], x[:, :2], x.t(), x[:1].expand(4, 4), torch.arange(4.0).as_strided((2, 2), (1, 1))):
        assert torch.equal(group.all_reduce(view), view)
        assert seen[-1].is_contiguous() and seen[-1].untyped_storage().nbytes() >= seen[-1].nbytes
    assert [piece.data_ptr() == x.data_ptr() for piece in seen] == [True, True, False, False, False, False]


def test_what_stages_pass_on_is_whole_though_other_ranks_hold_something_else(square: World) -> None:
    """Each rank sent a share, and the others' shares were gathered: right only where all held the same.

    Here the dp ranks do not.
    """
    rows = [["residual", "bfloat16", [4, 8], "contiguous", "T/tp D @dp:1"],
            ["hidden", "float32", [2, 2], "contiguous", None]]
    assert (square.run("tensor_dict", ["dp"], rows, 0, 1)
            == square.run("tensor_dict", ["tp"], rows, 1, None) == [[]] * 4)


def test_two_members_on_two_hosts_get_no_nvlink() -> None:
    """A group of two was let through, wherever its members were."""
    nvlink = pytest.importorskip("shardlib.ops.nvlink").nvlink
    assert family(2, lambda place: nvlink(replace(place, device=torch.device("cuda", 0))),
                  hosts=(0, 1)) == ["members run on 2 hosts"] * 2


def test_an_embedding_begins_where_its_uneven_shard_begins() -> None:
    """rank * rows_of_this_rank is no start where the last shard is short."""
    rows_of = pytest.importorskip("shardlib.ops.take").rows_of
    mesh, table, ids = Mesh(tp=3), torch.arange(14.0).view(7, 2), torch.arange(7)
    shards = [mesh.extent(7, ("tp",), {"tp": c}) for c in range(3)]
    assert shards == [(0, 3), (3, 2), (5, 2)]
    site = IndexSite("embedding", "ids", "V", 7)
    assert torch.equal(sum(rows_of(ids, table[start:start + size], start, site) for start, size in shards),
                       table)
