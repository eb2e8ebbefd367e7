"""The protocols between GPUs under every order of turns that a seed brings: sums and exchanges right to the bit, in memory as weak as a GPU's.

Each protocol has its negative controls: the same with one thing left out, which must go wrong on some of the seeds on which the
protocol itself does not. A control that passes would mean that the simulator no longer sees what it is there to see.
"""
from __future__ import annotations

import random
from dataclasses import replace
from typing import Any, Callable, Sequence

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings, strategies as st

from shardlib.triton_kernels import all_reduce, exchange, lamport, reduce_scatter
from shardlib.triton_kernels.lamport import EMPTY, SLOTS
from shardlib.triton_kernels.quads import pack, unpack_high, unpack_low
from shardlib.triton_kernels.simulator import Deadlock, Simulation
from shardlib.triton_kernels.workspace import Workspace
from trials import DTYPES, FAMILIES, GUARD, UNTOUCHED, Call, data, random_calls, workspaces, wrong

SEEDS = range(8)
pytestmark = pytest.mark.usefixtures("one_thread")
a_few = settings(max_examples=settings.default.max_examples // 8, derandomize=True, database=None)


def simulate(family: str, calls: Sequence[Call], world: int, seed: int, slots: int = 1, **rules: Any) -> str | None:
    """All ranks make the calls; what went wrong. slots: 0 puts all slots of an arena in one place."""
    xs, slot_bytes = data(calls, world, seed), max(call.slot_bytes(family, world) for call in calls)
    spaces = [replace(space, slot_bytes=slots * slot_bytes) for space in workspaces(family, world, slot_bytes)]

    def rank(r: int) -> Callable[[], list[torch.Tensor]]:
        return lambda: [call.run(family, x[r], spaces[r]) for call, x in zip(calls, xs)]
    try:
        got = Simulation(seed, **rules).run([rank(r) for r in range(world)])
    except Deadlock as deadlock:
        return str(deadlock)
    if any((space.arena[-GUARD:] != UNTOUCHED).any() for space in spaces):
        return "written behind an arena"
    return wrong(family, calls, xs, got)


def some_calls(family: str) -> st.SearchStrategy[list[Call]]:
    call = st.builds(Call, st.sampled_from(FAMILIES[family]), st.sampled_from(DTYPES), st.integers(1, 3), st.integers(1, 40), st.integers(1, 3),
                     st.integers(1, 2))
    return st.lists(call, min_size=2, max_size=4)


seeds, worlds, residents = st.integers(0, 2**32 - 1), st.integers(2, 4), st.sampled_from((None, None, 1, 2))


@a_few
@given(seeds, worlds, residents, some_calls("sums"))
def test_sums(seed: int, world: int, resident: int | None, calls: list[Call]) -> None:
    """one_shot, two_shot and reduce_scatter of any sizes and grids, in turns on one workspace."""
    assert simulate("sums", calls, world, seed, resident=resident) is None


@a_few
@given(seeds, worlds, residents, some_calls("chunks"))
def test_chunks(seed: int, world: int, resident: int | None, calls: list[Call]) -> None:
    assert simulate("chunks", calls, world, seed, resident=resident) is None


@a_few
@given(seeds, worlds, residents, some_calls("packets"))
def test_packets(seed: int, world: int, resident: int | None, calls: list[Call]) -> None:
    assert simulate("packets", calls, world, seed, resident=resident) is None


# -- negative controls -------------------------------------------------------------------------------------------------

Rules = dict[str, Any]
Patch = pytest.MonkeyPatch
SUMS = (all_reduce, reduce_scatter)


def in_sums(patch: Patch, name: str, value: Any) -> Rules:
    for module in SUMS:
        patch.setattr(module, name, value)
    return {}


def two_slots(patch: Patch) -> Rules:
    patch.setattr(lamport, "SLOTS", tl.constexpr(2))
    return {}


def slots_in_one_place(patch: Patch) -> Rules:
    patch.setattr(Workspace, "check", lambda workspace, nbytes: None, raising=False)
    return {"slots": 0}


def kernels_without_an_end(patch: Patch) -> Rules:
    """The stores of a kernel are not performed when the next one starts, as if it were launched early."""
    return {"boundary": False}


@triton.jit
def _clears_nothing(slot_address, start, stop, BLOCK: tl.constexpr, INTERPRET: tl.constexpr):
    pass


def nothing_is_cleared(patch: Patch) -> Rules:
    return in_sums(patch, "clear", _clears_nothing)


@triton.jit
def _enters_for_half(state_ptr):
    slot = tl.load(state_ptr)
    previous = (slot + SLOTS - 1) % SLOTS
    return slot, previous, tl.load(state_ptr + 2 + previous) // 2


def half_is_cleared(patch: Patch) -> Rules:
    """As if the size of the call before were not the device's own memory."""
    return in_sums(patch, "enter", _enters_for_half)


@triton.jit
def _the_word(word):
    return word


def empty_is_sent(patch: Patch) -> Rules:
    return in_sums(patch, "without_empty", _the_word)


@triton.jit
def _leaves_nothing(slot, state_ptr, quads):
    pass


def calls_are_not_counted(patch: Patch) -> Rules:
    patch.setattr(exchange, "count_call", _counts_nothing)
    return in_sums(patch, "leave", _leaves_nothing)


@triton.jit
def _leaves_at_the_first_block(slot, state_ptr, quads):
    tl.debug_barrier()
    if tl.atomic_add(state_ptr + 1, 1, sem="acq_rel", scope="gpu") == 0:
        tl.store(state_ptr + 2 + slot, quads)
        tl.store(state_ptr, (slot + 1) % SLOTS)
    if tl.atomic_add(state_ptr + 1, 0, sem="acq_rel", scope="gpu") == tl.num_programs(0):
        tl.store(state_ptr + 1, 0)


def the_first_block_counts_the_call(patch: Patch) -> Rules:
    """Blocks that start later take the number of the next call."""
    patch.setattr(exchange, "count_call", _counts_at_the_first_block)
    in_sums(patch, "leave", _leaves_at_the_first_block)
    return {"resident": 1}


@triton.jit
def _receives_by_one_word(address, stride, N: tl.constexpr, SPIN: tl.constexpr, CONSTRAINTS: tl.constexpr, WORDS: tl.constexpr,
                          INTERPRET: tl.constexpr):
    words = ()
    for i in tl.static_range(N):
        p = (address + i * stride).to(tl.pointer_type(tl.int32))
        first = tl.load(p, volatile=True)
        while tl.max((first == EMPTY).to(tl.int32)) > 0:
            first = tl.load(p, volatile=True)
        words = words + (first, tl.load(p + 1, volatile=True), tl.load(p + 2, volatile=True), tl.load(p + 3, volatile=True))
    return words


def one_word_of_four_is_polled(patch: Patch) -> Rules:
    return in_sums(patch, "receive", _receives_by_one_word)


@triton.jit
def _adds_own_first(words, own, J: tl.constexpr, RANK: tl.constexpr, W: tl.constexpr, KIND: tl.constexpr, INTERPRET: tl.constexpr):
    low = unpack_low(own[J], KIND)
    for r in tl.static_range(W - 1):
        low += unpack_low(words[4 * r + J], KIND)
    high = low
    if KIND != "fp32":
        high = unpack_high(own[J], KIND)
        for r in tl.static_range(W - 1):
            high += unpack_high(words[4 * r + J], KIND)
    return pack(low, high, KIND, INTERPRET)


def own_is_added_first(patch: Patch) -> Rules:
    """Sums in another order on every rank: they round differently."""
    return in_sums(patch, "add_up", _adds_own_first)


@triton.jit
def _raises_without_a_barrier(flags_ptr, value, RANK: tl.constexpr, W: tl.constexpr, P: tl.constexpr):
    r = tl.arange(0, P)
    there = tl.load(flags_ptr + r, mask=r < W, other=0)
    flag = (there + (tl.program_id(0) * W + RANK) * 8).to(tl.pointer_type(tl.int64))
    tl.atomic_xchg(flag, value, mask=r < W, sem="release", scope="sys")


def flags_without_a_barrier(patch: Patch) -> Rules:
    patch.setattr(exchange, "raise_flags", _raises_without_a_barrier)
    return {}


@triton.jit
def _raises_relaxed(flags_ptr, value, RANK: tl.constexpr, W: tl.constexpr, P: tl.constexpr):
    r = tl.arange(0, P)
    there = tl.load(flags_ptr + r, mask=r < W, other=0)
    flag = (there + (tl.program_id(0) * W + RANK) * 8).to(tl.pointer_type(tl.int64))
    tl.debug_barrier()
    tl.atomic_xchg(flag, value, mask=r < W, sem="relaxed", scope="sys")


def relaxed_flags(patch: Patch) -> Rules:
    patch.setattr(exchange, "raise_flags", _raises_relaxed)
    return {}


@triton.jit
def _awaits_without_acquire(flags_ptr, value, RANK: tl.constexpr, W: tl.constexpr, P: tl.constexpr):
    r = tl.arange(0, P)
    flag = (tl.load(flags_ptr + RANK) + (tl.program_id(0) * W + r) * 8).to(tl.pointer_type(tl.int64))
    while tl.min(tl.load(flag, mask=r < W, other=value, volatile=True)) < value:
        pass
    tl.debug_barrier()


def flags_without_acquire(patch: Patch) -> Rules:
    patch.setattr(exchange, "await_flags", _awaits_without_acquire)
    return {}


@triton.jit
def _awaits_without_a_barrier(flags_ptr, value, RANK: tl.constexpr, W: tl.constexpr, P: tl.constexpr):
    r = tl.arange(0, P)
    flag = (tl.load(flags_ptr + RANK) + (tl.program_id(0) * W + r) * 8).to(tl.pointer_type(tl.int64))
    while tl.min(tl.load(flag, mask=r < W, other=value, volatile=True)) < value:
        pass
    tl.atomic_add(flag, 0, mask=r < W, sem="acquire", scope="sys")


def acquire_without_a_barrier(patch: Patch) -> Rules:
    """The threads that do not poll may load early."""
    patch.setattr(exchange, "await_flags", _awaits_without_a_barrier)
    return {}


def one_number_for_two_calls(patch: Patch) -> Rules:
    """The second chunk of a call has the number of the first of the next."""
    patch.setattr(exchange, "CHUNKS", tl.constexpr(1))
    return {}


@triton.jit
def _counts_nothing(call, state_ptr):
    pass


@triton.jit
def _counts_at_the_first_block(call, state_ptr):
    tl.debug_barrier()
    if tl.atomic_add(state_ptr + 1, 1, sem="acq_rel", scope="gpu") == 0:
        tl.store(state_ptr, call + 1)
    if tl.atomic_add(state_ptr + 1, 0, sem="acq_rel", scope="gpu") == tl.num_programs(0):
        tl.store(state_ptr + 1, 0)


@triton.jit
def _pushes_words(address, a, b, c, d, flag, INTERPRET: tl.constexpr):
    p = address.to(tl.pointer_type(tl.int32))
    for i in tl.static_range(4):
        tl.store(p + 2 * i, (a, b, c, d)[i])
        tl.store(p + 2 * i + 1, flag)


def data_apart_from_its_flag(patch: Patch) -> Rules:
    """Packets that are not written at once."""
    patch.setattr(exchange, "push_packets", _pushes_words)
    return {}


CONTROLS = {
    "sums": (two_slots, slots_in_one_place, kernels_without_an_end, nothing_is_cleared, half_is_cleared, empty_is_sent, calls_are_not_counted,
             the_first_block_counts_the_call, one_word_of_four_is_polled, own_is_added_first),
    "chunks": (slots_in_one_place, kernels_without_an_end, calls_are_not_counted, the_first_block_counts_the_call, flags_without_a_barrier,
               relaxed_flags, flags_without_acquire, acquire_without_a_barrier, one_number_for_two_calls),
    "packets": (slots_in_one_place, kernels_without_an_end, calls_are_not_counted, the_first_block_counts_the_call, data_apart_from_its_flag),
}


def trial(family: str, seed: int, **rules: Any) -> str | None:
    draw = random.Random(seed)
    return simulate(family, random_calls(family, draw, 6 if family == "sums" else 4), 2 + seed % 2, seed, **rules)


@pytest.mark.parametrize("family", CONTROLS)
def test_without_a_change_no_seed_goes_wrong(family: str) -> None:
    assert [trial(family, seed) for seed in SEEDS] == [None] * len(SEEDS)


@pytest.mark.parametrize("family, control", [(f, c) for f, controls in CONTROLS.items() for c in controls],
                         ids=lambda value: value if isinstance(value, str) else value.__name__)
def test_negative_control(family: str, control: Callable[[Patch], Rules], monkeypatch: Patch) -> None:
    rules = control(monkeypatch)
    assert any(trial(family, seed, **rules) for seed in SEEDS), "passes: the simulator does not see what is missing"
