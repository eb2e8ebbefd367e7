"""cond: a branch on data, the same on every rank, in all executors."""
from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from shardlib import (
    EXPLICIT,
    Layout,
    Mesh,
    Params,
    SpecError,
    all_gather,
    compile,
    cond,
    einsum,
    explain,
    lower,
    param,
    prove,
    scan,
    sharded,
    simulate,
    step,
)
from shardlib.compiler.parser import check, parse_program
from shardlib.dtypes import fixed_dtypes
from shardlib.functions import argmax, greater, less, max, silu, sum
from shardlib.language.cond import COND
from shardlib.ops import rms_norm
from shardlib.reports.project import project
from shardlib.reports.prove import check_branches
from shardlib.spec import parse

MESH, LAYOUT, SIZES = Mesh(tp=2), Layout(F="tp"), dict(T=3, D=4, F=5)


@sharded("T D, D F, F D -> T D")
def deep(x, up, down):
    return einsum("T F, F D -> T D", silu(einsum("T D, D F -> T F", x, up)), down)


@sharded("T D, D F, F D -> T D")
def shallow(x, up, down):
    return x * 2.0


@sharded("T D, D F, F D -> T D")
def chosen(x, up, down):
    return cond(greater(sum("T D -> ()", x), than=0.0), deep, shallow, x, up, down)


def tensors(sign: float) -> tuple:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.rand(s, generator=generator, dtype=torch.float64) * sign
                 for s in ((3, 4), (4, 5), (5, 4)))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_every_executor_takes_the_same_branch(sign):
    x, up, down = tensors(sign)
    want = torch.nn.functional.silu(x @ up) @ down if sign > 0 else x * 2
    assert torch.allclose(simulate(chosen, LAYOUT, x, up, down, mesh=MESH), want)
    assert torch.allclose(compile(chosen)(x, up, down), want)
    assert torch.allclose(step(chosen)(x, up, down), want)


def test_it_prints_and_parses_and_is_proven_with_both_branches():
    program = lower(chosen, LAYOUT, mesh=MESH)
    assert "v3 = cond(v2, deep, shallow, x, up, down)" in str(program)
    assert parse_program(str(program)) == program == check(program, MESH)
    assert prove(program, MESH, SIZES).collectives == 1
    assert [c.op for c in project(program, MESH, 0, SIZES)] == ["all_reduce"]


def test_a_predicate_that_owes_is_rejected_by_the_type_check_and_by_the_proof():
    program = lower(chosen, LAYOUT, mesh=MESH)
    at = next(i for i, s in enumerate(program.steps) if s.op is COND)
    bad = replace(program.steps[at], ins=(parse("+tp"), *program.steps[at].ins[1:]))
    mutant = replace(program, steps=(*program.steps[:at], bad, *program.steps[at + 1:]))
    with pytest.raises(SpecError) as error:
        prove(mutant, MESH, SIZES)
    assert str(error.value) == (
        "cond on v2, which is +tp: ranks that see different pieces of it part ways before the collectives of "
        "deep and shallow")

    @sharded("T D/tp, D F, F D -> T D/tp", layout=EXPLICIT)
    def owing(x, up, down):
        return cond(sum("T D/tp -> +tp", x), shallow, shallow, x, up, down)
    with pytest.raises(SpecError) as error:
        lower(owing, mesh=MESH)
    assert ("cond: the predicate is +tp; ranks that see different pieces of it would part "
            "ways") in str(error.value)


@sharded("T D, D F, F D -> T D")
def much_deeper(x, up, down):
    return cond(greater(sum("T D -> ()", x), than=0.0), deep, shallow, x, up, down)


@sharded("T D, L D F, F D -> T D")
def stacked_deep(x, up, down):
    return scan(deep, x, up, down)


@sharded("T D, L D F, F D -> T D")
def stacked_shallow(x, up, down):
    return x


@sharded("T D, L D F, F D -> T D")
def layers(x, up, down):
    return cond(greater(sum("T D -> ()", x), than=0.0), stacked_deep, stacked_shallow, x, up, down)


@sharded("T D, D F, F D -> T D")
def nested(x, up, down):
    return cond(greater(sum("T D -> ()", x), than=0.0), shallow, much_deeper, x, up, down)


@pytest.mark.parametrize("f", [layers, nested])
def test_the_proof_finds_collectives_wherever_they_are_in_a_branch(f):
    """In a scan of it, in a branch of it."""
    program = lower(f, LAYOUT, mesh=MESH)
    prove(program, MESH, dict(SIZES, L=2))
    at = next(i for i, s in enumerate(program.steps) if s.op is COND)
    bad = replace(program.steps[at], ins=(parse("+tp"), *program.steps[at].ins[1:]))
    mutant = replace(program, steps=(*program.steps[:at], bad, *program.steps[at + 1:]))
    with pytest.raises(SpecError) as error:
        prove(mutant, MESH, dict(SIZES, L=2))
    assert str(error.value).startswith(
        "cond on v2, which is +tp: ranks that see different pieces of it part ways")
    outer = replace(program.steps[at], **{("orelse" if f is nested else "body"): mutant})
    with pytest.raises(SpecError) as inner:
        check_branches(replace(program, steps=(outer,)))
    assert str(inner.value) == str(error.value)
    harmless = replace(bad, body=replace(bad.body, steps=()), orelse=replace(bad.orelse, steps=()))
    check_branches(replace(program, steps=(harmless,)))


