"""Modes of torch around a call: those that would change its numbers do not,
and no gradient is lost without a word."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from shardlib import (
    Layout,
    Mesh,
    Params,
    SpecError,
    compile,
    cond,
    einsum,
    init,
    local,
    lower,
    param,
    scan,
    sharded,
    simulate,
    stacked,
    step,
    value_and_grad,
)
from shardlib.functions import mean, silu, square, stop_gradient, sum
from shardlib.language.value import apply
from shardlib.ops.cases import CASES
from shardlib.oracle import Case, normal
from shardlib.placement import place
from shardlib.run.simulate import simulate as simulate_ranks


@contextmanager
def set_for_now(get: Callable, put: Callable, value: Any) -> Iterator[None]:
    before = get()
    put(value)
    try:
        yield
    finally:
        put(before)


MODES = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16), "inference": torch.inference_mode,
    "device": lambda: torch.device("meta"),
    "bfloat16": lambda: set_for_now(torch.get_default_dtype, torch.set_default_dtype, torch.bfloat16),
    "float64": lambda: set_for_now(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "deterministic": lambda: set_for_now(torch.are_deterministic_algorithms_enabled,
                                         torch.use_deterministic_algorithms, True)}
SIZES = dict(zip("BTSDFVKGHLMNEPJ", (2, 3, 3, 4, 6, 5, 2, 2, 2, 2, 4, 3, 2, 5, 2)))


def function(case: Case) -> Any:
    """A sharded function that calls the op."""
    def call(*operands: Any) -> Any:
        return apply(case.op, operands, case.text if case.op.takes_text else None, **dict(case.attrs))
    of = [lambda: call(), lambda a: call(a), lambda a, b: call(a, b), lambda a, b, c: call(a, b, c),
          lambda a, b, c, d: call(a, b, c, d), lambda a, b, c, d, e: call(a, b, c, d, e),
          lambda a, b, c, d, e, f: call(a, b, c, d, e, f),
          lambda a, b, c, d, e, f, g: call(a, b, c, d, e, f, g),
          lambda a, b, c, d, e, f, g, h: call(a, b, c, d, e, f, g, h)]
    return sharded(case.text)(of[len(case.ins)])


def operands(case: Case) -> list[Tensor]:
    """Floats in float32, which autocast would narrow."""
    g, sizes, made = torch.Generator().manual_seed(0), case.fitting(SIZES), []
    for i, spec in enumerate(case.ins):
        draw = case.draws[i] if i < len(case.draws) else normal
        made.append(draw(Mesh().local_shape(spec, sizes, {}), sizes, g, made))
    return [x.float() if x.is_floating_point() else x for x in made]


def outcomes(case: Case, args: list[Tensor]) -> list[Tensor]:
    """On one rank, and the pieces of two."""
    f, mesh, sizes = function(case), Mesh(x=2), case.fitting(SIZES)
    made = compile(f, mesh=Mesh(x=1), sizes=sizes)(*args)
    program = lower(f, Layout(B="x"), mesh=mesh)
    placed = [place(x, kind, sizes, mesh) for x, (_, kind) in zip(args, program.arg_leaves())]
    pieces = simulate_ranks(program, mesh, [{n: p[rank] for (n, _), p in zip(program.arg_leaves(), placed)}
                                            for rank in range(2)], sizes)
    return [*(made if isinstance(made, tuple) else (made,)), *(x for rank in pieces for x in rank.values())]


def ragged(case: Case) -> bool:
    """Rows that data chose are no arguments, and no results."""
    return any(d.ragged for s in (*case.ins, *case.outs) for d in s.dims)


MADE = {str(case): (case, operands(case)) for case in CASES if not ragged(case)}


@pytest.mark.parametrize("mode", MODES)
def test_every_op_gives_the_same_bits(mode: str) -> None:
    for name, (case, args) in MADE.items():
        want = outcomes(case, args)
        with MODES[mode]():
            got = outcomes(case, args)
        for a, b in zip(got, want, strict=True):
            assert (a.dtype == b.dtype and a.device == b.device
                    and torch.equal(a.nan_to_num(), b.nan_to_num())), f"{name}, {mode}"


class Layer(Params):
    up: Tensor = param("D F")
    down: Tensor = param("F D")


class Net(Params):
    layers: Layer = stacked("L", Layer)
    gain: Tensor = param("D")


def tanh(x: Tensor) -> Tensor:
    return torch.tanh(x @ torch.ones(4, 4, dtype=x.dtype, device=x.device))


@sharded("B D -> B D")
def halved(x: Any) -> Any:
    return x * 0.5


@sharded("B D -> B D")
def kept(x: Any) -> Any:
    return silu(x)


@sharded("B D, * -> B D")
def layer(x: Any, w: Layer) -> Any:
    return x + einsum("B F, F D -> B D", silu(einsum("B D, D F -> B F", x, w.up)), w.down)


@sharded("B D, * -> ()")
def loss(x: Any, w: Net) -> Any:
    y = local("B D -> B D", tanh, scan(layer, x, w.layers) * w.gain)
    return mean("B D -> ()", square(y + stop_gradient(y * x)))


@sharded("B D, * -> ()")
def branching(x: Any, w: Net) -> Any:
    return mean("B D -> ()", cond(sum("B D -> ()", x), halved, kept, x * w.gain))


def arguments() -> tuple[Tensor, Net]:
    return torch.randn(4, 4, generator=torch.Generator().manual_seed(0)), init(Net, dict(B=4, D=4, F=6, L=2))


RUNS = {"call": lambda f, *args: f(*args), "compile": lambda f, *args: compile(f, mesh=Mesh(dp=1))(*args),
        "step": lambda f, *args: step(f, mesh=Mesh(dp=1))(*args),
        "simulate": lambda f, *args: simulate(f, Layout(B="dp", F="tp"), *args, mesh=Mesh(dp=2, tp=2))}


def leaves(made: Any) -> list[Tensor]:
    return ([made] if isinstance(made, Tensor)
            else [x for part in (made if isinstance(made, tuple) else vars(made).values())
                  for x in leaves(part)])


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("mode", MODES)
def test_every_way_to_run_gives_the_same_bits(run: str, mode: str) -> None:
    """What is made by generated code, by functions in local, and by backward."""
    for f in (loss, value_and_grad(loss)):
        args = arguments()
        want = leaves(RUNS[run](f, *args))
        with MODES[mode]():
            got = leaves(RUNS[run](f, *args))
        assert (len(got) == len(want)
                and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(got, want)))


def test_autocast_is_on_again_after_a_call() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        for run in RUNS.values():
            run(loss, *arguments())
            assert (torch.is_autocast_enabled("cpu")
                    and (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16)


# -- torch.autograd around a call ----------------------------------------------------------------------------

def requiring(x: Tensor, w: Net) -> tuple[Tensor, Net]:
    return (x.requires_grad_(),
            Net(layers=Layer(up=w.layers.up.requires_grad_(), down=w.layers.down.requires_grad_()),
                gain=w.gain.requires_grad_()))


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("f", [loss, branching])
def test_where_one_process_does_it_all_torch_s_own_backward_is_right(run: str, f: Any) -> None:
    args = requiring(*arguments())
    RUNS[run](f, *args).backward()
    if f is loss:
        want = leaves(simulate(value_and_grad(loss, ["x", "w"]), Layout(), *arguments(), mesh=Mesh())[1:])
    else:
        x, w = requiring(*arguments())
        y = x * w.gain
        (y * 0.5 if x.sum() else torch.nn.functional.silu(y)).mean().backward()
        want = [t.grad for t in leaves((x, w))]
    for mine, theirs in zip(leaves(args), want, strict=True):
        assert mine.grad is theirs is None or torch.allclose(mine.grad, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("run", RUNS)
def test_gradients_that_are_returned_have_no_graph(run: str) -> None:
    made = leaves(RUNS[run](value_and_grad(loss), *requiring(*arguments())))
    assert not any(x.requires_grad for x in made)
    want = leaves(RUNS[run](value_and_grad(loss), *arguments()))
    assert all(torch.equal(a, b) for a, b in zip(made, want, strict=True))


class Silent:
    """Rank 0 of two, on which nothing can be communicated."""
    mesh, rank, coordinate, device = Mesh(tp=2), 0, {"tp": 0}, torch.device("cpu")

    def compare_plans(self, title: str, plan: str) -> None:
        raise AssertionError("plans were compared")

    def create_groups(self, products: Any) -> None:
        raise AssertionError("a group was made")


@pytest.mark.parametrize("run", [compile, step])
@pytest.mark.parametrize("name, change", [
    ("x", lambda x, w: (x.requires_grad_(), w)),
    ("w.gain", lambda x, w: (x, Net(layers=w.layers, gain=torch.nn.Parameter(w.gain)))),
    ("w.layers.down",
     lambda x, w: (x, Net(layers=Layer(up=w.layers.up, down=w.layers.down.requires_grad_()), gain=w.gain)))])
def test_where_other_ranks_are_left_out_it_is_refused(run: Callable, name: str, change: Callable) -> None:
    call = run(loss, Layout(F="tp"), runtime=Silent(), sizes=dict(F=12))
    with pytest.raises(SpecError) as error:
        call(*change(*arguments()))
    assert str(error.value) == (f"loss: {name} requires grad, and torch.autograd does not reach other ranks; "
                                "take value_and_grad(loss), "
                                "or call it under torch.no_grad()")
    with pytest.raises(AssertionError), torch.no_grad():
        call(*change(*arguments()))
    with pytest.raises(AssertionError):
        call(*arguments())
    with pytest.raises(AssertionError):
        compile(value_and_grad(loss), Layout(F="tp"), runtime=Silent(),
                sizes=dict(F=12))(*change(*arguments()))


def test_prepared_weights_that_require_grad_are_named() -> None:
    call = compile(loss, Layout(F="tp"), runtime=Silent(), sizes=dict(F=12))
    x, w = arguments()
    prepared = call.prepare("w", requiring(x, w)[1])
    with pytest.raises(SpecError, match=r"^loss: w\.layers\.up requires grad, and"):
        call(x.detach(), prepared)
