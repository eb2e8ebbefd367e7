"""All ranks of a kernel's protocol in one process, without a GPU:
every block of every rank takes turns, as a seed decides.

The kernels run in Triton's interpreter (TRITON_INTERPRET=1 when triton is imported). A rank is a Python
function that launches kernels; a launch becomes one task a block. Tasks change hands at every store, volatile
load and atomic, by the seed, which also makes some ranks and blocks slow and some memory lazy. Memory is as
weak as a GPU's:

- a plain store becomes visible some time later, in any order, in parts; at the latest when its kernel ends
- a release makes visible only what a barrier of the block came after
- a plain load returns what memory holds or has held since the block began; after an acquire and a barrier,
  since that acquire
- volatile loads and atomics see what is visible; a block always sees its own stores, and its plain loads of
  an address never go back in time
- a rank starts its blocks in order, and holds at most `resident` of them at once

    Simulation(seed=3).run([lambda: one_shot(x0, workspace0, blocks=2),
                            lambda: one_shot(x1, workspace1, blocks=2)])

returns what each rank returned. `Deadlock` says who waits for ever. A pass is evidence, not proof: this is a
model, without the ordering of copy engines and without threads of a block that part ways; what it finds is
real.
"""
from __future__ import annotations

import inspect
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import triton.runtime.interpreter as interpreter

_BUILDER = interpreter.InterpreterBuilder
_SEMANTICS = interpreter._ir.MEM_SEMANTIC
_RELEASES = (_SEMANTICS.RELEASE, _SEMANTICS.ACQUIRE_RELEASE)
_ACQUIRES = (_SEMANTICS.ACQUIRE, _SEMANTICS.ACQUIRE_RELEASE)


class Deadlock(Exception):
    """All blocks that are left poll, and nothing will change in memory."""


class _Killed(BaseException):
    """Ends the thread of a task that is no longer wanted."""


class _Store:
    """Elements on their way to memory. synced: a barrier has come after it in its block."""

    def __init__(self, pointers: Any, values: Any, mask: Any) -> None:
        self.pointers, self.values, self.mask, self.synced = (np.array(pointers), np.array(values),
                                                              np.array(mask), False)

    def touches(self, addresses: set[int]) -> bool:
        return not addresses.isdisjoint(self.pointers.ravel().tolist())


class _Task(threading.Thread):
    """One block of one launch, or the program of a rank: a thread that runs only while it has the turn.

    Of the versions of memory (`Simulation.version`): since: the oldest that its plain loads may still see;
    acquired: of its last acquire; floor: for an address, the oldest it may see there. idle: it polls in vain,
    until memory changes where it has looked.
    """

    def __init__(self, simulation: Simulation, rank: int, body: Callable[[], Any], block: int = -1,
                 grid: tuple[int, ...] = ()) -> None:
        super().__init__(daemon=True)
        self.simulation, self.rank, self.body, self.block, self.grid = simulation, rank, body, block, grid
        self.turn, self.yielded = threading.Semaphore(0), threading.Semaphore(0)
        self.done, self.killed, self.waits = False, False, False
        self.result: Any = None
        self.pace = simulation.paces[rank] * simulation.random.choice((1.0, 1.0, 1.0, 0.05))
        self.pending: list[_Store] = []
        self.since, self.acquired, self.idle = 0, 0, False
        self.floor: dict[tuple[int, int], int] = {}
        self.polled: dict[bytes, set[int]] = {}

    def run(self) -> None:
        self.turn.acquire()
        try:
            if not self.killed:
                self.since = self.acquired = self.simulation.version
                self.result = self.body()
        except _Killed:
            pass
        except BaseException as error:
            self.simulation.error = self.simulation.error or _cause(error)
        self.done = True
        self.yielded.release()

    def give_up_turn(self) -> None:
        self.yielded.release()
        self.turn.acquire()
        if self.killed:
            raise _Killed

    def end(self) -> None:
        """Ends the thread, wherever it is."""
        self.killed = True
        self.turn.release()
        self.join()

    def publish(self, chosen: Callable[[_Store], bool] = lambda store: True) -> None:
        """Makes the chosen stores visible."""
        for store in [s for s in self.pending if chosen(s)]:
            self.simulation.perform(self, store, store.mask)
            self.pending.remove(store)

    def polls(self, pointers: Any) -> None:
        """It has looked there and changed nothing: idle if it has done so before, since it last woke."""
        key = np.asarray(pointers).tobytes()
        self.idle = key in self.polled
        if not self.idle:
            self.polled[key] = _eights(np.ravel(pointers).tolist())

    def wakes(self) -> None:
        """Memory has changed where it looks, or it has done anything else."""
        self.idle, self.polled = False, {}


