"""Packing: weights that multiply the same activation become one matrix, and their einsums one matmul.

A lowering choice, made once: it changes no type and no collective. `Compiled.prepare` builds the packed
weights; a body that was lowered for them takes those instead of the separate leaves. Packed are einsums of a
scan's body whose weight is a leaf of the stacked arguments, used there only, with the contracted dims in
front: `D K G H`, `D K H`, `K G H D`.
"""
from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from shardlib.language.einsum import EINSUM
from shardlib.language.fused import FUSED
from shardlib.language.local_code import LocalCode
from shardlib.language.scan import SCAN
from shardlib.program import Program, Scan, Step
from shardlib.spec import Dim, Spec


@dataclass(frozen=True)
class Packing:
    """One matmul: the steps of a body that it computes, their weights by path (in the body,
    and outside), in order."""
    scan: str
    steps: tuple[Step, ...]
    inner_paths: tuple[str, ...]
    outer_paths: tuple[str, ...]

    @property
    def name(self) -> str:
        """How the packed weight is called among the arguments."""
        return "|".join(self.outer_paths)


def packings(program: Program, prepared: set[str], dtypes: Mapping[str, str]) -> list[Packing]:
    """The packings of `program`, whose arguments `prepared` come packed; `dtypes`:
    of the weights, by path."""
    uses: dict[str, int] = {}
    for step in program.steps:
        for name in step.inputs:
            uses[name] = uses.get(name, 0) + 1
    found = []
    for step in program.steps:
        if step.op is SCAN:
            stacked = {p: n for p, n in Scan.of(step).stacked if n.split(".")[0] in prepared and uses[n] == 1}
            found += _of_body(step, stacked, dtypes)
    return found


def _of_body(scan: Step, stacked: Mapping[str, str], dtypes: Mapping[str, str]) -> list[Packing]:
    groups: dict[tuple, list[tuple[Step, str]]] = {}
    used = [i for s in scan.body.steps for i in s.inputs]
    for step in scan.body.steps:
        if (step.op is EINSUM and len(step.inputs) == 2 and step.inputs[1] in stacked
            and used.count(step.inputs[1]) == 1):
            x, w = step.ins
            inner = tuple(n for n in x.labels if n in w.labels)
            right = tuple(n for n in w.labels if n not in x.labels)
            left = tuple(n for n in x.labels if n not in w.labels)
            if (inner and right and x.labels == left + inner and w.labels == inner + right
                and step.outs[0].labels == left + right):
                groups.setdefault((step.inputs[0], inner, dtypes.get(stacked[step.inputs[1]])),
                                  []).append((step, step.inputs[1]))
    return [Packing(scan.outputs[0], tuple(s for s, _ in g), tuple(p for _, p in g),
                    tuple(stacked[p] for _, p in g)) for g in groups.values()]


