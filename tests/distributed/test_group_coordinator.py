"""What a GroupCoordinator says of itself, its messages and its refusals, on real ranks."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from asking import Asked
from pool import Pool, World
from torch import Tensor

from shardlib.distributed import GroupCoordinator, connect
from shardlib.distributed.communicators.alone import Alone
from shardlib.distributed.communicators.protocol import Call
from shardlib.errors import SpecError
from shardlib.mesh import Mesh


@pytest.fixture(scope="module")
def pair(pool: Pool) -> World:
    return pool.connect("tp=2", [("tp",)], 2)


@pytest.fixture(scope="module")
def square(pool: Pool) -> World:
    return pool.connect("dp=2,tp=2,ep=dp/tp", [("tp",), ("dp", "tp"), ("tp", "dp"), ("ep",)], 4)


def test_places_on_a_permuted_product(square: World) -> None:
    places = square.run("places", ["tp", "dp"])
    assert places[1] == {"name": "tp/dp", "rank": 1, "ranks": [0, 2, 1, 3], "world_size": 4, "local_rank": 1,
                         "rank_in_group": 2, "first_rank": 0, "last_rank": 3, "is_first_rank": False,
                         "is_last_rank": False, "next_rank": 3, "prev_rank": 2}
    assert [p["rank_in_group"] for p in places] == [0, 2, 1, 3]
    assert [(p["prev_rank"], p["next_rank"]) for p in places] == [(3, 2), (2, 3), (0, 1), (1, 0)]
    assert [p["is_first_rank"] for p in places] == [True, False, False, False]
    assert [p["is_last_rank"] for p in places] == [False, False, False, True]


def test_an_alias_is_its_axes(square: World) -> None:
    assert square.run("places", ["ep"]) == square.run("places", ["dp", "tp"])


def test_orders_share_process_groups_and_control_has_its_own(square: World) -> None:
    assert square.run("shared_groups") == [[True, True, False]] * 4


def test_messages(square: World) -> None:
    for axes in (["tp"], ["tp", "dp"]):
        assert square.run("messages", axes) == [[
            {"step": 3, "names": ["a", "b"], "x": [1.5, None, True]}, 100_000, True, ["dp", "tp"], None,
            "a message holds plain data only: Encoding objects of type type is unsupported", [1, 2]]] * 4


def test_nobody_leaves_a_barrier_early(pair: World) -> None:
    assert pair.run("barrier", ["tp"]) == [True, True]


MISUSE = [
    "a reduction is \"sum\" or \"max\", not 'mean'",
    "sum of bool over ranks: not defined; convert it to another dtype first",
    "all_gather over tp: sizes has length 1; the group has 2 members",
    "all_gather over tp: dim 0 of member {me} has 3; sizes (4, 4) say 4",
    "all_gather over tp: no dim 2 in a tensor of 2 dims",
    "reduce_scatter over tp: sizes (1, 1) add up to 2; dim 0 has 3",
    "all_to_all over tp: pieces has length 1; the group has 2 members",
    "all_to_all over tp: pieces of several dtypes; convert them to one",
    "broadcast over tp: no member 2 in a group of 2",
    ("all_reduce over tp: shared memory takes tensors on cpu, not on meta; torch.distributed (gloo) takes "
     "tensors on cpu, not on meta"),
    "reduce_scatter over tp: sizes (4, -1) along dim 0 are not all whole numbers of 0 or more",
    "all_gather over tp: sizes (3.0, 3.0) along dim 0 are not all whole numbers of 0 or more",
    "gather over tp: sizes (3, 3) along dim 1.0 are not all whole numbers of 0 or more",
    "all_to_all over tp: the sizes of shape (-3, -2) are not all whole numbers of 0 or more",
    "all_to_all over tp: the sizes of shape (3, 2.0) are not all whole numbers of 0 or more",
    "all_to_all over tp: member {me} keeps its piece of 6 elements; shape (5,) has 5",
    "recv over tp: the sizes of shape (-1,) are not all whole numbers of 0 or more",
    "broadcast over tp: no member 1.0 in a group of 2",
    "all_reduce over tp: the tensor is sparse_coo; make a dense tensor of it first",
    "broadcast over tp: the tensor is sparse_csr; make a dense tensor of it first",
    "all_reduce over tp: the tensor is jagged; make a dense tensor of it first",
    "all_to_all over tp: the tensor is nested; make a dense tensor of it first",
    "all_gather over tp: the tensor is quantized; make a dense tensor of it first",
]


def test_misuse_is_refused_before_anything_is_sent(pair: World) -> None:
    assert pair.run("misuse", ["tp"]) == [[text.format(me=me) for text in MISUSE] for me in range(2)]
    assert pair.run("barrier", ["tp"]) == [True, True]


def test_sizes_may_be_integers_of_numpy(pair: World) -> None:
    for me, answer in enumerate(pair.run("numpy_sizes", ["tp"])):
        mine = [[1.0, 3.0], [5.0, 7.0]][me]
        assert (answer
                == [[[0.0, 1.0, 1.0, 2.0], mine, [[2.0 * me, 2.0 * me + 1], [2.0 * me + 1, 2.0 * me + 2]],
                     [1.0, 2.0, 3.0, 4.0]]] * 3)


def test_a_group_of_one_keeps_the_shape_of_its_piece() -> None:
    group = GroupCoordinator("tp", (0,), 0, 0, torch.device("cpu"), (Alone(),), Alone())
    with pytest.raises(SpecError) as refused:
        group.all_to_all([torch.ones(4)], [(5,)])
    assert str(refused.value) == (
        "all_to_all over tp: member 0 keeps its piece of 4 elements; shape (5,) has 5")
    assert group.all_to_all([torch.ones(4)], [(2, 2)])[0].shape == (2, 2)


class Picky(Alone):
    """Takes small calls only."""

    name = "picky"

    def supports(self, call: Call) -> str | None:
        return None if call.nbytes <= 8 else f"picky takes at most 8 bytes, not {call.nbytes}"


def test_the_first_communicator_that_takes_a_call_gets_it() -> None:
    group = GroupCoordinator("tp", (0,), 0, 0, torch.device("cpu"), (Picky(), Alone()), Alone())
    assert [group.route("all_reduce", torch.ones(n), "sum").name for n in (2, 3)] == ["picky", "alone"]


class Shy(Alone):
    """Takes nothing."""

    name = "shy"

    def supports(self, call: Call) -> str | None:
        return "shy takes nothing"


def test_a_refusal_lists_every_reason_once() -> None:
    group = GroupCoordinator("tp", (0,), 0, 0, torch.device("cpu"), (Picky(), Shy(), Picky()), Alone())
    with pytest.raises(SpecError) as refused:
        group.all_reduce(torch.ones(3))
    assert str(refused.value) == "all_reduce over tp: picky takes at most 8 bytes, not 12; shy takes nothing"


def asked(me: int, collective: Callable[[GroupCoordinator], object]) -> Call:
    """What the members' communicators are asked, by member `me` of two."""
    noted = Asked()
    group = GroupCoordinator("tp", (0, 1), me, 0, torch.device("cpu"), (noted,), Alone())
    with pytest.raises(SpecError, match=r"^\w+ over tp: noted$"):
        collective(group)
    return noted.calls[0]


