"""Calls beside each other: whose turn it is, on which stream what runs, and what waits for what."""
from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_cuda import Cuda

from shardlib import Layout, Mesh, einsum, lower, sharded
from shardlib.distributed.aside import Begins
from shardlib.distributed.communicators.alone import Alone
from shardlib.distributed.router import Router
from shardlib.language.exchanges import Early, arrived, carried_out
from shardlib.run import beside as module
from shardlib.run.beside import asked, axes_of_sums, beside, largest_sum


class Fills(Alone):
    name, fills = "of many blocks", True


class Rounds(Alone):
    name, deterministic = "in no order", False


class Group:
    """Writes down what it is asked, by which communicators, and on which stream."""

    def __init__(self, log: list[str], cuda: Cuda | None = None, communicators: tuple = (Fills(), Rounds()),
                 deterministic: bool = False) -> None:
        self.name, self.log, self.cuda, self.communicators = "tp", log, cuda, communicators
        self.router = Router("tp", 2, communicators, deterministic=deterministic)

    def all_reduce(self, x: str, op: str, at: object) -> str:
        by = f" by {len(self.router.communicators)} on {self.cuda.now.name}" if self.cuda else f", {at}"
        self.log.append(f"{op} of {x}{by}")
        return f"{x}'"


    def reduce_scatter(self, x: str, dim: int, sizes: tuple, op: str, at: object) -> str:
        return self.all_reduce(f"rows of {x}", op, at)


def call(log: list[str], group: Any, name: str, count: int) -> Iterator[Any]:
    got = ""
    for i in range(count):
        log.append(f"{name}{i} has {got!r}")
        got = yield group, "all_reduce", f"{name}{i}", "sum"
    log.append(f"{name} ends with {got!r}")
    return name * 2


def test_calls_take_turns_and_the_longer_one_goes_on_alone() -> None:
    log: list[str] = []
    group, runtime = Group(log), SimpleNamespace(device=torch.device("cpu"))
    assert beside(runtime, call(log, group, "a", 1), call(log, group, "b", 2)) == ["aa", "bb"]
    at = [f"call {i} of 2 beside each other" for i in (1, 2)]
    assert log == ["a0 has ''", f"sum of a0, {at[0]}", "b0 has ''", f"sum of b0, {at[1]}",
                   "a ends with \"a0'\"", "b1 has \"b0'\"", f"sum of b1, {at[1]}", "b ends with \"b1'\""]
    assert beside(runtime) == [] and beside(runtime, call(log, group, "c", 0)) == ["cc"]


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    made = Cuda(monkeypatch)
    monkeypatch.setattr(module, "side_stream", lambda device: side)
    side = made.stream("side")
    return made


def test_what_travels_does_so_on_a_stream_of_its_own(cuda: Cuda) -> None:
    """It begins behind what has been computed so far, and is waited for in the next turn alone; communicators
    that fill the GPU have no part in it."""
    log = cuda.log
    group = Group(log, cuda)
    beside(SimpleNamespace(device=torch.device("cuda", 0)), *(call(log, group, name, 1) for name in "ab"))
    assert log == ["a0 has ''", "side waits for main", "sum of a0 by 1 on side",
                   "b0 has ''", "side waits for main", "sum of b0 by 1 on side",
                   "main waits for event 1", "a ends with \"a0'\"",
                   "main waits for event 2", "b ends with \"b0'\""]


def test_what_follows_a_reduce_scatter_goes_along(cuda: Cuda) -> None:
    """Up to the next collective, or to the end, or to one that only goes in turn."""
    log, here = cuda.log, SimpleNamespace(device=torch.device("cuda", 0))
    group, other = Group(log, cuda), Group(log, cuda, (Fills(),))
    other.name = "pp"

    def call(asked: Any) -> Iterator[Any]:
        got = yield group, "reduce_scatter", "x", 0, (1, 1), "sum"
        log.append(f"norm on {cuda.now.name}")
        if asked:
            got = yield asked, "all_reduce", got, "sum"
            log.append(f"{got!r} on {cuda.now.name}")
    begins = ["side waits for main", "sum of rows of x by 1 on side", "norm on side"]
    sums, ends = "sum of rows of x' by 1 on", "\"rows of x''\" on main"
    beside(here, call(group))
    assert log == [*begins, f"{sums} side", "main waits for event 1", ends]
    log.clear()
    beside(here, call(None))
    assert log == [*begins, "main waits for side"]
    log.clear()
    beside(here, call(other))
    assert log == [*begins, "main waits for side", f"{sums} main", ends]


@pytest.mark.parametrize("communicators, deterministic", [((Fills(),), False), ((Fills(), Rounds()), True)])
def test_a_group_without_another_communicator_runs_it_in_its_turn(cuda: Cuda, communicators: tuple,
                                                                  deterministic: bool) -> None:
    """Where sums are to be in rank order, one that adds up so."""
    log, here = cuda.log, SimpleNamespace(device=torch.device("cuda", 0))
    group = Group(log, cuda, communicators, deterministic)
    beside(here, call(log, group, "a", 1))
    assert log == ["a0 has ''", f"sum of a0 by {len(communicators)} on main", "a ends with \"a0'\""]


class Begun(Group, Begins):
    def __init__(self, device: torch.device, *args: Any) -> None:
        super().__init__(*args)
        self.device = device


def one_early(log: list[str], group: Any) -> Iterator[Any]:
    coming = yield Early((group, "all_reduce", "a", "sum"))
    log.append("computes")
    got = yield group, "all_reduce", "b", "sum"
    return got, arrived(coming)


def test_an_early_request_travels_while_others_compute(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one call, on a stream of its own, by the communicators that do not fill the GPU; by those that the
    group has then."""
    monkeypatch.setattr("shardlib.distributed.aside.side_stream", module.side_stream)
    log, group = cuda.log, Begun(torch.device("cuda", 0), cuda.log, cuda)
    assert carried_out(one_early(log, group), at="here") == ("b'", "a'")
    assert log == ["side waits for main", "sum of a by 1 on side", "computes", "sum of b by 2 on main",
                   "main waits for event 1"]
    group.communicators, group.router = (Fills(),), Router("tp", 2, (Fills(),))
    log.clear()
    assert carried_out(one_early(log, group), at="here") == ("b'", "a'")
    assert log == ["sum of a by 1 on main", "computes", "sum of b by 1 on main"]


def test_what_is_early_is_done_at_once_on_the_cpu() -> None:
    log: list[str] = []
    group = Begun(torch.device("cpu"), log)
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
