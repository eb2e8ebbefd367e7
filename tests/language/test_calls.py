"""Wrong calls of the API are one line: what is said, whole, by each way to call."""
from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from shardlib import (
    Layout,
    Mesh,
    Params,
    SpecError,
    all_reduce,
    compile,
    cond,
    einsum,
    explain,
    init,
    local,
    lower,
    param,
    prove,
    scan,
    sharded,
    simulate,
    stacked,
    step,
    value_and_grad,
)
from shardlib.functions import argmax, cast, clamp, equal, gelu, maximum, mean, silu, softmax, sum, where
from shardlib.ops import attention, rms_norm, rope_table

ONE, TP = Mesh(tp=1), Mesh(tp=2)


class Weights(Params):
    a: Tensor = param("D F")
    b: Tensor = param("F")


class Many(Params):
    layers: Weights = stacked("L", Weights)


@sharded("B D, * -> B F")
def project(x, w: Weights, *, power=1):
    return einsum("B D, D F -> B F", x, w.a) * (1.0 * power) + w.b


@sharded("B D -> ()")
def average(x, *, by):
    return mean("B D -> ()", x) * by


x, w = torch.ones(3, 4), Weights(a=torch.ones(4, 5), b=torch.ones(5))


def said(call: Callable, *args: Any, **kwargs: Any) -> str:
    """The whole message; lines of this file are counted out."""
    with pytest.raises(SpecError) as error:
        call(*args, **kwargs)
    return re.sub(r"          test_calls\.py:\d+$", "", str(error.value))


RUNS = {"call": lambda f, *args: f(*args), "compile": lambda f, *args: compile(f, mesh=ONE)(*args),
        "step": lambda f, *args: step(f, mesh=ONE)(*args),
        "simulate": lambda f, *args: simulate(f, Layout(F="tp"), *args, mesh=TP),
        "gradients": lambda f, *args: value_and_grad(summed)(*args)}


@sharded("B D, * -> ()")
def summed(x, w: Weights):
    return sum("B F -> ()", project(x, w))


DTYPES = "float64, int64, float32, int32, bfloat16, float16, int16, bool, uint8, int8"


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("args, says", [
    ((x,), "{f} takes 2 arguments, x, w; 1 was given"), ((), "{f} takes 2 arguments, x, w; 0 were given"),
    ((x, w, x), "{f} takes 2 arguments, x, w; 3 were given"),
    ((x, dict(a=w.a)), "{f}: w is a dict; it is a pytree of Params, a Weights"),
    ((x, None), "{f}: w is None; it is a pytree of Params, a Weights"),
    ((x, x), "{f}: w is a Tensor; it is a pytree of Params, a Weights"),
    ((x, Weights), "{f}: w is the class itself; it is a pytree of Params, a Weights"),
    ((x, Many(layers=w)), "{f}: w is a Many; it is a pytree of Params, a Weights"),
    ((w, w), "{f}: x is a Weights; it is one tensor, B D"), ((None, w), "{f}: x is None, not a tensor"),
    ((3.0, w), "{f}: x is a float, not a tensor"),
    ((np.ones((3, 4)), w), "{f}: x is a ndarray, not a tensor"),
    (([[1.0]], w), "{f}: x is a list, not a tensor"),
    ((x, Weights(a=w.a, b=np.ones(5))), "{f}: w.b is a ndarray, not a tensor"),
    ((x.to(torch.complex64), w), "{f}: x is complex64; a tensor of a program is one of " + DTYPES),
    ((x.to(torch.float8_e4m3fn), w), "{f}: x is float8_e4m3fn; a tensor of a program is one of " + DTYPES),
    ((x.to_sparse(), w), "{f}: x is sparse_coo; make a dense tensor of it first"),
    ((torch.nested.nested_tensor([x[0], x[1, :2]]), w), "{f}: x is nested; make a dense tensor of it first"),
    ((x, Weights(a=w.a.to("meta"), b=w.b)), "{f}: w.a is on meta, x on cpu; all arguments are on one device"),
    ((x[0], w), "{g}: x has 1 dims, its spec B D has 2"),
    ((torch.ones(3, 3), w), "{g}: D is 3 by x, and 4 by w.a")])
