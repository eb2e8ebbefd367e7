"""The dtype policy, and the dtypes of a program's values that follow from it.

- Of several operands an op computes in, and gives, the widest by `torch.promote_types`; a scalar `()` counts
  like any other. Indices, masks and what is only looked like do not count. Numbers of Python widen nothing
  within integers and within floats.
- Integers stay integers under `+ - *` and whole numbers. Sums of integers and masks (`sum`, `einsum`) are
  int64; fractions of them (`/`, `mean`, a factor of 0.5) are float32. Indices are integers of any size, read
  as int64.
- What an op gives does not depend on how its operands are split, nor on values that are no operand of it:
  made tables take `dtype=`.
- `rms_norm` and `rope` give x's dtype: they compute in the widest of their operands, norms in at least
  float32, and round once. A cache keeps its dtype: what is written is rounded to it.
- Statistics (means, sums of exp, squares) of narrow floats are float32 inside an op, which rounds once, at
  its end; losses, which are there to be added up (`cross_entropy`), stay float32. Where declarative
  text lets a dim be split, the op is printed as `widen`, the op, which owes in float32, what settles it,
  `cast_like`. What `sum`, `einsum`, and any op of explicit text owes, travels in the value's dtype.
- A cotangent has the dtype of its value. So has the carry of a scan, in every round; both branches of a cond
  give the same dtypes.

What an op cannot take is a `SpecError` before it runs. Only dtypes of arguments are told from outside; an
argument that something is indexed or masked by, here, in a body, or after ops that keep the dtype (moves,
`rename`, `x + 1`), holds int64 or bool by default.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeVar, overload

import torch

from shardlib.errors import SpecError
from shardlib.program import Program, Scan, Step

ITEMSIZE = {"float64": 8, "int64": 8, "float32": 4, "int32": 4, "bfloat16": 2, "float16": 2, "int16": 2,
            "bool": 1, "uint8": 1, "int8": 1}
FLOATS = ("float32", "bfloat16", "float16", "float64")
Dtypes = Sequence[str | None]
Kind = TypeVar("Kind", str, str | None)


@lru_cache(maxsize=1024)
def widest(*dtypes: str | None) -> str | None:
    """What holds all of `dtypes`, by torch.promote_types; None, not known, where one of them is."""
    first, *others = dtypes
    for other in others:
        first = (None if first is None or other is None
                 else str(torch.promote_types(getattr(torch, first), getattr(torch, other)))[6:])
    return first


def fractional(dtype: str | None) -> str | None:
    """The dtype of fractions of what has `dtype`."""
    return dtype if dtype in FLOATS or dtype is None else "float32"


def counted(dtype: str | None) -> str | None:
    """The dtype of sums of what has `dtype`."""
    return dtype if dtype in FLOATS or dtype is None else "int64"


def narrow(dtype: str | None) -> bool:
    """Whether statistics of what has `dtype` are taken in float32."""
    return dtype in ("bfloat16", "float16")


def fits(dtype: str | None, value: float) -> bool:
    """Whether a number is within what a dtype reaches. A fraction is: integers become float32 for it."""
    if dtype is None or dtype == "bool":
        return True
    if dtype in FLOATS:
        return abs(value) <= torch.finfo(getattr(torch, dtype)).max
    held = torch.iinfo(getattr(torch, dtype))
    return isinstance(value, float) or held.min <= value <= held.max


# -- one op --------------------------------------------------------------------------------------------------

def reading(f: Callable[[str | None], str | None]) -> Callable:
    """`Op.reads` of an op that reads all its operands in `f` of the widest of them."""
    return lambda dtypes, attrs: [f(widest(*dtypes))] * len(dtypes)


def as_they_come(dtypes: Dtypes, attrs: Mapping[str, Any]) -> Dtypes:
    """`Op.reads` of an op that looks at each operand as it is."""
    return dtypes


def holds(step: Step, i: int) -> str:
    """What operand `i` of a step may hold, as `Op.takes` has it."""
    takes = step.op.takes
    if callable(takes):
        takes = takes(step)
    return takes[min(i, len(takes) - 1)] if takes else "index" if i in step.op.index else "any"


def read_dtypes(step: Step, ins: Dtypes) -> Dtypes:
    """The dtypes in which a step reads operands of dtypes `ins`."""
    if step.bodies or step.op.moves:
        return ins
    if step.op.reads:
        return step.op.reads(ins, step.options)
    counting = [kind for i, kind in enumerate(ins) if i not in step.op.index]
    common = widest(*counting) if counting else None
    return [common if i not in step.op.index else kind and "int64" if holds(step, i) == "index" else kind
            for i, kind in enumerate(ins)]


def step_dtypes(step: Step, ins: Dtypes) -> Dtypes:
    """The dtypes of a step's results. SpecError, at its line, for operands that it does not take."""
    if step.bodies:
        return _of_bodies(step, ins)
    for i, (name, kind) in enumerate(zip(step.inputs, ins)):
        if kind and kind not in _HOLDS[what := holds(step, i)]:
            raise SpecError(
                f"{step.op.name}: {step.said[i] if i < len(step.said) and step.said[i] else name} is {kind}; "
                f"{_SAYS[what]}").at(step.where)
    if step.op.dtype:
        return step.op.dtype(ins, step.options)
    reads = read_dtypes(step, ins)
    return [next((kind for i, kind in enumerate(reads) if i not in step.op.index),
                 reads[0] if reads else "float32")] * len(step.outputs)


