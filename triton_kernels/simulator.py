"""All ranks of a kernel's protocol in one process, without a GPU: every block of every rank takes turns, as a seed decides.

The kernels run in Triton's interpreter (TRITON_INTERPRET=1 when triton is imported). A rank is a Python function that launches
kernels; a launch becomes one task a block. Tasks change hands at every store, volatile load and atomic, by the seed, and memory
is as weak as a GPU's:

- a plain store becomes visible some time later, in any order; at the latest when its kernel ends
- a release makes visible only what a barrier of the block came after
- a plain load may return what the block has seen at that address before, until an acquire
- a rank starts its blocks in order, and holds at most `resident` of them at once

    Simulation(seed=3).run([lambda: one_shot(x0, workspace0, blocks=2), lambda: one_shot(x1, workspace1, blocks=2)])

returns what each rank returned. `Deadlock` says who waits for ever. A pass is evidence, not proof: this is a model, without the
ordering of copy engines and without threads of a block that part ways; what it finds is real.
"""
from __future__ import annotations

import inspect
import random
import threading
from contextlib import contextmanager
from typing import Any, Callable, Iterator, Sequence

import numpy as np
import triton.runtime.interpreter as interpreter

_BUILDER = interpreter.InterpreterBuilder
_SEMANTICS = interpreter._ir.MEM_SEMANTIC
_RELEASES = (_SEMANTICS.RELEASE, _SEMANTICS.ACQUIRE_RELEASE)
_ACQUIRES = (_SEMANTICS.ACQUIRE, _SEMANTICS.ACQUIRE_RELEASE)


class Deadlock(Exception):
    """Nothing has changed in memory for a long time."""


class _Killed(BaseException):
    """Ends the thread of a task that is no longer wanted."""


class _Store:
    """Words on their way to memory. synced: a barrier has come after it in its block."""

    def __init__(self, pointers: Any, values: Any, mask: Any) -> None:
        self.pointers, self.values, self.mask, self.synced = np.array(pointers), np.array(values), np.array(mask), False

    def perform(self) -> None:
        interpreter._interpreter.store(self.pointers, self.values, self.mask)

    def touches(self, addresses: set[int]) -> bool:
        return not addresses.isdisjoint(self.pointers.ravel().tolist())


class _Task(threading.Thread):
    """One block of one launch, or the program of a rank: a thread that runs only while it has the turn."""

    def __init__(self, simulation: Simulation, rank: int, body: Callable[[], Any], block: int = -1, grid: tuple[int, ...] = ()) -> None:
        super().__init__(daemon=True)
        self.simulation, self.rank, self.body, self.block, self.grid = simulation, rank, body, block, grid
        self.turn, self.yielded = threading.Semaphore(0), threading.Semaphore(0)
        self.done, self.killed, self.waits = False, False, False
        self.result: Any = None
        self.pending: list[_Store] = []
        self.seen: dict[bytes, Any] = {}

    def run(self) -> None:
        self.turn.acquire()
        try:
            if not self.killed:
                self.result = self.body()
        except _Killed:
            pass
        except BaseException as error:
            self.simulation.error = self.simulation.error or error
        self.done = True
        self.yielded.release()

    def give_up_turn(self) -> None:
        self.yielded.release()
        self.turn.acquire()
        if self.killed:
            raise _Killed

    def perform(self, chosen: Callable[[_Store], bool]) -> None:
        """Makes the chosen stores visible."""
        for store in [s for s in self.pending if chosen(s)]:
            store.perform()
            self.simulation.idle = 0
        self.pending = [s for s in self.pending if not chosen(s)]


class Simulation:
    """One run of all ranks. weak: stores are delayed and loads stale; boundary: a kernel ends with its stores performed."""

    def __init__(self, seed: int = 0, *, weak: bool = True, boundary: bool = True, resident: int | None = None, patience: int = 20_000) -> None:
        self.random, self.weak, self.boundary, self.resident, self.patience = random.Random(seed), weak, boundary, resident, patience
        self.tasks: list[_Task] = []
        self.error: BaseException | None = None
        self.idle = 0
        self.now: _Task | None = None

    def run(self, ranks: Sequence[Callable[[], Any]]) -> list[Any]:
        """What each rank's function returned. Deadlock if they wait for each other; else the first error of any."""
        hosts = [_Task(self, rank, program) for rank, program in enumerate(ranks)]
        self.tasks = list(hosts)
        for host in hosts:
            host.start()
        with _patched(self):
            try:
                while not all(host.done for host in hosts):
                    self._turn()
            finally:
                self._end()
        return [host.result for host in hosts]

    def _turn(self) -> None:
        able = [t for t in self.tasks if not t.done and not t.waits and self._started(t)]
        if not able or self.idle > self.patience:
            waiting = ", ".join(f"block {t.block} of rank {t.rank}" for t in self.tasks if not t.done and t.block >= 0)
            raise Deadlock(f"no progress: {waiting or 'no block is left'}")
        self.now = self.random.choice(able)
        if self.now.block >= 0:
            interpreter.interpreter_builder.set_grid_dim(*self.now.grid)
            interpreter.interpreter_builder.set_grid_idx(self.now.block, 0, 0)
        self.now.turn.release()
        self.now.yielded.acquire()
        if self.error is not None:
            raise self.error
        self.idle = 0 if self.now.done else self.idle + 1
        for task in self.tasks:
            if task.pending and self.random.random() < 0.1:
                store = self.random.choice(task.pending)
                task.perform(lambda s: s is store)

    def _started(self, task: _Task) -> bool:
        if task.block < 0 or self.resident is None:
            return True
        return sum(not t.done and t.rank == task.rank and 0 <= t.block < task.block for t in self.tasks) < self.resident

    def launch(self, rank: int, grid: tuple[int, ...], body: Callable[[], None]) -> None:
        """Called by a rank's own task: its blocks take part until all are done."""
        host = self.now
        blocks = [_Task(self, rank, body, block, grid) for block in range(grid[0])]
        self.tasks += blocks
        for block in blocks:
            block.start()
        while not all(block.done for block in blocks):
            host.give_up_turn()
        for block in blocks if self.boundary else ():
            block.perform(lambda store: True)
        self.tasks = [t for t in self.tasks if t not in blocks or t.pending]

    def _end(self) -> None:
        for task in self.tasks:
            task.perform(lambda store: True)
            if not task.done:
                task.killed = True
                task.turn.release()


