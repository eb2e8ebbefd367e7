"""local: types asserted at the border, its derivative by the same law,
and the check that catches a false assertion."""
from __future__ import annotations

import pytest
import torch

from shardlib import (
    EXPLICIT,
    Layout,
    Mesh,
    Params,
    SpecError,
    compile,
    einsum,
    init,
    local,
    lower,
    param,
    reshard,
    sharded,
    simulate,
    step,
    value_and_grad,
)
from shardlib.compiler.parser import check, parse_program
from shardlib.dtypes import fixed_dtypes
from shardlib.functions import mean
from shardlib.language.local import check_local

MESH = Mesh(dp=2, tp=2)


def scaled(x, w):
    return torch.tanh(x) * w


def norm_of_all(x):
    return x / x.norm()


def projected(x, w):
    return x @ w


class Weights(Params):
    w: torch.Tensor = param("D")
    up: torch.Tensor = param("D F")


@sharded("B D, * -> ()")
def loss(x, p: Weights):
    y = local("B/dp D, D -> B/dp D", scaled, x, p.w)
    return mean("B F -> ()", einsum("B D, D F -> B F", y, p.up))


def test_value_and_gradients_are_those_of_the_whole():
    sizes = dict(B=5, D=4, F=3)
    x, p = torch.randn(5, 4, dtype=torch.float64), init(Weights, sizes, dtype=torch.float64)
    got, grads = simulate(value_and_grad(loss), Layout(B="dp", F="tp"), x, p, mesh=MESH)
    w, up = p.w.clone().requires_grad_(), p.up.clone().requires_grad_()
    want = (scaled(x, w) @ up).mean()
    want.backward()
    assert torch.allclose(got, want) and torch.allclose(grads.w, w.grad) and torch.allclose(grads.up, up.grad)


def test_a_printed_program_names_the_function_and_runs_only_what_is_given():
    program = lower(loss, Layout(B="dp", F="tp"), mesh=MESH)
    name = f"{scaled.__module__}.scaled"
    assert f'y = local("B/dp D, D -> B/dp D", {name}, x, p.w)' in str(program)
    assert parse_program(str(program), functions={name: scaled}) == check(program, MESH) == program
    with pytest.raises(SpecError) as error:
        parse_program(str(program))
    assert str(error.value) == (
        f"this program runs {name}, which was not given; pass functions={{{name!r}: ...}}")


@sharded("D -> D")
def two_functions(x):
    return local("D -> D", torch.sin, x) + local("D -> D", torch.exp, x) * local("D -> D", torch.sin, x)


def test_each_call_runs_its_own_function():
    x = torch.randn(4, dtype=torch.float64)
    for made in (two_functions(x), simulate(two_functions, Layout(D="tp"), x, mesh=MESH)):
        assert torch.equal(made, x.sin() + x.exp() * x.sin())


def test_the_check_accepts_what_is_true():
    check_local("B/dp D, D -> B/dp D", scaled, dict(B=5, D=4), MESH)
    check_local("B F/tp, F/tp D -> B D +tp", projected, dict(B=2, D=3, F=5), MESH)
    check_local("B F +dp, F D/tp -> B D/tp +dp", projected, dict(B=2, D=3, F=5), MESH)


@sharded("B F, F D -> ()")
def mean_of_projected(x, w):
    return mean("B D -> ()", local("B F/tp, F/tp D -> B D +tp", projected, x, w))


@sharded("B F, F D -> ()")
def mean_of_owed(x, w):
    y = local("B F +dp, F D/tp -> B D/tp +dp", projected, reshard("B/dp F -> B F +dp", x), w)
    return mean("B D -> ()", y)


def doubled_again(w):
    return w * 2


@sharded("D, D -> ()")
def mean_of_doubled(x, w):
    """Nothing that goes in is split or owes: only the result names tp."""
    return mean("D -> ()", x * local("D -> D +tp", doubled_again, w))


