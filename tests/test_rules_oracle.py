"""Typing rules against brute force: a rule accepts exactly what is right, in value and in derivative.

For every op, all combinations of the types of its operands are run on every rank of small meshes, with the
op's own generated code, and compared with the op's reference on the whole tensors. Owed pieces are random and
as large as the value; seeds too. Three ranks have a first, a last and one between; two see nothing that these
do not. (tests/compiler/test_totality.py runs every op on 2 x 2.) Of what is refused on two axes, or of many
operands, and of texts that are ill-typed, a sample is tried, the same one every time; ORACLE=all in the
environment tries all of it, and two ranks as well. (What is refused and right costs a collective, and never a
number; all that is accepted is tried.)
"""
from __future__ import annotations

import importlib.util
import itertools
import math
import os
import pkgutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

import shardlib.ops
from shardlib.compiler.builder import Builder
from shardlib.compiler.complete import complete
from shardlib.compiler.parser import check, parse_program
from shardlib.errors import SpecError
from shardlib.language.arithmetic import MUL
from shardlib.language.cond import COND
from shardlib.language.held import TABLE as BETWEEN_STAGES
from shardlib.language.local import local_op, local_vjp_op
from shardlib.language.moves import TABLE as MOVES
from shardlib.language.rearrange import RENAME
from shardlib.language.scan import SCAN
from shardlib.language.unary import OPS as UNARY
from shardlib.layout import Layout
from shardlib.mesh import Mesh
from shardlib.ops import TABLE
from shardlib.ops.cases import CASES, OPS
from shardlib.oracle import Case, NoSuchCall, Trial, disagreements, dual, same, some, types, verdicts
from shardlib.placement import join, place
from shardlib.program import Op, Program, Result
from shardlib.reference import operands
from shardlib.rules import Rule, RuleError
from shardlib.run.simulate import simulate
from shardlib.spec import parse

# no split is degenerate; some are uneven, B is below 3 ranks
SIZES = dict(B=2, T=5, D=4, F=3, K=3, G=2, H=4, V=5, S=6, J=2)
LARGE = dict(B=5, T=7, D=6, F=5, K=7, G=5, H=4, V=7, S=8, J=3)          # the same on two axes
HELD = ("+", "@0", "@1")
ALL = os.environ.get("ORACLE") == "all"
MOST, MOST_ON_ONE = (None, None) if ALL else (20, 200)
RANKS = (2, 3) if ALL else (3,)
ON_TWO_AXES = ("einsum", "add", "mul", "softmax", "rearrange", "sum", "embedding")
pytestmark = pytest.mark.usefixtures("one_thread")
every_case = pytest.mark.parametrize("case", CASES, ids=str)


def of_two_axes() -> list[Case]:
    """A chain of three operands has 50 times the combinations of two."""
    return [c for c in CASES if c.op.name in ON_TWO_AXES and len(c.ins) < 3]


def ill_typed(case: Case) -> int | None:
    """How many ill-typed texts of it are tried, each way: one way refuses them all, and says what may be
    written instead, which takes a second where there are many operands."""
    return None if ALL else 1 if len(case.ins) > 3 else 2


@cache
def accepted(case: Case, kinds: tuple[str, ...] = ("+",)) -> tuple:
    """What the rule accepts on one axis.

    It depends on no size; of five operands there are thousands of typings.
    """
    return tuple(found for found in verdicts(case, ("x",), kinds) if found[2] is not None)


def odd_sizes(case: Case) -> list[tuple[str | None, dict[str, int]]]:
    """All dims 0 or 1; each by itself 0, and 1, with its name; and uneven those that three ranks divide."""
    names = dict.fromkeys(n for s in (*case.ins, *case.outs) for n in s.names)
    return [(None, dict.fromkeys(SIZES, 0)), (None, dict.fromkeys(SIZES, 1)),
            *((n, {**SIZES, n: size}) for n in names for size in (0, 1)),
            (None, {n: 7 if n in names and size % 3 == 0 else size for n, size in SIZES.items()})]


def tells(name: str | None, ins: tuple, outs: tuple) -> bool:
    """Whether it is tried that this dim alone has an odd size: where it is split, and where nothing is. (With
    another split, it is what all ranks have alike.)"""
    split = {f.name for s in (*ins, *outs) for d in s.dims for f in d.factors if f.axes}
    return ALL or name is None or name in split or not split


def test_every_op_of_models_is_in_the_table() -> None:
    """Or in a language's table: an op that is in none has no case, and nothing tests it."""
    modules = [importlib.import_module(f"shardlib.ops.{m.name}")
               for m in pkgutil.iter_modules(shardlib.ops.__path__)]
    made = {op for m in modules for op in vars(m).values() if isinstance(op, Op)}
    assert sorted(op.name for op in made - {*OPS.values()}) == []


