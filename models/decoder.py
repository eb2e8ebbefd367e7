"""The device's side of generation: ids, positions, row numbers, end flags and the cache,
and the step that takes them further.

All of them lie in buffers that stay where they are, those of a smaller bucket in the front of them: a
captured step reads and writes them there, and feeds the next one without the host. A row that has ended, or a
slot that has no row, keeps its token and its position: what it writes into the cache lies beyond what it has,
in its own slot. Nothing here decides anything: see `decoding`.

What takes it further are generators of what a pipeline's stages ask each other, so that the stages may be at
several batches at once (`shardlib.run.turns`); where there is no pipeline they ask nothing.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from shardlib.api import Compiled, Prepared, arg_types, shard_of
from shardlib.distributed.runtime import Runtime
from shardlib.models.cache_buffer import CacheBuffer
from shardlib.models.following import follow, going
from shardlib.models.slots import Slots, Smaller, round_up
from shardlib.models.ways import Prompts, Way, Ways
from shardlib.params import Params, fill, leaf_values
from shardlib.run.beside import beside
from shardlib.run.captured import Graph
from shardlib.run.stretches import Stretches
from shardlib.run.turns import Pipeline, Requests, untold
from shardlib.spec import Spec

PROMPT_TOKENS = 1 << 15
"""Tokens of all rows that go through the model at once."""
STAGE_TOKENS = {"cpu": 1 << 12}
"""By device, the same of a pipeline, whose stages are at different chunks at once. Where it says nothing, on
GPUs, they are as elsewhere: smaller ones have not been measured."""
CAPTURED_TOKENS = 1 << 13
"""Up to which the beginning of prompts is captured, once its size comes again:
its launches take longer than its work."""
SMALLEST_CHUNK, ENDS = 16, 16


@dataclass(frozen=True)
class Beginning:
    """A captured beginning of prompts: what it reads, what it gives."""
    ids: Tensor
    last: Tensor
    chosen: Tensor
    graph: Graph


class Decoder:
    """Generates for one batch after another.

    steps: the compiled programs, as `Ways` has them.  draws: whether they take the rows' numbers.  kept: the
    cache.
    graph: steps are captured, in buckets of rows and rounded capacities; else sizes are exact.
    ways: of prompts, else all at once.  pipeline: of a model in stages, which has no other ways.
    chunk: of how many tokens a row's at most, if that is bounded; all but the first go as steps do.
    """

    def __init__(self, name: str, steps: Callable[[int | None, str, int, int], Compiled], draws: bool,
                 weights: Prepared, kept: type[Params], sizes: Mapping[str, int], most: int, runtime: Runtime,
                 cache: CacheBuffer, graph: bool, ways: Ways | None, pipeline: Pipeline | None,
                 chunk: int | None = None) -> None:
        self.name, self.steps, self.draws, self.weights = name, steps, draws, weights
        self.ways, self.pipeline = ways, pipeline
        self.kept, self.sizes, self.most, self.runtime = kept, sizes, most, runtime
        self.buffer, self.graph, self.chunk = cache, graph, chunk
        self.capacity, self._made, self._turn = 0, 0, 0
        self._graphs: dict[tuple[int, int], Graph] = {}
        self._stretches: dict[tuple[int, int], Stretches] = {}          # of a pipeline
        self._beginnings: dict[tuple[int, ...], Beginning | None] = {}      # None: has come once
        self._caches: dict[tuple[int, ...], object] = {}
        self._allocate(0, ENDS)

    # -- a batch ---------------------------------------------------------------------------------------------

    def begin(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, eos_ids: Sequence[int]) -> Slots:
        """Takes the prompts in, and chooses their first tokens."""
        return self._alone(self.beginning(prompts, max_new_tokens, eos_ids))

    def advance(self, slots: Slots) -> None:
        """One more token for every row that lives."""
        self._alone(self.advancing(slots))

    def _alone(self, asks: Requests) -> Any:
        """What it returns, with no other batch beside it."""
        return self.pipeline.run([asks])[0] if self.pipeline else answered(asks)

    def beginning(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, eos_ids: Sequence[int],
                  first: int = 0) -> Requests:
        """As `begin`. first: the number of the first row, by which it draws."""
        slots = self._slots(len(prompts), max(map(len, prompts)) + max_new_tokens)
        if slots.size > len(self.ids) or len(eos_ids) > len(self.ends):
            self._allocate(max(slots.size, len(self.ids)), max(round_up(len(eos_ids)), len(self.ends)))
        rows = [[0] if row is None else prompts[row] for row in slots.rows]
        state = {name: getattr(self, name)[:slots.size]
                 for name in ("ids", "position", "row", "live", "tokens")}
        state["position"].copy_(self._tensor([len(p) for p in rows]))
        state["row"].copy_(self._tensor([first + (row or 0) for row in slots.rows]))
        state["live"].copy_(self._tensor([row is not None for row in slots.rows]))
        self.ends.copy_(self._tensor([*eos_ids, *[-1] * (len(self.ends) - len(eos_ids))]))
        yield from self._prefill(slots.size, rows)
        state["ids"].copy_(state["tokens"])
        state["live"].logical_and_(going(state["tokens"], self.ends))
        return slots

    def _slots(self, rows: int, longest: int) -> Slots:
        """Of so many rows, in a cache that has room for texts as long."""
        self.capacity = min(round_up(longest), self.most) if self.graph else longest
        return Slots.of(rows, self._ranks(rows)) if self.graph else Slots(tuple(range(rows)))

    def advancing(self, slots: Slots) -> Requests:
        """As `advance`."""
        key = slots.size, self.capacity
        title = f"{self.name}, {slots.size} rows of {self.capacity}"
        if not self.graph:
            yield from self._step(*key)
        elif self.pipeline:
            if key not in self._stretches:
                self._stretches[key] = Stretches(title, lambda: self._step(*key), self.runtime,
                                                 self.pipeline.line)
            yield from self._stretches[key].run()
        elif key in self._graphs:
            self._graphs[key].replay()
        else:
            self._graphs[key] = Graph(title, lambda: answered(self._step(*key)), self.runtime)

    def fetch(self, slots: Slots) -> Callable[[], list[int]]:
        """What waits for the tokens that were chosen last, one a slot. At most two of them wait at a time."""
        tokens = self.tokens[:slots.size]
        if not tokens.is_cuda:
            made = tokens.tolist()
            return lambda: made
        self._turn = 1 - self._turn
        host = self.hosts[self._turn][:slots.size]
        host.copy_(tokens, non_blocking=True)
        event = torch.cuda.current_stream(tokens.device).record_event()

        def wait() -> list[int]:
            event.synchronize()
            return host.tolist()
        return wait

    def captured(self, slots: Slots) -> bool:
        """Whether a bucket of this size has its graph."""
        return (slots.size, self.capacity) in (self._stretches if self.pipeline else self._graphs)

    def cache_bytes(self, rows: int, length: int) -> int:
        """Of the keys and values of so many rows on this rank, each `length` long."""
        return sum(map(prod, self._shapes(rows, length).values())) * self.buffer.dtype.itemsize

    def compact(self, slots: Slots, smaller: Smaller) -> None:
        """Moves the rows that live on to the front, each on its own rank."""
        source = self._tensor(smaller.source)
        for held in (self.ids, self.position, self.row, self.live):
            held[:len(source)] = held[source]
        if moves := smaller.moves[self._block(slots.size)]:
            to, origin = (self._tensor(column) for column in zip(*moves))
            for leaf in self._views(slots.size, self.capacity).values():
                for layer in leaf.unbind(0):
                    layer.index_copy_(0, to, layer.index_select(0, origin))

    # -- steps -----------------------------------------------------------------------------------------------

    def _step(self, size: int, capacity: int) -> Requests:
        """Feeds the last tokens, and puts those that follow in their place: all of it on the device."""
        ids, start, last = self.ids[:size, None], self.position[:size], self.zeros[:size]
        chosen = yield from self._run(None, size, capacity, ids, start, last)
        follow(chosen, self.tokens[:size], self.ids[:size], start, self.live[:size], self.ends)

    def _prefill(self, size: int, rows: Sequence[Sequence[int]]) -> Requests:
        """The prompts in chunks, padded on the right: what padding writes is overwritten
        before a query may see it. Of a pipeline no stage waits between them for what the last one chooses: it
        tells all tokens at the end."""
        lengths, chosen = self._tensor([len(p) for p in rows]), torch.zeros_like(self.tokens[:size])
        for leaf in self._views(size, self.capacity).values():
            leaf.zero_()  # a slot that is masked counts as 0 times what lies there: it must not be a NaN
        for begin, count in self._chunks(size, max(map(len, rows))):
            ids = self._tensor(
                [[*p[begin:begin + count], *[0] * (count - len(p[begin:begin + count]))] for p in rows])
            last = (lengths - 1 - begin).clamp(-1, count - 1)           # -1: a row that ended before
            if self.graph and not self.pipeline and begin == 0 and ids.numel() <= CAPTURED_TOKENS:
                self._begin_prompts(ids, last, chosen)
            else:
                start = torch.full_like(lengths, begin)
                ahead = None if self.chunk and begin else begin
                run = self._run(ahead, size, self.capacity, ids, start, last)
                chosen.copy_((yield from untold(run, self.pipeline.line)) if self.pipeline else answered(run))
            here = (lengths > begin) & (lengths <= begin + count)
            self.tokens[:size] = torch.where(here, chosen, self.tokens[:size])
        if self.pipeline:
            self.tokens[:size] = yield self.pipeline.line.tells(self.tokens[:size])

    def _begin_prompts(self, ids: Tensor, last: Tensor, chosen: Tensor) -> None:
        """As `_run` does; from the second time on by a graph."""
        (size, count), capacity = ids.shape, self.capacity
        key = size, capacity, count

        def run() -> None:
            chosen.copy_(answered(self._run(0, size, capacity, ids, self.zeros[:size], last)))
        if key not in self._beginnings:
            self._beginnings[key] = None
            run()
            return
        made = self._beginnings[key]
        if made is None:
            graph = Graph(f"{self.name}, the beginning of {size} rows of {count} in {capacity}", run,
                          self.runtime)
            self._beginnings[key] = Beginning(ids, last, chosen, graph)
            return
        made.ids.copy_(ids)
        made.last.copy_(last)
        made.graph.replay()
        chosen.copy_(made.chosen)

    def _chunks(self, size: int, longest: int) -> Iterator[tuple[int, int]]:
        """(begin, length) of each: of few lengths, so that few programs are made."""
        begin = 0
        while begin < longest:
            staged = STAGE_TOKENS if self.pipeline else {}
            most = max(SMALLEST_CHUNK, round_up(staged.get(self.runtime.device.type, PROMPT_TOKENS) // size))
            wanted = max(SMALLEST_CHUNK, round_up(longest - begin)) if self.graph else longest - begin
            count = min(wanted, most, self.chunk or most, self.capacity - begin)
            yield begin, count
            begin += count

    def _run(self, ahead: int | None, size: int, capacity: int, ids: Tensor, start: Tensor,
             last: Tensor) -> Requests:
        """The tokens that a program chooses, on this rank's shards of whole tensors."""
        way = self._way(ahead, size, capacity, ids.shape[1])
        step = self.steps(ahead, way.over, size, capacity)
        given = {"ids": ids, "start": start, "last": last, **({"row": self.row[:size]} if self.draws else {})}
        types, mesh, here = dict(step.program.args), self.runtime.mesh, self.runtime.coordinate

        def local(given: Mapping[str, Tensor]) -> list[Tensor]:
            return [shard_of(x, types[name], mesh, here) for name, x in given.items()]
        if way.halved == "rows":
            ranks = self._ranks(size)                   # each has a half of its rows in each half
            halves = [{name: x.unflatten(0, (ranks, 2, -1))[:, i].flatten(0, 1) for name, x in given.items()}
                      for i in range(2)]
            made = self._beside(way, [(ahead, local(half), (i, 2)) for i, half in enumerate(halves)], size,
                                capacity)
            chosen = [self._kept(each, size, capacity, (i, 2)) for i, each in enumerate(made)]
            return torch.cat([x.view(ranks, -1) for x in chosen], 1).flatten()
        if way.halved == "tokens":
            half = ids.shape[1] // 2
            first = {**given, "ids": ids[:, :half], "last": last.clamp(max=half - 1)}
            second = {**given, "ids": ids[:, half:], "start": start + half,
                      "last": (last - half).clamp(min=-1)}
            calls = [(ahead, local(first), (0, 1)), (ahead + half, local(second), (0, 1))]
            made = self._beside(way, calls, size, capacity)
            if all(after is self._cache(size, capacity) for _, after in made):
                return torch.where(last < half, *(chosen for chosen, _ in made))
            # of two caches none has all: a layout under which they are not updated in place
            self.ways.made[ahead, size, capacity, ids.shape[1]] = Way()
            return (yield from self._run(ahead, size, capacity, ids, start, last))
        args = self._arguments(local(given), size, capacity)
        return self._kept((yield from step.requests(*args)) if self.pipeline else step(*args), size, capacity)

    def _way(self, ahead: int | None, size: int, capacity: int, length: int) -> Way:
        return self.ways(ahead, size, capacity, length, self._ranks(size)) if self.ways else Way()

    def _beside(self, way: Way, calls: Sequence[tuple[int | None, Sequence[Tensor], tuple[int, int]]],
                size: int, capacity: int) -> list[tuple[Tensor, object]]:
        """Of each (tokens ahead, what is given, part of the rows) what the program gives."""
        return beside(*(
            self.steps(ahead, way.over, size // part[1], capacity).requests(
                *self._arguments(given, size, capacity, part)) for ahead, given, part in calls))

    def prompts(self, rows: int, longest: int, max_new_tokens: int) -> Prompts:
        """How the beginning of so many prompts goes through the model."""
        size = self._slots(rows, longest + max_new_tokens).size
        _, count = next(self._chunks(size, longest))
        way = self._way(0, size, self.capacity, count)
        sizes = {**self.sizes, "B": size // (1 + (way.halved == "rows")), "S": self.capacity,
                 "T": count // (1 + (way.halved == "tokens"))}
        return Prompts(way, self.steps(0, way.over, sizes["B"], self.capacity).program, sizes)

    def _arguments(self, given: Sequence[Tensor], size: int, capacity: int,
                   part: tuple[int, int] = (0, 1)) -> tuple[object, ...]:
        """What a program takes: ids, weights, cache, and what else is given."""
        ids, *more = given
        return ids, self.weights, self._cache(size, capacity, part), *more

    def _kept(self, made: tuple[Tensor, object], size: int, capacity: int,
              part: tuple[int, int] = (0, 1)) -> Tensor:
        """The tokens of a call, whose cache is this one's."""
        chosen, after = made
        if after is not self._cache(size, capacity, part):  # a layout under which it is not updated in place
            for path, x in self._views(size, capacity, part).items():
                x.copy_(dict(leaf_values(after, "cache"))[path])
        return chosen

    # -- buffers ---------------------------------------------------------------------------------------------

    def _allocate(self, rows: int, ends: int) -> None:
        """The state of so many slots; graphs on smaller buffers are let go."""
        device = self.runtime.device
        self._forget()
        zeros = torch.zeros((5, rows), dtype=torch.int64, device=device)
        self.ids, self.position, self.row, self.tokens, self.zeros = zeros
        self.live = torch.zeros(rows, dtype=torch.bool, device=device)
        self.ends = torch.full((ends,), -1, dtype=torch.int64, device=device)
        self.hosts = torch.zeros((2, rows), dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")

    def _forget(self) -> None:
        """Lets go the graphs on buffers that are no more."""
        self._graphs.clear()
        self._stretches.clear()
        self._beginnings.clear()

    def _tensor(self, values: Sequence) -> Tensor:
        return torch.tensor(values, device=self.runtime.device)

    def _kinds(self, size: int, capacity: int) -> dict[str, Spec]:
        return arg_types(self.steps(None, "", size, capacity).program, "cache")

    def _ranks(self, rows: int) -> int:
        """Over how many ranks the cache is split by rows."""
        kind = next(iter(self._kinds(rows, self.capacity).values()))
        return self.runtime.mesh.size(kind.dims[1].axes)

    def _block(self, size: int) -> int:
        """Which of these this rank is."""
        kind = next(iter(self._kinds(size, self.capacity).values()))
        start, count = self.runtime.mesh.extent(size, kind.dims[1].axes, self.runtime.coordinate)
        return start // count

    def _shapes(self, size: int, capacity: int) -> dict[str, tuple[int, ...]]:
        sizes, mesh, here = ({**self.sizes, "B": size, "S": capacity}, self.runtime.mesh,
                             self.runtime.coordinate)
        return {path: mesh.local_shape(kind, sizes, here)
                for path, kind in self._kinds(size, capacity).items()}

    def _views(self, size: int, capacity: int, part: tuple[int, int] = (0, 1)) -> dict[str, Tensor]:
        """path -> this rank's leaf; of its rows the part (i, of so many)."""
        shapes = self._shapes(size, capacity)
        if self._made != self.buffer.made or not self.buffer.room(shapes):
            self._forget()                              # they, and what they hold, first
            self._caches.clear()
        views = self.buffer.views(shapes)
        self._made = self.buffer.made
        i, parts = part
        return {path: x.chunk(parts, 1)[i] for path, x in views.items()} if parts > 1 else views

    def _cache(self, size: int, capacity: int, part: tuple[int, int] = (0, 1)) -> object:
        """The cache as the programs take it."""
        views, key = self._views(size, capacity, part), (size, capacity, *part)
        if key not in self._caches:
            cache = fill(self.kept, "cache", lambda path: views[path])
            self._caches[key] = self.steps(None, "", size // part[1], capacity).prepare("cache", cache)
        return self._caches[key]


def answered(asks: Requests) -> Any:
    """What a generator returns that asks nothing."""
    try:
        next(asks)
    except StopIteration as stop:
        return stop.value
    raise AssertionError("a request that nobody answers")
