"""scan: one body over stacked layers. One step of the program, whose body is traced and printed once.

    x, cache = scan(block, x, (w.layers, cache), angles, mask)

The body is a `@sharded` function of (carry, slices of the stacked, constants) that returns the new carry, then what is
to be stacked. The stacked dim is the first of each stacked tensor; in the body it is gone, and conversions happen
there, never on the stack. Refused: a stacked dim that is split (that is a pipeline), two different stacked dims.
"""
from __future__ import annotations

from dataclasses import replace
from typing import Any

from shardlib.calls import what
from shardlib.errors import SpecError
from shardlib.params import Params, fill, leaf_values
from shardlib.program import Op
from shardlib.rules import Rule
from shardlib.spec import Spec
from shardlib.trace import Function, Value, apply, check_dims, trace_results


def scan(f: Function, carry: Any, stacked: Any, *constants: Any, **static: Any) -> Any:
    """Apply `f` over the slices of `stacked` (a tensor, a Params, or a tuple of them), passing `carry` on.

    Returns the last carry; and where `f` returns more, those results, stacked.
    """
    if not isinstance(f, Function):
        raise SpecError(f"scan: the body is a @sharded function, not {what(f)}")
    if not isinstance(carry, Value):
        raise SpecError(f"scan: the carry is {what(carry)}; it is one tensor of the traced function")
    stacks = stacked if isinstance(stacked, tuple) else (stacked,)
    values = [v for s in stacks for v in _tensors(s)]
    dims = dict.fromkeys(v.spec.dims[0].label if v.spec.dims else "()" for v in values)
    if len(dims) != 1 or "()" in dims:
        raise SpecError(f"scan: the stacked tensors begin with {', '.join(dims) or 'nothing'}; they share one first dim")
    (dim,) = dims
    if values[0].spec.dims[0].axes:
        raise SpecError(f"scan: {dim} is split over {'/'.join(values[0].spec.dims[0].axes)}; a scan over a split dim is a pipeline, "
                        f"which is not built yet")
    if carry.tracer.runs:
        return carry.tracer.scan(f, carry, stacks, constants, static)
    body, results = trace_results(f, [carry, *(_slice(s) for s in stacks), *constants], static)
    if len(f.ins) != 1 + len(stacks) + len(constants):
        raise SpecError(f"scan: {f.__name__} takes {len(f.ins)} arguments; it gets the carry, {len(stacks)} stacked and {len(constants)} constants")
    fixed = [v for c in constants for v in _tensors(c)]
    for i, ((path, spec), v) in enumerate(zip(body.arg_leaves(), (carry, *values, *fixed))):
        stack = 1 <= i <= len(values)
        check_dims(f"scan: {path} of {f.__name__}", Spec((*v.spec.dims[:stack], *spec.dims), spec.owed), v)
    first = values[0].spec.dims[0]
    outs = [spec if i == 0 else Spec((first, *spec.dims), spec.owed) for i, (_, spec) in enumerate(body.result_leaves())]
    made = apply(SCAN, (carry, *values, *fixed), ins=(carry.spec, *(v.spec for v in values), *(v.spec for v in fixed)), outs=outs,
                 body=body, dim=dim, stacked=len(values))
    flat = iter(made if isinstance(made, tuple) else (made,))
    out = tuple(fill(r, "", lambda _: next(flat)) if isinstance(r, Params) else next(flat) for r in results)
    for tree in out:
        if isinstance(tree, Params):
            carry.tracer.group(tree)
    return out if len(out) > 1 else out[0]


def _tensors(tree: Any) -> list[Value]:
    if isinstance(tree, Params):
        return [v for _, v in leaf_values(tree, "")]
    if not isinstance(tree, Value):
        raise SpecError(f"scan: {what(tree)} is neither a tensor of the traced function nor a Params")
    return [tree]


def _slice(tree: Any) -> Any:
    """The tree's specs without their first dim."""
    if isinstance(tree, Params):
        old = dict(leaf_values(tree, ""))
        return fill(tree, "", lambda path: replace(old[path].spec, dims=old[path].spec.dims[1:]))
    return tree


SCAN = Op("scan", rule=lambda step: Rule())
