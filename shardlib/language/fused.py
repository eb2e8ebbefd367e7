"""fused: steps that a kernel may take together, as one step whose body they are.

    x2, h = fused(all_reduce_add_rms_norm, y, x, w)

The body is a `@sharded` function of tensors; what the step means, sends and gives is what its body does. The
pass `fuse` makes such steps of those that it finds, and printed programs call them so. Where a device or a
communicator has a kernel of that name, generated code may call it; elsewhere it runs the body. Refused: a
body that takes or returns a pytree, dims that are not those of its signature.
"""
from __future__ import annotations

from typing import Any

from shardlib.errors import SpecError
from shardlib.language.calls import check_count, what
from shardlib.language.trace import Executor, Function, tensors, trace_results
from shardlib.language.value import Operand, apply, check_dims
from shardlib.program import Op
from shardlib.rules import Rule

FUSED = Op("fused", rule=lambda step: Rule())


def fused(f: Function, *args: Operand) -> Any:
    """`f(*args)`, as one step.

    >>> from shardlib import Mesh, lower, sharded
    >>> from shardlib.functions import silu
    >>> @sharded("B F, B F -> B F")
    ... def gate_up(gate, up):
    ...     return silu(gate) * up
    >>> @sharded("B F, B F -> B F")
    ... def double(gate, up):
    ...     return 2 * fused(gate_up, gate, up)
    >>> print(lower(double, mesh=Mesh()))
    @sharded("B F, B F -> B F", layout=EXPLICIT)
    def gate_up(gate, up):
        v1 = silu(gate)
        v2 = v1 * up
        return v2
    <BLANKLINE>
    <BLANKLINE>
    @sharded("B F, B F -> B F", layout=EXPLICIT)
    def double(gate, up):
        v1 = fused(gate_up, gate, up)
        v2 = v1 * 2
        return v2
    <BLANKLINE>
    """
    if not isinstance(f, Function):
        raise SpecError(f"fused: the body is a @sharded function, not {what(f)}")
    check_count(f, args)
    if None in f.ins or None in f.outs:
        raise SpecError(f"fused: {f.__name__} takes or returns a pytree; a body has tensors alone")
    values = [v for a in args for v in tensors("fused", a)]
    if values and isinstance(values[0].tracer, Executor):
        return f(*values)
    body, _ = trace_results(f, values)
    for (path, spec), v in zip(body.arg_leaves(), values):
        check_dims(f"fused: {path} of {f.__name__}", spec, v)
    return apply(FUSED, values, ins=[v.spec for v in values], outs=[s for _, s in body.result_leaves()],
                 body=body)
