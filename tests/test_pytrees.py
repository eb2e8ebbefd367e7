"""Pytrees: in one another, mapped over, returned; and printed so that the text is the program again."""
from __future__ import annotations

import pytest
import torch
from pasting import numbered, pasted
from torch import Tensor

from shardlib import (
    Layout,
    Mesh,
    Params,
    SpecError,
    einsum,
    init,
    lower,
    nested,
    param,
    reshard,
    scan,
    sharded,
    simulate,
    stacked,
    step,
    tree_map,
    value_and_grad,
)
from shardlib.compiler.parser import parse_program
from shardlib.functions import square, sum
from shardlib.ops import TABLE, embedding
from shardlib.params import struct

MESH, SIZES = Mesh(tp=3, dp=2), dict(V=7, D=5, L=2, K=4)
LAYOUTS = (Layout(V="tp"), Layout(D="tp", V="dp", K="dp"))


class Norm(Params):
    gain: Tensor = param("D", initial="ones")


class Layer(Params):
    norm: Norm = nested(Norm)
    up: Tensor = param("D K")
    down: Tensor = param("K D")


class Net(Params):
    embed: Tensor = param("V D")
    layers: Layer = stacked("L", Layer)
    last: Norm = nested(Norm)


class State(Params):
    w: Net = nested(Net)
    m: Net = nested(Net)
    steps: Tensor = param("()", initial="zeros")


@sharded("B D, * -> B D")
def layer(x, w: Layer):
    h = einsum("B D, D K -> B K", x * w.norm.gain, w.up)
    return x + einsum("B K, K D -> B D", h, w.down)


@sharded("B, * -> ()")
def loss(ids, w: Net):
    x = scan(layer, embedding("B, V D -> B D", ids, w.embed), w.layers) * w.last.gain
    return sum("B V -> ()", square(einsum("B D, V D -> B V", x, w.embed)))


@sharded("*, *, () -> *")
def sgd(w: Net, g: Net, rate):
    return tree_map(lambda w, g: w - g * rate, w, g)


@sharded("*, * -> *")
def momentum(s: State, g: Net):
    m = tree_map(lambda m, g: 0.9 * m + g, s.m, g)
    return State(w=tree_map(lambda w, m: w - 0.1 * m, s.w, m), m=m, steps=s.steps + 1)


def weights(seed: int = 0) -> Net:
    return init(Net, SIZES, seed=seed, dtype=torch.float64)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("f", [sgd, momentum, value_and_grad(loss), value_and_grad(loss, remat="layer")],
                         ids=["sgd", "momentum", "tied", "remat"])
def test_a_program_that_returns_pytrees_is_python(f, layout: Layout) -> None:
    """What a class says of its fields is so of a result, too: a value's text need not say it."""
    program = lower(f, layout, mesh=MESH)
    assert parse_program(str(program), TABLE) == program
    assert numbered(pasted(program, MESH)) == numbered(program)


def test_the_specs_of_pytrees_in_pytrees() -> None:
    assert [f"{path} {spec}" for path, spec in struct(State).leaves("s")][:5] == [
        "s.w.embed V D", "s.w.layers.norm.gain L D", "s.w.layers.up L D K", "s.w.layers.down L K D",
        "s.w.last.gain D"]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_steps_of_momentum(layout: Layout) -> None:
    ids = torch.tensor([1, 6, 1, 0])
    w, steps = weights(), torch.zeros((), dtype=torch.float64)
    free = tree_map(lambda t: t.clone().requires_grad_(), w)
    value, grads = simulate(value_and_grad(loss), layout, ids, w, mesh=MESH)
    by_hand = free.embed[ids]
    for gain, up, down in zip(free.layers.norm.gain, free.layers.up, free.layers.down):
        by_hand = by_hand + (by_hand * gain) @ up @ down
    want = ((by_hand * free.last.gain) @ free.embed.T).square().sum()
    want.backward()
    torch.testing.assert_close(value, want.detach())
    tree_map(torch.testing.assert_close, grads, tree_map(lambda t: t.grad, free))
    old = tree_map(torch.ones_like, w)
    made = simulate(momentum, layout, State(w=w, m=old, steps=steps), grads, mesh=MESH)
    tree_map(torch.testing.assert_close, made.m, tree_map(lambda m, g: 0.9 * m + g, old, grads))
    tree_map(torch.testing.assert_close, made.w, tree_map(lambda w, m: w - 0.1 * m, w, made.m))
    assert made.steps == 1


class Pinned(Params):
    table: Tensor = param("V/1 D")
    merged: Tensor = param("(K G) D")


@sharded("* -> *")
def doubled(p: Pinned):
    return Pinned(table=p.table * 2, merged=p.merged * 2)


def test_a_field_that_is_whole_on_purpose_is_returned_so() -> None:
    program = lower(doubled, Layout(V="tp", K="tp", D="dp"), mesh=MESH)
    types = [str(s) for _, s in (*program.arg_leaves(), *program.result_leaves())]
    assert types == ["V D/dp", "(K/tp G) D/dp"] * 2
    assert numbered(pasted(program, MESH)) == numbered(program)


class Plain(Params):
    table: Tensor = param("V D")


@sharded("* -> *")
def gathered(p: Plain):
    return Plain(table=reshard("V D -> V/1 D", p.table))


def test_a_value_that_says_where_it_lives_is_returned_there() -> None:
    program = lower(gathered, Layout(V="tp", D="dp"), mesh=MESH)
    assert [str(s) for _, s in program.result_leaves()] == ["V D/dp"]


@sharded("V D, * -> *")
def kept(x, p: Pinned):
    return Pinned(table=x)


def test_a_pytree_that_is_returned_is_converted_op_by_op_too(monkeypatch) -> None:
    """A rank's shards of it are those that `compile` gives."""
    from shardlib.run.step import Stepper
    asked = []
    monkeypatch.setattr(Stepper, "converted", lambda self, v, text: asked.append(str(text)) or v)
    step(kept, Layout(V="tp"), mesh=Mesh(tp=1))(torch.ones(2, 3), Pinned(table=torch.ones(2, 3)))
    assert asked == ["V/1 D"]


@pytest.mark.parametrize("call, said", [
    (lambda w: tree_map(torch.add, w, w.layers),
     "tree_map: a Net beside a Layer; they have the same fields, and the same ones set"),
    (lambda w: tree_map(torch.add, w, Net(embed=w.embed)),
     "tree_map: a Net beside a Net; they have the same fields, and the same ones set"),
    (lambda w: nested(3), "nested: what is nested is a class of Params, not 3")])
def test_what_is_no_pytree_like_it_is_refused(call, said: str) -> None:
    with pytest.raises(SpecError) as error:
        call(weights())
    assert str(error.value) == said


def test_a_tensor_is_a_pytree_of_one_leaf() -> None:
    assert tree_map(lambda a, b: a + b, 2, 3) == 5
