"""The dtypes of a program's values: what its ops make of those of its arguments.

Only dtypes of arguments and of floats that ops make (`default`) are told from outside; everything else follows. An argument that
something is indexed by, here, in a body, or after ops that keep the dtype (moves, `rename`, `x + 1`), holds int64.
"""
from __future__ import annotations

from typing import Mapping, Sequence

from shardlib.errors import SpecError
from shardlib.program import Program, Step

ITEMSIZE = {"float64": 8, "int64": 8, "float32": 4, "int32": 4, "bfloat16": 2, "float16": 2, "bool": 1, "uint8": 1, "int8": 1}


def value_dtypes(program: Program, given: Mapping[str, str | None], default: str | None) -> dict[str, str | None]:
    """The dtype of every value; None follows from None: not known. SpecError for a cond whose branches make different ones."""
    indices = _index_args(program)
    out = {path: given.get(path, "int64" if path in indices else default) for path, _ in program.arg_leaves()}
    for step in program.steps:
        ins = [out[i] for i in step.inputs]
        if step.bodies:
            made, *others = (result_dtypes(body, inner_dtypes(step, body, out, default)) for body in step.bodies)
            if others and (error := unlike(step.body.name, step.orelse.name, made, *others)):
                raise error.at(step.where)
            made = [next(filter(None, kinds), None) for kinds in zip(made, *others)]
        else:
            made = step.op.dtype(ins, step.options) if step.op.dtype else [ins[0] if ins else default] * len(step.outputs)
        out.update(zip(step.outputs, (default if d == "float" else d for d in made)))
    return out


def inner_dtypes(step: Step, body: Program, dtypes: Mapping[str, str | None], default: str | None) -> dict[str, str | None]:
    """The dtype of every value of a step's body."""
    return value_dtypes(body, {path: dtypes[n] for path, n in _passed(step, body)}, default)


def result_dtypes(program: Program, dtypes: Mapping[str, str | None]) -> list[str | None]:
    """The dtypes of the results, of those of all values."""
    return [dtypes[n] for n, _ in program.result_leaves()]


def fixed_dtypes(program: Program) -> list[str | None]:
    """The dtypes of the results as far as they are the same whatever the arguments hold."""
    return result_dtypes(program, value_dtypes(program, dict.fromkeys(path for path, _ in program.arg_leaves()), None))


def unlike(yes: str, no: str, made: Sequence[str | None], others: Sequence[str | None]) -> SpecError | None:
    """The error of a cond whose branches, named `yes` and `no`, are known to make results of different dtypes."""
    if not any(a and b and a != b for a, b in zip(made, others)):
        return None
    mine, theirs = (", ".join(kind or "any dtype" for kind in kinds) for kinds in (made, others))
    return SpecError(f"cond: {yes} returns {mine}, {no} returns {theirs}; both return the same dtypes")


def _passed(step: Step, body: Program) -> list[tuple[str, str]]:
    """(argument of the body, value that it gets); a cond's first operand, its predicate, goes into neither body."""
    paths = [path for path, _ in body.arg_leaves()]
    return list(zip(paths, step.inputs[len(step.inputs) - len(paths):]))


def _index_args(program: Program, wanted: Sequence[str] = ()) -> set[str]:
    """The arguments that hold indices, where the values `wanted` do."""
    found = set(wanted)
    for step in reversed(program.steps):
        for body in step.bodies:
            inner = _index_args(body, [n for made, (n, _) in zip(step.outputs, body.result_leaves()) if made in found])
            found.update(n for path, n in _passed(step, body) if path in inner)
        kept = _kept(step)
        found.update(n for i, n in enumerate(step.inputs) if i in step.op.index and i not in kept)      # of `ones_like` it is no index
        if any(made in found for made, source in zip(step.outputs, kept) if source is not None):
            found.update(n for i, n in enumerate(step.inputs) if i not in step.op.index)
    return found & {path for path, _ in program.arg_leaves()}


def _kept(step: Step) -> list[int | None]:
    """For every result, the operand whose dtype it has; None for a dtype of its own."""
    if step.bodies or step.op.asserted or not step.inputs:
        return [None] * len(step.outputs)
    made = step.op.dtype(range(len(step.inputs)), step.options) if step.op.dtype else [0] * len(step.outputs)
    return [source if isinstance(source, int) else None for source in made]