class Norm(Params):
    weight: Tensor = param("D")


@sharded("T D, D -> T D")
def normed(x, weight):
    return rms_norm(x, weight)


@sharded("T D, D -> T D")
def scaled(x, weight):
    return rms_norm(x, weight) * -2.0


@sharded("T D, * -> T D")
def normed_or_scaled(x, w: Norm):
    return cond(greater(sum("T D -> ()", x), than=0.0), normed, scaled, x, w.weight)


@sharded("T D, T, D -> T D")
def normed_layer(x, row, weight):
    return rms_norm(x, weight) * row


@sharded("T D, L T, * -> T D")
def normed_layers(x, rows, w: Norm):
    return scan(normed_layer, x, rows, w.weight)


def test_a_parameter_is_one_in_a_scan_too():
    (x, *_), rows, w = (tensors(1.0), torch.tensor([[1.0, 2.0, 3.0]]).double(),
                        Norm(weight=torch.tensor([1.0, 2.0, 3.0, 4.0]).double()))
    want = x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * w.weight * rows[0][:, None]
    assert torch.allclose(simulate(normed_layers, Layout(T="dp", D="dp"), x, rows, w, mesh=Mesh(dp=2, tp=2)),
                          want, rtol=1e-12)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("layout", [Layout(T="dp", D="dp"), Layout(T=("dp", "tp"), D="tp")])
def test_a_parameter_is_one_in_a_branch_too(layout, sign):
    """It is gathered where an op wants it whole."""
    x, w = tensors(sign)[0], Norm(weight=torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64))
    want = x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * w.weight * (1 if sign > 0 else -2)
    assert torch.allclose(simulate(normed_or_scaled, layout, x, w, mesh=Mesh(dp=2, tp=2)), want, rtol=1e-12)


@sharded("T/tp D -> T D", layout=EXPLICIT)
def gathered(x):
    return all_gather("T/tp D -> T D", x)


@sharded("T/tp D -> T/tp D", layout=EXPLICIT)
def as_it_is(x):
    return x


@sharded("T D -> T D", layout=EXPLICIT)
def of_the_whole(x):
    return x


@sharded("(), T/tp D -> T D", layout=EXPLICIT)
def of_two_results(p, x):
    return cond(p, gathered, as_it_is, x)


@sharded("(), T/tp D -> T D", layout=EXPLICIT)
def of_two_arguments(p, x):
    return cond(p, gathered, of_the_whole, x)


@pytest.mark.parametrize("f, says", [(of_two_results, 'gathered returns "T D", as_it_is "T/tp D"'),
                                     (of_two_arguments, 'gathered takes x as "T/tp D", of_the_whole "T D"')])
def test_branches_of_different_types_are_refused(f, says):
    with pytest.raises(SpecError) as error:
        lower(f, mesh=MESH)
    assert str(error.value).split("          ")[0] == f"cond: {says}; both take and return the same types"


@sharded("T D, F -> T D, F")
def in_order(x, v):
    return x, v


@sharded("T D, F -> F, T D")
def turned_round(x, v):
    return v, x


@sharded("T D, F -> T D, F, F")
def one_more(x, v):
    return x, v, v


@pytest.mark.parametrize("other, returns", [(turned_round, "F, T D"), (one_more, "T D, F, F")])
def test_branches_that_return_the_same_in_another_order_or_number_are_refused(other, returns):
    @sharded("(), T D, F -> T D, F")
    def f(p, x, v):
        return cond(p, in_order, other, x, v)
    with pytest.raises(SpecError) as error:
        lower(f, mesh=MESH)
    assert str(error.value).split("          ")[0] == (
        f"cond: in_order returns T D, F, {other.__name__} returns {returns}; both return the same dims")


@sharded("+tp, T D, D F, F D -> T D")
def owed_predicate(p, x, up, down):
    return cond(p, deep, shallow, x, up, down)


@pytest.mark.parametrize("p", [0.0, 2.0])
def test_a_predicate_that_owes_is_paid_where_conversions_are_made(p):
    x, up, down = tensors(1.0)
    got = simulate(owed_predicate, LAYOUT, torch.tensor(p, dtype=torch.float64).long(), x, up, down,
                   mesh=MESH)
    assert torch.allclose(got, torch.nn.functional.silu(x @ up) @ down if p else x * 2)


@sharded("T D -> T")
def first(x):
    return argmax("T D -> T", x)


@sharded("T D -> T")
def largest(x):
    return max("T D -> T", x)


@sharded("T D -> T")
def positive(y):
    return greater(largest(y), than=0.0)


@sharded("T D -> T D, T")
def itself_and_largest(x):
    return x, largest(x)


@sharded("T D -> T D, T")
def itself_and_first(x):
    return x, first(x)


