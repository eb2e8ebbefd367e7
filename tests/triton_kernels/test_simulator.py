"""The rules of the simulator, each on a kernel that is written to show it."""
from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
import triton.runtime.interpreter as interpreter
from torch import Tensor

from shardlib.triton_kernels.simulator import Deadlock, Simulation

SEEDS = range(80)


def zeros(count: int = 8) -> Tensor:
    return torch.zeros(count, dtype=torch.int32)


def outcomes(ranks: Callable[[], list[Callable[[], Any]]], **rules: Any) -> list[list[Any]]:
    """What the ranks return, for each seed; `ranks` makes them with memory of their own."""
    return [Simulation(seed, **rules).run(ranks()) for seed in SEEDS]


# -- stores --------------------------------------------------------------------------------------------------

@triton.jit
def _send(data_ptr, flag_ptr, N: tl.constexpr, BARRIER: tl.constexpr, SEM: tl.constexpr):
    tl.store(data_ptr + tl.arange(0, N), tl.full((N,), 7, tl.int32))
    if BARRIER:
        tl.debug_barrier()
    tl.atomic_xchg(flag_ptr, 1, sem=SEM, scope="sys")


@triton.jit
def _take(data_ptr, flag_ptr, out_ptr, N: tl.constexpr, ACQUIRE: tl.constexpr, BARRIER: tl.constexpr):
    early = tl.load(data_ptr + tl.arange(0, N))
    while tl.load(flag_ptr, volatile=True) == 0:
        pass
    if ACQUIRE:
        tl.atomic_add(flag_ptr, 0, sem="acquire", scope="sys")
    if BARRIER:
        tl.debug_barrier()
    tl.store(out_ptr + tl.arange(0, N), tl.load(data_ptr + tl.arange(0, N)) + early * 0)


def message(barrier: bool = True, sem: str = "release", acquire: bool = True,
            barrier_after: bool = True) -> Callable[[], list[Callable[[], Any]]]:
    """Rank 0 writes 7s and raises a flag; rank 1 waits for the flag and reads. Returns what it reads."""
    def ranks() -> list[Callable[[], Any]]:
        data, flag, out = zeros(), zeros(1), zeros()

        def receiver() -> list[int]:
            _take[(1,)](data, flag, out, N=8, ACQUIRE=acquire, BARRIER=barrier_after)
            return out.tolist()
        return [lambda: _send[(1,)](data, flag, N=8, BARRIER=barrier, SEM=sem), receiver]
    return ranks


def read(**how: Any) -> list[list[int]]:
    return [result[1] for result in outcomes(message(**how))]


def test_a_release_after_a_barrier_publishes_what_came_before() -> None:
    assert read() == [[7] * 8] * len(SEEDS)


def test_a_relaxed_flag_may_overtake_the_data() -> None:
    late = read(sem="relaxed")
    assert [0] * 8 in late and [7] * 8 in late
    assert any(0 < sum(values) < 56 for values in late), "a store may become visible in parts"


def test_a_release_without_a_barrier_publishes_nothing_of_the_other_threads() -> None:
    late = read(barrier=False)
    assert [0] * 8 in late and [7] * 8 in late


def test_a_load_may_be_early_until_an_acquire_and_a_barrier() -> None:
    for how in (dict(acquire=False), dict(barrier_after=False)):
        early = read(**how)
        assert [0] * 8 in early and [7] * 8 in early


def test_strong_memory_has_none_of_this() -> None:
    how = message(barrier=False, sem="relaxed", acquire=False)
    assert [result[1] for result in outcomes(how, weak=False)] == [[7] * 8] * len(SEEDS)


@triton.jit
def _add_one(p_ptr):
    tl.store(p_ptr, tl.load(p_ptr) + 1)
    tl.store(p_ptr, tl.load(p_ptr) + 1)


def test_a_block_sees_its_own_stores() -> None:
    def rank() -> Callable[[], int]:
        count = zeros(1)

        def program() -> int:
            for _ in range(3):
                _add_one[(1,)](count)
            return int(count)
        return program
    assert outcomes(lambda: [rank()]) == [[6]] * len(SEEDS)


@triton.jit
def _store(p_ptr, value):
    tl.store(p_ptr, value)


def test_a_kernel_ends_with_its_stores_performed() -> None:
    def ranks() -> list[Callable[[], Any]]:
        word = zeros(1)

        def program() -> int:
            _store[(1,)](word, 5)
            return int(word)
        return [program]
    assert outcomes(ranks) == [[5]] * len(SEEDS)
    assert [0] in outcomes(ranks, boundary=False)


@triton.jit
def _read_twice(p_ptr, out_ptr):
    first = tl.load(p_ptr)
    tl.store(out_ptr, first)
    tl.store(out_ptr + 1, tl.load(p_ptr))


