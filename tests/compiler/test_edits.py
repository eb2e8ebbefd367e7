"""What reads is what stands there: each small edit of a printed program is refused, or is printed as it was
edited.

An edit takes something out, doubles it, changes its place with its neighbour, or puts in something of its
kind from elsewhere in the program. Most are refused; that none is half understood is what this holds.
"""
from __future__ import annotations

import ast
from collections.abc import Iterator
from contextlib import suppress

import pytest

from shardlib.compiler.parser import parse_program
from shardlib.errors import SpecError
from shardlib.ops import TABLE

TEXT = '''class Mlp(Params):
    norm: Tensor = param("D")
    up: Tensor = param("D F/tp")


class Net(Params):
    layers: Mlp = stacked("L", Mlp)
    last: Mlp = nested(Mlp)
    head: Tensor = param("D V/tp")


class Mlp__2(Params):
    norm: Tensor = param("D")


@sharded("B/dp D, *, B/dp -> B/dp D, B/dp", layout=EXPLICIT)
def layer(x, w: Mlp, bias):
    h = einsum("B/dp D, D F/tp -> B/dp F/tp", x, w.up)
    v5 = einsum("B/dp F/tp, D F/tp -> B/dp D +tp", h, w.up)
    v = all_reduce("B/dp D +tp -> B/dp D", v5)
    v6 = x + v
    v7 = mean("B/dp D -> B/dp", x)
    v8 = v7 - bias
    return v6, v8


@sharded("B/dp D, D -> B/dp D", layout=EXPLICIT)
def norm(x, w):
    v1 = rms_norm(x, w, eps=1e-06)
    return v1


@sharded("B/dp D, B/dp -> B/dp D, B/dp", layout=EXPLICIT)
def one(x, y):
    v1 = x * 2.0
    return v1, y


@sharded("B/dp D, B/dp -> B/dp D, B/dp", layout=EXPLICIT)
def other(x, y):
    v1 = silu(x)
    return v1, y


@sharded("B/dp D, *, B/dp -> B/dp V/tp, B/dp, *", layout=EXPLICIT)
def net(x, w: Net, bias):
    y, m = scan(layer, x, (w.layers,), bias, reverse=True)
    v1 = fused(norm, y, w.last.norm)
    v2 = rename("B/dp -> R/dp", bias)
    v3 = sum("R/dp -> +dp", v2)
    v4 = all_reduce("+dp -> ()", v3)
    v5 = greater(v4, than=0.0)
    z, b = cond(v5, one, other, v1, bias)
    v6 = einsum("B/dp D, D V/tp -> B/dp V/tp", z, w.head)
    return v6, b, Mlp__2(norm=w.last.norm)
'''


def edits(text: str) -> Iterator[str]:
    """The program with one edit, each in turn."""
    tree = ast.parse(text)

    def put(node: ast.AST, field: str, new: object) -> str:
        old = getattr(node, field)
        setattr(node, field, new)
        try:
            return ast.unparse(tree)
        finally:
            setattr(node, field, old)
    for node in ast.walk(tree):
        for field, parts in ast.iter_fields(node):
            for i, part in enumerate(parts) if isinstance(parts, list) else ():
                before, after = parts[:i], parts[i + 1:]
                yield put(node, field, [*before, *after])
                yield put(node, field, [*before, part, part, *after])
                yield put(node, field, [*before, *after[:1], part, *after[1:]])
    for kind, field in ((ast.Name, "id"), (ast.Constant, "value"), (ast.Attribute, "attr")):
        nodes = [node for node in ast.walk(tree) if isinstance(node, kind)]
        others = list(dict.fromkeys(getattr(node, field) for node in nodes))
        for node in nodes:
            yield put(node, field, others[(others.index(getattr(node, field)) + 1) % len(others)])


def functions(text: str) -> dict[str, str]:
    return {node.name: ast.dump(node) for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}


def test_an_edited_program_is_refused_or_is_what_stands_there() -> None:
    """A function that nothing uses any more is no part of the program; in which order functions stand, and
    what a class says that only puts a result together, is printing's to say."""
    assert str(parse_program(TEXT, TABLE)) == TEXT
    read = {}
    for text in {*edits(TEXT)} - {ast.unparse(ast.parse(TEXT))}:
        with suppress(SpecError):
            read[text] = functions(str(parse_program(text, TABLE)))
    wrong = [text for text, found in read.items() if not found.items() <= functions(text).items()]
    assert wrong == [] and len(read) > 10


def test_a_fused_step_takes_tensors() -> None:
    of_tree = (TEXT.replace('"B/dp D, D -> B/dp D"', '"B/dp D, * -> B/dp D"')
               .replace("def norm(x, w):", "def norm(x, w: Mlp__2):")
               .replace("(x, w, eps", "(x, w.norm, eps"))
    with pytest.raises(SpecError) as error:
        parse_program(of_tree, TABLE)
    line = 1 + TEXT.splitlines().index("    v1 = fused(norm, y, w.last.norm)")
    assert str(error.value) == f"this is no program: line {line} is not of the printed form"
