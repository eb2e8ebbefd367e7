"""Shared memory beside what the conformance kit tries: many calls in a row, several rounds a call,
and peers that do not come."""
from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from conformance import DTYPES, REFUSED
from family import family
from torch import Tensor

from shardlib.distributed import segment
from shardlib.distributed.communicators import shared_memory as module
from shardlib.distributed.communicators.protocol import Call, Place
from shardlib.distributed.communicators.shared_memory import MOST, SharedMemory, shared_memory
from shardlib.distributed.rank_error import RankError
from shardlib.distributed.reduction import reduce_pieces

pytestmark = [pytest.mark.usefixtures("nothing_is_left"),
              pytest.mark.skipif(segment.unsupported() is not None, reason=str(segment.unsupported()))]


# -- many calls ----------------------------------------------------------------------------------------------

def drawn(seed: int, dtype: torch.dtype, n: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, (n,), generator=generator).bool()
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(n, generator=generator, dtype=torch.float64).to(dtype)
    return torch.randint(0, 100, (n,), generator=generator).to(dtype)


def attempt(made: SharedMemory, step: int, size: int, most: int) -> tuple[Tensor, Tensor]:
    """A random call, the same on all members: its result and the oracle's."""
    draw = random.Random(step)
    name, root = draw.choice(module.TAKES), draw.randrange(size)
    op, dtype = draw.choice(("sum", "max")), getattr(torch, draw.choice(DTYPES))
    if (op, str(dtype)[6:]) in REFUSED:
        dtype = torch.bfloat16
    counts = [draw.choice((0, 1, 7, draw.randrange(most))) for _ in range(size)]
    n = {"all_gather": 0, "reduce_scatter": sum(counts)}.get(name, counts[0])
    given = [drawn(step * 8 + m, dtype, counts[m] if name == "all_gather" else n) for m in range(size)]
    mine = given[made.me]
    if name == "all_reduce":
        return made.all_reduce(mine, op), reduce_pieces(given, op)
    if name == "all_gather":
        return made.all_gather(mine, counts), torch.cat(given)
    if name == "broadcast":
        return made.broadcast(mine, root), given[root]
    return made.reduce_scatter(mine, counts, op), reduce_pieces([x.split(counts)[made.me] for x in given], op)


def same(got: Tensor, want: Tensor) -> bool:
    return (got.dtype == want.dtype and got.shape == want.shape
            and torch.equal(got.view(torch.uint8), want.view(torch.uint8)))


def storm(place: Place, steps: int, most: int, slot: int) -> list[str]:
    """Steps one after another, with members that fall behind now and then;
    results must stay what they were."""
    module.SLOT, module.ONE_SHOT = slot, slot // 2
    made, moods, kept, wrong = shared_memory(place), random.Random(place.me), [], []
    for step in range(steps):
        if moods.random() < 0.01:
            time.sleep(moods.random() * 5e-3)
        kept = [*kept[-2:], (step, *attempt(made, step, place.size, most))]
        wrong += [f"step {step}, {then}" for then, got, want in kept if not same(got, want)]
    made.close()
    return wrong[:3]


@pytest.mark.parametrize("size, steps, most, slot", [(2, 6000, 600, 512 << 10), (2, 4000, 600, 512),
                                                     (3, 4000, 600, 640), (4, 4000, 600, 1024)])
def test_a_storm_of_calls(size: int, steps: int, most: int, slot: int) -> None:
    assert family(size, partial(storm, steps=steps, most=most, slot=slot)) == [[]] * size


def test_a_slot_filled_to_the_last_byte_is_not_handed_out() -> None:
    def body(place: Place) -> bool:
        made, x = shared_memory(place), torch.full((module.SLOT,), place.me, dtype=torch.uint8)
        results = [made.all_gather(x + i, (module.SLOT,) * 2) for i in range(4)]
        want = torch.cat([torch.full_like(x, m) for m in range(2)])
        return all(torch.equal(got, want + i) for i, got in enumerate(results))
    assert family(2, body) == [True, True]


# -- what it takes -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("call, text", [
    (Call("all_reduce", "sum", torch.float32, "cpu", MOST), None),
    (Call("all_reduce", "sum", torch.float32, "cpu", MOST + 1),
     "shared memory takes at most 67.1 MB, not 67.1 MB"),
    (Call("broadcast", None, torch.float32, "meta", 4), "shared memory takes tensors on cpu, not on meta"),
    (Call("send", None, torch.float32, "cpu", 4),
     "shared memory takes all_reduce, all_gather, reduce_scatter and broadcast, not send")])
def test_what_it_takes(call: Call, text: str | None) -> None:
    assert SharedMemory.supports(None, call) == text


# -- peers that do not come ----------------------------------------------------------------------------------

def said(call: Callable[[], object]) -> str:
    """The text of the RankError that the call ends with."""
    try:
        call()
    except RankError as error:
        return str(error)
    return "no error"