@pytest.mark.parametrize("layout", [Layout(), Layout(D="dp")])
def test_an_operand_that_is_whole_owes_where_the_result_does(layout):
    """Each of the two ranks adds 2 w."""
    x, w = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    value, grad = simulate(value_and_grad(mean_of_doubled, "w"), layout, x, w, mesh=MESH)
    assert torch.allclose(value, (x * 4 * w).mean()) and torch.allclose(grad, 4 * x / 5)


@pytest.mark.parametrize("f, layout",
                         [(mean_of_projected, Layout()), (mean_of_projected, Layout(B="dp", F="tp")),
                          (mean_of_projected, Layout(D=("tp", "dp"))),
                          (mean_of_owed, Layout(B="dp", F="tp"))])
def test_what_owes_by_its_text_owes(f, layout):
    x, w = (torch.randn(4, 3, dtype=torch.float64).requires_grad_(),
            torch.randn(3, 2, dtype=torch.float64).requires_grad_())
    (want := (x @ w).mean()).backward()
    value, of_x, of_w = simulate(value_and_grad(f, ["x", "w"]), layout, x.detach(), w.detach(), mesh=MESH)
    assert torch.allclose(value, want) and torch.allclose(of_x, x.grad) and torch.allclose(of_w, w.grad)


@pytest.mark.parametrize("text", ["B/dp D -> B/dp D", "B D +tp -> B D +tp"])
def test_the_check_rejects_what_is_false(text):
    with pytest.raises(SpecError) as error:
        check_local(text, norm_of_all, dict(B=4, D=3), MESH)
    assert (str(error.value)
            == (f'{norm_of_all.__module__}:norm_of_all: result 1 is not of the type that "{text}" asserts: '
                f"put together, it is not that of the whole"))


def test_a_closure_is_refused():
    scale = torch.ones(4)

    def closed(x):
        return x * scale
    f = sharded("B D -> B D")(lambda x: local("B D -> B D", closed, x))
    with pytest.raises(SpecError) as error:
        lower(f, Layout(), mesh=MESH)
    assert "closes over scale; pass what it needs as operands" in str(error.value)


# -- what it is given, and what it returns -------------------------------------------------------------------

def doubled(x, w):
    return x.mul_(2) * w


def second_doubled(x, w):
    w[:1].view(-1).add_(1)
    return x * w


def detached(x, w):
    return x.detach().neg_() * w


def itself(x, w):
    return x


def a_view(x, w):
    return x.mT.mT


def narrow(x, w):
    return x[:, :2] * w[:2]


def half(x, w):
    return (x * w).half()


def positive(x, w):
    return x > w


def two(x, w):
    return x, w


def one_of_two(x, w):
    return x * w, w[:1]


def number(x, w):
    return 3.0


def elsewhere(x, w):
    return (x * w).to("meta")


def said(run, f, text="B/dp D/1, D/1 -> B/dp D/1", dtype=None, outs="B D"):
    """What is said of `local` of f within a sharded function, and where:
    the same by each executor, and in each mode of torch."""
    @sharded(f"B D, D -> {outs}")
    def called(x, w):
        return local(text, f, x, w, dtype=dtype)
    messages = []
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with mode():
            x, w = torch.ones(4, 3), torch.ones(3)
            try:
                run(called, x, w)
                messages.append("")
            except SpecError as error:
                messages.append(str(error).replace(
                    f"          test_local.py:{called.fn.__code__.co_firstlineno + 2}", ""))
            assert torch.equal(w, torch.ones(3)) or "changes" in messages[-1]
    assert messages[1:] == messages[:-1]
    return messages[0]


RUNS = {"simulate": lambda f, x, w: simulate(f, Layout(B="dp"), x, w, mesh=MESH),
        "compile": lambda f, x, w: compile(f, mesh=Mesh(dp=1))(x, w),
        "step": lambda f, x, w: step(f, mesh=Mesh(dp=1))(x, w)}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_what_it_is_given_is_not_changed(run):
    for f, argument in ((doubled, "x"), (second_doubled, "w"), (detached, "x")):
        assert said(run, f) == (
            f"local: {f.__name__} changes {argument} in place, which others may read; let it work on a copy")
    assert said(run, itself) == said(run, a_view) == ""


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_tensors_of_inference_mode_are_taken_outside_of_it(run):
    """Torch counts nothing that is written to them; what is written to them
    in a function is seen all the same."""
    with torch.inference_mode():
        x, w = torch.full((4, 3), 2.0), torch.ones(3)

    def called(f):
        return sharded("B D, D -> B D")(lambda x, w: local("B/dp D/1, D/1 -> B/dp D/1", f, x, w))
    assert torch.equal(run(called(scaled), x, w), torch.tanh(x))
    with pytest.raises(SpecError, match="^local: doubled changes x in place"):
        run(called(doubled), x, w)


