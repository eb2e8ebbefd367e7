"""What value_and_grad returns, in which order and containers, on every executor;
and which `wrt` it refuses."""
from __future__ import annotations

import doctest

import pytest
import torch
from torch import Tensor

from shardlib import (
    Layout,
    Mesh,
    Params,
    SpecError,
    api,
    compile,
    einsum,
    lower,
    param,
    sharded,
    simulate,
    step,
    value_and_grad,
)
from shardlib.compiler.parser import check, parse_program
from shardlib.functions import square, sum
from shardlib.ops import TABLE, embedding

LAYOUT, ONE = Layout(B="dp", D="tp"), Mesh(dp=1, tp=1)


class Two(Params):
    a: Tensor = param("D F")
    b: Tensor = param("F")


class One(Params):
    c: Tensor = param("D")


@sharded("B D, *, F, * -> ()")
def loss(x, p: Two, y, q: One):
    return sum("B F -> ()", square(einsum("B D, D F -> B F", x * q.c, p.a) * y + p.b))


def arguments() -> dict[str, Tensor | Params]:
    g = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)
    return dict(x=drawn(4, 6), p=Two(a=drawn(6, 3), b=drawn(3)), y=drawn(3), q=One(c=drawn(6)))


def by_torch() -> dict[str, list[Tensor]]:
    """The gradients by the leaves of each argument."""
    args = arguments()
    leaves = dict(x=[args["x"]], p=[args["p"].a, args["p"].b], y=[args["y"]], q=[args["q"].c])
    for leaf in (x for group in leaves.values() for x in group):
        leaf.requires_grad_()
    ((args["x"] * args["q"].c @ args["p"].a * args["y"] + args["p"].b) ** 2).sum().backward()
    return {name: [leaf.grad for leaf in group] for name, group in leaves.items()}


RUNS = {
    "simulate": lambda f, *args: simulate(f, LAYOUT, *args, mesh=Mesh(dp=2, tp=3)),
    "compile": lambda f, *args: compile(f, LAYOUT, mesh=ONE)(*args),
    "step": lambda f, *args: step(f, LAYOUT, mesh=ONE)(*args), "call": lambda f, *args: f(*args)}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("wrt", [None, "y", "q", ["y"], ["q", "x"], ("y", "q", "p", "x"), ["p", "y", "x"]])
def test_gradients_come_in_the_order_and_the_containers_of_wrt(run, wrt):
    _, *got = run(value_and_grad(loss, wrt), *arguments().values())
    want, kinds = by_torch(), dict(x=Tensor, p=Two, y=Tensor, q=One)
    names = ["p", "q"] if wrt is None else [wrt] if isinstance(wrt, str) else wrt
    assert [type(g) for g in got] == [kinds[n] for n in names]
    for name, g in zip(names, got, strict=True):
        for mine, theirs in zip([g] if isinstance(g, Tensor) else vars(g).values(), want[name], strict=True):
            assert torch.allclose(mine, theirs, rtol=1e-12)


def test_the_value_is_first_and_printed_programs_say_the_same_order():
    assert torch.equal(RUNS["call"](value_and_grad(loss, ["q", "x"]), *arguments().values())[0],
                       loss(*arguments().values()))
    program = lower(value_and_grad(loss, ["q", "y", "p"]), LAYOUT, mesh=Mesh(dp=2, tp=3))
    assert [str(r.tree if not hasattr(r.tree, "name") else r.tree.name)
            for r in program.results] == ["()", "One", "F", "Two"]
    assert '@sharded("B/dp D/tp, *, F, * -> (), *, F, *", layout=EXPLICIT)' in str(program)
    assert check(parse_program(str(program), TABLE), Mesh(dp=2, tp=3)) == program


def test_a_breakpoint_sees_the_function_whose_gradients_are_stepped_for():
    seen = []

    @sharded("D -> ()")
    def looking(x):
        seen.append(getattr(x, "local", None))
        return sum("D -> ()", square(x))
    value, grad = step(value_and_grad(looking, "x"), mesh=ONE)(torch.ones(3))
    assert value == 3 and grad.tolist() == [2.0] * 3
    assert [x.tolist() for x in seen if x is not None] == [[1.0] * 3]


@sharded("T, V D, D -> ()")
def embedded(ids, table, w):
    return sum("T D -> ()", embedding("T, V D -> T D", ids, table) * w)


@pytest.mark.parametrize("wrt, message", [
    (["table", "table"], "wrt names table twice"), ([], "wrt is empty"),
    (["w", "v"], "embedded has no argument v"), ("", "embedded has no argument "),
    (None, "embedded takes no pytree, by which gradients are where wrt is not given")])
def test_a_wrt_that_says_nothing_is_refused_when_it_is_said(wrt, message):
    with pytest.raises(SpecError) as error:
        value_and_grad(embedded, wrt)
    line = embedded.fn.__code__.co_firstlineno
    assert str(error.value) == (
        f"value_and_grad: {message}; the arguments are ids, table, w          test_wrt.py:{line}")


def test_there_is_no_gradient_by_indices():
    with pytest.raises(SpecError) as error:
        lower(value_and_grad(embedded, ["w", "ids"]), LAYOUT, mesh=ONE)
    assert (str(error.value)
            == ("value_and_grad: embedded takes indices in ids; there is no gradient by them          "
                f"test_wrt.py:{embedded.fn.__code__.co_firstlineno}"))


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("leaf, kind", [("y", torch.int64), ("p.b", torch.int32), ("p.a", torch.bool)])
def test_there_is_no_gradient_by_integers(run, leaf, kind):
    args, (name, _, field) = arguments(), leaf.partition(".")
    args[name] = (Two(**{**vars(args["p"]), field: vars(args["p"])[field].to(kind)}) if field
                  else args[name].to(kind))
    with pytest.raises(SpecError) as error:
        run(value_and_grad(loss, ["x", "y", "p"]), *args.values())
    assert str(error.value) == (f"value_and_grad: {leaf} is {str(kind).removeprefix('torch.')}; only "
                                "floating-point tensors have gradients          "
                                f"test_wrt.py:{loss.fn.__code__.co_firstlineno}")


def test_gradients_are_no_part_of_a_program():
    @sharded("B D, *, F, * -> ()")
    def f(x, p: Two, y, q: One):
        return value_and_grad(loss)(x, p, y, q)[0]
    with pytest.raises(SpecError) as error:
        lower(f, mesh=ONE)
    assert str(error.value).startswith("value_and_grad: the gradients of loss are a program of their own, "
                                       "and no part of another          test_wrt.py:")


def test_the_example_of_its_docstring():
    (example,) = doctest.DocTestFinder(recurse=False).find(value_and_grad, globs=vars(api) | {})
    assert doctest.DocTestRunner().run(example) == (0, 8)
