"""Calls beside each other: whose turn it is, on which stream what runs, and what waits for what."""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fake_cuda import Cuda

from shardlib import Layout, Mesh, einsum, lower, sharded
from shardlib.distributed.aside import Begins
from shardlib.distributed.communicators.alone import Alone
from shardlib.distributed.router import Router
from shardlib.language.exchanges import Early, arrived, carried_out
from shardlib.run.beside import asked, axes_of_sums, beside, largest_sum


class Fills(Alone):
    name, fills = "of many blocks", True


class Rounds(Alone):
    name, deterministic = "in no order", False


class Group(Begins):
    """Writes down what it is asked, by which communicators, and on which stream."""

    def __init__(self, log: list[str], cuda: Cuda | None = None, communicators: tuple = (Fills(), Rounds()),
                 deterministic: bool = False) -> None:
        self.name, self.log, self.cuda, self.communicators = "tp", log, cuda, communicators
        self.router = Router("tp", 2, communicators, deterministic=deterministic)
        self.device = torch.device(*(("cuda", 0) if cuda else ("cpu",)))

    def all_reduce(self, x: str, op: str, at: object) -> str:
        by = f" by {len(self.router.communicators)} on {self.cuda.now.name}" if self.cuda else f", {at}"
        self.log.append(f"{op} of {x}{by}")
        return f"{x}'"


def call(log: list[str], group: Any, name: str, count: int) -> Iterator[Any]:
    got = ""
    for i in range(count):
        log.append(f"{name}{i} has {got!r}")
        got = yield group, "all_reduce", f"{name}{i}", "sum"
    log.append(f"{name} ends with {got!r}")
    return name * 2


def test_calls_take_turns_and_the_longer_one_goes_on_alone() -> None:
    log: list[str] = []
    group = Group(log)
    assert beside(call(log, group, "a", 1), call(log, group, "b", 2)) == ["aa", "bb"]
    at = [f"call {i} of 2 beside each other" for i in (1, 2)]
    assert log == ["a0 has ''", f"sum of a0, {at[0]}", "b0 has ''", f"sum of b0, {at[1]}",
                   "a ends with \"a0'\"", "b1 has \"b0'\"", f"sum of b1, {at[1]}", "b ends with \"b1'\""]
    assert beside() == [] and beside(call(log, group, "c", 0)) == ["cc"]


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    made = Cuda(monkeypatch)
    monkeypatch.setattr("shardlib.distributed.aside.side_stream", lambda device: side)
    side = made.stream("side")
    return made


def test_what_travels_does_so_on_a_stream_of_its_own(cuda: Cuda) -> None:
    """It begins behind what has been computed so far, and is waited for in the next turn alone; communicators
    that fill the GPU have no part in it."""
    log = cuda.log
    group = Group(log, cuda)
    beside(*(call(log, group, name, 1) for name in "ab"))
    assert log == ["a0 has ''", "side waits for main", "sum of a0 by 1 on side",
                   "b0 has ''", "side waits for main", "sum of b0 by 1 on side",
                   "main waits for event 1", "a ends with \"a0'\"",
                   "main waits for event 2", "b ends with \"b0'\""]


@pytest.mark.parametrize("communicators, deterministic", [((Fills(),), False), ((Fills(), Rounds()), True)])
def test_a_group_without_another_communicator_runs_it_in_its_turn(cuda: Cuda, communicators: tuple,
                                                                  deterministic: bool) -> None:
    """Where sums are to be in rank order, one that adds up so."""
    log = cuda.log
    group = Group(log, cuda, communicators, deterministic)
    beside(call(log, group, "a", 1))
    assert log == ["a0 has ''", f"sum of a0 by {len(communicators)} on main", "a ends with \"a0'\""]


def one_early(log: list[str], group: Any) -> Iterator[Any]:
    coming = yield Early((group, "all_reduce", "a", "sum"))
    log.append("computes")
    got = yield group, "all_reduce", "b", "sum"
    return got, arrived(coming)


def test_an_early_request_travels_while_others_compute(cuda: Cuda) -> None:
    """Of one call, on a stream of its own, by the communicators that do not fill the GPU; by those that the
    group has then."""
    log, group = cuda.log, Group(cuda.log, cuda)
    assert carried_out(one_early(log, group), at="here") == ("b'", "a'")
    assert log == ["side waits for main", "sum of a by 1 on side", "computes", "sum of b by 2 on main",
                   "main waits for event 1"]
    group.communicators, group.router = (Fills(),), Router("tp", 2, (Fills(),))
    log.clear()
    assert carried_out(one_early(log, group), at="here") == ("b'", "a'")
    assert log == ["sum of a by 1 on main", "computes", "sum of b by 1 on main"]


def test_what_is_early_is_done_at_once_on_the_cpu() -> None:
    log: list[str] = []
    group = Group(log)
    assert carried_out(one_early(log, group), at="here") == ("b'", "a'")
    assert log == ["sum of a, here", "computes", "sum of b, here"]


def test_the_largest_sum() -> None:
    @sharded("B F, F D -> B D")
    def f(x, w):
        return einsum("B F, F D -> B D", x, w)
    sizes, here = dict(B=3, F=8, D=5), dict(tp=1)
    assert largest_sum(lower(f, Layout(F="tp"), mesh=Mesh(tp=2)), Mesh(tp=2), sizes, here) == 15
    assert largest_sum(lower(f, Layout(F="tp"), mesh=Mesh(tp=1)), Mesh(tp=1), sizes, dict(tp=0)) == 0
    assert largest_sum(lower(f, Layout(D="tp"), mesh=Mesh(tp=2)), Mesh(tp=2), sizes, here) == 0


def test_what_is_asked() -> None:
    @sharded("B F, F D -> B D")
    def f(x, w):
        return einsum("B F, F D -> B D", x, w)

    @sharded("B F, F D, D F -> B F")
    def g(x, w, v):
        return einsum("B D, D F -> B F", f(x, w), v)
    mesh = Mesh(tp=2, dp=2)
    one = lower(f, Layout(F="tp"), mesh=mesh)
    two = lower(g, Layout(D="dp", F="tp"), mesh=mesh)
    assert asked(one, mesh) == [("all_reduce", "tp", "")] and axes_of_sums(one, mesh) == ("tp",)
    assert asked(two, mesh) == [("all_reduce", "tp", ""), ("all_reduce", "dp", "")]
    assert axes_of_sums(two, mesh) == ()