@contextmanager
def _patched(simulation: Simulation) -> Iterator[None]:
    """The interpreter's loads, stores, atomics, barriers and launches, by the rules of the simulation, until the end."""
    names = ("create_masked_load", "create_masked_store", "create_atomic_cas", "create_atomic_rmw", "create_barrier")
    load, store, cas, rmw, barrier = originals = [getattr(_BUILDER, name) for name in names]
    execute = interpreter.GridExecutor.__call__
    scopes: list[Any] = []

    def new_load(self: Any, pointers: Any, mask: Any, *more: Any) -> Any:
        task, volatile = simulation.now, bool(more[-1])
        if volatile:
            task.give_up_turn()
        addresses = set(np.asarray(pointers.data).ravel().tolist())
        task.perform(lambda s: s.touches(addresses))            # a block sees its own stores in order
        value = load(self, pointers, mask, *more)
        if simulation.weak and not volatile:
            key = np.asarray(pointers.data).tobytes() + np.asarray(mask.data).tobytes()
            if key in task.seen and simulation.random.random() < 0.5:
                return interpreter.TensorHandle(task.seen[key].copy(), value.dtype)
            task.seen[key] = np.array(value.data)
        return value

    def new_store(self: Any, pointers: Any, value: Any, mask: Any, *more: Any) -> None:
        task = simulation.now
        addresses = set(np.asarray(pointers.data).ravel().tolist())
        task.perform(lambda s: s.touches(addresses))            # stores of a block to one address keep their order
        if simulation.weak:
            task.pending.append(_Store(pointers.data, value.data, mask.data))
        else:
            store(self, pointers, value, mask, *more)
            simulation.idle = 0
        task.give_up_turn()

    def atomic(semantic: Any, run: Callable[[], Any], changes: Callable[[Any], bool]) -> Any:
        task = simulation.now
        task.give_up_turn()
        if semantic in _RELEASES:
            task.perform(lambda s: s.synced)
        result = run()
        if changes(result):
            simulation.idle = 0
        if semantic in _ACQUIRES:
            task.seen.clear()
        return result

    def new_cas(self: Any, pointer: Any, expected: Any, value: Any, semantic: Any, scope: Any) -> Any:
        return atomic(semantic, lambda: cas(self, pointer, expected, value, semantic, scope),
                      lambda old: bool(np.any(np.asarray(old.data) == np.asarray(expected.data))))

    def new_rmw(self: Any, op: Any, pointer: Any, value: Any, mask: Any, semantic: Any, scope: Any) -> Any:
        return atomic(semantic, lambda: rmw(self, op, pointer, value, mask, semantic, scope), lambda old: bool(np.any(np.asarray(value.data) != 0)))

    def new_barrier(self: Any) -> Any:
        for pending in simulation.now.pending:
            pending.synced = True
        return barrier(self)

    def new_execute(self: Any, *args: Any, **kwargs: Any) -> None:
        known = inspect.getfullargspec(self.fn).args
        given = inspect.getcallargs(self.fn, *args, **{k: v for k, v in kwargs.items() if k in known})
        given = {k: v if k in self.constexprs else interpreter._implicit_cvt(v) for k, v in given.items()}
        scopes.append(interpreter._patch_lang(self.fn))
        grid = tuple(self.grid(given) if callable(self.grid) else self.grid)
        simulation.launch(simulation.now.rank, grid + (1,) * (3 - len(grid)), lambda: self.fn(**given))

    for name, new in zip(names, (new_load, new_store, new_cas, new_rmw, new_barrier)):
        setattr(_BUILDER, name, new)
    interpreter.GridExecutor.__call__ = new_execute
    try:
        yield
    finally:
        for name, original in zip(names, originals):
            setattr(_BUILDER, name, original)
        interpreter.GridExecutor.__call__ = execute
        for scope in reversed(scopes):
            scope.restore()
