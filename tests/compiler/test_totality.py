"""What names no axis types under every layout, with the same numbers, forward and gradient.

Whole programs are drawn in `tests/test_programs.py`; here is every op by itself, and what the rule says of
pins, of dims that an op needs whole, and of what an op over pieces sends.
"""
from __future__ import annotations

import random

import pytest
import torch

from shardlib import Layout, Mesh, lower, scan, sharded, simulate
from shardlib import cond as choose
from shardlib.api import Sharded, step
from shardlib.compiler.complete import complete
from shardlib.compiler.grad import value_and_grad_program
from shardlib.functions import (
    argmax,
    cumsum,
    greater,
    logsumexp,
    softmax,
    tanh,
    where,
)
from shardlib.functions import max as largest
from shardlib.functions import sum as total
from shardlib.language.arithmetic import ADD
from shardlib.language.einsum import EINSUM
from shardlib.ops import cross_entropy, embedding, group_norm, layer_norm, rms_norm
from shardlib.ops.cases import CASES
from shardlib.oracle import Case, Trial, same
from shardlib.placement import join, place
from shardlib.program import Program, Result, Step
from shardlib.run.simulate import simulate as run
from shardlib.spec import Spec

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = dict(B=2, T=5, D=4, F=3, K=3, G=2, H=4, V=5, S=6, J=2)
# rows that data chose stay within a program: tests/ops/test_experts.py
ALONE = [c for c in CASES if not any(d.ragged for s in (*c.ins, *c.outs) for d in s.dims)]
MESH = Mesh(x=2, y=2)


# -- every op by itself --------------------------------------------------------------------------------------

def drawn_layout(case: Case) -> Layout:
    """Axes for some of the dims, in any order; the same each time."""
    chance = random.Random(str(case))
    names = list(dict.fromkeys(n for s in (*case.ins, *case.outs) for n in s.names))
    chance.shuffle(names)
    return Layout({n: chance.sample(["x", "y"], chance.randint(1, 2)) for n in names})


def written(case: Case, trial: Trial) -> Program:
    """The call; with a scalar that its results make, where it has derivatives."""
    call = case.step(case.ins, case.outs)
    args, steps, loss = dict(zip(call.inputs, case.ins)), [call], ""
    for j, (name, spec) in enumerate(zip(call.outputs, case.outs if trial.cotangents else ())):
        args[f"c{j}"] = spec
        steps.append(Step(EINSUM, (spec, spec), (Spec(),), (name, f"c{j}"), (f"l{j}",)))
        if loss:
            steps.append(Step(ADD, (Spec(), Spec()), (Spec(),), (loss, f"l{j}"), (f"s{j}",)))
        loss = steps[-1].outputs[0]
    results = [(Spec(), loss)] if loss else list(zip(case.outs, call.outputs))
    return Program("one", tuple(args.items()), tuple(steps), tuple(Result(s, (n,)) for s, n in results))


@pytest.mark.parametrize("case", ALONE, ids=str)
def test_an_op_types_under_every_layout_and_is_what_it_means(case: Case) -> None:
    trial, layout = Trial(case, Mesh(), SIZES), drawn_layout(case)
    program = complete(written(case, trial), layout, MESH)
    whole = {f"{of}{i}": x for of, side in (("x", trial.whole), ("c", trial.cotangents))
             for i, x in enumerate(side)}
    want = trial.results
    if trial.cotangents:
        program = value_and_grad_program(program, [f"x{i}" for i in case.differentiable], MESH)
        want = [sum((y * c).sum() for y, c in zip(trial.results, trial.cotangents)),
                *(sum(found) for found in zip(*trial.gradients))]
    placed = {n: place(whole[n], spec, trial.sizes, MESH) for n, spec in program.arg_leaves()}
    ran = run(program, MESH, [{n: x[r] for n, x in placed.items()} for r in range(4)], trial.sizes)
    close = max(case.tolerance, 1e-6)
    for i, ((_, kind), right) in enumerate(zip(program.result_leaves(), want, strict=True)):
        made = join([r[str(i)] for r in ran], kind, trial.sizes, MESH, close)
        assert same(made.to(right.dtype), right, close), (layout, program)