class Simulation:
    """One run of all ranks. weak: stores are late and loads early; boundary: a kernel ends with its stores
    performed; resident: how many blocks a rank holds at once, None for all; patience: how often all blocks
    poll in vain before it is a deadlock."""

    def __init__(self, seed: int = 0, *, weak: bool = True, boundary: bool = True,
                 resident: int | None = None, patience: int = 50) -> None:
        self.random, self.weak, self.boundary, self.resident, self.patience = (
            random.Random(seed), weak, boundary, resident, patience)
        self.haste = self.random.choice((0.05, 0.3, 1.0))
        self.tasks: list[_Task] = []
        self.error: BaseException | None = None
        self.now: _Task | None = None
        self.version, self.vain = 0, 0
        # (address, bytes) -> versions that changed it, and the value before
        self.history: dict[tuple[int, int], list[tuple[int, Any]]] = {}

    def run(self, ranks: Sequence[Callable[[], Any]]) -> list[Any]:
        """What each rank's function returned.

        Deadlock if they wait for each other; else the first error of any.
        """
        self.paces = [self.random.choice((1.0, 1.0, 0.05)) for _ in ranks]
        hosts = [_Task(self, rank, program) for rank, program in enumerate(ranks)]
        self.tasks = list(hosts)
        for host in hosts:
            host.start()
        with _patched(self):
            try:
                while not all(host.done for host in hosts):
                    self._step()
            finally:
                for task in self.tasks:
                    task.end()
                for task in self.tasks:
                    task.publish()
        return [host.result for host in hosts]

    # -- turns -----------------------------------------------------------------------------------------------

    def _step(self) -> None:
        """A turn of one task; now and then a store becomes visible."""
        able = [t for t in self.tasks if not t.done and not t.waits and self._started(t)]
        awake = [t for t in able if not t.idle]
        late = [t for t in self.tasks if t.pending]
        if late and (not awake or self.random.random() < self.haste):
            self._perform_some(self.random.choice(late))
        elif awake:
            self.vain = 0
            self._turn(self.random.choices(awake, [t.pace for t in awake])[0])
        elif self.vain < self.patience:
            self.vain += 1
            for task in able:
                self._turn(task)
        else:
            waiting = ", ".join(f"block {t.block} of rank {t.rank}" for t in self.tasks
                                if not t.done and t.block >= 0)
            raise Deadlock(f"no progress: {waiting or 'no block is left'}")

    def _turn(self, task: _Task) -> None:
        self.now = task
        if task.block >= 0:
            interpreter.interpreter_builder.set_grid_dim(*task.grid)
            interpreter.interpreter_builder.set_grid_idx(task.block, 0, 0)
        task.turn.release()
        task.yielded.acquire()
        if self.error is not None:
            raise self.error

    def _started(self, task: _Task) -> bool:
        if task.block < 0 or self.resident is None:
            return True
        return sum(not t.done and t.rank == task.rank and 0 <= t.block < task.block
                   for t in self.tasks) < self.resident

    def launch(self, rank: int, grid: tuple[int, ...], body: Callable[[], None]) -> None:
        """Called by a rank's own task: its blocks take part until all are done."""
        host = self.now
        blocks = [_Task(self, rank, body, block, grid) for block in range(grid[0])]
        self.tasks += blocks
        for block in blocks:
            block.start()
        host.waits = True
        host.give_up_turn()
        for block in blocks:
            block.join()
            if self.boundary:
                block.publish()
        self.tasks = [t for t in self.tasks if t not in blocks or t.pending]

    def ended(self, task: _Task) -> None:
        """Called by a block at its end: the last one lets its rank go on."""
        if not any(t.rank == task.rank and t.block >= 0 and not t.done and t is not task for t in self.tasks):
            next(t for t in self.tasks if t.rank == task.rank and t.block < 0).waits = False

    # -- memory ----------------------------------------------------------------------------------------------

    def perform(self, task: _Task, store: _Store, mask: Any) -> None:
        """Writes the elements of the store where mask is."""
        with self.change(task, store.pointers, mask, store.values.dtype, store=True):
            interpreter._interpreter.store(store.pointers, store.values, mask)

    def _perform_some(self, task: _Task) -> None:
        """Makes a store of the task, or a part of it, visible."""
        store = self.random.choice(task.pending)
        part = np.array([self.random.random() < 0.5 for _ in range(store.mask.size)]).reshape(
            store.mask.shape)
        mask = store.mask & part if self.random.random() < 0.5 else store.mask
        self.perform(task, store, mask)
        store.mask = store.mask & ~mask
        if not store.mask.any():
            task.pending.remove(store)

    @contextmanager
    def change(self, task: _Task, pointers: Any, mask: Any, dtype: Any,
               store: bool = False) -> Iterator[None]:
        """Around a change of memory: a new version, if any value changes or it is a store,
        whatever was there; the task has seen it."""
        before = _peek(pointers, mask, dtype)
        yield
        after = _peek(pointers, mask, dtype)
        changed = (before.view(np.uint8).reshape(before.size, -1)
                   != after.view(np.uint8).reshape(after.size, -1)).any(-1)
        self.version += int(changed.any() or store)
        if changed.any():
            where = _eights(np.ravel(pointers)[changed].tolist())
            for each in self.tasks:
                if not all(map(where.isdisjoint, each.polled.values())):
                    each.wakes()
        for address, old, differs, chosen in zip(np.ravel(pointers).tolist(), before.ravel(),
                                                 changed.tolist(), np.ravel(mask).tolist()):
            if differs:
                self.history.setdefault((address, dtype.itemsize), []).append((self.version, old))
            if chosen:
                task.floor[address, dtype.itemsize] = self.version

    def early(self, task: _Task, pointers: Any, mask: Any, now: Any) -> Any:
        """What a plain load returns where memory holds `now`:
        as of a random version that the task may still see."""
        version = (self.version if self.random.random() < 0.5
                   else self.random.randint(task.since, self.version))
        values = np.array(now)
        flat = values.reshape(-1)
        for i, (address, chosen) in enumerate(zip(np.ravel(pointers).tolist(), np.ravel(mask).tolist())):
            key = (address, values.itemsize)
            if chosen and key in self.history:
                seen = task.floor[key] = max(version, task.floor.get(key, 0))
                flat[i] = next((old for changed, old in self.history[key] if changed > seen), flat[i])
        return values


