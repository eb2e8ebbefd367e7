"""Programs under a schedule, compiled: called with what this rank holds, they return what it holds.

As `Compiled`, but that a rank goes through its list of stages and microbatches. What it holds of an argument
is the piece that it would hold on the mesh alone; a rank of several stages holds theirs one after another.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from shardlib.compiler.microbatches import Cut, cut
from shardlib.compiler.passes import DEFAULT, Pass, chosen
from shardlib.compiler.pipeline import Gradients, lower_results, traced_function
from shardlib.compiler.sizes import bind_sizes
from shardlib.distributed.channels import Channels, Parcel
from shardlib.distributed.mail import Mail, by_number
from shardlib.distributed.runtime import Runtime
from shardlib.errors import SpecError
from shardlib.language.arguments import argument_trees
from shardlib.language.calls import check_given, check_layout, check_static, check_tensors, refuse_named
from shardlib.language.exchanges import communicates_over
from shardlib.language.trace import Function
from shardlib.layout import Layout
from shardlib.mesh import check_sizes
from shardlib.params import Params, fill, flat_leaves, leaf_dtypes, named_leaves, rebuild
from shardlib.program import Program
from shardlib.reports.scheduled import channels
from shardlib.run.failures import explain_failure
from shardlib.run.index_flags import IndexFlags
from shardlib.run.rank_program import POST, TAKE, Message, RankProgram
from shardlib.run.stopwatch import Stopwatch
from shardlib.run.surroundings import without_autocast
from shardlib.schedules.clock import Span, Timeline, measured
from shardlib.schedules.folding import STAGES, TIME, Fold, timeless
from shardlib.schedules.schedule import Action
from shardlib.schedules.waits import prove_schedule
from shardlib.tree import Struct, leaves

MOST_MESSAGES = 64      # from one stage to another, in one action


class Scheduled:
    """A program as each rank runs it under a schedule: called with this rank's shards, it returns them."""

    def __init__(self, f: Function | Gradients, layout: Layout | None, runtime: Runtime, fold: Fold,
                 sizes: Mapping[str, int], static: Mapping[str, Any],
                 passes: Sequence[Pass | str] = DEFAULT) -> None:
        check_static(traced_function("compile", f), static)
        check_layout("compile", layout)
        check_sizes(sizes)
        prove_schedule(fold.schedule)
        self.f, self.layout, self.runtime, self.fold = f, layout, runtime, fold
        self.sizes, self.static, self.passes = dict(sizes), dict(static), chosen(passes)
        self.calls = 0
        self._flags = IndexFlags(runtime.device, lambda error: runtime.end_others(error))
        self._variants: dict[Any, tuple[Program, RankProgram, Any, tuple[Any, ...]]] = {}

    def lower(self, *args: Any, dtypes: Mapping[str, str] | None = None) -> tuple[Program, tuple[Any, ...]]:
        """The explicit program, typed over stages and microbatches, and what its results are like."""
        return lower_results(self.f, self.layout, self.fold.whole, self.sizes, args, self.static, self.passes,
                             dtypes, (TIME,))

    def shards(self, *args: Any) -> tuple[Any, ...]:
        """What this rank holds of whole arguments; leaves that only others' stages use are on the meta
        device."""
        program, _ = self.lower(*args)
        made = []
        for (name, tree), arg in zip(program.args, args):
            cut = {path: self.fold.shard(x, kind, self.runtime.coordinate)
                   for (path, kind), x in zip(leaves(name, tree), flat_leaves(arg))}
            made.append(fill(arg, name, cut.get) if isinstance(arg, Params) else cut[name])
        return tuple(made)

    def __call__(self, *args: Any, **named: Any) -> Any:
        if named:
            refuse_named(self.f, named)
        with without_autocast(), torch.no_grad():
            return self._run(args)

    def timeline(self, *args: Any) -> Timeline:
        """Runs once more, and says when each action was, in seconds; on the GPU, as it came to them. All
        ranks call it, and get the same."""
        self(*args)
        ranks, rank = self.fold.mesh.axes.get(STAGES, 1), self._variants[self._key(args)][1]
        lines = self.runtime.group((STAGES,) if STAGES in self.fold.mesh.axes else ())
        lines.barrier()
        rank.watch = Stopwatch(self.runtime.coordinate.get(STAGES, 0), self.runtime.device)
        try:
            self(*args)
            mine = [(*s.action, s.start, s.end) for s in rank.watch.spans()]
        finally:
            rank.watch = None
        told = [lines.broadcast_message(mine, p, list[tuple[int, str, int, float, float]])
                for p in range(ranks)]
        spans = [Span(p, Action(*action), start, end) for p, all_of in enumerate(told)
                 for *action, start, end in all_of]
        first = min(s.start for s in spans)
        return measured(self.fold.schedule, [replace(s, start=s.start - first, end=s.end - first)
                                             for s in spans])

    def _key(self, args: Sequence[Any]) -> Any:
        f = traced_function("compile", self.f)
        return tuple((path, x.shape, x.dtype) for name, arg in zip(f.arg_names, args)
                     for path, x in named_leaves(name, arg))

    def check(self) -> None:
        """SpecError if an index was out of range in any call so far; it waits for the device."""
        self._flags.check()

    def _run(self, args: Sequence[Any]) -> Any:
        f = traced_function("compile", self.f)
        check_given(f, args)
        named = [leaf for name, arg in zip(f.arg_names, args) for leaf in named_leaves(name, arg)]
        check_tensors(f, named, stages=True)
        key = self._key(args)
        if key not in self._variants:
            self._variants[key] = self._build(args)
        program, rank, run, results = self._variants[key]
        given = {path: None if x.is_meta else x for (name, tree), arg in zip(program.args, args)
                 for (path, _), x in zip(leaves(name, tree), flat_leaves(arg))}
        self.calls += 1
        try:
            made = run(given)
        except Exception as error:
            explain_failure(error, rank.lines)
            raise
        return rebuild(list(made), results)

    def _build(self, args: Sequence[Any]) -> tuple[Program, RankProgram, Any, tuple[Any, ...]]:
        argument_trees(traced_function("compile", self.f), args)
        program, results = self.lower(*args)
        given = {path: x for (name, tree), arg in zip(program.args, args)
                 for (path, _), x in zip(leaves(name, tree), flat_leaves(arg))}
        dtypes = leaf_dtypes(given.items())
        if isinstance(self.f, Gradients):
            self.f.check_dtypes(dtypes)
            program, results = self.lower(*args, dtypes=dtypes)
        coordinate, fold = self.runtime.coordinate, self.fold
        sizes = self._sizes(program, {path: tuple(x.shape) for path, x in given.items()}, coordinate)
        self.runtime.compare_plans(program.name, f"{fold}\n{sorted(sizes.items())}\n{dtypes}\n{program}")
        parts = cut(program, fold.whole, dtypes, fold.schedule.kinds)
        lines = (STAGES,) if fold.mesh.axes.get(STAGES, 1) > 1 else ()
        self.runtime.create_groups(list(dict.fromkeys((*_groups(parts, fold), *([lines] if lines else [])))))
        rank = RankProgram(fold, parts, sizes, coordinate, self.runtime.group, self.runtime.device)
        post = _Post(self, program.name, rank, self._mail(lines, parts, sizes) if lines else None)
        return program, rank, self._flags.around(post, rank.sites), results

    def _mail(self, lines: tuple[str, ...], parts: Cut, sizes: Mapping[str, int]) -> Mail | Channels:
        """By number where a communicator finds messages so, else a channel for each two stages in turn."""
        group, rank_of = self.runtime.group(lines), self.fold.schedule.rank_of
        if (way := by_number(group)) is not None:
            return Mail(group, way)
        mine = self.runtime.coordinate
        ends = sorted({edge for p in range(len(self.fold.schedule.ranks))
                       for edge in channels(self.fold, parts, sizes, {**mine, STAGES: p})})
        order = {edge: [Parcel(self._number(Message(a.line, a.part, *a.ends, a.number)), a.call.shapes[0],
                               getattr(torch, a.call.dtype)) for a in letters]
                 for edge, letters in channels(self.fold, parts, sizes, mine).items()}
        members = {edge: (rank_of[edge[0]], rank_of[edge[1]]) for edge in ends}
        return self.runtime.open_channels(lines, members, order)

    def _number(self, message: Message) -> int:
        """Of all messages between two ranks: which one."""
        kind = "FBIWba".index(message.part[0])
        m = int(message.part[1:]) if kind < 4 else 0
        stages, many = self.fold.schedule.stages, self.fold.schedule.microbatches
        number = ((kind * many + m) * stages + message.source) * stages + message.target
        if message.number >= MOST_MESSAGES or number >= 2**31 // MOST_MESSAGES:
            raise SpecError(f"schedule: {message} is message {message.number} of its action; {MOST_MESSAGES} "
                            "from one stage to another are numbered, and 2 billion in all")
        return number * MOST_MESSAGES + message.number

    def _sizes(self, program: Program, shapes: dict[str, tuple[int, ...]],
               coordinate: Mapping[str, int]) -> dict[str, int]:
        """The global sizes, from those of what this rank holds: of several stages, from the first one's."""
        fold = self.fold
        stages = fold.stages(coordinate.get(STAGES, 0))
        for path, kind in program.arg_leaves():
            for i, dim in enumerate(kind.dims):
                if STAGES not in dim.axes or any(n not in self.sizes for n in dim.names):
                    continue
                rows = [fold.still.rows(timeless(kind).dims[i], self.sizes, fold.place(coordinate, s, 0))[1]
                        for s in stages]
                if shapes[path][i] != sum(rows):
                    raise SpecError(f"{program.name}: {path} has {shapes[path][i]} rows of {dim}; with "
                                    f"{', '.join(f'{n}={self.sizes[n]}' for n in dim.names)} this rank's "
                                    f"stages, {', '.join(map(str, stages))}, hold {sum(rows)}")
                shapes[path] = (*shapes[path][:i], rows[0], *shapes[path][i + 1:])
        still = replace(program, args=tuple(
            (name, tree.map(timeless) if isinstance(tree, Struct) else timeless(tree))
            for name, tree in program.args))
        return bind_sizes(still, shapes, self.sizes, fold.still, fold.place(coordinate, stages[0], 0))