def test_arguments_that_are_none(run: str, args: tuple, says: str) -> None:
    f, g = ("summed", "summed_and_grad") if run == "gradients" else ("project", "project")
    assert said(RUNS[run], project, *args) == says.format(f=f, g=g)


MADE = {"lower": lambda f, **o: lower(f, **o), "compile": lambda f, **o: compile(f, **o),
        "step": lambda f, **o: step(f, **o),
        "simulate": lambda f, **o: simulate(f, o.pop("layout", None), x, **o),
        "value_and_grad": lambda f, **o: lower(value_and_grad(f, "x"), **o)}


@pytest.mark.parametrize("make", MADE)
def test_what_is_lowered_and_how(make: str) -> None:
    def run(f: Any = average, **options: Any) -> str:
        return said(MADE[make], f, **({"mesh": ONE, "by": 2.0} | options))
    says = "compile" if make == "compile" else "step" if make == "step" else "lower"
    assert run(lambda x: x) == f"{make}: it takes a @sharded function, not a function"
    assert run(None) == f"{make}: it takes a @sharded function, not None"
    assert run(layout="B=tp") == (
        f'{says}: the layout is a str; it is a Layout, as in Layout(B="dp") or Layout.parse("B=dp")')
    assert run(layout={"B": "tp"}) == (
        f'{says}: the layout is a dict; it is a Layout, as in Layout(B="dp") or Layout.parse("B=dp")')
    assert run(mesh="tp=1") == (
        'the mesh is a str; it is a Mesh, as in Mesh(dp=2, tp=4) or Mesh.parse("dp=2,tp=4")')
    assert run(to=3) == "average: it has no keyword argument to"
    assert run(x=x) == (
        'average: x is given by its place; keywords are for static arguments, which come after a "*,"')
    assert said(MADE[make], average, mesh=ONE) == "average: the keyword argument by is missing"


def test_options_of_compile_and_calls_by_name() -> None:
    assert said(compile, project, sizes="B=3") == (
        "sizes is a str; sizes map dims to integers, as in dict(B=8, D=512)")
    assert said(compile, project, donate="v") == (
        "compile: donate names v, which is no argument of project; it has x, w")
    for make in (compile, step):
        assert said(make(project, mesh=ONE), x, w=w) == (
            "project: w is given by name; tensors are given by their place, static arguments when it is "
            "compiled")
    assert said(average, x, by=[2]) == (
        "average: a static argument cannot be hashed: unhashable type: 'list'; compile the function with it")
    assert said(average, x=x) == (
        'average: x is given by its place; keywords are for static arguments, which come after a "*,"')


def test_programs_and_meshes_of_reports() -> None:
    program = lower(project, mesh=ONE)
    for report in (prove, explain):
        assert said(report, project, ONE, dict(B=3)) == (
            "what is proven and explained is a program, as lower(f, layout) returns it, not a Sharded")
        assert said(report, program, "tp=1", dict(B=3)) == (
            "the mesh is a str; it is a Mesh, as in Mesh(dp=2, tp=4)")
        assert said(report, program, ONE, None) == (
            "sizes is a NoneType; sizes map dims to integers, as in dict(B=8, D=512)")


