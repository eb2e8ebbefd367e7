"""Captured steps: a call that runs once, is recorded as a CUDA graph,
and is replayed from then on with one launch.

    step = compile(f, layout, runtime=runtime, graph=True)
    y = step(x, w)                  # runs, and is recorded, for these shapes and this w
    y = step(x, w)                  # replays

A tensor argument is copied into a buffer of the graph; a pytree (weights, a cache) is read, and where it is
donated written, where it lies: another one is another graph. Results are copied out of the graph's own
buffers, so that they are the caller's, as those of an eager call are. A graph keeps alive what it reads.
Eager calls and replays may take turns, on one stream at a time.

On the CPU nothing is recorded, and a replay is the call itself, on the same buffers: the same code is right
or wrong there, too.

Refused with a `SpecError`: `cond`, whose branch the host would choose (`graph="auto"` runs such a function
eagerly), arguments that want gradients, and ranks that come to record different graphs.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NoReturn
from warnings import catch_warnings, filterwarnings

import torch
from torch import Tensor

from shardlib.distributed.graph_capture import chained, new_graph, on_capture_stream
from shardlib.distributed.rank_error import RankError
from shardlib.distributed.runtime import Runtime
from shardlib.distributed.streams import passed
from shardlib.errors import SpecError
from shardlib.language.cond import COND
from shardlib.program import Program, Step


class Graph:
    """`call`, which takes and returns nothing: run once when this is made, and again by each `replay()`.

    Every rank makes it, with one `plan`: its title, where pieces are alike. It is recorded on the stream on
    which it has run, where communicators and libraries then have what they need; on that of the caller it
    begins after what is there, and ends before what comes.

    stretch: of a call that has run and that goes on behind it (`stretches`): it is recorded alone, while
    messages may be under way, so that the host waits for nothing.
    """

    def __init__(self, title: str, call: Callable[[], None], runtime: Runtime, plan: str = "",
                 stretch: bool = False) -> None:
        self.title, self._call = title, call
        self._graph: torch.cuda.CUDAGraph | None = None
        if not stretch:
            runtime.compare_plans(f"the graph of {plan or title}", plan or title)
        if runtime.device.type != "cuda":
            call()
            return
        graph, pool = new_graph(runtime.device)
        with on_capture_stream(runtime.device) as stream, chained():
            if not stretch:
                call()
            try:
                with (_capture(graph, pool) if stretch
                      else torch.cuda.graph(graph, pool, stream, "thread_local")):
                    call()
            except RankError:
                raise
            except RuntimeError as error:
                raise SpecError(f"{title} cannot be captured: {str(error).splitlines()[0]}; compile it "
                                "without graph=True") from error
        self._graph = graph
        self._begin = runtime.replays(title, self)

    def replay(self) -> None:
        if self._graph is None:
            self._call()
            return
        ends: list[torch.cuda.Event] = []
        self._begin(lambda: bool(ends) and passed(ends[0]))
        self._graph.replay()
        ends.append(torch.cuda.current_stream().record_event())

    def close(self) -> None:
        """Lets go what was recorded; it cannot be replayed any more."""
        self._graph.reset()
        self._graph, self._call = None, partial(_closed, self.title)


@contextmanager
def _capture(graph: torch.cuda.CUDAGraph, pool: tuple[int, int]) -> Iterator[None]:
    """As torch.cuda.graph, which first waits for all that the GPU has to do. A stretch may be empty."""
    graph.capture_begin(pool, "thread_local")
    try:
        yield
    finally:
        with catch_warnings():
            filterwarnings("ignore", "The CUDA Graph is empty")
            graph.capture_end()


def _closed(title: str) -> NoReturn:
    raise SpecError(f"{title}: the runtime is closed; connect again")


MOST_PYTREES = 16
"""Graphs for arguments of the same shapes: each keeps the pytrees alive that it reads."""


class Captures:
    """The graphs of one compiled function, by what it is called with."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self._steps: dict[tuple, _Step] = {}

    def around(self, name: str, sizes: str, key: tuple, main: Callable, copied: Sequence[bool]) -> Callable:
        """`main`, replayed; see `run`."""
        return lambda *values: self.run(name, sizes, key, main, values, copied)

    def run(self, name: str, sizes: str, key: tuple, main: Callable, values: Sequence[Any],
            copied: Sequence[bool]) -> tuple[Any, ...]:
        """What main(*values) returns. key: of main, and of the shapes of what is `copied`;
        others are known by where they lie, and how.

        sizes: the global ones, which all ranks say alike.
        """
        here = (key, *((t.data_ptr(), t.stride()) for v, moves in zip(values, copied) if not moves
                       for t in _tensors(v)))
        given = [v for v, moves in zip(values, copied) if moves]
        if torch.is_grad_enabled() and any(t.requires_grad for v in values for t in _tensors(v)):
            raise SpecError(f"{name}: an argument wants a gradient, and a replay makes none; compile "
                            "value_and_grad of it, or call it in torch.no_grad()")
        with torch.inference_mode():                    # which may write to tensors of both kinds
            step = self._steps.get(here)
            if step is None:
                if sum(known == key for known, *_ in self._steps) == MOST_PYTREES:
                    raise SpecError(f"{name}: {MOST_PYTREES} graphs of one shape, each of other pytrees, "
                                    "which a graph reads where they lie; donate those that it returns, or "
                                    "compile it without graph=True")
                title = f"{name} of {', '.join('x'.join(map(str, v.shape)) or '()' for v in given)}"
                step = self._steps[here] = _Step(title, f"{name}, {sizes}", main, values, copied,
                                                 self.runtime)
            else:
                for buffer, value in zip(step.taken, given):
                    buffer.copy_(value)
                step.graph.replay()
        return step.results()


class _Step:
    """main(*values) on buffers of its own. taken: those of the values that are copied; made: the results."""

    def __init__(self, title: str, plan: str, main: Callable, values: Sequence[Any], copied: Sequence[bool],
                 runtime: Runtime) -> None:
        with torch.inference_mode(False):
            self.values = [v.clone() if moves else v for v, moves in zip(values, copied)]
        self.taken = [v for v, moves in zip(self.values, copied) if moves]
        self.given_back = [v for v, moves in zip(self.values, copied) if not moves]
        self.made: list[Any] = []

        def call() -> None:
            out = main(*self.values)
            if not self.made:
                with torch.inference_mode(False):
                    self.made = [x if any(x is v for v in self.values) else torch.empty_like(x) for x in out]
            for buffer, x in zip(self.made, out):
                if buffer is not x:
                    buffer.copy_(x)
        self.graph = Graph(title, call, runtime, plan)

    def results(self) -> tuple[Any, ...]:
        """An argument that is updated in place is returned as it came; all else is a copy."""
        with torch.inference_mode(False), torch.no_grad():
            return tuple(x if any(x is v for v in self.given_back) else x.clone() for x in self.made)


def conditional(program: Program) -> Step | None:
    """A step of the program, or of a function in it, whose course depends on data."""
    inner = (found for s in program.steps
             for found in ([s] if s.op is COND else [conditional(body) for body in s.bodies]) if found)
    return next(inner, None)


def _tensors(value: Any) -> Sequence[Tensor]:
    return (value,) if isinstance(value, Tensor) else value
