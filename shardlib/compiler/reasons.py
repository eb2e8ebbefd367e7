"""Why a value is converted: which operand of which op asks for it, and which entry of the layout.

What `Step.why` says, and `explain` shows. And which entries of a layout gather what a program computes, since
an op needs all of their dim: a `LayoutWarning` for each.

    rms_norm takes x as B T D: F=tp, of w, comes before T=tp
    cumsum takes x as B T: it needs all of T
"""
from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches

from shardlib.errors import LayoutWarning
from shardlib.language.moves import ALL_GATHER
from shardlib.language.scan import SCAN
from shardlib.layout import Layout
from shardlib.program import Program, Scan, Step
from shardlib.source import user_frame
from shardlib.spec import Spec
from shardlib.tree import Struct, leaves


def warn(program: Program, layout: Layout) -> None:
    """A LayoutWarning for each entry of the layout that gathers what is no weight since an op needs all of
    its dim, that makes a scan a pipeline though what it goes along are no layers, or that is for no dim, and
    nearly spelled like one. `program` is explicit."""
    said: dict[str, str] = {}
    for part in (*program.bodies(), program):
        made = {name: s for s in part.steps for name in s.outputs}
        weights = {path for name, tree in part.args if isinstance(tree, Struct)
                   for path, _ in leaves(name, tree)}
        for step in part.steps:
            for entry, text in (*_gathers(step, made, weights, layout), *_stages(step, weights, layout)):
                said.setdefault(entry, f"{text}          {step.where}" if step.where else text)
    names = dict.fromkeys(n for part in (*program.bodies(), program) for spec in part.types().values()
                          for n in spec.names)
    for dim, axes, where in program.unmet:
        if not where and (near := _near(dim, names)):
            said.setdefault(f"{dim}={axes}", f"{program.name} has no dim {dim}; it has {near}")
    caller = user_frame()                                   # warnings.warn would say a line of ours
    before = caller.f_globals.setdefault("__warningregistry__", {})
    for entry, text in said.items():
        warnings.warn_explicit(f"layout {entry}: {text}", LayoutWarning, caller.f_code.co_filename,
                               caller.f_lineno, registry=before)


def _gathers(step: Step, made: dict[str, Step], weights: set[str],
             layout: Layout) -> Iterator[tuple[str, str]]:
    """(entry, what it costs) of operands that were gathered for the step; a buffer that each rank has whole,
    as a cache, is written to by all, and a token is drawn from all logits of its row."""
    other = (step.bodies or step.op.moves or step.op.distribute or step.op.updates is not None
             or step.op.constant)
    whole = () if other else step.op.rule(step).whole
    for name in step.inputs if whole else ():
        chain = []
        while name in made and made[name].op.moves:
            chain.append(made[name])
            name = made[name].inputs[0]
        for move in chain if name not in weights else ():
            before, after = _axes(move.ins[0]), _axes(move.outs[0])
            dims = {n: axes for n, axes in before.items() if n in whole and len(after[n]) < len(axes)}
            if move.op is ALL_GATHER and (entry := _entries(dims, layout)):
                yield entry, (f"{step.op.name} needs all of {' '.join(dims)}, so {name} is gathered; where "
                              "another of its dims may have the axis, too, it is exchanged")


def _near(dim: str, names: Iterable[str]) -> str | None:
    """A dim that is spelled nearly so; one letter is near its other case alone."""
    other = next((n for n in names if n.lower() == dim.lower()), None)
    return other or next(iter(get_close_matches(dim, [n for n in names if len(n) > 2], 1, 0.75)), None)


def _stages(step: Step, weights: set[str], layout: Layout) -> Iterator[tuple[str, str]]:
    """Of a scan along a split dim that no weights are stacked along."""
    if step.op is SCAN and (parts := Scan.of(step)).stages and not weights & {n for _, n in parts.stacked}:
        entry = f"{parts.dim}={'/'.join(layout.entries.get(parts.dim, ()))}"
        yield entry, (f"the scan of {step.bodies[0].name} goes along {parts.dim}, so it is a pipeline of "
                      f"{parts.stages} stages, of which each waits for the one before")


def taken(step: Step, i: int, have: Spec, wants: Sequence[Spec], layout: Layout) -> str:
    """Why operand `i` of a step as written, of type `have`, becomes `wants[i]`."""
    want, names = wants[i], [_name(step, j) for j in range(len(wants))]
    if have == want:
        return ""
    text, there = f"{step.op.name} takes {names[i]} as {want}", _axes(want)
    for name, axes in _axes(have).items():
        axis = next((a for a in axes if a not in there.get(name, ())), None)
        if axis is not None:
            return f"{text}: {_undone(step, i, name, axis, wants, names, layout)}"
    gained = _entries({n: axes for n, axes in there.items() if axes != _axes(have).get(n, ())}, layout)
    return f"{text}: {gained}" if gained else text


def _undone(step: Step, i: int, name: str, axis: str, wants: Sequence[Spec], names: Sequence[str],
            layout: Layout) -> str:
    """Why dim `name` of operand `i` is not split over `axis`, as it was."""
    if not step.op.distribute and name in step.op.rule(step).whole:
        return f"it needs all of {name}"
    mine = _entries({name: (axis,)}, layout)
    for j in (i, *(j for j in range(len(wants)) if j != i)):
        other = next((n for n, axes in _axes(wants[j]).items() if axis in axes and n != name), None)
        if other is not None:
            who = _entries({other: (axis,)}, layout) or f"{other}/{axis}"
            return f"{who}, of {names[j]}," + (f" comes before {mine}" if mine else f" has {axis}")
        if any(o.axis == axis for o in wants[j].owed):
            return f"{names[j]} owes over {axis}"
    return f"{name} is whole in it"


def kept(text: Spec, have: Spec, want: Spec, layout: Layout) -> str:
    """Why a value that stands alone becomes `want`."""
    if have == want:
        return ""
    gained = {n: axes for n, axes in _axes(want).items() if axes and axes != _axes(have).get(n, ())}
    why, entries = f"the layout keeps {text.whole()} as {want}", _entries(gained, layout)
    return f"{why}: {entries}" if entries else why


def renamed(have: Spec, placed: Spec, made: Spec, layout: Layout) -> str:
    """Why a dim of a value of type `have` is whole, as `placed` has it, where it gets another name."""
    changed = [(f.name, new) for old, now, new in zip(have.dims, placed.dims, made.dims)
               for f, g in zip(old.factors, now.factors) if f.axes != g.axes]
    text = f"rename makes {made}"
    if not changed:
        return text
    old, new = changed[0]
    entry = _entries({n: layout.entries.get(n, ()) for n in new.names}, layout)
    return f"{text}: {entry or f'{old} is {new.label} there, which no entry splits'}"


def _name(step: Step, i: int) -> str:
    """What the user calls operand `i`."""
    said = step.said[i] if i < len(step.said) else ""
    return said or (step.inputs[i] if len(step.inputs) > i else f"operand {i + 1}")


def _axes(spec: Spec) -> dict[str, tuple[str, ...]]:
    return {f.name: f.axes for d in spec.dims for f in d.factors}


def _entries(dims: dict[str, tuple[str, ...]], layout: Layout) -> str:
    """The entries of the layout that split these dims over one of these axes, as a layout is written."""
    return ",".join(f"{n}={'/'.join(layout.entries[n])}" for n, axes in dims.items()
                    if set(axes) & set(layout.entries.get(n, ())))