def test_what_is_decorated_drawn_and_differentiated() -> None:
    assert said(sharded, lambda x: x) == (
        'sharded: the signature is a function; it is text, as in @sharded("B T D, D F -> B T F")')
    assert said(sharded("B -> B"), torch.relu) == (
        '@sharded("B -> B"): what it decorates is a builtin_function_or_method, not a Python function')
    assert said(sharded, "B -> B", layout="B=tp").startswith("sharded: the layout is a str; it is a Layout")
    assert said(Mesh, 2) == "mesh: 2 is no mapping of axes to sizes; write Mesh(dp=2, tp=4)"
    assert said(Layout, "B=dp") == (
        "layout: 'B=dp' is no mapping of dims to axes; write Layout(B=\"dp\"), or Layout.parse(\"B=dp\")")
    assert said(init, 3, {}) == "init: what it draws is a class of Params, or an instance, not 3"
    assert said(init, Weights, dict(D=3)) == "init: no size of F; sizes has D: sizes=dict(F=...)"
    assert said(init, Weights, dict(D=3, F="4")) == "sizes: F is '4'; a size is an integer of at least 0"
    assert said(init, Weights, dict(D=3, F=4), dtype="float32") == (
        "init: dtype is 'float32'; it is a floating-point dtype of torch")
    assert said(value_and_grad, None) == "value_and_grad: it takes a @sharded function, not None"
    assert said(value_and_grad, value_and_grad(summed)) == (
        "value_and_grad: it takes a @sharded function, not a ValueAndGrad")
    assert said(value_and_grad, summed, 0) == "value_and_grad: wrt is 0; it names arguments: x, w"
    assert said(value_and_grad, summed, regather="some") == (
        "value_and_grad: regather is 'some'; it is one of all, weights, nothing")


@sharded("B D, D -> B D")
def shifted(x, b):
    return x + b


@sharded("B D -> B D")
def halved(x):
    return x * 0.5


TRACED = "no traced value; make it an argument of the @sharded function"
OPERATORS = ("a traced value has + - * / < <= > >= with values and numbers, ** with a number and, as a mask, "
             "& | ~; write the rest with functions: where(mask, a, b)")


