"""One rank's part of a program under a schedule: code for each of its stages, run in the order of its list.

A part is the generated code of one stage, a generator that yields its collectives. What a rank yields is
asked of whoever drives it, the simulator or real ranks:

    (group, method, operand, *more)         a collective of ranks, all of which ask for it
    (POST, message, x)                      a message to another rank, which nobody waits for here
    (TAKE, message, room)                   the message that another rank has posted

A message says of which action it is and from which stage to which, so that it is found whatever comes first.
Before and after the microbatches all stages of a rank are at the same program. What they ask of other stages
is one request of the rank; between its own stages it sees to it itself.
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shardlib.compiler.microbatches import Cut
from shardlib.errors import SpecError
from shardlib.language.held import here, runs
from shardlib.language.scan import SCAN
from shardlib.lowering.emit import Emitter
from shardlib.lowering.load import load
from shardlib.mesh import Mesh
from shardlib.program import Program, Scan
from shardlib.run.stopwatch import Stopwatch
from shardlib.schedules.folding import STAGES, TIME, Fold, timed, timeless
from shardlib.schedules.schedule import Action
from shardlib.spec import Spec

POST, TAKE = "post", "take"
Asking = Generator[tuple, Any, Any]


class Message(NamedTuple):
    """What one stage sends another. line: of the pipelines side by side, this one's first rank.

    part: in which action, as F3; number: which of several.
    """
    line: int
    part: str
    source: int
    target: int
    number: int

    def __str__(self) -> str:
        return f"{self.part} from stage {self.source} to {self.target}"


@dataclass(frozen=True)
class _Group:
    """A group in generated code: its axes, and what the driver has for it; None where that is one rank."""
    axes: tuple[str, ...]
    group: Any


@dataclass(frozen=True)
class Part:
    """Generated code of a stage: its arguments and results by name."""
    main: Callable[..., Asking]
    takes: tuple[str, ...]
    gives: tuple[str, ...]


@dataclass
class RankProgram:
    """What one rank does of a program under a schedule.

    group_of(axes): the group of the real mesh over these axes, as the driver wants it.
    most: after a run, the most bytes that were kept for backward at once.  watch: told of each action.
    """
    fold: Fold
    cut: Cut
    sizes: Mapping[str, int]
    coordinate: Mapping[str, int]
    group_of: Callable[[tuple[str, ...]], Any]
    device: torch.device
    lines: dict[str, Any] = field(default_factory=dict)
    sites: list = field(default_factory=list)
    wires: dict[str, Any] = field(default_factory=dict)
    most: int = 0
    doing: str = ""
    watch: Stopwatch | None = None

    def __post_init__(self) -> None:
        still, self.stages = self.fold.still, self.fold.stages(self.coordinate.get(STAGES, 0))
        self.types, self.kinds = self.cut.program.types(), self.cut.kinds
        self._line = self.fold.line(self.coordinate)
        self._made: dict[str, Callable[..., Asking]] = {}
        self.around = {(s, name): self._part(part, still, self.fold.place(self.coordinate, s, 0))
                       for s in self.stages for name, part in (("before", self.cut.before),
                                                               ("after", self.cut.after))}
        units = {s: self.cut.at(self.fold.place(self.coordinate, s, 0)) for s in self.stages}
        kinds = self.fold.schedule.kinds
        self.units = {(s, kind, m): self._part(unit, self.fold.whole, self.fold.place(self.coordinate, s, m))
                      for s in self.stages for kind, unit in zip(kinds, units[s])
                      for m in range(self.fold.schedule.microbatches)}

    def _part(self, program: Program, mesh: Mesh, at: Mapping[str, int]) -> Part:
        e = Emitter(mesh, mesh.rank(at), self.sizes, yields=True,
                    given={path: self.kinds[path] for path, _ in program.arg_leaves()},
                    layered=self._layered if mesh is self.fold.whole else ())
        source = e.program(program)
        key = f"{source}{sorted(e.groups.items())}"
        if key not in self._made or e.sites or e.helpers:
            groups = {name: _Group(axes, self._group(axes)) for axes, name in e.groups.items()}
            self._made[key] = load(source, e.space(self.device), groups, program.name)
            self.lines[self._made[key].__code__.co_filename] = e.lines
            self.sites += e.index_sites()
            self.wires |= e.wires
        return Part(self._made[key], tuple(path for path, _ in program.arg_leaves()),
                    tuple(r.values[0] for r in program.results))

    def _group(self, axes: tuple[str, ...]) -> Any:
        """The group of real ranks; along the stages, the ranks that have them."""
        real = tuple(a for a in axes if a != TIME)
        return self.group_of(real) if self.fold.mesh.size(real) > 1 else None

    # -- a run -----------------------------------------------------------------------------------------------

    def run(self, args: Mapping[str, Tensor | None]) -> Asking:
        """The result leaves, of the argument leaves: of each, what this rank holds."""
        given = {path: self.fold.pieces(x, self.types[path], self.sizes, self.coordinate)
                 for path, x in args.items() if x is not None}
        env = {s: {path: of[s] for path, of in given.items()} for s in self.stages}
        made = yield from self._together("before", env)
        for s in self.stages:
            env[s].update(zip(self.cut.first, made[s]))
        kept: dict[tuple[int, int], dict[str, Tensor]] = {}
        sums: dict[int, dict[str, Any]] = {s: {} for s in self.stages}
        for action in self.fold.schedule.ranks[self.coordinate.get(STAGES, 0)]:
            yield from self._act(action, env[action.stage], kept, sums[action.stage])
        self.doing = ""
        for s in self.stages:
            env[s].update((name, self._summed(name, found)) for name, found in sums[s].items())
        made = yield from self._together("after", env)
        return tuple(self._result(name, kind, {s: made[s][i] for s in self.stages if made[s][i] is not None})
                     for i, (name, kind) in enumerate(self.cut.program.result_leaves()))

    def _result(self, name: str, kind: Spec, found: Mapping[int, Tensor]) -> Tensor:
        """What this rank has of a result; room for it, where other ranks' stages hold it."""
        return self.fold.together(found, kind) if found else self._room(name, timeless(kind), self.stages[0])

    def _room(self, name: str, kind: Spec, s: int) -> Tensor:
        shape = self.fold.still.local_shape(kind, self.sizes, self.fold.place(self.coordinate, s, 0))
        return torch.empty(shape, dtype=getattr(torch, self.kinds[name]), device=self.device)

    def _act(self, action: Action, env: Mapping[str, Tensor], kept: dict[tuple[int, int], dict[str, Tensor]],
             sums: dict[str, Any]) -> Asking:
        """One action: what it takes is cut from what is there once, or was kept; what it gives is kept, and
        added up."""
        s, kind, m = action
        part, mine = self.units[s, kind, m], kept.setdefault((s, m), {})
        self.doing = f"stage {s}, microbatch {m}, {dict(F='forward').get(kind, 'backward')}"
        later = {n for k in "FIWB" if ("FIWB".index(k) > "FIWB".index(kind)) and (s, k, m) in self.units
                 for n in self.units[s, k, m].takes}
        if self.watch:
            self.watch.begin()
        args = [mine[n] if n in mine else self._slice(n, env.get(n), s, m) for n in part.takes]
        for name in [n for n in mine if n not in later]:
            del mine[name]
        code = part.main(*args)
        del args
        made = yield from self._asked(_posting(code, self._line, s, f"{kind}{m}"))
        for name, x in zip(part.gives, made):
            if name in self._crossing:
                self._add(sums, name, x, m)
            if name in later:
                mine[name] = x
        del made
        if self.watch:
            self.watch.end(action)
        if not mine:
            del kept[s, m]
        self.most = max(self.most, _bytes(kept))

    @cached_property
    def _crossing(self) -> set[str]:
        return {path for path, _ in self.cut.after.arg_leaves()}

    def _slice(self, name: str, x: Tensor | None, s: int, m: int) -> Tensor | None:
        """The part that microbatch m of stage s has of what is there for all of them."""
        if x is None or not timed(kind := self.types[name]):
            return x
        for i, dim in enumerate(kind.dims):
            if any(TIME in f.axes for f in dim.factors):
                first, here = (self.fold.whole.rows(dim, self.sizes, self.fold.place(self.coordinate, s, at))
                               for at in (0, m))
                x = x.narrow(i, here[0] - first[0], here[1])
        return x.contiguous()

    @cached_property
    def _layered(self) -> frozenset[str]:
        """What microbatches have as lists of layers: what scans stack, and only scans unstack, or sums add
        up. Nothing of it is copied."""
        scans = [step for unit in self.cut.units for step in unit.steps if step.op is SCAN]
        made = {name for step in scans for _, name in Scan.of(step).made}
        summed = {n for n in self._crossing if _owed(self.types[n]) == "+"}
        whole = Counter(i for part in (self.cut.before, *self.cut.units, self.cut.after)
                        for step in part.steps for i in step.inputs
                        if part is not self.cut.after or i not in summed)
        whole.subtract(value for step in scans for _, value in Scan.of(step).stacked)
        return frozenset(made - {n for n, times in whole.items() if times} - (self._crossing - summed))

    def _add(self, sums: dict[str, Any], name: str, x: Tensor | list[Tensor], m: int) -> None:
        """What microbatch m has of a value that is wanted after all of them. Sums are kept in float32."""
        kind = self.types[name]
        owed = _owed(kind)
        if isinstance(x, list):
            if name not in sums:
                sums[name] = self._sum_of_layers(name, x)
            else:
                for total, layer in zip(sums[name], x):
                    total.add_(layer)
        elif owed == "+":
            sums[name] = sums[name].add_(x) if name in sums else x.to(_wide(x.dtype), copy=True)
        elif owed:
            sums[name] = torch.maximum(sums[name], x) if name in sums else x
        elif timed(kind):
            sums.setdefault(name, {})[m] = x
        else:
            sums[name] = x

    def _sum_of_layers(self, name: str, layers: list[Tensor]) -> Tensor:
        if not layers:
            return self._room(name, timeless(self.types[name]), self.stages[0])[:0]
        like = layers[0]
        total = like.new_empty((len(layers), *like.shape), dtype=_wide(like.dtype))
        for row, layer in zip(total, layers):
            row.copy_(layer)
        return total

    def _summed(self, name: str, found: Any) -> Tensor:
        if isinstance(found, dict):
            dims = self.types[name].dims
            at = next(i for i, d in enumerate(dims) if any(TIME in f.axes for f in d.factors))
            return torch.cat([found[m] for m in sorted(found)], at)
        return found.to(getattr(torch, self.kinds[name]))

    # -- what generated code asks for ------------------------------------------------------------------------

    def _asked(self, code: Asking) -> Asking:
        """Runs the code of a microbatch, in which no stage waits for another but by messages."""
        answer = None
        try:
            while True:
                asked = code.send(answer)
                answer = yield asked if asked[0] in (POST, TAKE) else (asked[0].group, *asked[1:])
        except StopIteration as stop:
            return stop.value

    def _together(self, name: str, env: Mapping[int, dict[str, Tensor]]) -> Asking:
        """All stages of this rank at the program `name`. Their results, by stage."""
        program = getattr(self.cut, name)
        self.doing = name
        codes = {s: _posting(self.around[s, name].main(*self._given(program, s, env[s])), self._line, s, name)
                 for s in self.stages}
        asks: dict[int, tuple] = {}
        made: dict[int, Any] = {}

        def advance(s: int, answer: Any) -> None:
            try:
                asks[s] = codes[s].send(answer)
            except StopIteration as stop:
                asks.pop(s, None)
                made[s] = [x if here(kind, self.fold.place(self.coordinate, s, 0)) else None
                           for x, (_, kind) in zip(stop.value, program.result_leaves())]
        for s in self.stages:
            advance(s, None)
        while asks:
            s = min(asks, key=lambda s: _turn(asks[s]))
            if _turn(asks[s]) != 2:
                group, *rest = asks[s]
                advance(s, (yield (group if group in (POST, TAKE) else group.group, *rest)))
                continue
            answer = yield from self._of_all(asks)
            for s in list(asks):
                advance(s, answer)
        return made

    def _of_all(self, asks: Mapping[int, tuple]) -> Asking:
        """One collective over stages, of which this rank has several."""
        group, method, x, *more = next(iter(asks.values()))
        own = {s: ask[2] for s, ask in asks.items()}
        if method == "broadcast" and group.axes == (STAGES,):
            (root,) = more
            x, more = own.get(root, x), [self.fold.schedule.rank_of[root]]
        elif method == "all_reduce":
            for other in [*own.values()][1:]:
                x = x + other if more[0] == "sum" else torch.maximum(x, other)
        elif len(self.stages) > 1:
            raise SpecError(f"schedule: {method} over {STAGES} is not built where a rank has several stages")
        return x if group.group is None else (yield (group.group, method, x, *more))

    def _given(self, program: Program, s: int, env: Mapping[str, Tensor]) -> Iterator[Tensor | None]:
        """The arguments that a stage has, and room for those that it gets in a collective."""
        at = self.fold.place(self.coordinate, s, 0)
        comes = {i for step in program.steps if step.op.wire and runs(step, at) for i in step.inputs}
        for path, kind in program.arg_leaves():
            yield env.get(path) if here(kind, at) or path not in comes else self._room(path, kind, s)


def _posting(code: Asking, line: int, s: int, part: str) -> Asking:
    """The code of stage s, its sends as messages."""
    answer, numbers = None, Counter[tuple[int, int]]()
    try:
        while True:
            asked = code.send(answer)
            if asked[1] == "send":
                ends = source, target = asked[3:]
                message = Message(line, part, source, target, numbers[ends])
                asked = POST if s == source else TAKE, message, asked[2]
                numbers[ends] += 1
            answer = yield asked
    except StopIteration as stop:
        return stop.value


def _turn(asked: tuple) -> int:
    """What a rank of several stages asks for first: what needs none of its others; last, what needs all."""
    return 0 if asked[0] == POST else 3 if asked[0] == TAKE else 2 if STAGES in asked[0].axes else 1


def _owed(kind: Spec) -> str:
    """What a value owes over microbatches: "+", "max", or "" if nothing."""
    return next((o.kind for o in kind.owed if o.axis == TIME), "")


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def _bytes(kept: Mapping[Any, Mapping[str, Tensor | list[Tensor]]]) -> int:
    """Of tensors that are kept, each once."""
    found = {x.data_ptr(): x.nbytes for values in kept.values() for value in values.values()
             for x in (value if isinstance(value, list) else [value])}
    return sum(found.values())
