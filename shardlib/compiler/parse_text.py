"""What reading a printed program is made of: the few forms of syntax,
what the text has defined, and its values."""
from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from shardlib.errors import SpecError
from shardlib.program import Op, Program
from shardlib.spec import Dim, Spec
from shardlib.tree import Struct, leaves


@dataclass
class Tree:
    """A value of the text: its struct or spec, and the names of its leaves."""
    tree: Any
    names: tuple[str, ...]

    def field(self, name: str, node: ast.expr) -> Tree:
        at = 0
        for n, sub in self.tree.fields if isinstance(self.tree, Struct) else ():
            count = len(leaves("", sub))
            if n == name:
                return Tree(sub, self.names[at:at + count])
            at += count
        raise not_printed(node)


class Definitions:
    """What the text has defined so far, by the name it is printed under.

    `sizes`: leaves of a class, steps of a function.
    """

    def __init__(self, ops: Mapping[str, Op], functions: Mapping[str, Callable]) -> None:
        self.ops, self.local = ops, functions
        self.classes: dict[str, Struct] = {}
        self.functions: dict[str, Program] = {}
        self.sizes: dict[str, int] = {}
        self.depths: dict[str, int] = {}

    def function(self, node: ast.expr) -> Program:
        """The function that a name of the text stands for."""
        if name_of(node) not in self.functions:
            raise SpecError(f"this is no program: unknown function {name_of(node)!r}, line {node.lineno}")
        return self.functions[name_of(node)]

    def struct(self, node: ast.expr | None) -> Struct:
        """The class that a name of the text stands for."""
        if name_of(node) not in self.classes:
            raise not_printed(node)
        return self.classes[name_of(node)]


def stacked_along(struct: Struct, dims: Sequence[Dim]) -> Struct:
    """Many of `struct`, along one dim."""
    (dim,) = dims if len(dims) == 1 else (None,)
    if dim is None or len(dim.factors) != 1:
        raise SpecError("this is no program: what is stacked is stacked along one dim")
    made = struct.map(lambda s: Spec((dim, *s.dims), s.owed))
    return Struct(made.name, made.fields, dim.label)


@contextmanager
def at_line(node: ast.AST) -> Iterator[None]:
    """Errors inside say the line of `node`."""
    try:
        yield
    except SpecError as error:
        raise error.at("" if "line " in str(error).split("\n")[0]
                       else f"line {getattr(node, 'lineno', '?')}") from None


def original(name: str) -> str:
    """The name of a function or class before printing told it from others by a __2."""
    return re.sub(r"__[0-9]+$", "", name)


def name_of(node: ast.AST | None) -> str:
    if not isinstance(node, ast.Name):
        raise not_printed(node)
    return node.id


def literal(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        raise not_printed(node) from None


def not_printed(node: ast.AST | None) -> SpecError:
    return SpecError(f"this is no program: line {getattr(node, 'lineno', '?')} is not of the printed form")