def test_no_address_goes_back_in_time() -> None:
    def ranks() -> list[Callable[[], Any]]:
        word, out = zeros(1), zeros(2)

        def reader() -> tuple[int, ...]:
            _read_twice[(1,)](word, out)
            return tuple(out.tolist())
        return [lambda: _store[(1,)](word, 1), reader]
    assert {result[1] for result in outcomes(ranks)} == {(0, 0), (0, 1), (1, 1)}


# -- blocks --------------------------------------------------------------------------------------------------

@triton.jit
def _chain(flags_ptr, BACKWARDS: tl.constexpr):
    """Every block waits for its neighbour: for the one before it, or (BACKWARDS) for the one after it."""
    me, last = tl.program_id(0), tl.num_programs(0) - 1
    other = tl.minimum(me + 1, last) if BACKWARDS else tl.maximum(me - 1, 0)
    if other != me:
        while tl.load(flags_ptr + other, volatile=True) == 0:
            pass
    tl.atomic_xchg(flags_ptr + me, 1, sem="release", scope="gpu")


def chain(backwards: bool) -> Callable[[], list[Callable[[], Any]]]:
    def ranks() -> list[Callable[[], Any]]:
        flags = zeros(4)
        return [lambda: _chain[(4,)](flags, BACKWARDS=backwards)]
    return ranks


def test_blocks_start_in_order_and_wait_for_a_place() -> None:
    """A block that waits for a later one keeps it from starting, if not all find room."""
    outcomes(chain(False), resident=1)
    outcomes(chain(True))
    with pytest.raises(Deadlock, match=r"^no progress: block 0 of rank 0, block 1 of rank 0, block 2 of rank "
                       r"0, block 3 of rank 0$"):
        outcomes(chain(True), resident=3)


@triton.jit
def _await(flag_ptr):
    while tl.load(flag_ptr, volatile=True) == 0:
        pass


@triton.jit
def _await_by_cas(flag_ptr):
    while tl.atomic_cas(flag_ptr, 1, 0, sem="acquire", scope="sys") != 1:
        pass


@pytest.mark.parametrize("kernel", [_await, _await_by_cas])
def test_a_deadlock_says_who_waits(kernel: Any) -> None:
    done, flag = zeros(1), zeros(1)
    with pytest.raises(Deadlock, match=r"^no progress: block 0 of rank 1, block 1 of rank 1$"):
        Simulation().run([lambda: _store[(1,)](done, 1), lambda: kernel[(2,)](flag)])


@triton.jit
def _poll_some(flag_ptr, done_ptr):
    for _ in range(20):
        tl.load(flag_ptr, volatile=True)
    tl.store(done_ptr, 1)


def test_a_loop_of_polls_that_gives_up_is_no_deadlock() -> None:
    flag, done = zeros(1), zeros(1)
    Simulation().run([lambda: _poll_some[(1,)](flag, done)])
    assert int(done) == 1


# -- housekeeping --------------------------------------------------------------------------------------------

@triton.jit
def _helper(n):
    tl.static_assert(n == 3)


@triton.jit
def _fails(flag_ptr, n: tl.constexpr):
    _helper(n)


def test_an_error_comes_out_as_it_is() -> None:
    """Of a kernel, also from within the functions that it calls, and of a rank's own program;
    the others do not keep it waiting."""
    flag = zeros(1)

    def program() -> None:
        raise KeyError("a rank's own")
    with pytest.raises(KeyError, match="a rank's own"):
        Simulation().run([lambda: _await[(2,)](flag), program])
    with pytest.raises(AssertionError):
        Simulation().run([lambda: _await[(2,)](flag), lambda: _fails[(1,)](flag, n=2)])


def test_only_grids_of_one_dim() -> None:
    with pytest.raises(AssertionError, match="grids of one dim"):
        Simulation().run([lambda: _await[(1, 2)](zeros(1))])


@pytest.mark.parametrize("end", ["result", "deadlock", "error"])
def test_nothing_is_left_behind(end: str) -> None:
    """No thread, and the interpreter as it was."""
    before = (threading.active_count(), dict(vars(interpreter.InterpreterBuilder)),
              interpreter.GridExecutor.__call__, interpreter._patch_lang, tl.load)
    flag, word = zeros(1), zeros(1)
    ranks = {"result": lambda: _store[(2,)](word, 1), "deadlock": lambda: _await[(2,)](flag),
             "error": lambda: _fails[(2,)](flag, n=2)}
    try:
        Simulation().run([lambda: _store[(3,)](word, 1), ranks[end]])
    except (Deadlock, AssertionError):
        assert end != "result"
    after = (threading.active_count(), dict(vars(interpreter.InterpreterBuilder)),
             interpreter.GridExecutor.__call__, interpreter._patch_lang, tl.load)
    assert before == after


def test_a_seed_decides_everything() -> None:
    assert read(sem="relaxed") == read(sem="relaxed")
