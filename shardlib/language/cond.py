"""cond: one of two bodies, chosen by a scalar of the data.

    y = cond(is_long, window, full, q, k, v)

All ranks must choose alike, since the bodies may communicate: the predicate is a scalar that owes nothing,
equal on every rank. Both bodies are `@sharded` functions with the same arguments and results; one may have a
layout of its own, and the types of both are those of the first. Refused: a predicate with dims, or one that
still owes; bodies whose results differ in type, or, as far as that is known, in dtype. Its derivative is a
cond of the same predicate, whose branches run the forward ones again: nothing but the operands is kept.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from shardlib.dtypes import fixed_dtypes, unlike
from shardlib.errors import SpecError
from shardlib.language.calls import check_count, what
from shardlib.language.trace import Executor, Function, tensors, trace_results
from shardlib.language.value import Operand, Value, apply, check_dims
from shardlib.params import Params, fill
from shardlib.program import Op
from shardlib.rules import Rule

COND = Op("cond", rule=lambda step: Rule(), index=(0,), takes=("any",))


def cond(predicate: Operand, yes: Function, no: Function, *args: Operand | Params) -> Any:
    """`yes(*args)` where the scalar `predicate` is true (not zero), else `no(*args)`; the other does not run.

    >>> import torch
    >>> from shardlib import Layout, Mesh, sharded, simulate
    >>> from shardlib.functions import greater, square, sum
    >>> @sharded("D -> D")
    ... def shrunk(g):
    ...     return g * 0.1
    >>> @sharded("D -> D")
    ... def kept(g):
    ...     return g
    >>> @sharded("D -> D")
    ... def clipped(g):
    ...     return cond(greater(sum("D -> ()", square(g)), 100), shrunk, kept, g)
    >>> simulate(clipped, Layout(D="dp"), torch.tensor([3.0, 20.0]), mesh=Mesh(dp=2))
    tensor([0.3000, 2.0000])
    """
    if not isinstance(predicate, Value) or predicate.spec.dims:
        raise SpecError(f"cond: the predicate is {getattr(predicate, 'spec', type(predicate).__name__)}; it "
                        "is a scalar, (), of the traced function")
    for f in (yes, no):
        if not isinstance(f, Function):
            raise SpecError(f"cond: a branch is a @sharded function, not {what(f)}")
        check_count(f, args)
    flat = [v for a in args for v in tensors("cond", a)]
    if isinstance(tracer := predicate.tracer, Executor):
        return _taken(tracer, yes, yes if bool(tracer.whole(predicate)) else no, args)
    (body, results), (orelse, _) = (trace_results(f, list(args)) for f in (yes, no))
    body, orelse = replace(body, layout=yes.layout), replace(orelse, layout=no.layout)
    for f, branch in ((yes, body), (no, orelse)):
        for (path, spec), v in zip(branch.arg_leaves(), flat):
            check_dims(f"cond: {path} of {f.__name__}", spec, v)
    if [s.labels for _, s in body.result_leaves()] != [s.labels for _, s in orelse.result_leaves()]:
        raise SpecError(f"cond: {yes.__name__} returns {_say(body)}, {no.__name__} returns {_say(orelse)}; "
                        "both return the same dims")
    if error := unlike(yes.__name__, no.__name__, fixed_dtypes(body), fixed_dtypes(orelse)):
        raise error
    made = apply(COND, (predicate, *flat), ins=(predicate.spec, *(v.spec for v in flat)),
                 outs=[s for _, s in body.result_leaves()], body=body, orelse=orelse)
    it = iter(made if isinstance(made, tuple) else (made,))
    out = tuple(fill(r, "", lambda _: next(it)) if isinstance(r, Params) else next(it) for r in results)
    for tree in out:
        if isinstance(tree, Params):
            predicate.tracer.group(tree)
    return out if len(out) > 1 else out[0]


def _taken(tracer: Executor, yes: Function, f: Function, args: Sequence[Any]) -> Any:
    """What the branch `f` gives, in the types of the first one, `yes`."""
    results = f(*args)
    given = results if isinstance(results, tuple) else (results,)
    with tracer.under(yes):
        out = tuple(v if said is None else tracer.converted(v, said) for v, said in zip(given, yes.outs))
    return out if isinstance(results, tuple) else out[0]


def _say(program: Any) -> str:
    return ", ".join(str(s) for _, s in program.result_leaves())