def pack(group: Packing, leaves: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Per layer, the packed matrix: contracted dims flat, then the dims of every weight flat,
    one after the other.

    It lies in memory as matmuls of few rows read it fastest: by columns in 16 bits, by rows in more. The
    weights are taken out of `leaves`.
    """
    flat = []
    for step, path in zip(group.steps, group.outer_paths):
        w = leaves.pop(path)
        count = sum(n in step.ins[0].labels for n in step.ins[1].labels)
        flat.append(w.reshape(w.shape[0], prod(w.shape[1:1 + count]), prod(w.shape[1 + count:])))
    if _by_columns(str(flat[0].dtype)[6:]):
        flat = [torch.cat([w.mT for w in flat], -2).mT]
    whole = torch.cat(flat, -1) if len(flat) > 1 else flat[0]
    return tuple(whole.unbind(0))


def emit_packed(e: LocalCode, group: Packing, body: Program, names: dict[str, str], weight: str,
                uses: Mapping[str, int]) -> list[str]:
    """The lines of one matmul and of what it computes; `names` gets the variables
    of the steps that are done by them.

    A kernel may take the matmul, and with it the fused step that takes all that it makes. Neighbours that the
    body puts through the same op along their last dim (q and k through rope) go through it joined.
    """
    first = group.steps[0]
    shape = e.shape(first.ins[0])
    inner = sum(n in first.ins[1].labels for n in first.ins[0].labels)
    left = len(shape) - inner
    have, kind = e.dtypes[first.inputs[0]], e.dtypes[first.outputs[0]]
    x, weight = e.read(names[first.inputs[0]], have, kind), e.read(weight, e.dtypes[first.inputs[1]], kind)
    flat = (*shape[:left], prod(shape[left:]))
    operand = (x if inner == 1 else e.view(x, flat) if ".view(" in x and have == kind
               else f"{x}.reshape({flat})")
    columns, by_columns = (sum(prod(e.shape(s.outs[0])[left:]) for s in group.steps),
                           _by_columns(e.dtypes[first.inputs[1]]))
    sizes = prod(shape[:left]), prod(shape[left:]), columns
    then = _taker(group, body, uses) if by_columns else None
    if then and (text := e.product(operand, weight, sizes, kind, then)):
        made = e.variable()
        names.update(dict.fromkeys((then.outputs[0], *then.inputs), made))      # no line is written of these
        return [f"{made} = {e.view(text, e.shape(then.outs[0]))}"]
    product = by_columns and e.product(operand, weight, sizes, kind)
    product = e.view(product, (*shape[:left], columns)) if product else f"torch.matmul({operand}, {weight})"
    if len(group.steps) == 1:
        names[first.outputs[0]] = e.variable()
        return [f"{names[first.outputs[0]]} = {_view(e, first, product, left)}"]
    runs = _runs(group, body, names)
    width = {s.outputs[0]: prod(e.shape(s.outs[0])[left:]) for s in group.steps}
    parts = [e.variable() for _ in runs]
    lines: list[str] = []

    def name(step: Step, out: str, text: str) -> None:
        """Call `out` by the view `text` where it is used once, else by a variable."""
        if uses.get(out, 0) == 1 or "." not in text:
            names[out] = text
        else:
            names[out] = e.variable()
            lines.append(f"{names[out]} = {text}")
    cut = f".split({tuple(sum(width[s.outputs[0]] for s, _ in run) for run in runs)}, -1)" if runs[1:] else ""
    lines.append(f"{', '.join(parts)} = {product}{cut}")
    for part, run in zip(parts, runs):
        if len(run) == 1:
            name(run[0][0], run[0][0].outputs[0], _view(e, run[0][0], part, left))
            continue
        pieces, joining = _joined(e, run, part, left, names)
        lines += joining
        for piece, (step, after) in zip(pieces, run):
            names[step.outputs[0]] = piece
            name(step, after.outputs[0],
                 piece if len(step.outs[0].dims) == left + 2 else e.view(piece, e.shape(step.outs[0])))
    return lines


def _by_columns(dtype: str) -> bool:
    """How packed weights of this dtype lie."""
    return getattr(torch, dtype).itemsize == 2


def _taker(group: Packing, body: Program, uses: Mapping[str, int]) -> Step | None:
    """The fused step of one result that takes all that the group makes, each as wide and in its order, and
    that nothing else uses."""
    made = tuple(s.outputs[0] for s in group.steps)
    then = next((s for s in body.steps if s.op is FUSED and s.inputs == made and len(s.outputs) == 1), None)
    alike = len({s.outs[0] for s in group.steps}) == 1 and all(uses[n] == 1 for n in made)
    return then if alike else None


def _runs(group: Packing, body: Program, made: Collection[str]) -> list[list[tuple[Step, Step | None]]]:
    """The steps of the group with the op that follows each, neighbours together that an op joins;
    its other operands are `made`."""
    follows: dict[str, list[Step]] = {}
    for step in body.steps:
        for name in step.inputs:
            follows.setdefault(name, []).append(step)
    results = {n for n, _ in body.result_leaves()}
    runs: list[list[tuple[Step, Step | None]]] = []
    for step in group.steps:
        (out,) = step.outputs
        after = follows.get(out, [])
        joins = (after[0] if len(after) == 1 and after[0].op.joins and after[0].inputs[0] == out
                 and out not in results else None)
        joins = joins if joins and all(i in made for i in joins.inputs[1:]) else None
        last = runs[-1][-1] if runs else (None, None)
        if joins and last[1] and (joins.op, joins.inputs[1:], joins.attrs, step.outs[0].dims[-1]) == (
                last[1].op, last[1].inputs[1:], last[1].attrs, last[0].outs[0].dims[-1]):
            runs[-1].append((step, joins))
        else:
            runs.append([(step, joins)])
    return runs


def _joined(e: LocalCode, run: list[tuple[Step, Step]], part: str, left: int,
            names: dict[str, str]) -> tuple[list[str], list[str]]:
    """The variables of the pieces, and the lines that make them:
    one call of the op that all of them go through."""
    (step, op), last = run[0], run[0][0].outs[0].dims[-1]
    lead = e.shape(step.outs[0])[:left]
    heads = [prod(e.shape(s.outs[0])[left:-1]) for s, _ in run]
    wide = Spec((*step.outs[0].dims[:left], Dim((), size=sum(heads)), last))
    (size,) = e.shape(Spec((last,)))
    whole = e.variable()
    text = op.op.emit(e, replace(op, ins=(wide, *op.ins[1:]), outs=(wide,)),
                      [whole, *(names[i] for i in op.inputs[1:])])
    pieces = [e.variable() for _ in run]
    return pieces, [f"{whole} = {e.view(part, (*lead, sum(heads), size))}",
                    f"{', '.join(pieces)} = {text}.split({tuple(heads)}, {left})"]


def _view(e: LocalCode, step: Step, text: str, left: int) -> str:
    out = e.shape(step.outs[0])
    return text if len(out) == left + 1 else e.view(text, out)
