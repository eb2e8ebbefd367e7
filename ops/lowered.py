"""Every name that a printed program uses: below `from shardlib.ops.lowered import *` what
`lower` prints is Python.

The ops of the language and of models are here as printing calls them, those that only the compiler writes
(`rank_of`, `silu_vjp`) too. What `parse_program` reads and Python does not: a second class of one name
(`Layer__2`), an argument named as an op that is called. A function that `local` names is to be imported as it
is named.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from shardlib import EXPLICIT, Params, SpecError, cond, local, nested, param, sharded, stacked
from shardlib import scan as forward_scan
from shardlib.compiler.parser import CORE
from shardlib.language.fused import fused
from shardlib.language.trace import Executor, Tracer
from shardlib.language.value import ACTIVE, apply
from shardlib.ops import TABLE
from shardlib.program import Op


def _function(op: Op) -> Callable:
    def call(*operands: Any, **attrs: Any) -> Any:
        return (apply(op, operands[1:], operands[0], **attrs) if op.takes_text
                else apply(op, operands, **attrs))
    call.__name__ = call.__qualname__ = op.name
    return call


def scan(f: Any, carry: Any, stacks: tuple, *constants: Any, reverse: bool = False, stages: int = 0) -> Any:
    """`shardlib.scan`; in `reverse`, as backward has it, from the last layer to the first; over so many
    `stages`, each of which sends its carries on to the next."""
    tracer = ACTIVE.get()
    if reverse and isinstance(tracer, Executor):
        raise SpecError("scan: step runs no scan in reverse; lower, compile and simulate do")
    made = forward_scan(f, carry, stacks, *constants)
    if reverse or stages:
        steps = tracer.steps if isinstance(tracer, Tracer) else []
        said = [(name, n) for name, n in (("reverse", reverse), ("stages", stages)) if n]
        steps[-1] = replace(steps[-1], attrs=tuple(sorted((*steps[-1].attrs, *said))))
    return made


_CALLS = {op.name: _function(op) for op in (*CORE.values(), *TABLE.values())}
globals().update(_CALLS)
__all__ = ["EXPLICIT", "Params", "Tensor", "cond", "fused", "local", "nested", "param", "scan", "sharded",
           "stacked", *_CALLS]
