"""Typing rules as data: what an op accepts on each mesh axis, and what its result then is.

A `Rule` says, for one call with its dims named, in which operands the op is linear, which dims must be whole,
and which dims are summed or maxed away. `natural` types the call from it. A rule is sound and complete: it
accepts exactly those combinations in which the op, run on the local pieces without communication, is the op
on the whole, and its local derivative the derivative under dual types.

>>> from shardlib.spec import parse
>>> rule = Rule(linear=((0,), (1,)), sums=("F",))                   # B T F, F D -> B T D
>>> str(natural("einsum", rule, (parse("B T F/tp"), parse("F/tp D")), (parse("B T D"),))[0])
'B T D +tp'
>>> natural("silu", Rule(), (parse("B T F +tp"),), (parse("B T F"),))
Traceback (most recent call last):
shardlib.rules.RuleError: silu: operand 1 owes a sum over tp, and silu of a sum is not the sum of silu
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shardlib.errors import SpecError
from shardlib.spec import Owed, Spec


@dataclass(frozen=True)
class Rule:
    """One call's rule, in the names of its dims.

    linear: groups of operands; the op is linear in each group (within a group: in all its operands together).
    whole:  dims that no axis may split.
    sums:   dims that are summed away where a result lacks them: split, that result owes the sum.
    maxes:  the same for a maximum.
    uses:   for each result, the operands whose values it depends on; all of them where nothing is said.
    shapes: operands of which only the dims count: what they owe does not matter.
    met:    dims whose pieces the step brings together itself (`Op.exchanges`): split, nothing is owed.
    alike:  pairs of dims, one of them in `met`, that may be split over the same axes.
    ragged: it knows which rows of a ragged dim there are; any other op may but take each row by itself.
    Any other dim that a result lacks must be whole, too. A dim that only results have is made there, as its
    spec says.
    """
    linear: tuple[tuple[int, ...], ...] = ()
    whole: tuple[str, ...] = ()
    sums: tuple[str, ...] = ()
    maxes: tuple[str, ...] = ()
    uses: tuple[tuple[int, ...], ...] = ()
    shapes: tuple[int, ...] = ()
    met: tuple[str, ...] = ()
    alike: tuple[tuple[str, str], ...] = ()
    ragged: bool = False


class RuleError(SpecError):
    """A call that its rule refuses.

    `operand`, `item`: what to point at; `axis`: the mesh axis, where there is one.
    """

    def __init__(self, message: str, operand: int | None = None, item: str | None = None,
                 axis: str | None = None) -> None:
        super().__init__(message)
        self.operand, self.item, self.axis = operand, item, axis


def natural(op: str, rule: Rule, ins: Sequence[Spec], outs: Sequence[Spec],
            names: Sequence[str] | None = None) -> tuple[Spec, ...]:
    """The types of the results of `op` on operands of types `ins`, its results having the dims of `outs`.

    `names` are what a message calls the operands. RuleError where the rule refuses.
    """
    names = names or [f"operand {i + 1}" for i in range(len(ins))]
    uses = rule.uses or (tuple(range(len(ins))),) * len(outs)
    if not rule.ragged and any(s.ragged for s in (*ins, *outs)):
        _check_rows(op, rule, ins, outs)
    axes = _label_axes(op, rule, ins, outs, names, sorted({i for used in uses for i in used}))
    types = []
    for out, used in zip(outs, uses):
        passed = _owed(op, rule, ins, axes, names, [i for i in used if i not in rule.shapes])
        taken = {n for i in used for n in ins[i].names}
        gone = {n: a for n, a in axes.items()
                if a and n in taken and n not in out.names and n not in rule.met}
        for name, split in gone.items():
            if name not in rule.sums and name not in rule.maxes:
                raise _must_be_whole(op, name, split, ins, names)
        owed = [Owed("+", a) for n, split in gone.items() if n in rule.sums for a in split]
        owed += [Owed("max", a) for n, split in gone.items() if n in rule.maxes for a in split]
        types.append(_with_axes(op, out, axes).owing(*passed, *owed))
    return tuple(types)


def _check_rows(op: str, rule: Rule, ins: Sequence[Spec], outs: Sequence[Spec]) -> None:
    """RuleError unless every ragged dim is in all results, and its names nowhere else."""
    for i, dim in ((i, d) for i, s in enumerate((*ins, *outs)) for d in s.dims if d.ragged):
        others = (n for s in (*ins, *outs) for d in s.dims if d.label != dim.label for n in d.names)
        if (any(dim.label not in out.labels for out in outs)
            or not {*dim.names}.isdisjoint({*others, *rule.whole, *rule.maxes})):
            raise RuleError(f"{op}: {dim.label} has only rows that data chose, and {op} would have to know "
                            "which; ops that take each row by itself may have it, grouped_einsum and combine",
                            i, dim.label)


def _label_axes(op: str, rule: Rule, ins: Sequence[Spec], outs: Sequence[Spec], names: Sequence[str],
                used: Sequence[int]) -> dict[str, tuple[str, ...]]:
    """The one ordered axis tuple of every name: the same in all operands, no axis on two names."""
    axes: dict[str, tuple[str, ...]] = {}
    first: dict[str, int] = {}
    for i in used:
        for factor in (f for d in ins[i].dims for f in d.factors):
            if factor.name not in axes:
                axes[factor.name], first[factor.name] = factor.axes, i
            elif axes[factor.name] != factor.axes:
                raise _differs(op, factor.name, (names[first[factor.name]], axes[factor.name]),
                               (names[i], factor.axes), i)
    for spec in outs:
        for factor in (f for d in spec.dims for f in d.factors):
            axes.setdefault(factor.name, factor.axes)
    owner: dict[str, str] = {}
    for name, split in axes.items():
        for axis in split:
            pair = owner.get(axis), name
            if axis in owner and not (axes[owner[axis]] == split and {pair, pair[::-1]} & {*rule.alike}):
                raise RuleError(f"{op}: axis {axis} splits both {owner[axis]} and {name}; a rank would hold "
                                "only the pairs on the diagonal", first.get(name), name, axis)
            owner[axis] = name
    for name in rule.whole:
        if axes.get(name):
            raise _must_be_whole(op, name, axes[name], ins, names)
    return axes


def _owed(op: str, rule: Rule, ins: Sequence[Spec], axes: dict[str, tuple[str, ...]], names: Sequence[str],
          used: Sequence[int]) -> list[Owed]:
    """What the operands `used` owe and their result then owes too."""
    split = {a: n for n, dims in axes.items() for a in dims}
    passed: dict[str, Owed] = {}
    for i in used:
        for owed in ins[i].owed:
            if owed.kind == "max":
                raise RuleError(f"{op}: {names[i]} owes a max over {owed.axis}; only all_reduce and "
                                "reduce_scatter take one",
                                i, str(owed), owed.axis)
            if owed.axis in split:
                raise RuleError(
                    f"{op}: {names[i]} {_owes(owed)}, while {split[owed.axis]} is split over {owed.axis}; "
                    f"their pieces do not match", i, str(owed), owed.axis)
            if owed.kind == "+":
                _check_linear(op, rule, i, owed, ins, names, used)
            if (before := passed.setdefault(owed.axis, owed)) != owed:
                raise RuleError(f"{op}: {names[i]} {_owes(owed)}, another operand {_owes(before)}", i,
                                str(owed), owed.axis)
    return list(passed.values())


def _check_linear(op: str, rule: Rule, i: int, owed: Owed, ins: Sequence[Spec], names: Sequence[str],
                  used: Sequence[int]) -> None:
    owing = {j for j in used if owed in ins[j].owed}
    group = next((g for g in rule.linear if i in g), None)
    if group is None:
        raise RuleError(
            f"{op}: {names[i]} owes a sum over {owed.axis}, and {op} of a sum is not the sum of {op}",
            i, str(owed), owed.axis)
    if missing := [j for j in group if j not in owing]:
        raise RuleError(f"{op}: {names[missing[0]]} is whole, {names[i]} owes a sum over {owed.axis}; the "
                        "sum would count "
                        f"{names[missing[0]]} once for every rank of {owed.axis}", i, str(owed), owed.axis)
    if others := sorted(owing - set(group)):
        raise RuleError(f"{op}: {names[i]} and {names[others[0]]} both owe a sum over {owed.axis}; the "
                        "product of two sums is not the sum of the "
                        f"products", others[0], str(owed), owed.axis)


def _owes(owed: Owed) -> str:
    return f"owes a sum over {owed.axis}" if owed.kind == "+" else f"is held at {owed.axis}:{owed.at}"


def _differs(op: str, name: str, one: tuple[str, tuple[str, ...]], other: tuple[str, tuple[str, ...]],
             operand: int) -> RuleError:
    def say(axes: tuple[str, ...]) -> str:
        return f"split over {'/'.join(axes)}" if axes else "whole"
    return RuleError(f"{op}: {name} is {say(one[1])} in {one[0]}, {say(other[1])} in {other[0]}", operand,
                     name)


def _must_be_whole(op: str, name: str, axes: tuple[str, ...], ins: Sequence[Spec],
                   names: Sequence[str]) -> RuleError:
    operand = next((i for i, s in enumerate(ins) if name in s.names), None)
    who = f" in {names[operand]}" if operand is not None else ""
    return RuleError(f"{op}: {name} is split over {'/'.join(axes)}{who}; {op} needs all of {name} on each "
                     "rank", operand, name)


def _with_axes(op: str, spec: Spec, axes: dict[str, tuple[str, ...]]) -> Spec:
    for dim in spec.dims:
        for factor in () if dim.ragged else dim.factors[1:]:
            if axes.get(factor.name):
                raise RuleError(f"{op}: {factor.name} is split over {'/'.join(axes[factor.name])} and is not "
                                f"the first factor of {dim.label}; a rank's rows would be strided",
                                0, factor.name)
    return spec.owing().split_by(axes)
