"""A scan in two: what its carries need, and the rest, each layer of which may be done whenever one likes.

Of the gradient of a pipeline the first is what the stage before waits for; the second, the gradients of the
weights, needs no other round's result and sends nothing. What the first has and the second uses is stacked
between them.

>>> import warnings
>>> from shardlib import Layout, Mesh, einsum, lower, scan, sharded, value_and_grad
>>> from shardlib.errors import LayoutWarning
>>> from shardlib.functions import mean
>>> @sharded("B D, D -> B D")
... def layer(x, w):
...     return x * w
>>> @sharded("B D, L D -> ()")
... def loss(x, ws):
...     return mean("B D -> ()", scan(layer, x, ws))
>>> with warnings.catch_warnings():
...     warnings.simplefilter("ignore", LayoutWarning)          # no Params are stacked here, a tensor is
...     program = lower(value_and_grad(loss, wrt="ws"), Layout(L="pp"), mesh=Mesh(pp=2))
>>> print(str(halved(program)).partition("def layer_vjp_carry")[2].partition("@sharded")[0].strip())
(g, w):
    v2 = einsum("B D, D -> B D", g, w)
    return v2, g
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from shardlib.language.scan import SCAN
from shardlib.language.trace import fresh
from shardlib.program import Program, Result, Scan, Step
from shardlib.spec import Spec
from shardlib.tree import Tree, leaves


def halved(program: Program) -> Program:
    """The program with the gradient of each pipeline in two scans."""
    taken, steps = program.names(), []
    for step in program.steps:
        again = step.op is SCAN and step.options.get("stages") and step.options.get("reverse")
        steps += in_two(step, taken) if again else [step]
    return replace(program, steps=tuple(steps))


def in_two(step: Step, taken: set[str]) -> list[Step]:
    """A scan as one that makes its carries and one without carries; it alone, where nothing is left for that.

    taken: names that are not free for new values.
    """
    body, parts = step.bodies[0], Scan.of(step)
    types, wanted, first = body.types(), {name for name, _ in parts.carried}, []
    for inner in reversed(body.steps):
        if wanted & {*inner.outputs}:
            wanted |= {*inner.inputs}
            first.append(inner)
    rest = [s for s in body.steps if not any(s is f for f in first)]
    made = {o for s in rest for o in s.outputs}
    late = [(name, out) for name, out in parts.made if name in made]
    if not late:
        return [step]
    used = [*dict.fromkeys(i for s in rest for i in s.inputs if i not in made)]
    given = {path for path, _ in (*parts.stacked, *parts.constants)}
    shared = [(name, fresh(f"{name}_shared".replace(".", "_"), taken)) for name in used if name not in given]
    early = [(name, out) for name, out in parts.made if name not in made]
    one = _scan(step, first[::-1], [*parts.carried, *early, *shared], parts.stages, len(parts.carries),
                f"{body.name}_carry", [])
    return [one, _scan(step, rest, late, 0, 0, f"{body.name}_rest",
                       [(name, out, types[name]) for name, out in shared])]


def _scan(step: Step, steps: Sequence[Step], gives: Sequence[tuple[str, str]], stages: int, carries: int,
          name: str, shared: Sequence[tuple[str, str, Spec]]) -> Step:
    """A scan over the same dim with these steps. gives: (value of the body, value outside).

    shared: of what another scan has stacked, (value of the body, value outside, type in the body).
    """
    body, parts, types = step.bodies[0], Scan.of(step), step.bodies[0].types()
    dim = step.ins[len(parts.carries)].dims[0]
    needed = {i for s in steps for i in s.inputs} | {value for value, _ in gives}
    outer, kinds = dict(step.passed(body)), dict(zip(step.inputs, step.ins))
    stacked = {path for path, _ in parts.stacked}
    args: list[tuple[str, Tree]] = []
    for arg in body.args:
        paths = [path for path, _ in leaves(*arg)]
        if paths[0] in {path for path, _ in parts.carries}:
            args += [arg] if carries else []
        elif needed & {*paths}:
            args.append(arg)
    at = next((i for i, arg in enumerate(args) if leaves(*arg)[0][0] not in stacked
               and leaves(*arg)[0][0] not in {p for p, _ in parts.carries}), len(args))
    args[at:at] = [(value, kind) for value, _, kind in shared]
    outer |= {value: out for value, out, _ in shared}
    kinds |= {out: Spec((dim, *kind.dims), kind.owed) for _, out, kind in shared}
    paths = [path for arg in args for path, _ in leaves(*arg)]
    before = dict(zip(step.outputs, step.outs))
    outs = tuple(before.get(out) or Spec((dim, *types[value].dims), types[value].owed)
                 for value, out in gives)
    many = sum(path in stacked or path in {value for value, _, _ in shared} for path in paths)
    results = tuple(Result(types[value], (value,)) for value, _ in gives)
    inputs = tuple(outer[path] for path in paths)
    return replace(step, ins=tuple(kinds[i] for i in inputs), inputs=inputs, outs=outs,
                   outputs=tuple(out for _, out in gives),
                   attrs=Scan.attrs(step.options["dim"], many, carries, bool(carries), stages),
                   body=replace(body, name=name, args=tuple(args), steps=tuple(steps), results=results))