_SAYS = {"number": "it takes integers and floats", "float": 'it takes floats, as cast(x, "float32") makes '
         'them', "index": "indices are integers", "mask": "a mask is bool, as greater and less make it",
         "any": f"a dtype is one of {', '.join(ITEMSIZE)}"}
_HOLDS = {"any": {*ITEMSIZE}, "number": {*ITEMSIZE} - {"bool"}, "float": {*FLOATS}, "mask": {"bool"},
          "index": {*ITEMSIZE} - {*FLOATS} - {"bool"}}


# -- a program -----------------------------------------------------------------------------------------------

@overload
def value_dtypes(program: Program, given: Mapping[str, str], default: str = "float32") -> dict[str, str]: ...
@overload
def value_dtypes(program: Program, given: Mapping[str, str | None],
                 default: str | None = "float32") -> Mapping[str, str | None]:
    ...
def value_dtypes(program: Program, given: Mapping[str, Any], default: Any = "float32") -> Any:
    """The dtype of every value; None follows from None: not known. SpecError for what an op does not take,
    for a cond whose branches make different dtypes, and for a scan whose carry changes."""
    guessed = _guessed(program, {})
    out = {path: given.get(path, guessed.get(path, default)) for path, _ in program.arg_leaves()}
    if strange := next((path for path, kind in out.items() if kind is not None and kind not in ITEMSIZE),
                       None):
        raise SpecError(f"{program.name}: {strange} is {out[strange]}; a dtype is one of "
                        f"{', '.join(ITEMSIZE)}").at(program.where)
    for step in program.steps:
        out.update(zip(step.outputs, step_dtypes(step, [out[i] for i in step.inputs])))
    return out


def inner_dtypes(step: Step, body: Program, dtypes: Mapping[str, Kind]) -> Mapping[str, Kind]:
    """The dtype of every value of a step's body, of those outside."""
    return value_dtypes(body, {path: dtypes[n] for path, n in step.passed(body)})


def result_dtypes(program: Program, dtypes: Mapping[str, str | None]) -> list[str | None]:
    """The dtypes of the results, of those of all values."""
    return [dtypes[n] for n, _ in program.result_leaves()]


def fixed_dtypes(program: Program) -> list[str | None]:
    """The dtypes of the results as far as they are the same whatever the arguments hold."""
    return result_dtypes(program,
                         value_dtypes(program, dict.fromkeys(path for path, _ in program.arg_leaves())))


def unlike(yes: str, no: str, made: Dtypes, others: Dtypes) -> SpecError | None:
    """The error of a cond whose branches, named `yes` and `no`,
    are known to make results of different dtypes."""
    if not any(a and b and a != b for a, b in zip(made, others)):
        return None
    mine, theirs = (", ".join(kind or "any dtype" for kind in kinds) for kinds in (made, others))
    return SpecError(f"cond: {yes} returns {mine}, {no} returns {theirs}; both return the same dtypes")


def changed(body: str, before: str | None, after: str | None) -> SpecError | None:
    """The error of a scan whose carry is known to come back in another dtype."""
    if before is None or after is None or before == after:
        return None
    return SpecError(f"scan: the carry is {before}, {body} returns it as {after}; a carry keeps its dtype: "
                     "cast one of them")


def _of_bodies(step: Step, ins: Dtypes) -> Dtypes:
    outside = dict(zip(step.inputs, ins))
    made, *others = (result_dtypes(body, inner_dtypes(step, body, outside)) for body in step.bodies)
    if others:
        error = unlike(step.body.name, step.orelse.name, made, *others)
    elif step.op.name == "fused":
        error = None
    else:
        carries = len(Scan.of(step).carries)
        error = next(filter(None, (changed(step.body.name, *pair) for pair in zip(ins[:carries], made))),
                     None)
    if error:
        raise error.at(step.where)
    return [next(filter(None, kinds), None) for kinds in zip(made, *others)]


def _guessed(program: Program, wanted: Mapping[str, str]) -> dict[str, str]:
    """The dtypes of arguments that hold indices or masks, where the values `wanted` have theirs."""
    found = dict(wanted)
    for step in reversed(program.steps):
        for name, kind in _guesses(step, found):
            found.setdefault(name, kind)
    return {path: found[path] for path, _ in program.arg_leaves() if path in found}


def _guesses(step: Step, found: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for body in step.bodies:
        inner = _guessed(body, {n: found[made] for made, (n, _) in zip(step.outputs, body.result_leaves())
                                if made in found})
        yield from ((n, inner[path]) for path, n in step.passed(body) if path in inner)
    for i, name in enumerate(step.inputs):
        if (what := holds(step, i)) in ("index", "mask"):
            yield name, "int64" if what == "index" else "bool"
        elif (not step.bodies and not step.op.dtype and not step.op.asserted and step.outputs[0] in found
              and i not in step.op.index):
            yield name, found[step.outputs[0]]
