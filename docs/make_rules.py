"""Writes docs/rules.md: for every op, what it accepts on one mesh axis, and what its result then is.

    python docs/make_rules.py
"""
from __future__ import annotations

from pathlib import Path

import shardlib
from shardlib import functions, ops
from shardlib.ops.cases import CASES
from shardlib.oracle import Case

PAGE = Path(__file__).with_name("rules.md")
INFIX = {"add": "x + y", "sub": "x - y", "mul": "x * y", "div": "x / y", "scale": "x * number",
         "shift": "x + number", "reciprocal": "1 / x", "compare": "x > y",
         "filled": "where(mask, x, number)"}
HEAD = """# Typing rules

Made by `python docs/make_rules.py` from the rules themselves; `tests/test_rules_oracle.py` holds each rule against brute
force, and this page against the rules.

Each row is one op, a call of it with everything whole, and what else it accepts on one mesh axis, here `x`: `D/x` is split,
`+x` a sum still owed, `max:x` a maximum still owed. A combination that is missing is refused. For several axes, each has to
be accepted by itself, a dim has the same axes in the same order in all operands, and an axis splits one dim.

For every op: an operand that owes a maximum is refused; `all_reduce` and `reduce_scatter` take it. An index or a mask owes
nothing. Operands held at one coordinate (`@x:0`), with others whole or held at the same, give a result that is held there.
`min`, `all`, `var`, `std`, `logsumexp`, `argmax` and `cross_entropy` over a split dim are more than one step: the same over the pieces, and what joins them.
"""  # noqa: E501
INNER = """
## Steps that only compiled programs have

Derivatives, and the parts of ops that run over a split dim.
"""
COLUMNS = "\n| op | whole | also accepted |\n|---|---|---|\n"


def row(case: Case) -> str:
    """One op's row of the table."""
    accepted = [f"`{', '.join(map(str, ins))} -> {', '.join(map(str, outs))}`"
                for ins, made in case.combinations(("x",))
                if (outs := case.accepts(ins, made)) is not None]
    name = INFIX.get(case.op.name, case.op.name)
    return f"| `{name}` | {accepted[0]} | {'<br>'.join(accepted[1:])} |\n"


def page() -> str:
    """The text of docs/rules.md: the first case of each op."""
    first = {case.op.name: case for case in reversed(CASES)}
    cases = [case for case in CASES if first[case.op.name] is case]
    public = [case for case in cases
              if case.op.name in INFIX or any(hasattr(m, case.op.name) for m in (shardlib, functions, ops))]
    inner = [case for case in cases if case not in public]
    return HEAD + COLUMNS + "".join(map(row, public)) + INNER + COLUMNS + "".join(map(row, inner))


if __name__ == "__main__":
    PAGE.write_text(page())
