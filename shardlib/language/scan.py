"""scan: one body over stacked layers. One step of the program, whose body is traced and printed once.

    x, cache = scan(block, x, (w.layers, cache), angles, mask)
    x, owed, cache = scan(block, (x, owed), (w.layers, cache), angles, mask)
    norms = scan(norm_of, (), w.layers)

The body is a `@sharded` function of (carry or carries, slices of the stacked, constants) that returns the new
carries, then what is to be stacked. The stacked dim is the first of each stacked tensor; in the body it is
gone, and conversions happen there, never on the stack; a layout of the body's own is in force there. Where
the layout splits that dim, the scan is a pipeline: each rank makes the rounds of its layers, and sends the
carry on to the next. Refused: two different stacked dims.
"""
from __future__ import annotations

from typing import Any

from shardlib.errors import SpecError
from shardlib.language.calls import what
from shardlib.language.trace import Executor, Function, tensors, trace_results
from shardlib.language.value import Operand, Value, apply, check_dims
from shardlib.params import Params, fill, leaf_values
from shardlib.program import Op, Scan
from shardlib.rules import Rule
from shardlib.spec import Dim, Spec


def scan(f: Function, carry: Operand | tuple[Operand, ...], stacked: Any, *constants: Operand | Params,
         **static: Any) -> Any:
    """Apply `f` over the slices of `stacked` (a tensor, a Params, or a tuple of them),
    passing `carry` on (a tensor, or a tuple of them; `()` where nothing is).

    Returns the last carry, or carries; and where `f` returns more, those results, stacked.

    >>> import torch
    >>> from shardlib import sharded
    >>> @sharded("B, B, () -> B, B")
    ... def average(old, x, decay):
    ...     new = decay * old + (1 - decay) * x
    ...     return new, new
    >>> @sharded("B, L B, () -> B, L B")
    ... def averages(start, xs, decay):
    ...     return scan(average, start, xs, decay)
    >>> averages(torch.zeros(1), torch.full((3, 1), 8.0), torch.tensor(0.5))
    (tensor([7.]), tensor([[4.],
            [6.],
            [7.]]))
    """
    if not isinstance(f, Function):
        raise SpecError(f"scan: the body is a @sharded function, not {what(f)}")
    carries, stacks = _carries(carry), stacked if isinstance(stacked, tuple) else (stacked,)
    values = [v for s in stacks for v in tensors("scan", s)]
    first = _stacked_dim(values)
    if isinstance(tracer := values[0].tracer, Executor):
        return tracer.scan(f, carries, stacks, constants, static)
    if len(f.ins) != len(carries) + len(stacks) + len(constants):
        raise SpecError(
            f"scan: {f.__name__} takes {len(f.ins)} arguments; it gets "
            f"{'the carry' if len(carries) == 1 else f'{len(carries)} carries'}, {len(stacks)} stacked and "
            f"{len(constants)} constants")
    body, results = trace_results(f, [*carries, *(_slice(s) for s in stacks), *constants], static)
    if len(body.results) < len(carries) or any(isinstance(r, Params) for r in results[:len(carries)]):
        raise SpecError(f"scan: {f.__name__} returns {len(body.results)}; the first {len(carries)} are the "
                        "carries, tensors")
    fixed = [v for c in constants for v in tensors("scan", c)]
    operands = (*carries, *values, *fixed)
    for i, ((path, spec), v) in enumerate(zip(body.arg_leaves(), operands)):
        stack = len(carries) <= i < len(carries) + len(values)
        check_dims(f"scan: {path} of {f.__name__}", Spec((*v.spec.dims[:stack], *spec.dims), spec.owed), v)
    outs = [spec if i < len(carries) else Spec((first, *spec.dims), spec.owed)
            for i, (_, spec) in enumerate(body.result_leaves())]
    with tracer.under(f):
        made = apply(SCAN, operands, ins=[v.spec for v in operands], outs=outs, body=body,
                     **dict(Scan.attrs(first.label, len(values), len(carries))))
    flat = iter(made if isinstance(made, tuple) else (made,))
    out = tuple(fill(r, "", lambda _: next(flat)) if isinstance(r, Params) else next(flat) for r in results)
    for tree in out:
        if isinstance(tree, Params):
            tracer.group(tree)
    return out if len(out) > 1 else out[0]


def _carries(carry: Any) -> tuple[Value, ...]:
    given = carry if isinstance(carry, tuple) else (carry,)
    carries = tuple(c for c in given if isinstance(c, Value))
    if len(carries) < len(given):
        wrong = next(c for c in given if not isinstance(c, Value))
        raise SpecError(
            f"scan: the carry is {what(wrong)}; it is a tensor of the traced function, or a tuple of them")
    return carries


def _stacked_dim(values: list[Value]) -> Dim:
    """The one dim with which all of `values` begin. SpecError where it is none."""
    dims = dict.fromkeys(v.spec.dims[0].label if v.spec.dims else "()" for v in values)
    if len(dims) != 1 or "()" in dims:
        raise SpecError(
            f"scan: the stacked tensors begin with {', '.join(dims) or 'nothing'}; they share one first dim")
    return values[0].spec.dims[0]


def _slice(tree: Any) -> Any:
    """The tree's specs without their first dim."""
    if isinstance(tree, Params):
        old = dict(leaf_values(tree, ""))
        return fill(tree, "", lambda path: old[path].spec.with_dims(old[path].spec.dims[1:]))
    return tree


SCAN = Op("scan", rule=lambda step: Rule())
