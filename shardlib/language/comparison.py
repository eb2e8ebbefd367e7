"""The ops behind comparisons and `& | ~`: they make masks, and have no gradient. All are refused of sums that
are still owed."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from shardlib.dtypes import FLOATS, fits
from shardlib.errors import SpecError
from shardlib.language.arithmetic import aligned, broadcast, broadcasting, same
from shardlib.language.local_code import LocalCode
from shardlib.program import Op, Step, number
from shardlib.rules import Rule

SIGNS = {"greater": ">", "less": "<", "greater_equal": ">=", "less_equal": "<=", "equal": "==",
         "not_equal": "!="}
_HOLDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    ">": lambda x, y: (x.maximum(y) != y) & (x == x) & (y == y),
    "<": lambda x, y: (x.minimum(y) != y) & (x == x) & (y == y),
    ">=": lambda x, y: x.maximum(y) == x, "<=": lambda x, y: x.minimum(y) == x,
    "==": lambda x, y: x.maximum(y) == x.minimum(y), "!=": lambda x, y: ~(x.maximum(y) == x.minimum(y))}


def _called(sign: str) -> str:
    return next((name for name, s in SIGNS.items() if s == sign), "compare")


def _between(e: LocalCode, step: Step, args: list[str]) -> str:
    """Code of `x sign y`."""
    sign = step.options.get("sign") or {"logical_and": "&", "logical_or": "|"}[step.op.name]
    return f"({f' {sign} '.join(aligned(step, args))})"


def _holding(e: LocalCode, step: Step, x: str) -> str:
    """x, wider where its own dtype does not reach to the number: torch would turn that round, or take it for
    infinite."""
    kind = e.dtypes[step.inputs[0]]
    return x if fits(kind, step.options["than"]) else f"{x}.double()" if kind in FLOATS else f"{x}.long()"


def _both(x: Tensor, than: float) -> tuple[Tensor, Tensor]:
    wide = x if x.is_floating_point() else x.double() if isinstance(than, float) else x.long()
    return wide, wide.new_tensor(than)


def _with_number(name: str, sign: str) -> Op:
    return Op(name, keywords={"than": number}, rule=lambda s: Rule(), infer=same, constant=True,
              takes=("number",), dtype=lambda d, o: ["bool"],
              emit=lambda e, s, a: f"({_holding(e, s, a[0])} {sign} {s.options['than']!r})",
              reference=lambda d, x: _HOLDS[sign](*_both(x, d.options["than"])))


WITH_NUMBER = {name: _with_number(name, sign) for name, sign in SIGNS.items()}
COMPARE = Op("compare", keywords={"sign": lambda v: v in (*_HOLDS,)}, rule=lambda s: Rule(),
             infer=lambda ins, attrs: (broadcast(_called(attrs["sign"]), ins),), constant=True,
             takes=("number",), dtype=lambda d, o: ["bool"],
             promotes=True, emit=_between,
             reference=lambda d, x, y: _HOLDS[d.options["sign"]](x, y))
LOGICAL = {name: Op(name, rule=lambda s: Rule(), infer=broadcasting(name), constant=True, index=(0, 1),
                    takes=("mask",), dtype=lambda d, o: ["bool"], emit=_between, reference=means)
           for name, means in (("logical_and", lambda d, x, y: x.minimum(y)),
                               ("logical_or", lambda d, x, y: x.maximum(y)))}
NOT = Op("logical_not", rule=lambda s: Rule(), infer=same, constant=True, index=(0,), takes=("mask",),
         dtype=lambda d, o: ["bool"], emit=lambda e, s, a: f"~{a[0]}",
         reference=lambda d, x: x == x.new_zeros(()))


def against_number(name: str, than: Any) -> tuple[Op, dict[str, Any]]:
    """The step that compares a value with a number of Python."""
    if not number(than):
        raise SpecError(f"{name}: it compares with a value or a finite number, not with {than!r}")
    return WITH_NUMBER[name], {"than": than}


TABLE = {op.name: op for op in (*WITH_NUMBER.values(), COMPARE, *LOGICAL.values(), NOT)}
