"""How the user writes it: values and calls of a program as they stand in its source, or would stand there.

What a variable holds has its name, an expression is written out. Where the source is at hand, it is quoted.
"""
from __future__ import annotations

import ast
import linecache
from collections.abc import Sequence
from itertools import islice

from shardlib.language.comparison import SIGNS
from shardlib.language.moves import RESHARD
from shardlib.language.scan import SCAN
from shardlib.program import INFIX, Program, Step
from shardlib.source import Where

SHORT = 40          # characters of an expression that stands for an operand's name
DEPTH = 4           # calls within calls that are written out
# what users call ops that are named otherwise
WORDS = {"scale": "mul", "shift": "add", "reciprocal": "div", "filled": "where"}
_NODES = dict(add=ast.Add, sub=ast.Sub, mul=ast.Mult, div=ast.Div, scale=ast.Mult, shift=ast.Add)


def operand(step: Step, i: int, program: Program, depth: int = DEPTH) -> str:
    """Operand i as the user's text has it: a variable, or the expression that made it."""
    if not step.said or step.said[i]:
        return step.said[i] if step.said else step.inputs[i]
    quoted = in_source(step)
    return quoted[i] if quoted else expression(step.inputs[i], program, depth)


def in_source(step: Step) -> list[str]:
    """The operands as they stand in the user's source; nothing where that cannot be told."""
    text = _call_in_source(step.where)
    try:
        node = ast.parse(text, mode="eval").body
    except SyntaxError:
        return []
    if isinstance(node, ast.BinOp) and type(node.op) is _NODES.get(step.op.name):
        parts = [node.left, node.right]
    elif isinstance(node, ast.Call) and _called(node) == step.op.name:
        parts = node.args
    else:
        return []
    parts = [p for p in parts if not isinstance(p, ast.Constant)]
    if len(parts) != len(step.inputs) or any(isinstance(p, ast.Starred) for p in parts):
        return []
    return [ast.unparse(p) if p.lineno != p.end_lineno else ast.get_source_segment(text, p) for p in parts]


def _called(node: ast.Call) -> str:
    return getattr(node.func, "id", getattr(node.func, "attr", ""))


def _call_in_source(where: Where | None) -> str:
    """The expression that was being computed, in parentheses; nothing where the source is not at hand."""
    if where is None or where.code is None:
        return ""
    first, last, start, end = next(islice(where.code.co_positions(), where.instruction // 2, None),
                                   (None,) * 4)
    if None in (first, last, start, end):
        return ""
    text = [linecache.getline(where.file, n).encode() for n in range(first, last + 1)]
    text[-1] = text[-1][:end]
    text[0] = text[0][start:]
    return f"({b''.join(text).decode(errors='replace')})"


def made_by(value: str, program: Program) -> Step | None:
    """The step that makes a value; None for an argument."""
    return next((s for s in program.steps if value in s.outputs), None)


def variable(value: str, program: Program) -> str:
    """A value by the user's variable that holds it, else the expression that made it."""
    if not any(s.said for s in program.steps):
        return value
    said = (word for s in program.steps for name, word in zip(s.inputs, s.said) if name == value and word)
    return next(said, None) or expression(value, program)


def expression(value: str, program: Program, depth: int = DEPTH) -> str:
    """A value as the user's text makes it, an argument by its path. depth: of calls that are written out."""
    step = made_by(value, program)
    if step is None:
        return value if value in dict(program.arg_leaves()) else "..."
    if step.op is SCAN or step.op is RESHARD and step.called:
        return f"{step.called.partition(',')[0] or 'scan'}(...)"
    if step.op is RESHARD and step.ins == step.outs:        # what a text says of an operand
        return operand(step, 0, program, depth)
    if not depth:
        return "..."
    return written(step, [operand(step, i, program, depth - 1) for i in range(len(step.inputs))])


def label(code: str) -> str:
    """A short name for an expression: what is passed to calls is left out."""
    try:
        tree = ast.parse(code, mode="eval")
    except SyntaxError:             # `y := x` is none without the parentheses around it
        return code
    for call in ast.walk(tree):
        if isinstance(call, ast.Call):
            call.args, call.keywords = [ast.Constant(...)], []
    return ast.unparse(tree)


def labels(step: Step, program: Program) -> list[str]:
    """What a message calls each operand: where two expressions look alike, in full; long ones by number."""
    codes = [operand(step, i, program) for i in range(len(step.inputs))]
    names = [label(code) for code in codes]

    def unlike(i: int) -> str:
        if len({codes[j] for j, m in enumerate(names) if m == names[i]}) == 1:
            return names[i]
        return codes[i] if codes.count(codes[i]) == 1 and len(codes[i]) <= SHORT else f"operand {i + 1}"
    return [unlike(i) for i in range(len(names))]


def written(step: Step, operands: Sequence[str]) -> str:
    """The call as source text."""
    name, options = step.op.name, step.options
    inner = [f"({o})" if o.count(" ") and not o.endswith(")") else o for o in operands]
    if name in INFIX:
        return f"{inner[0]} {INFIX[name]} {inner[1]}"
    if name in ("scale", "shift"):
        return f"{inner[0]} {'*' if name == 'scale' else '+'} {options['by']!r}"
    if name == "reciprocal":
        return f"1 / {inner[0]}"
    if name == "compare":
        return f"{next(n for n, sign in SIGNS.items() if sign == options['sign'])}({', '.join(operands)})"
    if name == "filled":
        return f"where({', '.join(operands)}, {options['value']!r})"
    options = {k: f'"{v}"' if isinstance(v, str) else repr(v) for k, v in step.attrs}
    text = [f'"{step.text}"'] if step.op.takes_text else []
    return f"{name}({', '.join([*text, *operands, *(f'{k}={v}' for k, v in options.items())])})"