@pytest.mark.parametrize("run", RUNS)
def test_what_it_returns_is_what_is_said(run):
    rows = 2 if run == "simulate" else 4
    for f, says in (
            (narrow, f"narrow returns ({rows}, 2), its text says ({rows}, 3) on this rank"),
            (half, "half returns float16, not float32; where that is meant, say dtype='float16'"),
            (positive, "positive returns bool, not float32; where that is meant, say dtype='bool'"),
            (two, "two returns 2, its text names 1 results"),
            (number, "number returns a float, no tensor"),
            (elsewhere, "elsewhere returns a tensor on meta, its operands are on cpu")):
        assert said(RUNS[run], f) == f"local: {says}"
    split = "B/dp D/1, D/1 -> B/dp D/1, 1"
    assert said(RUNS[run], one_of_two, split, outs="B D, 1") == ""
    assert said(RUNS[run], two, split, outs="B D, 1") == (
        "local: result 2 of two is (3,), its text says (1,) on this rank")
    assert said(RUNS[run], one_of_two, split, ("float32", "int64"), outs="B D, 1") == (
        "local: result 2 of one_of_two is float32, not int64; where that is meant, say dtype='float32'")


def test_a_dtype_of_its_own_is_said():
    assert said(RUNS["simulate"], half, dtype="float16") == said(RUNS["step"], positive, dtype=["bool"]) == ""
    f = sharded("B D, D -> B D")(lambda x, w: local("B D, D -> B D", positive, x, w, dtype="bool"))
    program = lower(f, mesh=MESH)
    assert f"local(\"B D, D -> B D\", {positive.__module__}.positive, x, w, dtype=('bool',))" in str(program)
    assert parse_program(str(program), functions={f"{positive.__module__}.positive": positive}) == program
    assert fixed_dtypes(program) == ["bool"]
    assert said(RUNS["step"], half, dtype="float17") == (
        "local: dtype is 'float17'; it is one of float64, int64, float32, int32, bfloat16, float16, int16, "
        "bool, uint8, int8")
    assert said(RUNS["step"], half, dtype=("float16", "float16")) == (
        "local: dtype names 2, the text has 1 results")


class Cube(torch.autograd.Function):
    """Its backward works in place on what it is given."""
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x ** 3

    @staticmethod
    def backward(ctx, g):
        return g.mul_(3 * ctx.saved_tensors[0] ** 2)


def cubed(x, w):
    return Cube.apply(x) * 1


def cubed_at_last(x, w):
    return Cube.apply(x)


def without_torch(x, w):
    return torch.from_numpy(x.detach().numpy() * w.detach().numpy())


def gradients(f, x, w):
    @sharded("B D, D -> ()")
    def total(x, w):
        return mean("B D -> ()", local("B/dp D, D -> B/dp D", f, x, w) * x)
    return simulate(value_and_grad(total, ["x", "w"]), Layout(B="dp"), x, w, mesh=MESH)[1:]


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_derivatives_leave_cotangents_alone_and_are_known(mode):
    with mode():
        x, w = torch.randn(4, 3), torch.randn(3)
        of_x, of_w = gradients(cubed, x, w)
        assert torch.allclose(of_x, x ** 3 / 3, rtol=1e-5) and torch.equal(of_w, torch.zeros(3))
        for f, says in ((cubed_at_last, "cubed_at_last changes operand 3 in place, which others may read; "
                         "let it work on a copy"),
                        (without_torch, ("torch knows no derivative of without_torch; make it a "
                                         "torch.autograd.Function, or call stop_gradient"))):
            with pytest.raises(SpecError) as error:
                gradients(f, x, w)
            assert str(error.value).split("          ")[0] == f"local: {says}"


