"""The protocols between GPUs under every order of turns that a seed brings: sums and exchanges right to the
bit, in memory as weak as a GPU's.

Each protocol has its negative controls: the same with one thing left out, which must go wrong on some of the
seeds on which the protocol itself does not. A control that passes would mean that the simulator no longer
sees what it is there to see.
"""
from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from trials import (
    DTYPES,
    FAMILIES,
    GUARD,
    MOVES,
    NORMS,
    SUMS,
    UNTOUCHED,
    WARPS,
    Call,
    data,
    random_calls,
    workspaces,
    wrong,
)

from shardlib.triton_kernels import (
    all_reduce,
    all_reduce_add_rms_norm,
    exchange,
    expert_exchange,
    lamport,
    quads,
    reduce_scatter,
    split_argmax,
)
from shardlib.triton_kernels.lamport import EMPTY, SLOTS
from shardlib.triton_kernels.quads import pack, unpack_high, unpack_low
from shardlib.triton_kernels.simulator import Deadlock, Simulation
from shardlib.triton_kernels.workspace import Workspace

SEEDS = {"sums": (0, 2, 3), "norms": (0, 2, 3), "moves": (0, 5, 7), "choices": (0, 2, 3),
         "experts": (1, 4)}
"""Of `trial`: each control goes wrong on some of them, the protocols themselves on none."""
pytestmark = pytest.mark.usefixtures("one_thread")
a_few = settings(max_examples=max(6, settings.default.max_examples // 8), derandomize=True, database=None)


def simulate(calls: Sequence[Call], world: int, seed: int, slots: int = 1, **rules: Any) -> str | None:
    """All ranks make the calls; what went wrong. slots: 0 puts all slots of an arena in one place."""
    xs, slot_bytes = data(calls, world, seed), max(call.slot_bytes(world) for call in calls)
    spaces = [replace(space, slot_bytes=slots * slot_bytes) for space in workspaces(world, slot_bytes)]

    def rank(r: int) -> Callable[[], list[torch.Tensor]]:
        return lambda: [call.run(x[r], spaces[r]) for call, x in zip(calls, xs)]
    try:
        got = Simulation(seed, **rules).run([rank(r) for r in range(world)])
    except Deadlock as deadlock:
        return str(deadlock)
    if any((space.arena[-GUARD:] != UNTOUCHED).any() for space in spaces):
        return "written behind an arena"
    if any((left_over(space) != EMPTY.value).any() for space in spaces):
        return "something is left in an arena"
    return wrong(calls, xs, got)


def left_over(space: Workspace) -> torch.Tensor:
    """What must be empty after the last call: all but what has filled its slot."""
    words, last = space.arena[:-GUARD].clone(), (int(space.state[0]) + SLOTS.value - 1) % SLOTS.value
    start = last * space.slot_bytes // 4
    words[start:start + 4 * int(space.state[2 + last])] = EMPTY.value
    return words


def some_calls(family: str) -> st.SearchStrategy[list[Call]]:
    """What `random_calls` draws, by other hands."""
    def call(warps: int) -> st.SearchStrategy[Call]:
        quads, blocks = {"norms": (12, 1), "all": (20, 1), "choices": (12, 2),
                         "experts": (12, 2)}.get(family, (40, 3))
        return st.builds(Call, st.sampled_from(FAMILIES[family]), st.sampled_from(DTYPES), st.integers(1, 3),
                         st.integers(1, quads), st.integers(1, blocks), st.sampled_from((8, 32, 32 * warps)),
                         st.just(warps), st.sampled_from((1, 2, 4)))
    return st.lists(st.sampled_from(WARPS).flatmap(call), min_size=2, max_size=4)


seeds, worlds, residents = st.integers(0, 2**32 - 1), st.integers(2, 4), st.sampled_from((None, None, 1, 2))


def wants_all_blocks(call: Call) -> bool:
    """Whether its blocks wait for each other."""
    return call.kernel in NORMS and call.split > 1


@pytest.mark.parametrize("family", FAMILIES)
def test_calls_in_turns(family: str) -> None:
    """Any of the kernels, of any sizes and grids, on one workspace."""
    @settings(a_few, max_examples=a_few.max_examples // (1 if family in ("sums", "moves") else 3))
    @given(seeds, worlds, residents, some_calls(family))
    def check(seed: int, world: int, resident: int | None, calls: list[Call]) -> None:
        assert (simulate(calls, world, seed, resident=None if any(map(wants_all_blocks, calls)) else resident)
                is None)
    check()


# -- negative controls ---------------------------------------------------------------------------------------

Rules = dict[str, Any]
Patch = pytest.MonkeyPatch
KERNELS = (all_reduce, reduce_scatter, exchange, all_reduce_add_rms_norm, split_argmax, expert_exchange)


def in_kernels(patch: Patch, name: str, value: Any) -> Rules:
    for module in KERNELS:
        if hasattr(module, name):
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
    return in_kernels(patch, "clear", _clears_nothing)


@triton.jit
def _enters_for_half(state_ptr):
    slot = tl.load(state_ptr)
    previous = (slot + SLOTS - 1) % SLOTS
    return slot, previous, tl.load(state_ptr + 2 + previous) // 2


def half_is_cleared(patch: Patch) -> Rules:
    """As if the size of the call before were not the device's own memory."""
    return in_kernels(patch, "enter", _enters_for_half)


@triton.jit
def _the_word(word):
    return word


def empty_is_sent(patch: Patch) -> Rules:
    return in_kernels(patch, "without_empty", _the_word)


@triton.jit
def _leaves_nothing(slot, state_ptr, filled, quads, PARTS: tl.constexpr, LINE: tl.constexpr, chunk):
    pass


def calls_are_not_counted(patch: Patch) -> Rules:
    return in_kernels(patch, "leave", _leaves_nothing)


@triton.jit
def _leaves_at_the_first_block(slot, state_ptr, filled, quads, PARTS: tl.constexpr, LINE: tl.constexpr,
                               chunk):
    tl.debug_barrier()
    if tl.atomic_add(state_ptr + 1, 1, sem="acq_rel", scope="gpu") == 0:
        tl.store(state_ptr + 2 + slot, filled)
        tl.store(state_ptr, (slot + 1) % SLOTS)
    if tl.atomic_add(state_ptr + 1, 0, sem="acq_rel", scope="gpu") == tl.num_programs(0):
        tl.store(state_ptr + 1, 0)


def the_first_block_counts_the_call(patch: Patch) -> Rules:
    """Blocks that start later take the number of the next call."""
    in_kernels(patch, "leave", _leaves_at_the_first_block)
    return {"resident": 1}


@triton.jit
def _receives_by_one_word(address, stride, N: tl.constexpr, SPIN: tl.constexpr, CONSTRAINTS: tl.constexpr,
                          WORDS: tl.constexpr, INTERPRET: tl.constexpr):
    words = ()
    for i in tl.static_range(N):
        p = (address + i * stride).to(tl.pointer_type(tl.int32))
        first = tl.load(p, volatile=True)
        while tl.max((first == EMPTY).to(tl.int32)) > 0:
            first = tl.load(p, volatile=True)
        words = words + (first, tl.load(p + 1, volatile=True), tl.load(p + 2, volatile=True),
                         tl.load(p + 3, volatile=True))
    return words


@triton.jit
def _receives_lines_by_one_word(address, stride, line, line_stride, N: tl.constexpr, SPIN: tl.constexpr,
                                CONSTRAINTS: tl.constexpr, WORDS: tl.constexpr, INTERPRET: tl.constexpr):
    words, of_lines = (), ()
    for i in tl.static_range(N):
        p, l = ((address + i * stride).to(tl.pointer_type(tl.int32)),
                (line + i * line_stride).to(tl.pointer_type(tl.int32)))
        of_line = tl.load(l, volatile=True)
        while tl.max((of_line == EMPTY).to(tl.int32)) > 0:
            of_line = tl.load(l, volatile=True)
        of_lines = of_lines + (of_line,)
        for j in tl.static_range(4):
            words = words + (tl.load(p + j, volatile=True),)
    return words + of_lines


@triton.jit
def _awaits_the_first(p, wanted):
    """Of a quad, by its place."""
    word = tl.load(p, mask=wanted, other=0, volatile=True)
    while tl.max(((word == EMPTY) & (p.to(tl.int64) % 16 == 0)).to(tl.int32)) > 0:
        word = tl.load(p, mask=wanted, other=0, volatile=True)
    return word


def one_word_of_four_is_polled(patch: Patch) -> Rules:
    """Of moved data, one of the line: it may come before the data."""
    patch.setattr(exchange, "receive_lines", _receives_lines_by_one_word)
    patch.setattr(expert_exchange, "await_where", _awaits_the_first)
    return in_kernels(patch, "receive", _receives_by_one_word)


@triton.jit
def _receives_quads_alone(address, stride, line, line_stride, N: tl.constexpr, SPIN: tl.constexpr,
                          CONSTRAINTS: tl.constexpr, WORDS: tl.constexpr, INTERPRET: tl.constexpr):
    words, of_lines = (), ()
    for i in tl.static_range(N):
        p, l = ((address + i * stride).to(tl.pointer_type(tl.int32)),
                (line + i * line_stride).to(tl.pointer_type(tl.int32)))
        for j in tl.static_range(4):
            word = tl.load(p + j, volatile=True)
            while tl.max((word == EMPTY).to(tl.int32)) > 0:
                word = tl.load(p + j, volatile=True)
            words = words + (word,)
        of_lines = of_lines + (tl.load(l, volatile=True),)
    return words + of_lines


def lines_are_not_awaited(patch: Patch) -> Rules:
    patch.setattr(exchange, "receive_lines", _receives_quads_alone)
    return {}


@triton.jit
def _takes_without_waiting(address, there, INTERPRET: tl.constexpr):
    p = address.to(tl.pointer_type(tl.int32))
    word = tl.load(p, mask=there, other=0, volatile=True)
    tl.store(p, EMPTY, mask=there)
    return word


def what_is_hidden_is_not_awaited(patch: Patch) -> Rules:
    patch.setattr(exchange, "take_words", _takes_without_waiting)
    return {}


@triton.jit
def _takes_and_leaves(address, there, INTERPRET: tl.constexpr):
    p = address.to(tl.pointer_type(tl.int32))
    word = tl.load(p, mask=there, other=0, volatile=True)
    while tl.max((word == EMPTY).to(tl.int32)) > 0:
        word = tl.load(p, mask=there, other=0, volatile=True)
    return word


def what_is_hidden_is_not_emptied(patch: Patch) -> Rules:
    patch.setattr(exchange, "take_words", _takes_and_leaves)
    return {}


@triton.jit
def _receives_rows_alone(address, stride, word, word_stride, wanted, N: tl.constexpr, SPIN: tl.constexpr,
                         CONSTRAINTS: tl.constexpr, WORDS: tl.constexpr, INTERPRET: tl.constexpr):
    flags, words = (), ()
    for i in tl.static_range(N):
        flags = flags + (tl.load((word + i * word_stride).to(tl.pointer_type(tl.int32)), volatile=True),)
    for i in tl.static_range(N):
        p = (address + i * stride).to(tl.pointer_type(tl.int32))
        for j in tl.static_range(4):
            words = words + (expert_exchange.await_where(p + j, (wanted != 0) & (flags[i] == 1)),)
    return words + flags


def words_of_rows_are_not_awaited(patch: Patch) -> Rules:
    """Whose word has not come sends nothing."""
    patch.setattr(expert_exchange, "receive_parts", _receives_rows_alone)
    return {}


def rows_are_not_emptied(patch: Patch) -> Rules:
    patch.setattr(expert_exchange, "store_quads_once", _stores_no_empty)
    return {}


@triton.jit
def _stores_no_empty(address, a, b, c, d, there, INTERPRET: tl.constexpr):
    quads.store_quads_once(address, a, b, c, d, there & ((a != EMPTY) | (b != EMPTY)), INTERPRET)


@triton.jit
def _says_where_rows_come_alone(address, word, there, INTERPRET: tl.constexpr):
    quads.push_words_once(address, word, there & (word == 1), INTERPRET)


def nothing_is_said_where_nothing_comes(patch: Patch) -> Rules:
    patch.setattr(expert_exchange, "push_words_once", _says_where_rows_come_alone)
    return {}


@triton.jit
def _adds_own_first(words, own, J: tl.constexpr, RANK: tl.constexpr, W: tl.constexpr, KIND: tl.constexpr,
                    INTERPRET: tl.constexpr):
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
    return in_kernels(patch, "add_up", _adds_own_first)


@triton.jit
def _sums_what_is_there(squares, address, part, SPLIT: tl.constexpr, SPIN: tl.constexpr,
                        CONSTRAINTS: tl.constexpr, WORDS: tl.constexpr, LANES: tl.constexpr,
                        INTERPRET: tl.constexpr):
    total = tl.sum(squares, 0)
    if SPLIT > 1:
        p = (address + tl.zeros((1,), tl.int64)).to(tl.pointer_type(tl.float32))
        tl.store(p + part * max(1, 4 // SPLIT), total)
        total = tl.zeros((1,), tl.float32)
        for i in tl.static_range(SPLIT):
            total += tl.load(p + i * max(1, 4 // SPLIT), volatile=True)
    return total


def sums_of_parts_are_not_awaited(patch: Patch) -> Rules:
    """Of a row, by the blocks that share it."""
    return in_kernels(patch, "_sum_of_row", _sums_what_is_there)


def blocks_of_a_row_run_one_after_another(patch: Patch) -> Rules:
    """What a grid that the GPU does not hold would do."""
    return {"resident": 1, "split": 4}


@triton.jit
def _bits(x):
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(x != x, EMPTY, bits ^ ((bits >> 31) & 0x7FFFFFFF))


def nan_is_sent_as_empty(patch: Patch) -> Rules:
    return in_kernels(patch, "_key", _bits)


@triton.jit
def _chooses_the_lane_alone(x_ptr, columns, LANES: tl.constexpr):
    lane, best, found = tl.arange(0, LANES), tl.full((LANES,), -2**31, tl.int32), tl.zeros((LANES,), tl.int32)
    for start in tl.range(0, columns, LANES):
        there = start + lane < columns
        key = tl.where(there, split_argmax._key(tl.load(x_ptr + start + lane, mask=there,
                                                        other=0).to(tl.float32)), -2**31)
        found = tl.where(key > best, start + lane, found)
        best = tl.maximum(best, key)
    top = tl.max(best, 0)
    return top, tl.max(tl.where(best == top, found, -1), 0)


def of_equals_the_last_is_chosen(patch: Patch) -> Rules:
    return in_kernels(patch, "best_of", _chooses_the_lane_alone)


PROTOCOL = (two_slots, slots_in_one_place, kernels_without_an_end, nothing_is_cleared, half_is_cleared,
            empty_is_sent, calls_are_not_counted, the_first_block_counts_the_call, one_word_of_four_is_polled)
CONTROLS = {"sums": (*PROTOCOL, own_is_added_first),
            "norms": (*PROTOCOL, own_is_added_first, sums_of_parts_are_not_awaited,
                      blocks_of_a_row_run_one_after_another),
            "moves": (*PROTOCOL, lines_are_not_awaited, what_is_hidden_is_not_awaited,
                      what_is_hidden_is_not_emptied),
            "experts": (*PROTOCOL, words_of_rows_are_not_awaited, rows_are_not_emptied,
                        nothing_is_said_where_nothing_comes),
            "choices": (*(c for c in PROTOCOL if c is not empty_is_sent), nan_is_sent_as_empty,
                        of_equals_the_last_is_chosen)}


def world_of(family: str, seed: int) -> int:
    """Mostly two where there are norms, whose blocks all wait for each other:
    a trial takes several times as long."""
    return 2 + (seed % 4 == 3 if family == "norms" else seed % 2)


def trial(family: str, seed: int, **rules: Any) -> str | None:
    draw, split = random.Random(seed), rules.pop("split", 1 if "resident" in rules else None)
    calls = random_calls(family, draw, 4 if family in ("norms", "experts") else 6)
    if split:
        calls = [replace(call, blocks=3 if split == 1 else 1, split=split) if call.kernel in NORMS else call
                 for call in calls]
    return simulate(calls, world_of(family, seed), seed, **rules)


@pytest.mark.parametrize("family", CONTROLS)
def test_without_a_change_no_seed_goes_wrong(family: str) -> None:
    assert [trial(family, seed) for seed in SEEDS[family]] == [None] * len(SEEDS[family])


@pytest.mark.parametrize("family, control", [(f, c) for f, controls in CONTROLS.items() for c in controls],
                         ids=lambda value: value if isinstance(value, str) else value.__name__)
def test_negative_control(family: str, control: Callable[[Patch], Rules], monkeypatch: Patch) -> None:
    """Of two ranks no order of sums is another."""
    rules, least = control(monkeypatch), 3 if control is own_is_added_first else 2
    assert any(trial(family, seed, **rules) for seed in SEEDS[family]
               if world_of(family, seed) >= least), "passes: the simulator does not see what is missing"


def pushes(kernel: str, world: int, inner: int, patch: Patch,
           lanes: Callable[[Any], Any] = lambda there: there) -> tuple[list[int], ...]:
    """The addresses that all ranks push to in one call, sorted: of quads and of words;
    and those that they should. lanes: which do it."""
    found: dict[str, list[int]] = {"push_quads_once": [], "push_words_once": []}

    def noting(name: str) -> Callable[..., None]:
        push = getattr(quads, name)

        def note(address: Any, *data: Any) -> None:
            *words, there, interpret = data
            chosen = lanes(there)
            found[name].extend(address.handle.data[chosen.handle.data.astype(bool)].tolist())
            push(address, *words, chosen, interpret)
        return note
    for name in found:
        in_kernels(patch, name, noting(name))
    call = Call(kernel, torch.float32, 1, inner, blocks=2, line=8)
    spaces, xs = (workspaces(world, call.slot_bytes(world)),
                  [torch.ones(call.shape(world)) for _ in range(world)])
    Simulation(inner, weak=False).run([lambda r=r: call.run(xs[r], spaces[r]) for r in range(world)])
    parts = 2 * -(-inner // world) if kernel == "two_shot" else inner  # of a rank, in a slot of another
    count, lines = (world - 1) * parts, (world - 1) * -(-inner // 8) if kernel in MOVES else 0
    arenas = sorted(space.arena.data_ptr() for space in spaces)
    return (*map(sorted, found.values()), [a + 16 * i for a in arenas for i in range(count)],
            [a + 16 * count + 4 * i for a in arenas for i in range(lines)])


@pytest.mark.parametrize("kernel, world", [(kernel, 2 + i % 2) for i, kernel in enumerate(SUMS + MOVES)])
def test_every_quad_is_pushed_once(kernel: str, world: int, monkeypatch: Patch) -> None:
    """To each place of a slot, and nowhere else: a second copy could come when the first
    has been read and cleared.

    Of fewer quads than a block has lanes, and of more than all blocks have; a push in all lanes would be
    seen.
    """
    for inner in (5, 70):
        quads_found, words_found, of_quads, of_words = pushes(kernel, world, inner, monkeypatch)
        assert (quads_found, words_found) == (of_quads, of_words)
    quads_found, _, of_quads, _ = pushes(kernel, world, 5, monkeypatch, lambda there: there == there)
    assert set(quads_found) == set(of_quads) and len(quads_found) > len(of_quads)


@triton.jit
def _packs(x_ptr, out_ptr, KIND: tl.constexpr):
    i = tl.arange(0, 64)
    x = tl.load(x_ptr + i)
    tl.store(out_ptr + i, pack(x, x, KIND, True))


@pytest.mark.parametrize("kind, dtype, place", [("bf16", torch.bfloat16, 8), ("fp16", torch.float16, 11)])
def test_numbers_are_rounded_to_the_nearest_and_halves_to_even(kind: str, dtype: torch.dtype,
                                                               place: int) -> None:
    """In the interpreter, where the kernels' own instruction is not: as torch does."""
    x, out = ((1 + torch.arange(64) * 2.0 ** -place) * torch.tensor([1.0, -1.0]).repeat(32),
              torch.zeros(64, dtype=torch.int32))
    _packs[(1,)](x, out, kind)
    assert torch.equal(out, torch.stack([x, x], 1).to(dtype).flatten().view(torch.int32))


@triton.jit
def _keys(x_ptr, out_ptr):
    i = tl.arange(0, 16)
    tl.store(out_ptr + i, split_argmax._key(tl.load(x_ptr + i)))


def test_keys_grow_with_the_floats_and_are_never_empty() -> None:
    """-0.0 is 0.0, and every NaN the largest."""
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([-inf, -3e38, -2.0, -1.0, -1e-40, -0.0, 0.0, 1e-40, 0.5, 1.0, 2.0, 3e38, inf, nan, 0, 0])
    x[14:] = torch.tensor([EMPTY.value, -1], dtype=torch.int32).view(torch.float32)     # NaNs, too
    out = torch.zeros(16, dtype=torch.int32)
    _keys[(1,)](x, out)
    assert (out.diff()[:13] > 0).tolist() == [i != 5 for i in range(13)] and out[5] == out[6]
    assert (out[13:] == 2**31 - 1).all()
