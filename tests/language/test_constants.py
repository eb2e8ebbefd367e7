"""Constants: each rank makes its piece, as it is wanted, and nothing is sent; what they refuse."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from shardlib import (
    Layout,
    Mesh,
    Params,
    SpecError,
    compile,
    lower,
    param,
    scan,
    sharded,
    simulate,
    stacked,
    step,
    value_and_grad,
)
from shardlib.compiler.parser import parse_program
from shardlib.functions import arange, full, greater, ones, sum, tril, where, zeros
from shardlib.lowering.emit import Emitter
from shardlib.lowering.load import load
from shardlib.ops import TABLE, one_hot

pytestmark = pytest.mark.usefixtures("one_thread")
LAYOUTS = (Layout(), Layout(T="x"), Layout(S="x"), Layout(T="x", S="y"), Layout(S=("y", "x")),
           Layout(T=("x", "y")), Layout(B="x", T="x"), Layout(B="x", T="x", S="y"))


@sharded("B T S -> T S, T S, T S, T, T S, B T S")
def everything(x):
    """The last one beside an activation, which may be split otherwise."""
    return (zeros("T S", dtype="int32"), ones("T S"), full("T S", -2.5, dtype="float64"), arange("T"),
            tril("T S", diagonal=1), where(tril("T S", diagonal=-1), x, full("S", 7.0, dtype="float64")))


def want(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    shape = x.shape[1:]
    below = torch.ones(shape, dtype=torch.bool).tril(-1)
    return (torch.zeros(shape, dtype=torch.int32), torch.ones(shape), torch.full(shape, -2.5).double(),
            torch.arange(shape[0]), torch.ones(shape, dtype=torch.bool).tril(1), torch.where(below, x, 7.0))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("shape", ((2, 5, 7), (1, 3, 1), (3, 1, 2), (2, 0, 3)))
def test_pieces_are_those_of_the_whole(layout: Layout, shape: tuple[int, ...]) -> None:
    x, log = torch.randn(shape, dtype=torch.float64), []
    made = simulate(everything, layout, x, mesh=Mesh(x=2, y=2), log=log)
    for got, whole in zip(made, want(x), strict=True):
        assert got.dtype == whole.dtype and torch.equal(got, whole)
    assert log == []


def test_compile_and_step_are_told_sizes() -> None:
    f = sharded("B -> B T")(lambda x: full("B T", 2.0) * x)
    for how in (compile, step):
        assert torch.equal(how(f, sizes=dict(T=3), mesh=Mesh())(torch.ones(2)), torch.full((2, 3), 2.0))
        assert said(lambda: how(f, mesh=Mesh())(torch.ones(2))) == (
            "full: no argument holds all of T; say its global size: sizes=dict(T=...)")
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    for got, whole in zip(step(everything, Layout(B="x", T="x"), mesh=Mesh(x=1))(x), want(x), strict=True):
        assert torch.equal(got, whole)


def test_simulate_is_told_sizes() -> None:
    f = sharded("B -> B T")(lambda x: full("B T", 2.0) * x)
    made = simulate(f, Layout(T="x", B="y"), torch.ones(2), mesh=Mesh(x=2, y=2), sizes=dict(T=3))
    assert torch.equal(made, torch.full((2, 3), 2.0))
    assert said(lambda: simulate(f, None, torch.ones(2), mesh=Mesh(), sizes=dict(B=3, T=3))) == (
        "f: B is 3 by sizes, and 2 by x")
    assert said(lambda: f(torch.ones(2), sizes=dict(T=3))) == (
        "<lambda>: it has no keyword argument sizes; compile(<lambda>, sizes=...) has")


def test_a_function_of_nothing() -> None:
    f = sharded("-> T")(lambda: arange("T"))
    assert str(lower(f, Layout(T="x"), mesh=Mesh(x=2))) == '''\
@sharded("-> T/x", layout=EXPLICIT)
def f():
    v1 = arange("T/x", dtype='int64')
    return v1
'''
    assert torch.equal(compile(f, sizes=dict(T=4), mesh=Mesh())(), torch.arange(4))


def test_they_are_made_as_they_are_wanted() -> None:
    """Beside an activation that has their axis, as a parameter is converted; and no piece is left over."""
    f = sharded("B T S -> B T S")(lambda x: where(tril("T S"), x, full("T", -1.0)))
    program = lower(f, Layout(B="x", T="x"), mesh=Mesh(x=2))
    assert str(program) == '''\
@sharded("B/x T S -> B/x T S", layout=EXPLICIT)
def f(x):
    v = tril("T S", diagonal=0, dtype='bool')
    v4 = full("T", dtype='float32', value=-1.0)
    v3 = where(v, x, v4)
    return v3
'''
    assert parse_program(str(program), TABLE) == program


class Layer(Params):
    w: torch.Tensor = param("T S")


class Stack(Params):
    layers: Layer = stacked("L", Layer)


@sharded("T S, * -> T S")
def layer(x, p: Layer):
    return where(tril("T S"), x * p.w, full("T S", -1.0))


@sharded("T S, * -> ()")
def loss(x, w: Stack):
    return sum("T S -> ()", scan(layer, x, w.layers))


def test_backward_of_a_scan_makes_them_anew_and_keeps_none() -> None:
    w, layout, mesh = Stack(layers=Layer(w=torch.randn(2, 3, 3))), Layout(T="x", S="y"), Mesh(x=2, y=2)
    x = torch.randn(3, 3)
    text = str(lower(value_and_grad(loss, wrt="w"), layout, mesh=mesh))
    assert ", x_kept = scan(layer," in text and text.count("_kept") == 2
    assert text.count("tril(") == 2
    value, grads = simulate(value_and_grad(loss, wrt="w"), layout, x, w, mesh=mesh)
    given, y = w.layers.w.clone().requires_grad_(), x
    for one in given:
        y = torch.where(torch.ones(3, 3).tril().bool(), y * one, -1.0)
    y.sum().backward()
    torch.testing.assert_close(value, y.sum().detach())
    torch.testing.assert_close(grads.layers.w, given.grad)


def test_they_are_made_where_the_code_runs() -> None:
    e = Emitter(Mesh(), 0, dict(T=2))
    main = load(e.program(lower(sharded("-> T, T")(lambda: (arange("T"), zeros("T"))), mesh=Mesh())),
                e.space(torch.device("meta")), {}, "f")
    assert [x.device.type for x in main()] == ["meta", "meta"]


@pytest.mark.parametrize(
    "layout", (Layout(), Layout(V="x"), Layout(B="x", V="y"), Layout(V=("x", "y"))), ids=str)
def test_one_hot_is_that_of_torch(layout: Layout) -> None:
    ids = torch.tensor([[0, 4, 2], [3, 3, 1]])
    f = sharded("B T, V -> B V T")(lambda ids, _: one_hot("B T -> B V T", ids, dtype="int64"))
    got = simulate(f, layout, ids, torch.zeros(5), mesh=Mesh(x=2, y=2))
    assert torch.equal(got, torch.nn.functional.one_hot(ids, 5).movedim(-1, 1))


# -- refusals ------------------------------------------------------------------------------------------------

def said(call: Callable) -> str:
    """What the error says, but for the line."""
    with pytest.raises(SpecError) as error:
        call()
    return str(error.value).split("          ")[0].split("\n")[0]


@pytest.mark.parametrize("name, call", (
    ("zeros", lambda: zeros("T")), ("ones", lambda: ones("T")), ("full", lambda: full("T", 1)),
    ("arange", lambda: arange("T")), ("tril", lambda: tril("T S"))))
def test_outside_of_a_function_there_are_none(name: str, call: Callable) -> None:
    assert said(call) == (f"{name} was called outside of a @sharded function; put the computation into one, "
                          "and call that")


def refusal(f: Callable, **more: Any) -> str:
    return said(lambda: compile(sharded("B -> B")(lambda x: f()), mesh=Mesh(), **more)(torch.ones(2)))


def test_what_they_refuse() -> None:
    kinds = "float64, int64, float32, int32, bfloat16, float16, int16, bool, uint8, int8"
    for f, args in ((zeros, ["B"]), (ones, ["B"]), (full, ["B", 0]), (arange, ["B"]), (tril, ["B C"])):
        assert refusal(lambda: f(*args, dtype="long")) == (
            f"{f.__name__}: dtype is 'long'; it is one of {kinds}")
    for text in ("B +tp", "... B"):
        assert refusal(lambda: zeros(text)) == (
            f'zeros "{text}": the text is dims of what is made; it owes nothing')
    for text in ("B C", "()", "(B C)", "3"):
        assert refusal(lambda: arange(text)) == (
            f'arange "{text}": the text is one dim of what is made; it owes nothing')
    assert refusal(lambda: tril("B")) == 'tril "B": the text is two dims of what is made; it owes nothing'
    assert refusal(lambda: tril("B C", diagonal=0.5)) == "tril: diagonal is 0.5; it is a whole number"
    for value in (float("inf"), float("nan"), None, "1", torch.ones(())):
        assert refusal(lambda: full("B", value)) == (
            f"full: the value is {value!r}; it is a finite number, True or False")
    for value, dtype in ((0.5, "int64"), (300, "uint8"), (-1, "uint8"), (1e39, "float32"), (1, "bool"),
                         (True, "float32")):
        assert refusal(lambda: full("B", value, dtype=dtype)) == (
            f"full: the value is {value!r}, and {dtype} does not hold that")
    long = sharded("T -> T")(lambda x: greater(arange("T", dtype="int8"), 0))
    assert said(lambda: compile(long, mesh=Mesh())(torch.ones(129))) == (
        "arange: T counts to 128, and int8 does not hold that")
    assert compile(long, mesh=Mesh())(torch.ones(128)).sum() == 127
    assert refusal(lambda: arange("B", dtype="bool")) == "arange: B counts to 1, and bool does not hold that"


def test_what_one_hot_refuses() -> None:
    def made(text: str, **more: Any) -> Callable:
        return lambda: lower(sharded("B T -> B T")(lambda ids: one_hot(text, ids, **more)), mesh=Mesh())
    for text in ("B T -> B T", "B T -> B V", "B T -> T B V", "B T, V -> B T V"):
        assert said(made(text)) == (
            f'one_hot "{text}": the specs are those of "B -> B V": the result has one dim more, else the '
            "same")
    assert said(made("B T -> B T V", dtype="float")) == (
        "one_hot: dtype is 'float'; it is one of float64, int64, float32, int32, bfloat16, float16, int16, "
        "bool, uint8, int8")
    ids = sharded("B, V -> B V")(lambda ids, _: one_hot("B -> B V", ids))
    assert said(lambda: compile(ids, mesh=Mesh())(torch.tensor([0, 3]), torch.ones(3))) == (
        "one_hot: ids holds 3, outside of 0 to 2 (V=3)")
    assert said(lambda: compile(ids, mesh=Mesh())(torch.ones(2), torch.ones(3))) == (
        "one_hot: ids is float32; indices are integers")


def test_a_constant_that_is_to_owe_is_made_once_and_owed_by_one_coordinate() -> None:
    f = sharded("D -> D +x")(lambda x: ones("D"))
    assert "owe(" in str(lower(f, Layout(), mesh=Mesh(x=2)))
    assert torch.equal(simulate(f, Layout(), torch.zeros(3), mesh=Mesh(x=2)), torch.ones(3))


@sharded("B T -> B T, B T")
def one_more_and_two(x):
    return x + full("T", 1.0), x + full("T", 2.0)


def test_a_step_tells_constants_that_are_made_anew_apart() -> None:
    """By itself T is split, beside x it is not: what the first sum makes is not what the second does."""
    x = torch.zeros(2, 3)
    one, two = step(one_more_and_two, Layout(B="x", T="x"), mesh=Mesh(x=1))(x)
    assert torch.equal(one, x + 1) and torch.equal(two, x + 2)