# -- what the rule says --------------------------------------------------------------------------------------

def moves(f: Sharded, layout: Layout, **more) -> list[str]:
    """The conversions that are printed, in the body of a scan too."""
    program = lower(f, layout, mesh=more.pop("mesh", Mesh(x=2)), **more)
    return [f"{s.op.name} {s.text}" for p in (*program.bodies(), program) for s in p.steps if s.op.moves]


@sharded("B T D, D -> B T D")
def weighed(x, w):
    return rms_norm(x, 1 + w)


@sharded("B T, V D, T, P D -> B T D")
def embedded(ids, table, at, places):
    return embedding("B T, V D -> B T D", ids, table) + embedding("T, P D -> T D", at, places)


@sharded("B T S, T S -> B T S")
def masked(scores, seen):
    return softmax(where(seen, scores, -1e9 + 0 * scores), "S")


@pytest.mark.parametrize("f", [weighed, embedded, masked], ids=lambda f: f.__name__)
@pytest.mark.parametrize("layout", ["B=x,D=x", "D=x,B=x", "T=x,S=x", "S=x,T=x", "V=x,P=x", "S=x"])
def test_an_expression_is_converted_as_a_parameter_is(f: Sharded, layout: str) -> None:
    g, sizes = torch.Generator().manual_seed(0), dict(B=3, T=5, D=6, S=4, V=7, P=5)
    shapes = [[sizes[d.label] for d in s.dims] for s in f.ins]
    args = [torch.randn(shape, generator=g) for shape in shapes]
    args = ([torch.randint(5, shapes[0]), args[1], torch.randint(5, shapes[2]), args[3]] if f is embedded
            else [args[0], args[1] > 0] if f is masked else args)
    right = simulate(f, Layout(), *args, mesh=Mesh(x=1))
    assert torch.allclose(simulate(f, Layout.parse(layout), *args, mesh=Mesh(x=2)), right, atol=1e-6)


@pytest.mark.parametrize("layout", ["T=x", "T=x,D=x", "D=x,T=x"])
def test_no_order_of_operands_counts(layout: str) -> None:
    after = sharded("T D, T D -> T D")(lambda p, x: p + cumsum(x, "T"))
    before = sharded("T D, T D -> T D")(lambda p, x: cumsum(x, "T") + p)
    assert moves(after, Layout.parse(layout)) == moves(before, Layout.parse(layout))


def test_a_dim_that_an_op_needs_whole_leaves_its_axes_to_another() -> None:
    f = sharded("B T -> B T")(lambda x: cumsum(x, "T"))
    assert moves(f, Layout(T="x", B="x")) == ["all_to_all B T/x -> B/x T", "all_to_all B/x T -> B T/x"]
    assert moves(f, Layout(T="x")) == ["all_gather B T/x -> B T", "shard B T -> B T/x"]


PIECES = {
    "softmax": sharded("B D -> B D")(lambda x: softmax(x, "D")),
    "logsumexp": sharded("B D -> B")(lambda x: logsumexp("B D -> B", x)),
    "max": sharded("B D -> B")(lambda x: largest("B D -> B", x)),
    "argmax": sharded("B D -> B")(lambda x: argmax("B D -> B", x)),
    "rms_norm": sharded("B D, D -> B D")(lambda x, w: rms_norm(x, w)),
    "layer_norm": sharded("B D, D, D -> B D")(lambda x, w, b: layer_norm(x, w, b)),
    "group_norm": sharded("B G D, D -> B G D")(lambda x, w: group_norm(x, w, over="D")),
    "cross_entropy": sharded("B D, B -> B")(lambda x, ids: cross_entropy("B D, B -> B", x, ids))}


