"""fused: a step that is its body, in all that is told of it and in all that runs it."""
from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from shardlib import (
    EXPLICIT,
    Layout,
    Mesh,
    Params,
    SpecError,
    all_reduce,
    compile,
    einsum,
    explain,
    lower,
    param,
    prove,
    sharded,
    simulate,
    step,
    value_and_grad,
)
from shardlib.compiler.parser import check, parse_program
from shardlib.dtypes import value_dtypes
from shardlib.functions import sum
from shardlib.language.fused import FUSED, fused
from shardlib.lowering.emit import Emitter
from shardlib.ops import TABLE, rms_norm, rope
from shardlib.reference import meaning
from shardlib.reports.classes import Classes
from shardlib.reports.project import project, project_classes
from shardlib.reports.prove import match

MESH, SIZES = Mesh(tp=2), dict(B=3, D=4, F=5)


def with_eps(eps: float) -> Any:
    @sharded("B D +tp, B D, D -> B D, B D", layout=EXPLICIT)
    def add_norm(y, residual, w):
        x = residual + all_reduce("B D +tp -> B D", y)
        return x, rms_norm(x, w, eps)
    return add_norm


narrow, wide = with_eps(1e-5), with_eps(0.5)


def halves(first: Any, second: Any, third: Any) -> Any:
    @sharded("B F/tp, F/tp D, B D, D -> B D", layout=EXPLICIT)
    def halves(a, down, r, w):
        y = einsum("B F/tp, F/tp D -> B D +tp", a, down)
        x, h = first(y, r, w)
        x2, h2 = second(y, x, w)
        x3, h3 = third(y, x2, w)
        return x3 * h * h2 * h3
    return halves


def as_one(f: Any) -> Any:
    return lambda *args: fused(f, *args)


PLAIN, MADE = halves(narrow, narrow, wide), halves(as_one(narrow), as_one(narrow), as_one(wide))


def values() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape) for shape in ((3, 5), (5, 4), (3, 4), (4,))]


def test_it_prints_below_its_bodies_each_once_and_reads_back() -> None:
    program = lower(MADE, mesh=MESH)
    assert str(program) == '''\
@sharded("B D +tp, B D, D -> B D, B D", layout=EXPLICIT)
def add_norm(y, residual, w):
    v1 = all_reduce("B D +tp -> B D", y)
    x = residual + v1
    v2 = rms_norm(x, w, eps=1e-05)
    return x, v2


@sharded("B D +tp, B D, D -> B D, B D", layout=EXPLICIT)
def add_norm__2(y, residual, w):
    v1 = all_reduce("B D +tp -> B D", y)
    x = residual + v1
    v2 = rms_norm(x, w, eps=0.5)
    return x, v2


@sharded("B F/tp, F/tp D, B D, D -> B D", layout=EXPLICIT)
def halves(a, down, r, w):
    y = einsum("B F/tp, F/tp D -> B D +tp", a, down)
    x, h = fused(add_norm, y, r, w)
    x2, h2 = fused(add_norm, y, x, w)
    x3, h3 = fused(add_norm__2, y, x2, w)
    v1 = x3 * h
    v2 = v1 * h2
    v3 = v2 * h3
    return v3
'''
    assert parse_program(str(program), TABLE) == program == check(program, MESH)


def test_what_it_means_sends_and_gives_is_what_its_body_does() -> None:
    plain, made = lower(PLAIN, mesh=MESH), lower(MADE, mesh=MESH)
    args = values()
    named = {path: x.double() for (path, _), x in zip(made.arg_leaves(), args)}
    assert torch.equal(*(meaning(p, named, SIZES)[0] for p in (plain, made)))
    assert torch.equal(*(simulate(f, None, *args, mesh=MESH) for f in (PLAIN, MADE)))
    proofs = [prove(p, MESH, SIZES) for p in (plain, made)]
    assert proofs[0] == proofs[1] and proofs[0].collectives == 3
    told = [explain(p, MESH, SIZES) for p in (plain, made)]
    assert str(told[1]) == str(told[0]) + "".join(f"{line}\n" for line in told[1].fusions)
    assert [line.partition(" at ")[0] for line in told[1].fusions] == ["add_norm"]
    assert value_dtypes(made, {"a": "bfloat16", "w": "float64"})["x2"] == "float32"


