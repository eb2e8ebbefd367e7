"""The oracle of the typing rules: what is true of an op on split operands, found by running it on every rank.

A `Case` is one call of an op, its specs whole. `judge` places random operands on all ranks of a mesh as given
types, runs the op's own generated code on each, and says which types the results may be given: those as which
the pieces put together are the op's reference on the whole, and as which the local derivative, of random
cotangents of the dual types, is the reference's. A rule is sound and complete when it accepts exactly what
`judge` finds a type for.

>>> from shardlib.compiler.parser import CORE
>>> from shardlib.spec import parse
>>> case = Case(CORE["sum"], "B D -> B")
>>> [str(t) for t in Trial(case, Mesh(x=2), dict(B=3, D=5)).judge((parse("B D/x"),))[0]]
['B +x']

| operand on an axis | its cotangent |
|---|---|
| split | split |
| whole | owed |
| owed | whole |
| held at k | held at k, and so is that of every operand of the op |
"""
from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from shardlib.compiler.sizes import Sizes
from shardlib.compiler.typings import alike, types
from shardlib.dtypes import step_dtypes
from shardlib.errors import SpecError
from shardlib.language.exchanges import meets_over
from shardlib.language.local_code import LocalCode
from shardlib.language.rearrange import RENAME, by_factor, renamed
from shardlib.lowering.emit import Emitter
from shardlib.lowering.load import load
from shardlib.mesh import Mesh
from shardlib.placement import NotReplicated, choices_of, join, join_rows, place, place_rows
from shardlib.program import Op, Program, Result, Step
from shardlib.reference import refer
from shardlib.rules import RuleError, natural
from shardlib.run.simulate import run_ranks
from shardlib.spec import Dim, Owed, Spec, parse_signature

Types = tuple[Spec, ...]
Splits = Mapping[str, tuple[str, ...]]
Draw = Callable[[tuple[int, ...], Mapping[str, int], torch.Generator, list[Tensor]], Tensor]


class NoSuchCall(Exception):
    """The op on whole operands fails at these sizes, as it may:
    an index into an empty dim, half of one element."""


def normal(shape: tuple[int, ...], sizes: Mapping[str, int], g: torch.Generator,
           before: list[Tensor]) -> Tensor:
    return torch.randn(shape, generator=g, dtype=torch.float64)