def _eights(addresses: list[int]) -> set[int]:
    """The aligned 8 bytes that each word of at most 8 lies in."""
    return {address >> 3 for address in addresses}


def _peek(pointers: Any, mask: Any, dtype: Any) -> Any:
    return interpreter._interpreter.load(pointers, mask, np.zeros_like(pointers, dtype=dtype), dtype)


def _cause(error: BaseException) -> BaseException:
    """The error itself, without what the interpreter wraps around it at each call of a function."""
    while isinstance(error, interpreter.InterpreterError) and error.__cause__ is not None:
        error = error.__cause__
    return error


@contextmanager
def _patched(simulation: Simulation) -> Iterator[None]:
    """The interpreter's loads, stores, atomics, barriers and launches,
    by the rules of the simulation, until the end."""
    names = ("create_masked_load", "create_masked_store", "create_atomic_cas", "create_atomic_rmw",
             "create_barrier")
    load, store, cas, rmw, barrier = originals = [getattr(_BUILDER, name) for name in names]
    execute, patch_language = interpreter.GridExecutor.__call__, interpreter._patch_lang
    scopes: dict[tuple[int, ...], Any] = {}
    languages: dict[Any, tuple[int, ...]] = {}

    def see_own(task: _Task, pointers: Any) -> None:
        if task.pending:
            addresses = set(np.ravel(pointers).tolist())
            task.publish(lambda s: s.touches(addresses))

    def new_load(self: Any, pointers: Any, mask: Any, *more: Any) -> Any:
        task, volatile = simulation.now, bool(more[-1])
        if volatile:
            task.give_up_turn()
        see_own(task, pointers.data)
        value = load(self, pointers, mask, *more)
        if volatile:
            task.polls(pointers.data)
        elif simulation.weak:
            return interpreter.TensorHandle(simulation.early(task, pointers.data, mask.data, value.data),
                                            value.dtype)
        return value

    def new_store(self: Any, pointers: Any, value: Any, mask: Any, *more: Any) -> None:
        task = simulation.now
        see_own(task, pointers.data)  # stores of a block to one address keep their order
        task.pending.append(_Store(pointers.data, value.data, mask.data))
        if not simulation.weak:
            task.publish()
        task.wakes()
        task.give_up_turn()

    def atomic(pointers: Any, mask: Any, dtype: Any, semantic: Any, run: Callable[[], Any]) -> Any:
        task = simulation.now
        task.give_up_turn()
        see_own(task, pointers)
        if semantic in _RELEASES:
            task.publish(lambda s: s.synced)
        version = simulation.version
        with simulation.change(task, pointers, mask, dtype):
            result = run()
        if simulation.version == version:
            task.polls(pointers)
        else:
            task.wakes()
        if semantic in _ACQUIRES:
            task.acquired = simulation.version
        return result

    def new_cas(self: Any, pointer: Any, expected: Any, value: Any, semantic: Any, scope: Any) -> Any:
        mask = np.ones_like(pointer.data, dtype=bool)
        return atomic(pointer.data, mask, value.data.dtype, semantic,
                      lambda: cas(self, pointer, expected, value, semantic, scope))

    def new_rmw(self: Any, op: Any, pointer: Any, value: Any, mask: Any, semantic: Any, scope: Any) -> Any:
        return atomic(pointer.data, mask.data, value.data.dtype, semantic,
                      lambda: rmw(self, op, pointer, value, mask, semantic, scope))

    def new_barrier(self: Any) -> Any:
        task = simulation.now
        task.since = task.acquired
        for pending in task.pending:
            pending.synced = True
        return barrier(self)

    def patch_once(function: Any) -> Any:
        """The interpreter patches Triton's language at every call of a function,
        which takes most of the time."""
        if function not in languages:
            known = {id(interpreter.tl), id(interpreter.tl.core)}
            languages[function] = tuple(sorted(known & {id(v) for v in function.__globals__.values()}))
        if languages[function] not in scopes:
            scope = scopes[languages[function]] = patch_language(function)
            # Triton 3.6 fails with numpy 2.4
            scope.set_attr(interpreter.tl.tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    def new_execute(self: Any, *args: Any, **kwargs: Any) -> None:
        known = inspect.getfullargspec(self.fn).args
        given = inspect.getcallargs(self.fn, *args, **{k: v for k, v in kwargs.items() if k in known})
        given = {k: v if k in self.constexprs else interpreter._implicit_cvt(v) for k, v in given.items()}
        patch_once(self.fn)
        grid = tuple(self.grid(given) if callable(self.grid) else self.grid)
        assert all(n == 1 for n in grid[1:]), f"grids of one dim, not {grid}"

        def block() -> None:
            self.fn(**given)
            simulation.ended(simulation.now)
        simulation.launch(simulation.now.rank, grid + (1,) * (3 - len(grid)), block)

    for name, new in zip(names, (new_load, new_store, new_cas, new_rmw, new_barrier)):
        setattr(_BUILDER, name, new)
    interpreter.GridExecutor.__call__, interpreter._patch_lang = new_execute, patch_once
    builder, options = interpreter.interpreter_builder, interpreter.interpreter_builder.options
    builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)   # a sum would be five
    try:
        yield
    finally:
        for name, original in zip(names, originals):
            setattr(_BUILDER, name, original)
        interpreter.GridExecutor.__call__, interpreter._patch_lang = execute, patch_language
        builder.options = options
        for scope in reversed(scopes.values()):
            scope.restore()