def test_one_rank_runs_it_compiled_and_line_by_line() -> None:
    mesh, args = Mesh(tp=1), values()
    made = compile(MADE, mesh=mesh)(*args)
    assert torch.equal(made, compile(PLAIN, mesh=mesh)(*args))
    assert torch.equal(made, step(MADE, mesh=mesh)(*args))


def test_reports_name_the_step_and_the_code_the_program_around_it() -> None:
    program = lower(MADE, mesh=MESH)
    line = next(s for s in program.steps if s.op is FUSED).bodies[0].steps[0].where
    assert [c.step for c in project(program, MESH, 0, SIZES)] == [f"add_norm.v1 ({line})"] * 3
    e, unfused = Emitter(MESH, 0, SIZES), Emitter(MESH, 0, SIZES)
    assert e.program(program) == unfused.program(lower(PLAIN, mesh=MESH))
    assert list(map(str, e.plan.values())) == list(map(str, unfused.plan.values())) == [
        f"step {i} of halves, {line}: B D +tp -> B D" for i in (1, 2, 3)]


def test_ranks_of_which_one_has_another_body_part_ways() -> None:
    """A proof looks into bodies."""
    program = lower(MADE, mesh=MESH)
    classes = Classes(MESH, {"tp": (0, 1)})
    mine, theirs = project_classes(program, classes, SIZES)
    with pytest.raises(SpecError) as error:
        match(classes, [mine, theirs[:2]])
    assert str(error.value) == (
        f"the ranks part ways: rank 0 is in all_reduce of 12 float32 over ranks 0 1 at {mine[2].step}; "
        "rank 1 has ended")
    assert mine[2].step.startswith("add_norm.v1 (test_fused.py:")


@sharded("B D, D -> B D")
def scaled(x, w):
    return einsum("B D, D -> B D", x, w)


@sharded("B D, D -> B D")
def declared(x, w):
    return fused(scaled, x, w) + sum("D -> ()", w)


def test_text_without_axes_is_completed_body_and_all() -> None:
    program, mesh = lower(declared, Layout(B="dp", D="dp"), mesh=Mesh(dp=2)), Mesh(dp=2)
    assert str(program.bodies()[0]) == '''\
@sharded("B/dp D, D/dp -> B/dp D", layout=EXPLICIT)
def scaled(x, w):
    w2 = all_gather("D/dp -> D", w)
    v1 = einsum("B/dp D, D -> B/dp D", x, w2)
    return v1
'''
    assert check(program, mesh) == program
    x, w = torch.randn(3, 4), torch.randn(4)
    assert torch.allclose(simulate(declared, Layout(B="dp", D="dp"), x, w, mesh=mesh), x * w + w.sum())


class Pair(Params):
    a: Tensor = param("D")


@sharded("* -> D")
def of_pair(w: Pair):
    return w.a


@sharded("D, D -> D, D")
def renamed(x, y):
    return fused(scaled, x, y), y


@pytest.mark.parametrize("body, args, message", [
    (abs, 1, "fused: the body is a @sharded function, not a builtin_function_or_method"),
    (scaled, 1, "scaled takes 2 arguments, x, w; 1 was given"),
    (of_pair, 1, "fused: of_pair takes or returns a pytree; a body has tensors alone"),
    (scaled, 2, "fused: x of scaled has dims D, not B D")])
def test_what_it_refuses(body: Any, args: int, message: str) -> None:
    @sharded("D -> D")
    def caller(x):
        return fused(body, *[x] * args)
    with pytest.raises(SpecError) as error:
        lower(caller, mesh=Mesh())
    assert str(error.value).split("   ")[0].strip() == message


def test_in_explicit_text_an_operand_has_the_type_of_the_signature() -> None:
    @sharded("B D, B D, D -> B D, B D", layout=EXPLICIT)
    def caller(y, r, w):
        return fused(narrow, y, r, w)
    with pytest.raises(SpecError) as error:
        lower(caller, mesh=MESH)
    assert str(error.value).split("    ")[0] == (
        'fused: y owes no sum over tp; the signature of add_norm takes "B D +tp"')


@pytest.mark.parametrize("old, new, message", [
    ("fused(add_norm, y, r, w)", "fused(add_norm, y, r)", "line 20 is not of the printed form"),
    ("fused(add_norm, y, r, w)", "fused(add_norm, r, y, w)",
     '"B D" stands where "B D +tp" is said, line 20'),
    ("fused(add_norm, y, r, w)", "fused(other, y, r, w)", "unknown function 'other', line 20"),
    ("fused(add_norm, y, r, w)", "fused(add_norm, y, r, w, eps=1)", "line 20 is not of the printed form"),
    ("fused(add_norm, y, r, w)", "fused()", "line 20 is not of the printed form")])