def test_every_op_has_a_case() -> None:
    assert set(OPS) - {case.op.name for case in CASES} == {*MOVES, *BETWEEN_STAGES}


def test_every_op_has_a_reference() -> None:
    """But for moves, which keep what their operand denotes; scan and cond, which mean what their bodies do;
    and local, whose text asserts what it is: `check_local` holds it against the function of whole tensors."""
    without = (*MOVES.values(), *BETWEEN_STAGES.values(), SCAN, COND, local_op(abs), local_vjp_op(abs))
    assert [op.name for op in {*OPS.values(), *without} if (op.reference is None) != (op in without)] == []


def test_the_cases_have_as_many_operands_as_the_reference() -> None:
    assert all(least <= len(case.ins) <= most for case in CASES for least, most in [operands(case.op)])
    assert {op.name: operands(op) for op in OPS.values()
            if op.reference is not None and operands(op)[0] != operands(op)[1]} == {
        "einsum": (0, math.inf), "concat": (0, math.inf), "stack": (0, math.inf),
        "attention": (3, math.inf), "attention_lse": (3, math.inf), "attention_vjp": (3, math.inf),
        "label_sums_vjp": (3, math.inf), "layer_norm": (2, 3), "group_norm": (2, 3),
        "norm_vjp": (2, math.inf), "sample": (0, math.inf), "combine": (0, math.inf),
        "combine_vjp": (2, math.inf), "route": (1, 2)}


def test_every_op_has_a_derivative_or_is_one_of_those_without() -> None:
    """Those of derivatives and moves, and what is constant, apart."""
    assert {op.name for op in OPS.values() if op.vjp is None and not op.moves and not op.constant
            and not op.name.endswith("_vjp")} == {
        "ties", "exp_minus", "finite", "argmax", "argmin", "rank_of", "from_rank", "ones_like",
        "zeros_like", "update_cache", "causal_mask", "rope_table", "attention_lse",
        "cross_entropy_sums"}


# -- sound and complete --------------------------------------------------------------------------------------

@pytest.mark.parametrize("ranks", RANKS)
@every_case
def test_a_rule_accepts_what_is_right_on_one_axis(case: Case, ranks: int) -> None:
    kinds = HELD if len(case.ins) < 4 else ("+",)
    assert disagreements(case, Mesh(x=ranks), SIZES, kinds, most=MOST_ON_ONE) == []


@pytest.mark.parametrize("case", of_two_axes(), ids=str)
def test_a_rule_accepts_what_is_right_on_two_axes(case: Case) -> None:
    assert disagreements(case, Mesh(x=2, y=3), LARGE, most=MOST) == []


@pytest.mark.parametrize("ranks", RANKS)
@every_case
def test_what_a_rule_accepts_is_right_at_sizes_0_and_1(case: Case, ranks: int) -> None:
    ran = 0
    for name, sizes in odd_sizes(case):
        try:
            trial = Trial(case, Mesh(x=ranks), sizes)
        except NoSuchCall:
            continue
        for ins, _, outs in accepted(case):
            if not tells(name, ins, outs):
                continue
            results = trial.run(ins, outs)
            assert ([p for j in range(len(outs)) if (p := trial.wrong(results, ins, outs, j))]
                    == []), (sizes, ins, outs)
            ran += 1
    assert ran


@every_case
def test_an_owed_max_is_refused(case: Case) -> None:
    if case.op is RENAME:
        return
    used = {i for u in case.op.rule(case.step(case.ins, case.outs)).uses or [range(len(case.ins))] for i in u}
    for i in used - {*case.op.index, *case.indices}:
        ins = [s.owing(*parse("max:x").owed) if i == j else s for j, s in enumerate(case.ins)]
        with pytest.raises(RuleError, match="owes a max over x; only all_reduce and reduce_scatter take one"):
            case.rule(ins)


# -- the oracle sees what is wrong ---------------------------------------------------------------------------

def with_rule(name: str, text: str, rule: Rule) -> Case:
    case = next(c for c in CASES if c.op.name == name and c.text == text)
    return replace(case, op=replace(case.op, rule=lambda step: rule))


@pytest.mark.parametrize("name", [n for n in UNARY if not n.endswith("_vjp")])
def test_no_pointwise_function_passes_for_linear(name: str) -> None:
    found = disagreements(with_rule(name, "B D -> B D", Rule(linear=((0,),))), Mesh(x=2), SIZES)
    assert found == [f"{name} on x=2: B D +x -> B D +x is accepted, but result 0 is wrong"]


