"""Groups are made by their members alone: in whatever order, and again in runtimes that come and go."""
from __future__ import annotations

from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pool import Pool

from shardlib.distributed import process_groups
from shardlib.distributed.process_groups import ProcessGroups
from shardlib.distributed.runtime import Runtime
from shardlib.mesh import Mesh

DP, TP, BOTH = ["dp"], ["tp"], ["dp", "tp"]


def test_ranks_make_their_groups_in_different_orders(pool: Pool) -> None:
    """Ranks 0 and 1 begin with tp, which is theirs alone; the others wait for them in dp."""
    world = pool.connect("dp=2,tp=2", [], 4)
    orders = [[TP, DP, BOTH]] * 2 + [[DP, TP, BOTH]] * 2
    assert world.run("groups_in_turn", orders) == [[1, 2, 6], [1, 4, 6], [2, 5, 6], [4, 5, 6]]


def test_ranks_that_make_no_group_are_not_waited_for(pool: Pool) -> None:
    world = pool.connect("dp=2,tp=2", [], 4)
    assert world.run("groups_in_turn", [[TP], [TP], [], []]) == [[1], [1], [], []]
    assert world.run("groups_in_turn", [[], [], [TP], [TP]]) == [[], [], [5], [5]]


def test_groups_are_made_again_where_runtimes_come_and_go(pool: Pool) -> None:
    """No group reads what an earlier one of the same ranks has left in the store."""
    world = pool.connect("dp=2,tp=2", [], 4)
    sums = [[1, 2], [1, 4], [2, 5], [4, 5]]
    found = world.run("groups_again", [[TP, DP]] * 2 + [[DP, TP]] * 2)
    pool.joined = None
    assert found == [[mine] * 5 + [False, False] for mine in sums]


Group = tuple[str, tuple[int, ...]]


def made(monkeypatch: pytest.MonkeyPatch, mesh: Mesh, rank: int, bound: Any = None) -> list[Group]:
    """Each process group that `rank` makes, and its members, where its runtime makes those over tp and dp."""
    calls: list[Group] = []
    monkeypatch.setattr(process_groups.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(process_groups.dist, "get_rank", lambda: rank)
    monkeypatch.setattr(process_groups.distributed_c10d, "_get_default_group",
                        lambda: SimpleNamespace(bound_device_id=bound))
    monkeypatch.setattr(process_groups, "_among", lambda ranks, *how: calls.append((how[2], ranks)))
    monkeypatch.setattr(process_groups.dist, "new_group",
                        lambda ranks, *how, **more: calls.append((f"split {how[1]}", tuple(ranks))))
    groups = ProcessGroups(torch.device("cuda", 0), timedelta(seconds=1), 1)
    runtime = SimpleNamespace(mesh=mesh, rank=rank, _process_groups=groups, group=lambda axes: None)
    Runtime._create_groups(runtime, [("tp",), ("dp",)])
    return calls


@pytest.mark.parametrize("dp", [2, 16, 256, 1024])
def test_a_rank_makes_its_own_groups_however_many_there_are(dp: int, monkeypatch: pytest.MonkeyPatch) -> None:
    across, tp = tuple(range(11, 64 * dp, 64)), tuple(range(8, 16))
    assert made(monkeypatch, Mesh(dp=dp, cp=8, tp=8), 11) == [
        (backend, ranks) for ranks in (tp, across) for backend in ("nccl", "gloo")]


def test_where_groups_are_split_off_a_bound_one_every_rank_makes_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """ncclCommSplit is a call of all ranks of what is split; groups of gloo are their members' own."""
    found = made(monkeypatch, Mesh(dp=2, tp=2), 0, bound=torch.device("cuda", 0))
    assert found == [("split nccl", (0, 1)), ("gloo", (0, 1)), ("split nccl", (0, 2)), ("gloo", (0, 2)),
                     ("split nccl", (1, 3)), ("split nccl", (2, 3))]


def test_a_channel_is_a_group_of_its_two_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each direction one, by the name of who posts; made once."""
    calls: list[tuple[object, ...]] = []
    monkeypatch.setattr(process_groups, "_among", lambda ranks, name, timeout, backend, device: calls.append(
        (ranks, name, timeout, backend, device)) or len(calls))
    groups = ProcessGroups(torch.device("cpu"), timedelta(seconds=9), 7)
    digest = process_groups._digest((1, 3))
    there, back, other = groups.channel("x", (3, 1)), groups.channel("x", (1, 3)), groups.channel("y", (3, 1))
    assert (there, back, other) == (1, 2, 3) and groups.channel("x", (3, 1)) == there and len(calls) == 3
    assert calls == [((1, 3), f"shardlib/7/channel {name} {digest}", timedelta(seconds=9), "gloo", None)
                     for name in ("x 3", "x 1", "y 3")]
    on_gpu = ProcessGroups(torch.device("cuda", 1), timedelta(seconds=9), 8)
    on_gpu.channel("x", (3, 1))
    assert calls[3] == ((1, 3), f"shardlib/8/channel x 3 {digest}", timedelta(seconds=9), "nccl",
                        torch.device("cuda", 1))


def test_torch_still_makes_a_group_under_a_name_that_it_is_given() -> None:
    """`_among` relies on a function of torch that is not public."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        group = process_groups._among((0,), "ours", timedelta(seconds=5), "gloo", None)
        dist.all_reduce(x := torch.ones(2), group=group)
        assert (group.group_name, dist.get_process_group_ranks(group), x.tolist()) == ("ours", [0], [1, 1])
        dist.destroy_process_group(group)
    finally:
        dist.destroy_process_group()