CALLS = {
    "all_reduce": lambda made: made.all_reduce(torch.ones(3), "sum"),
    "all_gather": lambda made: made.all_gather(torch.ones(3), (3,) * made.size),
    "reduce_scatter": lambda made: made.reduce_scatter(torch.ones(made.size), (1,) * made.size, "sum"),
    "broadcast": lambda made: made.broadcast(torch.ones(3), 1),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_member_that_does_not_come_in_time_is_named(name: str) -> None:
    def body(place: Place) -> list[str]:
        made = shared_memory(place)
        made.timeout_s = 0.2
        texts = [said(lambda: CALLS[name](made)) for _ in range(2)] if place.me == 0 else []
        place.share(None)
        return texts
    text = f"{name} over tp: rank 1 has not come within 0.2 s"
    assert family(2, body) == [[text, f"{name} over tp: not possible any more; {text}"], []]


def test_all_members_that_do_not_come_are_named() -> None:
    def body(place: Place) -> str:
        made = shared_memory(place)
        made.timeout_s = 0.2
        text = said(lambda: CALLS["all_reduce"](made)) if place.me == 1 else ""
        place.share(None)
        return text
    assert family(4, body) == ["", "all_reduce over tp: ranks 0, 2 and 3 have not come within 0.2 s", "", ""]


def test_a_broadcasting_root_waits_for_who_is_two_rounds_behind() -> None:
    def body(place: Place) -> str:
        made = shared_memory(place)
        made.timeout_s = 0.2
        text = said(lambda: [made.broadcast(torch.ones(3), 0) for _ in range(3)]) if place.me == 0 else ""
        place.share(None)
        return text
    assert family(2, body) == ["broadcast over tp: rank 1 has not come within 0.2 s", ""]


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("step", ["_begin", "_meet"])
def test_a_member_killed_in_a_call_is_named(name: str, step: str) -> None:
    def body(place: Place) -> str:
        made = shared_memory(place)
        CALLS["all_reduce"](made)
        if place.me == 1:
            setattr(made, step, die)
        return said(lambda: CALLS[name](made))
    text = f"{name} over tp: rank 1 has died or left"
    assert family(3, body) == [text, "killed", text]


def test_a_member_that_leaves_is_named_and_what_it_gave_is_there() -> None:
    def body(place: Place) -> Any:
        made = shared_memory(place)
        if place.me == 1:
            got = CALLS["broadcast"](made)
            made.close()
            return [got.tolist(), said(lambda: CALLS["broadcast"](made))]
        time.sleep(0.1)
        return [CALLS["broadcast"](made).tolist(), said(lambda: CALLS["broadcast"](made))]
    ones = [1.0] * 3
    assert family(2, body) == [[ones, "broadcast over tp: rank 1 has died or left"],
                               [ones, "broadcast over tp: not possible any more; the group was destroyed"]]


@pytest.mark.parametrize("name", module.TAKES)
def test_an_error_before_others_can_see_the_call_leaves_the_group_as_it_was(name: str) -> None:
    def body(place: Place) -> list[Any]:
        made, texts = shared_memory(place), []
        real, module.torch.Tensor.copy_ = module.torch.Tensor.copy_, lambda *_: 1 / 0
        if place.me == 0 or name != "broadcast":
            for _ in range(3):
                try:
                    CALLS[name](made) if name != "broadcast" else made.broadcast(torch.ones(3), 0)
                except ZeroDivisionError as error:
                    texts.append(str(error))
        module.torch.Tensor.copy_ = real
        return [len(texts),
                [made.all_reduce(torch.full((3,), 1.0 + place.me), "sum").tolist() for _ in range(3)]]
    assert family(2, body) == [[3, [[3.0] * 3] * 3], [3 * (name != "broadcast"), [[3.0] * 3] * 3]]


def test_after_an_error_that_comes_later_no_call_is_possible() -> None:
    def body(place: Place) -> str:
        made, real = shared_memory(place), module.reduce_pieces
        module.reduce_pieces = lambda *_: 1 / 0
        with pytest.raises(ZeroDivisionError):
            CALLS["all_reduce"](made)
        module.reduce_pieces = real
        return said(lambda: CALLS["all_gather"](made))
    assert family(2, body) == [
        "all_gather over tp: not possible any more; all_reduce over tp ended with ZeroDivisionError"] * 2


def test_after_an_interrupt_no_call_is_possible() -> None:
    def body(place: Place) -> str:
        made = shared_memory(place)
        if place.me == 0:
            signal.signal(signal.SIGALRM, signal.default_int_handler)
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            with pytest.raises(KeyboardInterrupt):
                CALLS["all_reduce"](made)
        text = said(lambda: CALLS["all_gather"](made)) if place.me == 0 else ""
        place.share(None)
        return text
    assert family(2, body) == [
        "all_gather over tp: not possible any more; all_reduce over tp ended with KeyboardInterrupt", ""]