def unseen(x, w):
    x.data.mul_(2)
    return x * w


@pytest.mark.parametrize("f, says", [
    (unseen, "unseen changes x, which others may read; let it work on a copy"),
    (narrow, 'narrow returns (2, 2); "B/dp D, D -> B/dp D" says (2, 3)'),
    (number, 'number returns float; "B/dp D, D -> B/dp D" says (2, 3)'),
    (two, 'two returns (2, 3), (3,); "B/dp D, D -> B/dp D" says (2, 3)')])
def test_the_check_sees_what_torch_does_not(f, says):
    with pytest.raises(SpecError) as error:
        check_local("B/dp D, D -> B/dp D", f, dict(B=4, D=3), MESH)
    assert str(error.value) == f"{f.__module__}:{says}"


@sharded("B T D, D -> B T D")
def by_rows(x, w):
    return local("... D, D -> ... D", scaled, x, w)


@sharded("B T F, F D -> B T D")
def contracted(x, w):
    return local("... F/tp, F/tp D -> ... D +tp", projected, x, w)


@pytest.mark.parametrize("layout, text", [
    (Layout(B="dp", D="tp"), 'local("B/dp T D, D -> B/dp T D"'),
    (Layout(T=("tp", "dp")), 'local("B T/tp/dp D, D -> B T/tp/dp D"'),
    (Layout(), 'local("B T D, D -> B T D"')], ids=str)
def test_what_dots_stand_for_stays_split(layout, text):
    """In text that is explicit, too, which says it no more."""
    x, w = torch.randn(3, 5, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    program = lower(by_rows, layout, mesh=MESH)
    assert text in str(program) and "rows=" not in str(program)
    assert program == check(program, MESH)
    assert torch.equal(simulate(by_rows, layout, x, w, mesh=MESH), scaled(x, w))
    free = x.clone().requires_grad_()
    scaled(free, w).square().sum().backward()
    squares = sharded("B T D, D -> ()")(lambda x, w: einsum("B T D, B T D -> ()", *2 * (by_rows(x, w),)))
    torch.testing.assert_close(simulate(value_and_grad(squares, "x"), layout, x, w, mesh=MESH)[1], free.grad)


def test_rows_get_no_axis_that_the_text_gives_away():
    x, w = torch.randn(3, 5, 4, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    layout = Layout(B=("dp", "tp"), T="tp", F="tp")
    program = lower(contracted, layout, mesh=MESH)
    assert 'local("B/dp T F/tp, F/tp D -> B/dp T D +tp"' in str(program)
    assert torch.allclose(simulate(contracted, layout, x, w, mesh=MESH), x @ w)
    check_local("B/dp T F/tp, F/tp D -> B/dp T D +tp", projected, dict(B=3, T=5, F=4, D=6), MESH)


@sharded("B F -> B F")
def doubled_pieces(x):
    return local("... F/tp -> ... F/tp", doubled_rows, x)


def doubled_rows(x):
    return x * 2


def test_an_axis_of_another_dim_is_no_row_s():
    assert 'local("B F/tp -> B F/tp"' in str(lower(doubled_pieces, Layout(B="tp"), mesh=MESH))


def test_rows_by_name_and_in_explicit_style():
    named = sharded("B D, D -> B D")(lambda x, w: local("B D, D -> B D", scaled, x, w, rows=("B",)))
    assert 'local("B/dp D, D -> B/dp D"' in str(lower(named, Layout(B="dp", D="tp"), mesh=MESH))
    explicit = sharded("B/dp D, D -> B/dp D", layout=EXPLICIT)(
        lambda x, w: local("... D, D -> ... D", scaled, x, w))
    assert 'local("B/dp D, D -> B/dp D"' in str(lower(explicit, mesh=MESH))
    x, w = torch.ones(2, 3), torch.ones(3)
    assert torch.equal(step(by_rows, Layout(B="dp"), mesh=Mesh(dp=1, tp=1))(x[None], w), scaled(x[None], w))