@pytest.mark.parametrize("name, text, rule, says", (
    ("rms_norm", "B T D, D -> B T D", Rule(linear=((1,),)),
     "rms_norm on x=2: B T D/x, D/x -> B T D/x is accepted, but result 0 is wrong"),
    ("add", "B T, B T -> B T", Rule(linear=((0,), (1,))),
     "add on x=2: B T, B T +x -> B T +x is accepted, but result 0 is wrong"),
    ("mul", "B T, B T -> B T", Rule(linear=((0, 1),)),
     "mul on x=2: B T +x, B T +x -> B T +x is accepted, but result 0 is wrong"),
    ("mul", "B T, B T -> B T", Rule(linear=((0,),)),
     "mul on x=2: B T, B T +x -> B T +x is refused, but right"),
    ("softmax", "B T D -> B T D", Rule(whole=("T", "D")),
     "softmax on x=2: B T D/x -> B T D/x is refused, but right"),
    ("max", "B T D -> B", Rule(sums=("T", "D")),
     "max on x=2: B T/x D -> B +x is accepted, but result 0 is wrong"),
    ("attention", "B T K G H, B S K H, B S K V -> B T K G V", Rule(linear=((2,),), whole=("H",), sums=("S",)),
     ("attention on x=2: B T K G H, B S/x K H, B S/x K V -> B T K G V +x is accepted, but result 0 is "
      "wrong")),
))
def test_a_wrong_rule_is_found(name: str, text: str, rule: Rule, says: str) -> None:
    assert says in disagreements(with_rule(name, text, rule), Mesh(x=2), SIZES)


@pytest.mark.parametrize("name, text, emit", (
    ("softmax", "B T D -> B T D", lambda e, s, a: f"{a[0]}.softmax(0)"),
    ("rms_norm", "B T D, D -> B T D",
     lambda e, s, a: f"F.rms_norm({a[0]}, ({e.shape(s.ins[1])[0]},), {a[1]}, 2e-6)"),
    ("argmax", "B T V -> B T", lambda e, s, a: f"{a[0]}.argmin(2)"),
    ("causal_mask", "B -> B T S", lambda e, s, a: f"~({OPS['causal_mask'].emit(e, s, a)})"),
))
def test_code_that_is_wrong_alike_on_all_ranks_is_found(name: str, text: str, emit: Callable) -> None:
    case = next(c for c in CASES if c.op.name == name and c.text == text)
    ins, _, outs = accepted(case)[0]
    trial = Trial(replace(case, op=replace(case.op, emit=emit)), Mesh(x=2), SIZES)
    assert trial.wrong(trial.run(ins, outs), ins, outs, 0) == "result 0 is wrong"


def test_a_wrong_derivative_is_found() -> None:
    step = replace(MUL, name="own_rows", emit=lambda e, s, a: f"{a[0]} * {1 + e.rank} + ({a[0]} * "
                   f"{-e.rank}).detach()", reference=lambda d, x: x)
    found = disagreements(Case(replace(step, rule=lambda s: Rule(), infer=lambda ins, attrs: (ins[0],)),
                               "B -> B"), Mesh(x=2), SIZES)
    assert "own_rows on x=2: B -> B is accepted, but the cotangent of operand 0 is wrong" in found


# -- derivatives ---------------------------------------------------------------------------------------------

def vjp_problems(trial: Trial, ins: tuple, outs: tuple, settled: bool) -> list[str]:
    """What is wrong with the program that the op's vjp writes, for cotangents of the dual types or,
    if `settled`, owing nothing."""
    case, mesh, b = trial.case, trial.mesh, Builder(trial.mesh)
    step = case.step(ins, outs)
    for name, kind in zip(step.inputs, ins):
        b.declare(name, kind)
    b.add(step.op, step.inputs, outs, step.outputs, attrs=step.attrs)
    seeds = [b.declare(f"g{j}", out.owing() if settled else dual(out, mesh)) for j, out in enumerate(outs)]
    made = [case.op.vjp(b, step, seeds)[i] for i in case.differentiable]
    program = Program("vjp", tuple((n, b.types[n]) for n in (*step.inputs, *seeds)), tuple(b.steps),
                      tuple(Result(b.types[m], (m,)) for m in made), True)
    data = [{**{n: trial.operand(i, ins[i])[rank] for i, n in enumerate(step.inputs)},
             **{g: trial.cotangent(j, b.types[g])[rank] for j, g in enumerate(seeds)}}
            for rank in range(mesh.world_size)]
    ran, found = simulate(program, mesh, data, trial.sizes), []
    for at, (i, name) in enumerate(zip(case.differentiable, made)):
        got = trial.joined([r[str(at)] for r in ran], b.types[name])
        if got is None or (got.dtype != trial.operand(i, ins[i])[0].dtype
            or not same(got.double(), sum(each[at] for each in trial.gradients), case.tolerance)):
            found.append(f"{case}: the cotangent of operand {i} is wrong, for operands "
                         f"{', '.join(map(str, ins))}\n{program}")
        if not settled and b.types[name] != dual(ins[i], mesh):
            found.append(f"{case}: the cotangent of operand {i}, {ins[i]}, has type {b.types[name]}, not "
                         f"{dual(ins[i], mesh)}")
    return found


