"""Reading a printed Program back: `parse_program(str(program)) == program`.

The text goes through `ast`, and only the forms that printing makes are understood: classes of `param` and
`stacked` fields, `@sharded` functions, calls of known ops with names, numbers and strings, `scan`, `cond`,
and a return. Nothing is executed. An explicit program is typed as it is read. Text from anywhere is safe to
read: what is no program is a `SpecError`, and length, depth and what a text unfolds to are bounded.
"""
from __future__ import annotations

import ast
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from shardlib.compiler import grad
from shardlib.compiler.complete import complete
from shardlib.compiler.parse_function import FunctionText
from shardlib.compiler.parse_text import (
    Definitions,
    at_line,
    literal,
    name_of,
    not_printed,
    original,
    stacked_along,
)
from shardlib.errors import SpecError
from shardlib.language import (
    along,
    casts,
    comparison,
    constants,
    draws,
    extremes,
    held,
    masks,
    moves,
    pieces,
    reductions,
    softmax,
    sorting,
    topk,
    unary,
    variance,
    windows,
)
from shardlib.language.arithmetic import RECIPROCAL
from shardlib.language.einsum import EINSUM
from shardlib.language.rearrange import REARRANGE, RENAME
from shardlib.layout import EXPLICIT
from shardlib.mesh import Mesh
from shardlib.program import Op, Program
from shardlib.spec import check_text, nameable, parse
from shardlib.tree import Struct

_MODULES = (moves, held, unary, casts, comparison, masks, reductions, extremes, softmax, variance, along,
            constants, pieces, sorting, topk, draws, windows, grad)
CORE: dict[str, Op] = {"einsum": EINSUM, "reciprocal": RECIPROCAL,
                       **{name: op for module in _MODULES for name, op in module.TABLE.items()},
                       "rearrange": REARRANGE, "rename": RENAME}
MAX_TEXT = 4_000_000        # characters of a program
MAX_LEAVES = 100_000        # tensors of one pytree


def parse_program(text: str, ops: Mapping[str, Op] | None = None,
                  functions: Mapping[str, Callable] | None = None) -> Program:
    """The program that `text` prints: its last function.

    SpecError for anything that is not a printed program.

    ops: operators beyond the language's own (`shardlib.ops.TABLE`).  functions: what `local` may run, by
    "module.name".
    """
    check_text("program", text, MAX_TEXT)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = ast.parse(text)
    except (SyntaxError, ValueError) as error:
        raise SpecError(f"this is no program: {error}") from None
    except (RecursionError, MemoryError):
        raise SpecError("this is no program: it is nested too deeply") from None
    known = Definitions({**CORE, **(ops or {})}, functions or {})
    try:
        for node in module.body:
            _top(known, node)
    except RecursionError:
        raise SpecError("this is no program: it is nested too deeply") from None
    if not known.functions:
        raise SpecError("this is no program: it has no @sharded function")
    return list(known.functions.values())[-1]


def _top(known: Definitions, node: ast.stmt) -> None:
    """Read a class or a function; imports are passed over."""
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return
    if (not isinstance(node, (ast.ClassDef, ast.FunctionDef)) or not nameable(node.name)
        or node.name in known.sizes):
        raise not_printed(node)
    if isinstance(node, ast.ClassDef):
        known.classes[node.name] = _class(known, node)
    else:
        known.functions[node.name] = FunctionText(known, node).program()


def _class(known: Definitions, node: ast.ClassDef) -> Struct:
    if [*map(name_of, node.bases)] != ["Params"] or node.keywords or node.decorator_list:
        raise not_printed(node)
    fields: dict[str, Any] = {}
    count = 0
    for item in node.body:
        if isinstance(item, ast.Pass):
            continue
        if (not isinstance(item, ast.AnnAssign) or not nameable(name := name_of(item.target))
            or name in fields):
            raise not_printed(item)
        fields[name] = _field(known, item.value, name_of(item.annotation))
        count += known.sizes[item.annotation.id] if isinstance(fields[name], Struct) else 1
        if count > MAX_LEAVES:
            raise SpecError(f"this is no program: {node.name} holds more than {MAX_LEAVES} tensors")
    known.sizes[node.name] = count
    return Struct(original(node.name), tuple(fields.items()))


def _field(known: Definitions, value: ast.expr | None, kind: str) -> Any:
    if not isinstance(value, ast.Call) or value.keywords:
        raise not_printed(value)
    form = name_of(value.func), len(value.args)
    with at_line(value):
        if form == ("param", 1) and kind == "Tensor":
            return parse(literal(value.args[0]))
        if form == ("stacked", 2) and kind == name_of(value.args[1]):
            return stacked_along(known.struct(value.args[1]), parse(literal(value.args[0])).dims)
        if form == ("nested", 1) and kind == name_of(value.args[0]):
            return known.struct(value.args[0])
    raise not_printed(value)


def check(program: Program, mesh: Mesh) -> Program:
    """An explicit program, typed again from its text: the same program,
    or a SpecError for the first step that does not type."""
    return complete(program, EXPLICIT, mesh)
