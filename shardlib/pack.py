"""Packing: weights that multiply the same activation become one matrix, and their einsums one matmul.

A lowering choice, made once: it changes no type and no collective. `Compiled.prepare` builds the packed weights; a body
that was lowered for them takes those instead of the separate leaves. Packed are einsums of a scan's body whose weight is
a leaf of the stacked arguments, used there only, with the contracted dims in front: `D K G H`, `D K H`, `K G H D`.
"""
from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Mapping

import torch
from torch import Tensor

from shardlib.einsum import EINSUM
from shardlib.program import Program, Step
from shardlib.scan import SCAN

if TYPE_CHECKING:
    from shardlib.emit import Emitter


@dataclass(frozen=True)
class Packing:
    """One matmul: the steps of a body that it computes, their weights by path (in the body, and outside), in order."""
    scan: str
    steps: tuple[Step, ...]
    inner_paths: tuple[str, ...]
    outer_paths: tuple[str, ...]

    @property
    def name(self) -> str:
        """How the packed weight is called among the arguments."""
        return "|".join(self.outer_paths)


def packings(program: Program, prepared: set[str]) -> list[Packing]:
    """The packings of `program`, whose arguments `prepared` come packed."""
    uses: dict[str, int] = {}
    for step in program.steps:
        for name in step.inputs:
            uses[name] = uses.get(name, 0) + 1
    found = []
    for step in program.steps:
        if step.op is SCAN:
            paths = [p for p, _ in step.body.arg_leaves()]
            stacked = {p: n for p, n in list(zip(paths, step.inputs))[1:1 + step.options["stacked"]]
                       if n.split(".")[0] in prepared and uses[n] == 1}
            found += _of_body(step, stacked)
    return found


def _of_body(scan: Step, stacked: Mapping[str, str]) -> list[Packing]:
    groups: dict[tuple, list[tuple[Step, str]]] = {}
    used = [i for s in scan.body.steps for i in s.inputs]
    for step in scan.body.steps:
        if step.op is EINSUM and len(step.inputs) == 2 and step.inputs[1] in stacked and used.count(step.inputs[1]) == 1:
            x, w = step.ins
            inner = tuple(n for n in x.labels if n in w.labels)
            right = tuple(n for n in w.labels if n not in x.labels)
            left = tuple(n for n in x.labels if n not in w.labels)
            if inner and right and x.labels == left + inner and w.labels == inner + right and step.outs[0].labels == left + right:
                groups.setdefault((step.inputs[0], inner), []).append((step, step.inputs[1]))
    return [Packing(scan.outputs[0], tuple(s for s, _ in g), tuple(p for _, p in g), tuple(stacked[p] for _, p in g)) for g in groups.values()]


def pack(group: Packing, leaves: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """Per layer, the packed matrix: contracted dims flat, then the dims of every weight flat, one after the other."""
    flat = []
    for step, path in zip(group.steps, group.outer_paths):
        w = leaves[path]
        count = sum(n in step.ins[0].labels for n in step.ins[1].labels)
        flat.append(w.reshape(w.shape[0], prod(w.shape[1:1 + count]), prod(w.shape[1 + count:])))
    whole = torch.cat(flat, -1) if len(flat) > 1 else flat[0].contiguous()
    return tuple(whole.unbind(0))


def emit_packed(e: Emitter, group: Packing, x: str, weight: str, temporary: str) -> list[tuple[str, str]]:
    """(target, expression) lines: the matmul, then each step's result; a target that is a step's output stands by its name."""
    step = group.steps[0]
    shape = e.shape(step.ins[0])
    inner = sum(n in step.ins[1].labels for n in step.ins[0].labels)
    operand = x if inner == 1 else f"{x}.reshape({(*shape[:len(shape) - inner], prod(shape[len(shape) - inner:]))})"
    widths = [prod(e.shape(s.outs[0])[len(shape) - inner:]) for s in group.steps]
    product = f"torch.matmul({operand}, {weight})"
    if len(group.steps) == 1:
        return [(step.outputs[0], _view(e, step, product, len(shape) - inner))]
    lines = [(temporary, f"{product}.split({tuple(widths)}, -1)")]
    return lines + [(s.outputs[0], _view(e, s, f"{temporary}[{i}]", len(shape) - inner)) for i, s in enumerate(group.steps)]


def _view(e: Emitter, step: Step, text: str, left: int) -> str:
    out = e.shape(step.outs[0])
    return text if len(out) == left + 1 else f"{text}.view({out})"