@dataclass(frozen=True)
class Case:
    """One call of an op. `text`: its specs, whole.

    `draws`: what each operand holds, normal numbers by default.

    indices, constants: operands beside those in `op.index` that hold integers or masks; that have no
    cotangent.
    complete: whether every typing can be said in these names; not where one name stands for two dims.
    tolerance: relative to the largest element: float64 rounds to 1e-16 of it.
    """
    op: Op
    text: str
    attrs: tuple[tuple[str, Any], ...] = ()
    draws: tuple[Draw, ...] = ()
    indices: tuple[int, ...] = ()
    constants: tuple[int, ...] = ()
    complete: bool = True
    tolerance: float = 1e-12

    def __str__(self) -> str:
        return f'{self.op.name}("{self.text}"{"".join(f", {k}={v!r}" for k, v in self.attrs)})'

    @cached_property
    def ins(self) -> tuple[Spec, ...]:
        return parse_signature(self.text)[0]

    @cached_property
    def outs(self) -> tuple[Spec, ...]:
        return parse_signature(self.text)[1]

    @cached_property
    def made(self) -> tuple[Dim, ...]:
        """The dims that only results have: a call says how they are split."""
        known = {n for s in self.ins for n in s.names}
        return () if self.op is RENAME else tuple(dict.fromkeys(
            d for s in self.outs for d in s.dense.dims if known.isdisjoint(d.names)))

    @cached_property
    def differentiable(self) -> tuple[int, ...]:
        """The operands that have cotangents."""
        fixed = (*self.op.index, *self.indices, *self.constants)
        return tuple(i for i in range(len(self.ins)) if i not in fixed) if self.op.vjp else ()

    def fitting(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """`sizes`, with those names fitted to the others that a rename gives to a dim,
        or whose dim it takes apart; and those whose length others say."""
        if self.op.lengths and (said := self.op.lengths(self.step(self.ins, self.outs))):
            known = Sizes("case", {n: size for n, size in sizes.items() if n != said[0].label})
            known.say(self.step(self.ins, self.outs))
            known.settle()
            return known.of
        if self.op is not RENAME:
            return dict(sizes)
        pairs = list(zip(self.ins[0].dims, self.outs[0].dims))
        fitted = {n for old, new in pairs
                  for n in (new if by_factor(old, new) else min(old, new, key=lambda d: len(d.names))).names}
        known = Sizes("case", {n: size for n, size in sizes.items() if n not in fitted})
        known.rename(self.step(self.ins, self.outs))
        known.settle()
        return {**sizes, **known.of}

    def step(self, ins: Sequence[Spec], outs: Sequence[Spec]) -> Step:
        return Step(self.op, tuple(ins), tuple(outs), tuple(f"x{i}" for i in range(len(ins))),
                    tuple(f"y{i}" for i in range(len(outs))), self.attrs)

    def rule(self, ins: Sequence[Spec], made: Splits | None = None) -> tuple[Spec, ...]:
        """What the rule says the results are, dims in `made` split so. RuleError where it refuses."""
        if self.op is RENAME:
            return (renamed(*ins, *self.outs),)
        outs = (tuple(s.split_by(made or {}) for s in self.outs) if self.op.takes_text
                else self.op.infer(ins, dict(self.attrs)))
        return natural(self.op.name, self.op.rule(self.step(ins, outs)), ins, outs)

    def accepts(self, ins: Sequence[Spec], made: Splits | None = None) -> tuple[Spec, ...] | None:
        try:
            return self.rule(ins, made)
        except RuleError:
            return None

    def operand_types(self, i: int, axes: Sequence[str], kinds: Sequence[str] = ("+",)) -> list[Spec]:
        """All types of operand i; an index or a mask owes nothing."""
        return types(self.ins[i], axes, () if i in (*self.op.index, *self.indices) else kinds)

    def combinations(self, axes: Sequence[str], kinds: Sequence[str] = ("+",)) -> Iterator[
            tuple[tuple[Spec, ...], dict[str, tuple[str, ...]]]]:
        """All types of the operands together, and all splits of the dims that the results make; where not all
        typings are asked for, those alone in which every name has the same axes in all operands."""
        splits, each = types(Spec(self.made), axes, ()), [self.operand_types(i, axes, kinds)
                                                          for i in range(len(self.ins))]
        for ins in itertools.product(*each) if self.complete else alike(each, {}):
            for made in splits:
                yield ins, {d.names[0]: d.axes for d in made.dims if d.names}


@lru_cache(maxsize=64)
def verdicts(case: Case, axes: tuple[str, ...],
             kinds: tuple[str, ...] = ("+",)) -> list[tuple[Types, Splits, Types | None]]:
    """For all combinations: the types of the operands, how made dims are split,
    and the results as the rule says, or None."""
    return [(ins, made, case.accepts(ins, made)) for ins, made in case.combinations(axes, kinds)]


def dual(kind: Spec, mesh: Mesh, held: Sequence[Owed] = ()) -> Spec:
    """The type of a cotangent of a value of type `kind`; `held`:
    what the op that has the value as operand or result is held at."""
    busy = {*kind.split_axes, *(o.axis for o in kind.owed), *(o.axis for o in held)}
    return kind.owing(*held, *(Owed("+", a) for a in mesh.axes if a not in busy))


class Trial:
    """One case on one mesh at given sizes, with data drawn by `seed`, and its truth:
    the op's reference on whole operands."""

    def __init__(self, case: Case, mesh: Mesh, sizes: Mapping[str, int], seed: int = 0) -> None:
        self.case, self.mesh = case, mesh
        try:
            self.sizes = case.fitting(sizes)
        except SpecError as error:
            raise NoSuchCall(str(error)) from error
        self._codes: dict[str, Callable] = {}
        self.generator = torch.Generator().manual_seed(seed)
        self.whole: list[Tensor] = []
        try:
            for i, spec in enumerate(case.ins):
                draw = case.draws[i] if i < len(case.draws) else normal
                self.whole.append(draw(self.shape(spec), self.sizes, self.generator, self.whole))
            self.dtypes = {f"x{i}": str(x.dtype).removeprefix("torch.") for i, x in enumerate(self.whole)}
            self.emitters = [Emitter(mesh, rank, self.sizes, given=self.dtypes)
                             for rank in range(mesh.world_size)]
            self._truth()
        except (RuntimeError, IndexError, ValueError) as error:
            raise NoSuchCall(str(error)) from error
        self._placed: dict[tuple[int, Spec], list[Tensor]] = {}
        self._ran: dict[tuple, list | None] = {}
        self._duals: dict[tuple[int, Spec], list[Tensor]] = {}

    def shape(self, spec: Spec) -> tuple[int, ...]:
        """The shape of a whole tensor, all pairs of a ragged dim included."""
        every = Spec(tuple(d._replace(ragged="") for d in spec.whole().dims))
        return self.mesh.local_shape(every, self.sizes, {})

    @cached_property
    def chosen(self) -> Tensor:
        """Which pairs of a ragged dim there are: the operand that has this dim alone, or the result."""
        for spec, x in (*zip(self.case.ins, self.whole), *zip(self.case.outs, self.results)):
            if len(spec.dims) == 1 and spec.dims[0].ragged:
                return x
        raise NoSuchCall("nothing says which rows there are")

    def placed(self, x: Tensor, kind: Spec) -> list[Tensor]:
        if not kind.dims or not kind.dims[0].ragged:
            return place(x, kind, self.sizes, self.mesh, self.generator)
        return place_rows(x, self.chosen, kind, self.sizes, self.mesh, self.generator)

    def _truth(self) -> None:
        case = self.case
        given = [_wide(x).clone().requires_grad_(i in case.differentiable) for i, x in enumerate(self.whole)]
        made = refer(case.step(case.ins, case.rule(case.ins)), self.sizes, given)
        self.results = [y.detach() for y in made]
        self.cotangents = ([normal(tuple(y.shape), self.sizes, self.generator, []) for y in made]
                           if case.differentiable else [])
        self.gradients = [_gradients(made[:j + 1][j:], given, self.cotangents[j:j + 1], case)
                          for j in range(len(made))] if self.cotangents else []

    def operand(self, i: int, kind: Spec) -> list[Tensor]:
        if (i, kind) not in self._placed:
            self._placed[i, kind] = self.placed(self.whole[i], kind)
        return self._placed[i, kind]

    def cotangent(self, j: int, kind: Spec) -> list[Tensor]:
        if (j, kind) not in self._duals:
            self._duals[j, kind] = self.placed(self.cotangents[j], kind)
        return self._duals[j, kind]

    def code(self, e: LocalCode, ins: Sequence[Spec], outs: Sequence[Spec]) -> Callable:
        """The generated function of a rank, which says on what it depends: the op's own text."""
        step = self.case.step(ins, outs)
        e.constants.clear()
        e.dtypes.update(zip(step.outputs, step_dtypes(step, [e.dtypes[i] for i in step.inputs])))
        text = self.case.op.emit(e, step, [f"a{i}" for i in range(len(ins))])
        if text not in self._codes:
            args = tuple(zip(step.inputs, ins))
            program = Program("case", args, (step,),
                              tuple(Result(s, (n,)) for s, n in zip(outs, step.outputs)), True)
            writer = Emitter(e.mesh, e.rank, self.sizes, given=self.dtypes, yields=True)
            source = writer.program(program)
            groups = {name: e.mesh.group(axes, e.rank) for axes, name in writer.groups.items()}
            self._codes[text] = load(source, {**writer.helpers, **writer.constants}, groups, str(self.case))
        return self._codes[text]

    def run(self, ins: Sequence[Spec],
            outs: Sequence[Spec]) -> list[tuple[list[Tensor], tuple[Tensor, ...]]] | None:
        """Each rank's operands and results; None where the code fails on one of them."""
        try:        # writing code, or running it, may make anything of shapes that do not fit
            codes = tuple(self.code(e, ins, outs) for e in self.emitters)
            if (tuple(ins), codes) not in self._ran:
                self._ran = {(tuple(ins), codes): None}
                given = [[self.operand(i, s)[rank].detach().requires_grad_(i in self.case.differentiable)
                          for i, s in enumerate(ins)]
                         for rank in range(self.mesh.world_size)]
                made = run_ranks([code(*xs) for xs, code in zip(given, codes)])
                self._ran = {(tuple(ins), codes): list(zip(given, made))}
            return self._ran[tuple(ins), codes]
        except Exception:
            return None

    def wrong(self, ran: list | None, ins: Sequence[Spec], outs: Sequence[Spec], j: int) -> str | None:
        """What is wrong with giving result j the type outs[j]; None where nothing is."""
        if ran is None:
            return "the local code fails"
        made = [results[j] for _, results in ran]
        try:
            got = self.joined([y.detach() for y in made], outs[j])
        except NotReplicated:
            return f"result {j} is not the same on ranks that should agree"
        if got is None or not same(_wide(got), self.results[j], self.case.tolerance):
            return f"result {j} is wrong"
        joined = any(o.kind == "max" for o in outs[j].owed)     # its derivative asks what the others have
        joined |= meets_over(self.case.step(ins, outs)) != ()
        return (self._wrong_derivative(ran, made, ins, outs[j], j) if self.case.differentiable and not joined
                else None)

    def _wrong_derivative(self, ran: list, made: list[Tensor], ins: Sequence[Spec], out: Spec,
                          j: int) -> str | None:
        held = tuple(o for o in out.owed if o.kind == "@")
        seeds = self.cotangent(j, dual(out, self.mesh, held))
        found = [_gradients([y], given, [seed.to(y.dtype)], self.case)
                 for (given, _), y, seed in zip(ran, made, seeds)]
        for at, i in enumerate(self.case.differentiable):
            try:
                got = self.joined([g[at] for g in found], dual(ins[i], self.mesh, held))
            except NotReplicated:
                return f"the cotangent of operand {i} is not the same on ranks that should agree"
            if got is None or not same(_wide(got), self.gradients[j][at], self.case.tolerance):
                return f"the cotangent of operand {i} is wrong"
        return None

    def joined(self, pieces: list[Tensor], kind: Spec) -> Tensor | None:
        for piece, c in zip(pieces, self.mesh.coordinates()):
            if tuple(piece.shape) != self.mesh.local_shape(kind, self.sizes, c):
                return None
        if not kind.dims or not kind.dims[0].ragged:
            return join(pieces, kind, self.sizes, self.mesh, self.case.tolerance)
        if len(kind.dims) == 1:
            choices = choices_of(pieces, kind, self.sizes, self.mesh)
            return join(choices, kind.dense, self.sizes, self.mesh).reshape(-1)
        return join_rows(pieces, self.chosen, kind, self.sizes, self.mesh, self.case.tolerance)

    def judge(self, ins: Sequence[Spec], made: Splits | None = None) -> list[list[Spec]]:
        """For every result, the types that it may be given; nothing at all where one of them has none."""
        axes, right = tuple(self.mesh.axes), []
        held = tuple({f"@{o.at}": None for s in ins for o in s.owed if o.kind == "@"})
        whole_outs = [s.split_by(made) for s in self.case.outs] if made else list(self.case.outs)
        for j, whole in enumerate(self.case.outs):
            right.append([])
            for out in types(whole, axes, ("+", *held)):
                axes_of = {f.name: f.axes for d in out.dims for f in d.factors}
                if made and any(axes_of.get(n, axes) != axes for n, axes in made.items()):
                    continue
                outs = [*whole_outs[:j], out, *whole_outs[j + 1:]]
                if self.wrong(self.run(ins, outs), ins, outs, j) is None:
                    right[j].append(out)
            if not right[j]:
                return []
        return right


def some(found: Sequence, most: int | None, case: Case) -> list:
    """At most so many of what was found for `case`, drawn: the same ones every time."""
    return list(found) if most is None or len(found) <= most else random.Random(str(case)).sample(found, most)


def disagreements(case: Case, mesh: Mesh, sizes: Mapping[str, int], kinds: Sequence[str] = ("+",),
                  seeds: int = 3, most: int | None = None) -> list[str]:
    """Where the rule of `case` and the truth differ, over all combinations of types
    of its operands on the axes of `mesh`.

    A rejection is justified when one of `seeds` draws of data shows every typing wrong. `most`: of those that
    the rule rejects, only so many are tried.
    """
    trials, found = [Trial(case, mesh, sizes, seed) for seed in range(seeds if case.complete else 1)], []
    every = verdicts(case, tuple(mesh.axes), tuple(kinds))
    for ins, made, outs in (*(v for v in every if v[2] is not None),
                            *some([v for v in every if v[2] is None], most, case)):
        text = f"{case.op.name} on {mesh}: {', '.join(map(str, ins))} -> "
        if outs is not None:
            problems = (trials[0].wrong(trials[0].run(ins, outs), ins, outs, j) for j in range(len(outs)))
            found += [f"{text}{', '.join(map(str, outs))} is accepted, but {p}" for p in problems if p]
        elif case.complete and (right := _always(trials, ins, made)):
            found.append(f"{text}{', '.join(' or '.join(map(str, r)) for r in right)} is refused, but right")
    return found


def _always(trials: Sequence[Trial], ins: Sequence[Spec], made: Splits) -> list[list[Spec]]:
    """The types of the results that are right in all trials; nothing where a result has none."""
    found: list[list[Spec]] = []
    for trial in trials:
        right = trial.judge(ins, made)
        found = [[t for t in a if t in b] for a, b in zip(found, right)] if found else right
        if not found or not all(found):
            return []
    return found


def _gradients(made: Sequence[Tensor], given: Sequence[Tensor], seeds: Sequence[Tensor],
               case: Case) -> list[Tensor]:
    leaves = [given[i] for i in case.differentiable]
    if not made[0].requires_grad:
        return [torch.zeros_like(x) for x in leaves]
    found = torch.autograd.grad(made, leaves, seeds, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found)]


def _wide(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def same(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Equal up to `tolerance` times the largest finite element; NaN and infinities in the same places."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return bool((a == b).all())
    if bool(torch.isfinite(a).all()) and bool(torch.isfinite(b).all()):
        return not a.numel() or float((a - b).abs().max()) <= tolerance * max(1.0, float(b.abs().max()))
    odd = ~torch.isfinite(b)
    if (not bool((odd == ~torch.isfinite(a)).all())
        or not bool(((a[odd] == b[odd]) | (a[odd].isnan() & b[odd].isnan())).all())):
        return False
    return same(torch.where(odd, 0, a), torch.where(odd, 0, b), tolerance)