@pytest.mark.parametrize("body, says", [
    (lambda x, s: silu(), "silu: it is called silu(x), and missing 1 required positional argument: 'x'"),
    (lambda x, s: silu(x, x), "silu: it is called silu(x), and takes 1 positional argument but 2 were given"),
    (lambda x, s: mean(x),
     "mean: it is called mean(text, x), and missing 1 required positional argument: 'x'"),
    (lambda x, s: sum(x, dim=1),
     "sum: it is called sum(text, x), and got an unexpected keyword argument 'dim'"),
    (lambda x, s: rms_norm(x),
     "rms_norm: it is called rms_norm(x, w, eps), and missing 1 required positional argument: 'w'"),
    (lambda x, s: rms_norm(x, s, eps="small"), "rms_norm: could not convert string to float: 'small'"),
    (lambda x, s: rope_table("B -> B T/1 H", s),
     ("rope_table: it is called rope_table(text, start, *, theta, scaling, dtype), and missing 1 required "
      "keyword-only argument: 'theta'")),
    (lambda x, s: attention("B D -> B D", x),
     ("attention: it is called attention(text, q, k, v, seen, *, mask, lengths, bias, sinks, causal, window, "
      "softcap, scale, ahead), and missing 2 required positional arguments: 'k' and 'v'")),
    (lambda x, s: silu(3.0), f"silu: operand 1 is a float, {TRACED}"),
    (lambda x, s: silu(None), f"silu: operand 1 is None, {TRACED}"),
    (lambda x, s: softmax(None, "D"), f"softmax: operand 1 is None, {TRACED}"),
    (lambda x, s: where(x, None, x), f"where: operand 2 is None, {TRACED}"),
    (lambda x, s: all_reduce("B D -> B D", 3.0), f"all_reduce: operand 1 is a float, {TRACED}"),
    (lambda x, s: cast(x, torch.float32),
     "cast: torch.float32 is not one of float32, bfloat16, float16, float64"),
    (lambda x, s: x * float("inf"), "mul: inf; the numbers of a program are finite"),
    (lambda x, s: x / 1e-320, "div: 1e-320; the numbers of a program are finite"),
    (lambda x, s: x / 0, "div: by the number 0"),
    (lambda x, s: x % 2, OPERATORS), (lambda x, s: x // 2, OPERATORS), (lambda x, s: 2 ** x, OPERATORS),
    (lambda x, s: x ** s, "**: the exponent is Value(S); it is a finite number"),
    (lambda x, s: x ** float("nan"), "**: the exponent is nan; it is a finite number"),
    (lambda x, s: x > "1", "greater: it compares with a value or a finite number, not with '1'"),
    (lambda x, s: x == 1,
     "==: a traced value has no numbers yet; equal(x, y) and not_equal(x, y) make masks"),
    (lambda x, s: (x > 0) & True,
     "logical_and: the other mask is a bool, not a tensor of the traced function"),
    (lambda x, s: equal(3.0, x), f"compare: operand 1 is a float, {TRACED}"),
    (lambda x, s: maximum(x, "B"), f"maximum: operand 2 is a str, {TRACED}"),
    (lambda x, s: clamp(x), "clamp: neither min nor max is given"),
    (lambda x, s: clamp(x, min=float("nan")), "clamp: min is nan; it is a finite number"),
    (lambda x, s: gelu(x, approximate="fast"), "gelu: approximate is 'fast'; it is 'none' or 'tanh'"),
    (lambda x, s: scan(shifted, None, x), "scan: the carry is None; it is a "
                                   "tensor of the traced function, or a tuple of them"),
    (lambda x, s: scan(lambda x, b: x, x, x), "scan: the body is a @sharded function, not a function"),
    (lambda x, s: scan(shifted, x), ("scan: it is called scan(f, carry, stacked, *constants, **static), and "
                                     "missing 1 required positional argument: 'stacked'")),
    (lambda x, s: scan(shifted, x, s), "scan: b of shifted has dims S, not S D"),
    (lambda x, s: scan(shifted, s, x), "scan: x of shifted has dims S, not B D"),
    (lambda x, s: scan(shifted, x, x, s),
     "scan: shifted takes 2 arguments; it gets the carry, 1 stacked and 1 constants"),
    (lambda x, s: cond(argmax("S -> ()", s), halved, None, x),
     "cond: a branch is a @sharded function, not None"),
    (lambda x, s: cond(argmax("S -> ()", s), halved, halved), "halved takes 1 argument, x; 0 were given"),
    (lambda x, s: cond(argmax("S -> ()", s), halved, halved, s), "cond: x of halved has dims S, not B D"),
    (lambda x, s: cond(argmax("S -> ()", s), halved, halved, 3.0),
     "cond: a float is neither a tensor of the traced function nor a Params"),
    (lambda x, s: local("B D -> B D", "relu", x), "local: a str is no function"),
    (lambda x, s: local("B D -> B D", torch.relu), "local: relu is given no operand"),
    (lambda x, s: einsum("B E, S -> B S", x * 1, s),
     'einsum "B E, S -> B S": operand 1 has dims B D, not B E'),
    (lambda x, s: halved(), "halved takes 1 argument, x; 0 were given"),
    (lambda x, s: halved(x, by=2), "halved: it has no keyword argument by"),
    (lambda x, s: project(x, s), "project: w is a Value; it is a pytree of Params, a Weights"),
    (lambda x, s: 3.0, "<lambda>: the result is a float, not a tensor of the traced function")])
def test_wrong_calls_inside_of_a_function(body: Callable, says: str) -> None:
    """At the user's line."""
    f = sharded("B D, S -> B D")(body)
    assert said(lower, f, mesh=ONE) == says
    where = f"          test_calls.py:{body.__code__.co_firstlineno}"
    with pytest.raises(SpecError) as error:
        lower(f, mesh=ONE)
    assert str(error.value).startswith(says + where[:-1])


def test_a_user_s_own_error_passes() -> None:
    def own(x):
        return int("no number") + x
    for run in (lambda f: lower(f, mesh=ONE), lambda f: step(f, mesh=ONE)(x)):
        with pytest.raises(ValueError, match="^invalid literal for int") as error:
            run(sharded("B D -> B D")(own))
        assert not isinstance(error.value, SpecError)
