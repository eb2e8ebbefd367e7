"""fuse: steps that a fusion means become one step, whose body they are.

    y = all_reduce("B T D +tp -> B T D", v)   |   r, h = fused(all_reduce_add_rms_norm, v, x, w)
    r = x + y                                 |
    h = rms_norm(r, w, eps=1e-05)             |

What is looked for is a table of fusions, in its order. `fuse(table)` is two passes: before a gradient is made
of a program, fusions that do not communicate, but for the steps that a fusion with a collective wants, since
a fused step keeps its operands and backward runs its body again; then, forward and backward alike, all of
them. Whatever looks like a fusion and is none is noted with the reason (`fusion_report`); `require_fusion` is
a pass that insists.
"""
from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from shardlib.compiler.fusion import Fusion, Product
from shardlib.compiler.matching import Matching
from shardlib.compiler.passes.rewrite import Pass
from shardlib.errors import SpecError
from shardlib.language.fused import FUSED
from shardlib.mesh import Mesh
from shardlib.program import Program, Step


def fuse(fusions: Sequence[Fusion],
         product: Callable[[Product], Callable | str] | None = None) -> tuple[Pass, Pass]:
    """The passes that make fused steps of what `fusions` mean.

    product: what multiplies by weights that lie by columns, as `Compiled.prepare` lays those of 16 bits:
    asked when code is written, it gives what is called with x and w, or says why nothing is.

    >>> from shardlib import EXPLICIT, Mesh, lower, sharded
    >>> from shardlib.functions import silu
    >>> @sharded("F, F -> F", layout=EXPLICIT)
    ... def gate_up(gate, up):
    ...     return silu(gate) * up
    >>> @sharded("B F, B F -> B F")
    ... def double(x, y):
    ...     return y * silu(x) * 2
    >>> print(lower(double, mesh=Mesh(), passes=fuse([Fusion(gate_up)])).bodies()[0])
    @sharded("B F, B F -> B F", layout=EXPLICIT)
    def gate_up(gate, up):
        v1 = silu(gate)
        v2 = up * v1
        return v2
    <BLANKLINE>
    """
    table = tuple(fusions)
    local, others = ([f for f in table if f.communicates == wanted] for wanted in (False, True))

    def early(program: Program, mesh: Mesh) -> Program:
        return fused_by(program, mesh, local, _claimed(program, mesh, others))

    def late(program: Program, mesh: Mesh) -> Program:
        return fused_by(program, mesh, table)
    return (Pass("fuse_local", lambda program, mesh: _everywhere(program, mesh, early), after_grad=False,
                 fusions=table),
            Pass("fuse", lambda program, mesh: _everywhere(program, mesh, late), before_grad=False,
                 fusions=table, product=product))


def fusion_report(program: Program) -> list[str]:
    """What has been fused, and what looks like a fusion and is none, with the reason: a line each.

    The body of a scan is told once, however often it runs.

    >>> from shardlib import EXPLICIT, Mesh, lower, sharded
    >>> from shardlib.functions import silu
    >>> @sharded("F, F -> F", layout=EXPLICIT)
    ... def gate_up(gate, up):
    ...     return silu(gate) * up
    >>> @sharded("F, F, F -> F, F")
    ... def two(x, y, z):
    ...     return silu(x) * y, silu(z)
    >>> for line in fusion_report(lower(two, mesh=Mesh(), passes=fuse([Fusion(gate_up)]))):
    ...     print(line)                                                 # doctest: +ELLIPSIS
    gate_up at <...>:3: fused
    gate_up at <...>:3: v3 goes into the result, not into mul
    """
    lines = []
    for step in program.steps:
        if step.op is FUSED:
            lines.append(f"{step.bodies[0].name}{_at(step)}: fused")
        else:
            lines += [line for body in step.bodies for line in fusion_report(body)]
    return [*lines, *program.unfused]


def require_fusion(name: str, count: int) -> Pass:
    """The pass that is a SpecError, with the whole report, unless the program has `count` fused steps `name`.

    They are counted in the program's text, those of a scan's body once: Llama's sums are 2 in a layer and one
    after the last, 3 for any number of layers. More than expected is an error like fewer.

    >>> from shardlib import Mesh, lower, sharded
    >>> @sharded("B F -> B F")
    ... def double(x):
    ...     return x * 2
    >>> lower(double, mesh=Mesh(), passes=[require_fusion("gate_up", 1)])
    Traceback (most recent call last):
    shardlib.errors.SpecError: require_fusion: double has 0 fused gate_up, not 1
      nothing in it is like a fusion
    """
    def check(program: Program, mesh: Mesh) -> Program:
        if (found := _count(program, name)) != count:
            said = f"require_fusion: {program.name} has {found} fused {name}, not {count}"
            report = fusion_report(program) or ["nothing in it is like a fusion"]
            raise SpecError("\n  ".join([said, *report]))
        return program
    return Pass("require_fusion", check, before_grad=False)


def _count(program: Program, name: str) -> int:
    return sum(s.bodies[0].name == name if s.op is FUSED else sum(_count(b, name) for b in s.bodies)
               for s in program.steps)


def _everywhere(program: Program, mesh: Mesh, f: Callable[[Program, Mesh], Program]) -> Program:
    """`f` applied to the program, bodies first; those of fused steps stay what they are."""
    steps = tuple(s if s.op is FUSED else s.rewritten(lambda body: _everywhere(body, mesh, f))
                  for s in program.steps)
    return f(replace(program, steps=steps), mesh)


def fused_by(program: Program, mesh: Mesh, fusions: Sequence[Fusion],
             claimed: Collection[str] = ()) -> Program:
    """The program with all fusions made in it that can be, one after the other: two that are right alone may
    need each other's results. Its bodies stay as they are. `claimed`: values whose steps are left alone."""
    matching, notes = Matching(program, mesh), []
    for fusion in fusions:
        for mark in matching.candidates(fusion):
            found = matching.at(fusion, mark) if matching.made.get(mark.outputs[0]) is mark else None
            if found is None:
                continue
            if isinstance(found, str):
                notes.append(f"{fusion.name}{_at(mark)}: {found}")
            elif not any(o in claimed for s in found.steps for o in s.outputs):
                matching = Matching(_replaced(matching.program, found.made, found.steps), mesh)
    return replace(matching.program, unfused=tuple(notes))


def _claimed(program: Program, mesh: Mesh, fusions: Sequence[Fusion]) -> set[str]:
    """The values that steps of `fusions` would make, were these made."""
    left = {id(s) for s in fused_by(program, mesh, fusions).steps}
    return {o for s in program.steps for o in s.outputs if id(s) not in left}


def _replaced(program: Program, made: Step, steps: Sequence[Step]) -> Program:
    """The program with one step in the place of several: where the last was; what needs it comes after."""
    gone = {id(s) for s in steps}
    last = max(i for i, s in enumerate(program.steps) if id(s) in gone)
    left = [made if i == last else s for i, s in enumerate(program.steps) if i == last or id(s) not in gone]
    known, order = {name for name, _ in program.arg_leaves()}, []
    while left:
        waiting = []
        for step in left:
            if known.issuperset(step.inputs):
                order.append(step)
                known.update(step.outputs)
            else:
                waiting.append(step)
        if len(waiting) == len(left):
            raise AssertionError(f"{waiting[0].op.name} takes what nothing makes")
        left = waiting
    return replace(program, steps=tuple(order))


def _at(step: Step) -> str:
    return f" at {step.where}" if step.where else ""