@pytest.mark.parametrize("name", PIECES)
def test_over_pieces_nothing_with_their_dim_is_sent(name: str) -> None:
    """What is: a maximum, a sum, a few numbers a row; and what comes in, or goes out, in another split."""
    sent = moves(PIECES[name], Layout(D="x", B="x"))
    assert any("reduce" in text for text in sent) and not any("D" in text for text in sent), sent


@sharded("B D/1, D -> B D")
def pinned(x, w):
    h = tanh(x * 2)
    return h * w


@sharded("B D/1, D/1 -> B D")
def pinned_both(x, w):
    return tanh(x) * w


def test_a_pin_lives_on_where_all_that_have_the_dim_have_it() -> None:
    """Through ops of one operand, and of two that both have it; else the layout says, and whole is cut."""
    assert moves(pinned, Layout(D="x")) == ["shard B D -> B D/x"]
    assert moves(pinned_both, Layout(D="x")) == ["shard B D -> B D/x"]
    (last,) = [s for s in lower(pinned_both, Layout(D="x"), mesh=Mesh(x=2)).steps if s.op.name == "mul"]
    assert last.text == "B D, D -> B D"
    (last,) = [s for s in lower(pinned, Layout(D="x"), mesh=Mesh(x=2)).steps if s.op.name == "mul"]
    assert last.text == "B D/x, D/x -> B D/x"


@pytest.mark.parametrize("f", [pinned, pinned_both], ids=lambda f: f.__name__)
def test_step_carries_pins_as_compile_does(f: Sharded, monkeypatch: pytest.MonkeyPatch) -> None:
    from shardlib.run import step as stepping
    made, plain = [], stepping.complete_step

    def watched(*args):
        made.append(plain(*args))
        return made[-1]
    monkeypatch.setattr(stepping, "complete_step", watched)
    step(f, Layout(D="x"), mesh=Mesh(x=1))(torch.ones(2, 3), torch.ones(3))
    own = [f"{s.op.name} {s.text}" for program, _ in made for s in program.steps]
    assert own == [f"{s.op.name} {s.text}" for s in lower(f, Layout(D="x"), mesh=Mesh(x=1)).steps]


@sharded("B T/1, T -> B T")
def grown(x, w):
    return tanh(x * w)


@sharded("B T, L T -> B T")
def layers(x, w):
    return scan(grown, x, w)


def test_what_a_body_returns_gets_the_type_of_its_carry() -> None:
    body, = lower(layers, Layout(T="x"), mesh=Mesh(x=2)).bodies()
    assert [str(s) for _, s in body.arg_leaves()] == ["B T", "T/x"]
    assert [str(s) for _, s in body.result_leaves()] == ["B T"]


@sharded("B/1 T -> B T/1")
def doubled(x):
    return x * 2


@sharded("B T/1 -> B/1 T")
def halved(x):
    return x * 0.5


@sharded("B T -> B T")
def either(x):
    return choose(greater(total("B T -> ()", x), 0), doubled, halved, x)


def test_the_first_branch_of_a_cond_says_the_types_of_both() -> None:
    program = lower(either, Layout(B="x", T="x"), mesh=Mesh(x=2))
    yes, no = program.bodies()
    sides = (yes.arg_leaves(), yes.result_leaves())
    assert [[str(s) for _, s in side] for side in sides] == [["B T/x"], ["B/x T"]]
    assert ([kind for _, kind in (*no.arg_leaves(), *no.result_leaves())]
            == [kind for _, kind in (*yes.arg_leaves(), *yes.result_leaves())])
    for x in (torch.ones(3, 2), -torch.ones(3, 2)):
        found = simulate(either, Layout(B="x", T="x"), x, mesh=Mesh(x=2))
        assert torch.equal(found, x * (2 if x.sum() > 0 else 0.5))