def _groups(parts: Cut, fold: Fold) -> list[tuple[str, ...]]:
    """The axes of all groups of the mesh that some rank communicates over, in the program's order."""
    found = []
    for part, mesh in ((parts.before, fold.still), *((u, fold.whole) for u in parts.units),
                       (parts.after, fold.still)):
        for step in (s for p in (part, *part.bodies()) for s in p.steps):
            axes = tuple(a for a in communicates_over(step, mesh) if a in fold.mesh.axes)
            found += [axes] if fold.mesh.size(axes) > 1 else []
    return found


class _Post:
    """Drives one rank's part: collectives by its groups, messages by mail."""

    def __init__(self, owner: Scheduled, title: str, rank: RankProgram,
                 mail: Mail | Channels | None) -> None:
        self.owner, self.title, self.rank, self.mail = owner, title, rank, mail

    def __call__(self, args: Mapping[str, Tensor | None]) -> tuple[Tensor, ...]:
        own: dict[Message, Tensor] = {}
        code, answer = self.rank.run(args), None
        try:
            while True:
                answer = self._answer(own, *code.send(answer))
        except StopIteration as stop:
            if self.mail:
                self.mail.wait(self._at("the end"))
            return stop.value

    def _at(self, doing: object) -> str:
        return f"{self.title}, call {self.owner.calls}, {doing}"

    def _answer(self, own: dict[Message, Tensor], group: Any, method: Any, x: Any, *more: Any) -> Any:
        at = self._at(self.rank.doing)
        if group not in (POST, TAKE):
            return getattr(group, method)(x, *more, at=at)
        message, here = method, self.rank.coordinate.get(STAGES, 0)
        there = self.owner.fold.schedule.rank_of[message.target if group == POST else message.source]
        if there == here:
            return own.update({message: x}) if group == POST else own.pop(message)
        number = self.owner._number(message)
        if group == POST:
            return self.mail.post(x, there, number, at)
        found = self.mail.take(x.shape, x.dtype, there, number, at)
        if self.rank.watch:
            self.rank.watch.begin()
        return found