@sharded("T D -> T")
def second_of_two(x):
    return cond(greater(sum("T D -> ()", x), than=0.0), itself_and_largest, itself_and_first, x)[1]


def branching(yes, no):
    @sharded("T D -> T")
    def f(x):
        return cond(greater(sum("T D -> ()", x), than=0.0), yes, no, x)
    return f


def test_branches_of_different_dtypes_are_refused_at_lowering():
    with pytest.raises(SpecError) as error:
        lower(branching(first, positive), Layout(), mesh=MESH)
    first_line, where = str(error.value).split("          ")
    assert (first_line == "cond: first returns int64, positive returns bool; both return the same dtypes"
            and where.startswith("test_cond.py:"))


@pytest.mark.parametrize("yes, no", [(largest, first), (first, largest)])
def test_what_one_branch_is_known_to_make_the_other_makes_too(yes, no):
    """The largest of x is what x is, which the program does not say."""
    assert fixed_dtypes(lower(branching(yes, no), mesh=MESH)) == ["int64"]


@pytest.mark.parametrize("x, above, below", [(0.5, False, False), (0.75, True, False), (0.25, False, True)])
def test_a_number_is_neither_above_nor_below_itself(x, above, below):
    @sharded("T -> T, T")
    def compared(x):
        return greater(x, than=0.5), less(x, than=0.5)
    for run in (compared, lambda x: simulate(compared, Layout(T="tp"), x, mesh=MESH)):
        assert [y.tolist() for y in run(torch.tensor([x, x]))] == [[above] * 2, [below] * 2]


@pytest.mark.parametrize("call", [prove, explain])
def test_branches_of_different_dtypes_are_refused_where_those_of_the_arguments_are_known(call):
    """The largest of x is what x is: of integers an integer, as is its place."""
    program = lower(branching(first, largest), Layout(), mesh=MESH)
    with pytest.raises(SpecError) as error:
        call(program, MESH, SIZES)
    assert str(error.value).split("          ")[0] == (
        "cond: first returns int64, largest returns float32; both return the same dtypes")
    with pytest.raises(SpecError) as error:
        call(program, MESH, SIZES, dict(x="bfloat16"))
    assert str(error.value).split("          ")[0] == (
        "cond: first returns int64, largest returns bfloat16; both return the same dtypes")
    call(program, MESH, SIZES, dict(x="int64"))
    call(lower(branching(first, first), Layout(), mesh=MESH), MESH, SIZES)


@pytest.mark.parametrize("run",
                         [lambda f, x: compile(f)(x), lambda f, x: simulate(f, Layout(T="tp"), x, mesh=MESH)])
def test_branches_of_different_dtypes_are_refused_before_they_run(run):
    x = torch.tensor([[1.0, 3.0], [2.0, 0.0]])
    with pytest.raises(SpecError) as error:
        run(branching(first, largest), x)
    assert str(error.value).split("          ")[0] == (
        "cond: first returns int64, largest returns float32; both return the same dtypes")
    assert (run(branching(first, largest), x.long()).tolist() == [1, 0]
            and run(branching(largest, largest), x).tolist() == [3.0, 2.0])
    with pytest.raises(SpecError) as error:
        run(second_of_two, x)
    assert str(error.value).split("          ")[0] == (
        "cond: itself_and_largest returns float32, float32, itself_and_first returns float32, int64; both "
        "return the same dtypes")
    assert run(second_of_two, x.long()).tolist() == [3, 2]


@sharded("B D -> B D", layout=Layout(B="x"))
def twice_by_rows(x):
    return 2 * x


@sharded("B D -> B D", layout=Layout(D="x"))
def thrice_by_columns(x):
    return 3 * x


def test_a_branch_has_a_layout_of_its_own() -> None:
    """On every executor: compile ignored it, and step did not. The first one's says the types of both, and
    after it the caller's is in force again."""
    seen = []

    @sharded("B D -> B D")
    def f(x):
        y = cond(greater(sum("B D -> ()", x), 0), twice_by_rows, thrice_by_columns, x)
        seen.append(str(y.spec))
        return y
    layout, mesh = Layout(B="y"), Mesh(x=2, y=2)
    program = lower(f, layout, mesh=mesh)
    yes, no = program.bodies()
    assert [s.text for s in yes.steps if not s.op.moves] == ["B/x D -> B/x D"]
    assert [s.text for s in no.steps if not s.op.moves] == ["B D/x -> B D/x"]
    kinds = [str(kind) for b in (yes, no) for _, kind in (*b.arg_leaves(), *b.result_leaves())]
    assert kinds == ["B/x D"] * 4
    assert [str(kind) for _, kind in program.result_leaves()] == ["B/y D"]
    for x, want in ((torch.ones(3, 4), 2.0), (-torch.ones(3, 4), -3.0)):
        assert torch.equal(simulate(f, layout, x, mesh=mesh), torch.full((3, 4), want))
        seen.clear()
        assert torch.equal(step(f, layout, mesh=Mesh(x=1, y=1))(x), torch.full((3, 4), want))
        assert seen == ["B/x D"]
