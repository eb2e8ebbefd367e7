"""local: types asserted at the border, its derivative by the same law, and the check that catches a false assertion."""
from __future__ import annotations

import pytest
import torch

from shardlib import Layout, Mesh, Params, SpecError, einsum, init, local, lower, param, sharded, simulate, value_and_grad
from shardlib.functions import mean
from shardlib.local import check_local
from shardlib.parser import check, parse_program

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
    assert str(error.value) == f"this program runs {name}, which was not given; pass functions={{{name!r}: ...}}"


def test_the_check_accepts_what_is_true():
    check_local("B/dp D, D -> B/dp D", scaled, dict(B=5, D=4), MESH)
    check_local("B F/tp, F/tp D -> B D +tp", projected, dict(B=2, D=3, F=5), MESH)
    check_local("B F +dp, F D/tp -> B D/tp +dp", projected, dict(B=2, D=3, F=5), MESH)


@pytest.mark.parametrize("text", ["B/dp D -> B/dp D", "B D +tp -> B D +tp"])
def test_the_check_rejects_what_is_false(text):
    with pytest.raises(SpecError) as error:
        check_local(text, norm_of_all, dict(B=4, D=3), MESH)
    assert str(error.value) == (f'{norm_of_all.__module__}:norm_of_all: result 1 is not of the type that "{text}" asserts: '
                                f"put together, it is not that of the whole")


def test_a_closure_is_refused():
    scale = torch.ones(4)

    def closed(x):
        return x * scale
    f = sharded("B D -> B D")(lambda x: local("B D -> B D", closed, x))
    with pytest.raises(SpecError) as error:
        lower(f, Layout(), mesh=MESH)
    assert "closes over scale; pass what it needs as operands" in str(error.value)