def of_rows(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.int16)


CALLS: list[tuple[Callable[[GroupCoordinator, int], object], str, str | None, int, bool]] = [
    (lambda g, n: g.all_gather(of_rows(n, 4), 0, (3, 2)), "all_gather", None, 40, False),
    (lambda g, n: g.all_gather(of_rows(4, n), 1, (3, 2)), "all_gather", None, 40, False),
    (lambda g, n: g.all_gather(of_rows(3, 4), 0, (3, 3)), "all_gather", None, 48, True),
    (lambda g, n: g.gather(of_rows(n, 4), 1, 0, (3, 2)), "gather", None, 40, False),
    (lambda g, n: g.gather(of_rows(3, 4), 1, 0, (3, 3)), "gather", None, 48, True),
    (lambda g, n: g.reduce_scatter(of_rows(5, 4), 0, (3, 2), "max"), "reduce_scatter", "max", 40, False),
    (lambda g, n: g.reduce_scatter(of_rows(4, 6), 1, (3, 3)), "reduce_scatter", "sum", 48, True),
    (lambda g, n: g.all_to_all([of_rows(3, 4) if n == 3 else of_rows(1, 4), of_rows(2, 4)],
                               [(n, 4), (1 if n == 3 else 2, 4)]), "all_to_all", None, -1, False),
    (lambda g, n: g.all_to_all([of_rows(3, 4)] * 2, [(3, 4)] * 2), "all_to_all", None, -1, False),
    (lambda g, n: g.all_to_all([of_rows(3, 4)] * 2, [(3, 4)] * 2, True), "all_to_all", None, 48, True),
    (lambda g, n: g.all_reduce(of_rows(5, 4), "max"), "all_reduce", "max", 40, True),
    (lambda g, n: g.all_reduce(of_rows(5, 4)), "all_reduce", "sum", 40, True),
    (lambda g, n: g.broadcast(of_rows(5, 4), 1), "broadcast", None, 40, True),
    (lambda g, n: g.send(of_rows(5, 4), 1) if n == 3 else g.recv((5, 4), torch.int16, 0), "send", None, 40,
     True)]
"""A collective by the member with n = 3 rows, and by that with 2; and what its communicators must be asked:
name, op, bytes, even."""


@pytest.mark.parametrize("collective, name, op, nbytes, even", CALLS)
def test_all_members_ask_their_communicators_the_same(collective: Any, name: str, op: str | None, nbytes: int,
                                                      even: bool) -> None:
    """Whatever their own pieces: members that choose different communicators would wait for each other."""
    assert [asked(me, lambda group: collective(group, 3 - me))
            for me in (0, 1)] == [Call(name, op, torch.int16, "cpu", nbytes, even, False)] * 2


def test_nobody_sends_to_itself() -> None:
    with connect(Mesh(), device="cpu") as runtime:
        group = runtime.group(())
        with pytest.raises(SpecError, match="^send: a group of one has nobody to send to$"):
            group.send(torch.ones(1), 0)
        with pytest.raises(SpecError, match="^recv: a group of one has nobody to receive from$"):
            group.recv((1,), torch.float32, 0)


def test_explain_names_the_communicator_and_its_measured_time(pair: World) -> None:
    assert (pair.run("explained")
            == [[[["all_reduce", "shared memory", 7.0, "all_reduce of 40 B: measured: shared memory 7 µs"]],
                 "measured on a machine, 2026-01-01"]] * 2)


def test_messages_from_member_to_member(pair: World, square: World) -> None:
    cannot = "a message holds plain data only: Encoding objects of type type is unsupported"
    other = "message: Expected `object`, got `array`"
    for world, axes, name in ((pair, ["tp"], "tp"), (square, ["dp", "tp"], "dp/tp")):
        n = world.size
        assert world.run("passed_on", axes) == [[
            {"from": (me - 1) % n}, 50_000, (me - 1) % n, cannot if me < 2 else "",
            other if me == 1 else None,
            f"send_message over {name}: member {me} is the one that calls; it has what it would send",
            f"recv_message over {name}: no member {n} in a group of {n}"] for me in range(n)]
