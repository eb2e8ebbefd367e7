"""Kernels for fused steps and for matmuls: what the device, or a communicator of the group, has for them.

Where no kernel takes a step its body runs, some of which smaller fusions of the table may take.

A step is one of a fusion where its body is what the fusion's function means, whoever made it. Its kernel is
asked for when code is written, with the shapes and dtypes of this rank. Where pieces are not even, members
would be asked unlike things: there the body runs. With SHARDLIB_REFERENCE=1 in the environment every body
runs, on all ranks.
"""
from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from shardlib.compiler.fusion import Product, Site
from shardlib.compiler.matching import static_of
from shardlib.compiler.passes.fuse import fused_by
from shardlib.compiler.passes.rewrite import Pass
from shardlib.distributed.fused_call import FusedCall
from shardlib.distributed.runtime import Runtime
from shardlib.dtypes import holds
from shardlib.errors import SpecError
from shardlib.language.calls import what
from shardlib.language.fused import FUSED
from shardlib.language.moves import axes_of
from shardlib.lowering.buffers import updates_of_fused
from shardlib.program import Program, Step
from shardlib.spec import Spec


class Kernels:
    """Those that come with `passes`, for a program whose dims have `sizes`, on this rank.

    answers: of each fused step, and each matmul, that was asked for, who takes it, or why its body runs, or
    the library's.
    """

    def __init__(self, runtime: Runtime, passes: Sequence[Pass], sizes: Mapping[str, int]) -> None:
        self.runtime, self.sizes = runtime, sizes
        self.meant = {f.name: f for p in passes for f in p.fusions}
        self.fusions = {name: f for name, f in self.meant.items() if f.kernel is not None}
        self.products = [p.product for p in passes if p.product is not None]
        self.reference = os.environ.get("SHARDLIB_REFERENCE", "0") not in ("", "0")
        self.answers: list[str] = []

    @property
    def plan(self) -> str:
        """What all ranks that run a program together must have alike."""
        return "bodies of fused steps\n" if self.reference else ""

    def meet(self, program: Program) -> None:
        """Makes the groups whose communicators are to be asked. All ranks call it."""
        steps = [s for p in (program, *program.bodies()) for s in p.steps
                 if s.op is FUSED and s.bodies[0].name in self.fusions]
        if (groups := list(dict.fromkeys(filter(None, map(self._axes, steps))))) and not self.reference:
            self.runtime.create_groups(groups)

    def __call__(self, step: Step, operands: Sequence[Tensor]) -> Callable | None:
        """What takes the step; None where its body runs."""
        name = step.bodies[0].name
        found = self._asked(step, operands)
        said = found if isinstance(found, str) else "by a kernel"
        self.answers.append(f"{name}{f' at {step.where}' if step.where else ''}: {said}")
        return None if isinstance(found, str) else _counted(step, found)

    def body(self, step: Step) -> Program:
        """The body of a fused step that no kernel takes: what is left of it where the table's later fusions
        take some of its steps. So a norm behind a sum that is too large for one kernel has its own."""
        (body,), names = step.bodies, list(self.meant)
        if self.reference or body.name not in self.meant:
            return body
        later = [self.meant[name] for name in names[names.index(body.name) + 1:]]
        return fused_by(body, self.runtime.mesh, later)

    def product(self, rows: int, lines: int, columns: int, dtype: str, then: Step | None) -> Callable | None:
        """What takes x @ w, and with it the step `then`; None where the library does."""
        if not self.products or self.reference:
            return None
        fusion = then and self.meant.get(then.bodies[0].name)
        if then and (fusion is None or static_of(fusion, then.bodies[0], self.runtime.mesh) != {}):
            return None
        asked = Product(self.runtime.device.type, rows, lines, columns, dtype, fusion and fusion.function)
        answers = [product(asked) for product in self.products]
        found = next((a for a in answers if not isinstance(a, str)), answers[0])
        title = f"matmul of {rows} x {lines} x {columns}{f', {fusion.name}' if fusion else ''}"
        self.answers.append(f"{title}: {found if isinstance(found, str) else 'by a kernel'}")
        return None if isinstance(found, str) else found

    def _asked(self, step: Step, operands: Sequence[Tensor]) -> Callable | str:
        (body,), fusion, axes = step.bodies, self.fusions.get(step.bodies[0].name), self._axes(step)
        if self.reference:
            return "SHARDLIB_REFERENCE is set"
        if fusion is None or fusion.kernel is None:
            return "there is no kernel of that name"
        if (static := static_of(fusion, body, self.runtime.mesh)) is None:
            return "its body is not what the fusion means"
        if axes is None:
            return "its collectives are over several groups"
        if blind := _blind(body):
            return blind
        if not all(self._even(spec, axes) for s in body.steps for spec in (*s.ins, *s.outs)):
            return "its pieces are not even"
        group = self.runtime.group(axes) if axes else None
        sums = [c for c in group.communicators
                if c.deterministic or not group.router.deterministic] if group else []
        here = self.runtime.coordinate
        begins = [tuple(self.runtime.mesh.rows(d, self.sizes, here)[0] for d in s.dims) for s in step.ins]
        site = Site(fusion.function, self.runtime.device.type, operands, static, tuple(sums),
                    self.runtime.mesh.size(axes), begins)
        kernel: Any = fusion.kernel(site)
        return FusedCall(group, fusion.name, kernel) if group and not isinstance(kernel, str) else kernel

    def _even(self, spec: Spec, axes: Sequence[str]) -> bool:
        """Whether all members of a group over `axes` hold as much of a value."""
        return all(self.sizes[d.factors[0].name] % self.runtime.mesh.size(d.axes) == 0
                   for d in spec.dims if {*axes}.intersection(d.axes))

    def _axes(self, step: Step) -> tuple[str, ...] | None:
        """The axes of the one group over which the step communicates, () where it is of one rank;
        None where there are several."""
        mesh = self.runtime.mesh
        over = {axes for s in step.bodies[0].steps if s.op.wire and mesh.size(axes := axes_of(s, mesh)) > 1}
        return None if len(over) > 1 else next(iter(over), ())