def test_what_is_no_program(old: str, new: str, message: str) -> None:
    text = str(lower(MADE, mesh=MESH))
    assert old in text
    with pytest.raises(SpecError) as error:
        parse_program(text.replace(old, new), TABLE)
    assert str(error.value) == f"this is no program: {message}"


# -- gradients -----------------------------------------------------------------------------------------------

@sharded("B D, B D, D -> B D, B D")
def added(y, residual, w):
    x = residual + y
    return x, rms_norm(x, w, 0.5)


def losses(call: Any, used: str) -> Any:
    @sharded("B F, F D, B D, D -> ()")
    def loss(a, down, r, w):
        x, h = call(einsum("B F, F D -> B D", a, down), r, w)
        both = {"both": lambda: x * h, "first": lambda: x * x, "second": lambda: h}[used]()
        return sum("B D -> ()", both * 3)
    return loss


@pytest.mark.parametrize("layout", [Layout(), Layout(B="dp", F="tp"), Layout(F=("dp", "tp"))])
@pytest.mark.parametrize("used", ["both", "first", "second"])
def test_its_derivative_is_that_of_its_body(layout: Layout, used: str) -> None:
    """What is owed (a weight's cotangent, over dp) is settled outside of it, once."""
    mesh, args, logs = Mesh(dp=2, tp=2), values(), ([], [])
    plain, made = (simulate(value_and_grad(losses(call, used), wrt=["a", "down", "r", "w"]), layout, *args,
                            mesh=mesh, log=log) for call, log in zip((added, as_one(added)), logs))
    assert all(torch.equal(a, b) for a, b in zip(plain, made, strict=True))
    assert sorted(name for _, name, _ in logs[0]) == sorted(name for _, name, _ in logs[1])


def test_backward_runs_the_body_again_from_its_operands() -> None:
    program = lower(value_and_grad(losses(as_one(added), "both"), wrt=["r", "down"]), mesh=Mesh())
    assert str(program.bodies()[1]) == '''\
@sharded("B D, B D, D, B D, B D -> B D, B D", layout=EXPLICIT)
def added_vjp(y, residual, w, g, g2):
    x = residual + y
    v2, v3 = rms_norm_vjp(x, w, g2, eps=0.5)
    v4 = g + v2
    return v4, v4
'''
    of_one = lower(value_and_grad(losses(as_one(added), "first"), wrt="r"), mesh=Mesh(), passes=())
    assert str(of_one.bodies()[1]).splitlines()[1:] == ["def added_vjp(g):", "    return g"]
    assert parse_program(str(program), TABLE) == program == check(program, Mesh())


def test_one_that_communicates_has_a_derivative_too() -> None:
    @sharded("B F/tp, F/tp D, B D, D -> ()", layout=EXPLICIT)
    def loss(a, down, r, w):
        x, h = fused(narrow, einsum("B F/tp, F/tp D -> B D +tp", a, down), r, w)
        return sum("B D -> ()", x * h)

    @sharded("B F/tp, F/tp D, B D, D -> ()", layout=EXPLICIT)
    def plain(a, down, r, w):
        x = r + all_reduce("B D +tp -> B D", einsum("B F/tp, F/tp D -> B D +tp", a, down))
        return sum("B D -> ()", x * rms_norm(x, w, 1e-5))
    names = ["a", "down", "r", "w"]
    one, other = (simulate(value_and_grad(f, wrt=names), None, *values(), mesh=MESH) for f in (loss, plain))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_what_has_no_derivative_has_none_in_a_body() -> None:
    @sharded("B T H, B T H -> B T H")
    def turned(x, angles):
        return rope("B T H, B T H -> B T H", x, angles)

    @sharded("B T H, B T H -> ()")
    def loss(x, angles):
        return sum("B T H -> ()", fused(turned, x, angles))
    with pytest.raises(SpecError) as error:
        lower(value_and_grad(loss, wrt="angles"), mesh=Mesh())
    assert str(error.value).split("    ")[0] == (
        "value_and_grad: rope has no derivative by angles; stop_gradient makes it a constant")
    assert "turned_vjp" in str(lower(value_and_grad(loss, wrt="x"), mesh=Mesh()))