@pytest.mark.parametrize("ranks", (1, *RANKS))
@pytest.mark.parametrize("case", [c for c in CASES if c.differentiable], ids=str)
def test_a_derivative_is_typed_by_the_rules_and_is_that_of_autograd(case: Case, ranks: int) -> None:
    trial = Trial(case, Mesh(x=ranks), SIZES)
    for ins, _, outs in accepted(case):
        assert (vjp_problems(trial, ins, outs, settled=False)
                + vjp_problems(trial, ins, outs, settled=True) == [])


def test_every_vjp_op_is_in_a_derivative() -> None:
    used = set()
    for case in (c for c in CASES if c.differentiable):
        b, step = Builder(Mesh()), case.step(case.ins, case.rule(case.ins))
        names = [*zip(step.inputs, step.ins), *zip(step.outputs, step.outs),
                 *((f"g{j}", out) for j, out in enumerate(step.outs))]
        for name, kind in names:
            b.declare(name, kind)
        case.op.vjp(b, step, [f"g{j}" for j in range(len(step.outs))])
        used |= {s.op.name for s in b.steps}
    assert {n for n in OPS if n.endswith("_vjp")} <= used


# -- explicit text and the page ------------------------------------------------------------------------------

def one_step(case: Case, ins: tuple, outs: tuple) -> Program:
    step = case.step(ins, outs)
    return Program("one", tuple(zip(step.inputs, ins)), (step,),
                   tuple(Result(s, (n,)) for s, n in zip(outs, step.outputs)), True)


@every_case
def test_explicit_text_is_typed_by_the_rule_and_reads_back(case: Case) -> None:
    mesh = Mesh(x=2)
    for ins, _, outs in accepted(case, HELD if len(case.ins) < 3 else ("+",)):
        program = one_step(case, ins, outs)
        assert check(program, mesh) == program
        assert parse_program(str(program), TABLE) == program


@every_case
def test_explicit_text_with_another_result_is_a_spec_error(case: Case) -> None:
    wrong = [(ins, (*outs[:j], other, *outs[j + 1:])) for ins, made, outs in accepted(case)
             for j, out in enumerate(outs)
             for other in types(case.outs[j], ("x",), ("+", "max"))
             if other != out and all(f.axes == made.get(f.name, f.axes) for d in other.dims
                                     for f in d.factors)]
    for ins, outs in some(wrong, ill_typed(case), case):
        with pytest.raises(SpecError):
            check(one_step(case, ins, outs), Mesh(x=2))


@every_case
def test_explicit_text_that_the_rule_refuses_is_a_spec_error(case: Case) -> None:
    refused = [(ins, made) for ins, made, outs in verdicts(case, ("x",))
               if outs is None and not case.op.distribute]
    for ins, made in some(refused, ill_typed(case), case):
        with pytest.raises(SpecError):
            check(one_step(case, ins, tuple(s.split_by(made) for s in case.outs)), Mesh(x=2))


@pytest.mark.parametrize("name, text", (("logsumexp", "B V T -> B T"), ("logsumexp", "V -> ()"),
                                        ("argmax", "B T V -> B T"), ("argmax", "V B -> B")))
@pytest.mark.parametrize("size", (1, 2, 5))
def test_a_distributed_form_is_the_op(name: str, text: str, size: int) -> None:
    """Over a split dim, with ties, infinities, NaN, and ranks that hold nothing."""
    case, mesh, sizes = Case(OPS[name], text), Mesh(x=2, y=2), {**SIZES, "V": size}
    given, wanted = case.ins[0], case.outs[0]
    for axes, special in itertools.product((("x",), ("x", "y"), ("y", "x")),
                                           (0.0, torch.inf, -torch.inf, torch.nan)):
        x = torch.randint(-2, 3, mesh.local_shape(given, sizes, {}),
                          generator=torch.Generator().manual_seed(size)).double()
        x.view(-1)[::3] += special
        kind = given.split({"V": axes})
        program = complete(one_step(case, (kind,), (wanted,)), Layout(), mesh)
        ran = simulate(program, mesh, [{"x0": p} for p in place(x, program.args[0][1], sizes, mesh)], sizes)
        dim = given.labels.index("V")
        assert same(join([r["0"] for r in ran], wanted, sizes, mesh), getattr(x, name)(dim),
                    1e-9), (program, x)


def test_the_page_of_rules_is_made_from_the_rules() -> None:
    path = Path(__file__).parents[1] / "docs" / "make_rules.py"
    spec = importlib.util.spec_from_file_location("make_rules", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text() == module.page(), "python docs/make_rules.py"