def _blind(body: Program) -> str | None:
    """Why nobody can look at the indices of a body before a kernel takes them; None where all are seen."""
    given = {path for path, _ in body.arg_leaves()}
    for step in body.steps:
        indices = [i for i, spec in enumerate(step.ins) if holds(step, i) == "index" and not _says_rows(spec)]
        if indices and step.op.looks is None:
            return f"nothing says what {step.op.name} looks at"
        if any(step.inputs[i] not in given for i in indices):
            return f"an index of {step.op.name} is made inside of it"
    return None


def _says_rows(spec: Spec) -> bool:
    """Whether it is no index of the user's, but what says which row of a ragged dim is which."""
    return any(d.ragged for d in spec.dims)


def _counted(step: Step, kernel: Callable) -> Callable:
    """`kernel`, held to the step's results: one tensor, or a tuple of several; a tensor of two rows is not
    two. What updates a buffer is put there, if it is not there already: others take it from there."""
    name, count, paths = step.bodies[0].name, len(step.outs), [p for p, _ in step.bodies[0].arg_leaves()]
    updates = [(step.outputs.index(out), paths.index(path)) for out, path in updates_of_fused(step).items()]

    def run(*operands: Tensor, **options: Any) -> Any:
        made = kernel(*operands, **options)
        several = isinstance(made, tuple | list) and len(made) == count
        if not (isinstance(made, Tensor) if count == 1 else several):
            raise SpecError(f"{name}: its kernel gives {what(made)}, not "
                            f"{'one tensor' if count == 1 else f'a tuple of {count} tensors'}")
        if not updates:
            return made
        given = [made] if count == 1 else list(made)
        for result, operand in updates:
            new, old = given[result], operands[operand]
            if new is old:
                continue
            if not isinstance(new, Tensor) or (new.shape, new.dtype) != (old.shape, old.dtype):
                raise SpecError(f"{name}: its kernel gives {_form(new)} for a buffer of {_form(old)}")
            given[result] = old.copy_(new)
        return given[0] if count == 1 else tuple(given)
    return run


def _form(x: Any) -> str:
    return f"{tuple(x.shape)} {str(x.dtype)[6:]}" if isinstance(x, Tensor) else what(x)
