"""Dtypes by hand: what is printed, what is rounded how often, what is refused, in every executor."""
from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, bfloat16, float16, float32, float64, int64

from shardlib import (
    Layout,
    Mesh,
    Params,
    SpecError,
    compile,
    einsum,
    explain,
    lower,
    param,
    scan,
    sharded,
    simulate,
    stacked,
    step,
    value_and_grad,
)
from shardlib.compiler.parser import parse_program
from shardlib.functions import argmax, cast, greater, logsumexp, mean, softmax, sum, where
from shardlib.ops import attention, embedding, rms_norm, rope, rope_table

pytestmark = pytest.mark.usefixtures("one_thread")
ONE, TWO = Mesh(tp=1), Mesh(tp=2)
EXECUTORS = {"simulate": lambda f, *xs: simulate(f, Layout(), *xs, mesh=TWO),
             "compile": lambda f, *xs: compile(f)(*xs), "step": lambda f, *xs: step(f)(*xs)}
every_executor = pytest.mark.parametrize("call", EXECUTORS.values(), ids=EXECUTORS)


@sharded("B T -> ()")
def average(x):
    return mean("B T -> ()", x)


@sharded("B V -> B")
def normaliser(x):
    return logsumexp("B V -> B", x)


def test_a_statistic_over_a_split_dim_is_printed_as_widened_settled_and_rounded() -> None:
    assert str(lower(average, Layout(T="tp"), mesh=TWO)) == (
        '@sharded("B T/tp -> ()", layout=EXPLICIT)\n'
        'def average(x):\n'
        '    v2 = widen(x)\n'
        '    v1 = mean("B T/tp -> +tp", v2)\n'
        '    v = all_reduce("+tp -> ()", v1)\n'
        '    v3 = cast_like(v, x)\n'
        '    return v3\n')
    assert str(lower(normaliser, Layout(V="tp"), mesh=TWO)) == (
        '@sharded("B V/tp -> B", layout=EXPLICIT)\n'
        'def normaliser(x):\n'
        '    v2 = max("B V/tp -> B max:tp", x)\n'
        '    v = all_reduce("B max:tp -> B", v2)\n'
        '    v3 = finite(v)\n'
        '    v4 = widen(x)\n'
        '    v5 = sum_exp("B V/tp, B -> B +tp", v4, v3)\n'
        '    v6 = all_reduce("B +tp -> B", v5)\n'
        '    v7 = log_plus(v6, v3)\n'
        '    v8 = cast_like(v7, x)\n'
        '    return v8\n')


@pytest.mark.parametrize("layout", (Layout(), Layout(T="tp", V="tp")), ids=str)
@pytest.mark.parametrize("kind", (float16, bfloat16))
def test_statistics_are_rounded_once(layout: Layout, kind: torch.dtype) -> None:
    """To the number that float64 is rounded to; a mean does not overflow where its sum does."""
    x = torch.randn(50, 300, generator=torch.Generator().manual_seed(0)).to(kind) * 3 + 5
    assert simulate(average, layout, torch.full((4, 4096), 8.0, dtype=float16), mesh=TWO).item() == 8.0
    assert torch.equal(simulate(average, layout, x, mesh=TWO), x.double().mean().to(kind))
    assert torch.equal(simulate(normaliser, layout, x, mesh=TWO), x.double().logsumexp(1).to(kind))


@pytest.mark.parametrize("f", (average, normaliser))
def test_statistics_of_integers_and_masks(f: Any) -> None:
    x = torch.arange(12).view(3, 4)
    if f is normaliser:
        with pytest.raises(SpecError) as error:
            simulate(f, Layout(), x, mesh=ONE)
        assert str(error.value).splitlines()[0].startswith(
            'logsumexp: x is int64; it takes floats, as cast(x, "float32") makes them')
        return
    for mesh in (ONE, TWO):
        assert (simulate(f, Layout(T="tp"), x, mesh=mesh).item() == 5.5
                and simulate(f, Layout(T="tp"), x, mesh=mesh).dtype == float32)
        assert simulate(f, Layout(T="tp"), x > 2, mesh=mesh).item() == 0.75


def torchs(kind: torch.dtype, f: Any, *xs: Tensor) -> list[Tensor]:
    """The gradients of the sum of f by torch at `kind`, of operands that bfloat16 holds."""
    given = [x.to(kind).requires_grad_() for x in xs]
    return list(torch.autograd.grad(f(*given).sum(), given))


def test_the_derivative_of_softmax_is_as_exact_as_torchs() -> None:
    @sharded("B V, B V -> ()")
    def f(x, w):
        return sum("B V -> ()", softmax(x, "V") * w)
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(40, 500, generator=g).bfloat16() * 3 for _ in range(2))
    ours = simulate(value_and_grad(f, "x"), Layout(), x, w, mesh=ONE)[1]
    plain = lambda x: x.softmax(1) * w.to(x.dtype)      # noqa: E731
    (exact,), (theirs,) = torchs(float64, plain, x), torchs(bfloat16, plain, x)
    assert ((ours - exact).abs().max() <= 2 * (theirs - exact).abs().max()
            and (ours - exact).norm() <= 1.1 * (theirs - exact).norm())


def test_the_derivative_of_attention_is_as_exact_as_torchs() -> None:
    """Of torch's own attention in bfloat16, against float64, where scores are large."""
    @sharded("B T K G H, B S K H, B S K H, B T K G H -> ()")
    def f(q, k, v, w):
        return sum("B T K G H -> ()", attention("B T K G H, B S K H, B S K H -> B T K G H", q, k, v) * w)

    def plain(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q[:, :, :, 0], k, v))
        rows = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return rows.transpose(1, 2)[:, :, :, None] * w.to(q.dtype)
    g = torch.Generator().manual_seed(0)
    q, k, v, w = ((3 * torch.randn(2, 48, 2, *heads, generator=g)).bfloat16()
                  for heads in ((1, 16), (16,), (16,), (1, 16)))
    ours = simulate(value_and_grad(f, ("q", "k", "v")), Layout(), q, k, v, w, mesh=ONE)[1:]
    for mine, exact, theirs in zip(ours, torchs(float64, plain, q, k, v), torchs(bfloat16, plain, q, k, v)):
        assert mine.dtype == bfloat16 and (mine - exact).norm() <= 2 * (theirs - exact).norm()


@sharded("B T, () -> B T")
def scaled(x, s):
    return x * s + where(greater(x, than=0.0), x, x - s)


def test_a_scalar_counts_like_any_other() -> None:
    """Where torch lets a tensor without dims count less."""
    x, s = torch.tensor([[1.0, -3.0]]).bfloat16(), torch.tensor(1 / 3)
    want = x.float() * s + torch.where(x > 0, x, x.float() - s)
    for made in (simulate(scaled, Layout(), x, s, mesh=TWO), compile(scaled)(x, s), step(scaled)(x, s)):
        assert made.dtype == float32 and torch.equal(made, want)


def test_integers_stay_integers() -> None:
    @sharded("B -> B, B, B, B")
    def f(n):
        return -n, 7 - n, n * 3 - 1, n * 0.5
    n = torch.tensor([2**24 + 1, -5])
    for made in (simulate(f, Layout(), n, mesh=ONE), compile(f)(n), step(f)(n)):
        assert [y.tolist() for y in made[:3]] == [(-n).tolist(), (7 - n).tolist(), (n * 3 - 1).tolist()]
        assert [y.dtype for y in made] == [int64, int64, int64, float32]


def test_torchs_default_dtype_has_no_say() -> None:
    @sharded("B, B -> B, B, B, ()")
    def f(n, m):
        return n / m, 1 / n, n * 0.5, mean("B -> ()", n)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(bfloat16)
        made = compile(f)(torch.tensor([1, 2]), torch.tensor([3, 4]))
    finally:
        torch.set_default_dtype(before)
    assert [y.dtype for y in made] == [float32] * 4 and torch.equal(made[0], torch.tensor([1 / 3, 0.5]))


def test_no_other_argument_has_a_say() -> None:
    @sharded("B, B T H, B -> B T H")
    def turned(unused, x, start):
        return rope("B T H, B T H -> B T H", x, rope_table("B -> B T/1 H", start, theta=1e4))
    x, start, made = torch.rand(2, 6, 8), torch.tensor([1000, 3000]), []
    for other in (torch.ones(2, dtype=kind) for kind in (float32, bfloat16, float16, float64)):
        made.append(simulate(turned, Layout(), other, x, start, mesh=ONE))
        assert torch.equal(made[0], made[-1]) and torch.equal(made[0], compile(turned)(other, x, start))


def test_the_gradients_of_a_product_of_two_dtypes() -> None:
    """The casts are written where the dtypes are known; the program of one dtype has none."""
    @sharded("B D, D -> ()")
    def product(x, w):
        return sum("B D -> ()", x * w)
    x, w = torch.rand(4, 6).bfloat16(), torch.rand(6)
    backward = value_and_grad(product, ("x", "w"))
    for made in (simulate(backward, Layout(B="tp"), x, w, mesh=TWO), compile(backward)(x, w)):
        assert [y.dtype for y in made] == [float32, bfloat16, float32]
        assert torch.equal(made[1], w.bfloat16().expand(4, 6)) and torch.allclose(made[2], x.float().sum(0))
    kinds = dict(x="bfloat16", w="float32")
    program = lower(backward, Layout(), mesh=ONE, dtypes=kinds)
    assert (str(program).count("cast") == str(program).count(", dtype='bfloat16')") == 1
            and parse_program(str(program)) == program)
    assert "cast" not in str(lower(backward, Layout(), mesh=ONE))
    assert "cast" not in str(lower(backward, Layout(), mesh=ONE, dtypes=dict(x="float16", w="float16")))


class Layer(Params):
    norm: Tensor = param("D")
    up: Tensor = param("D F")
    down: Tensor = param("F D")


class Net(Params):
    layers: Layer = stacked("L", Layer)


@sharded("B D, * -> B D")
def keeps(x, w: Layer):
    return x + cast(einsum("B F, F D -> B D", einsum("B D, D F -> B F", rms_norm(x, w.norm), w.up), w.down),
                    "bfloat16")


@sharded("B D, * -> B D")
def widens(x, w: Layer):
    return x + einsum("B F, F D -> B D", einsum("B D, D F -> B F", x, w.up), w.down)


def scanning(body: Any) -> Any:
    @sharded("B D, * -> ()")
    def f(x, w: Net):
        return mean("B D -> ()", scan(body, x, w.layers))
    return f


def net() -> Net:
    g = torch.Generator().manual_seed(0)
    norm, up, down = (torch.rand(3, 6, generator=g), torch.randn(3, 6, 5, generator=g),
                      torch.randn(3, 5, 6, generator=g))
    return Net(layers=Layer(norm=norm.double(), up=up, down=down.half()))


@pytest.mark.parametrize("layout", (Layout(), Layout(B="tp"), Layout(F="tp"), Layout(B="tp", D="tp")),
                         ids=str)
def test_gradients_through_a_scan_of_several_dtypes(layout: Layout) -> None:
    x, w = torch.randn(4, 6, generator=torch.Generator().manual_seed(1)).bfloat16(), net()
    value, dx, dw = simulate(value_and_grad(scanning(keeps), ("x", "w")), layout, x, w, mesh=TWO)
    assert ([y.dtype for y in (value, dx, dw.layers.norm, dw.layers.up, dw.layers.down)]
            == [bfloat16, bfloat16, float64, float32, float16])
    exact = [y.double().requires_grad_() for y in (x, w.layers.norm, w.layers.up, w.layers.down)]
    h = exact[0]
    for norm, up, down in zip(*exact[1:]):
        h = h + torch.nn.functional.rms_norm(h, (6,), norm, 1e-6) @ up @ down
    for got, want in zip((dx, dw.layers.norm, dw.layers.up, dw.layers.down),
                         torch.autograd.grad(h.mean(), exact)):
        assert (got - want).norm() < 0.02 * want.norm()


CHANGED = (
    "scan: the carry is bfloat16, widens returns it as float32; a carry keeps its dtype: cast one of them")


@every_executor
def test_a_carry_that_changes_its_dtype_is_refused(call: Any) -> None:
    with pytest.raises(SpecError) as error:
        call(scanning(widens), torch.rand(4, 6).bfloat16(), net())
    assert str(error.value).splitlines()[0].split("          ")[0] == CHANGED
    with pytest.raises(SpecError, match=CHANGED):
        explain(lower(scanning(widens), mesh=TWO), TWO, dict(B=4, D=6, F=5, L=3), {"x": "bfloat16"})


@pytest.mark.parametrize("kind", (torch.uint16, torch.complex64, torch.float8_e4m3fn), ids=str)
@every_executor
def test_a_dtype_that_is_not_known_is_one_error(call: Any, kind: torch.dtype) -> None:
    with pytest.raises(SpecError) as error:
        call(average, torch.zeros(2, 3).to(kind))
    assert str(error.value).splitlines()[0].split("          ")[0] == (
        f"average: x is {str(kind)[6:]}; a tensor of a program is one of float64, int64, float32, int32, "
        "bfloat16, float16, int16, bool, uint8, int8")


@every_executor
def test_what_an_op_does_not_take_is_refused_before_it_runs(call: Any) -> None:
    @sharded("B T, B T -> B T")
    def less_masks(left, right):
        return left - right
    with pytest.raises(SpecError) as error:
        call(less_masks, torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool))
    first_line, where = str(error.value).splitlines()[0].split("          ")
    assert (first_line == "sub: right is bool; it takes integers and floats"
            and where.startswith("test_dtypes_by_hand.py:"))


@every_executor
def test_a_mask_is_no_index(call: Any) -> None:
    @sharded("B, V D -> B D")
    def rows(which, table):
        return embedding("B, V D -> B D", which, table)
    with pytest.raises(SpecError) as error:
        call(rows, torch.tensor([True, False]), torch.ones(3, 2))
    first_line, _ = str(error.value).splitlines()[0].split("          ")
    assert first_line == "embedding: which is bool; indices are integers"


@every_executor
@pytest.mark.parametrize("spec, kind, says", [
    ("B", torch.float32, "seen is float32; indices are integers"),
    ("B", torch.bool, "seen is bool; indices are integers"),
    ("B T S", torch.int64, "seen is int64; a mask is bool, as greater and less make it")])
def test_attention_takes_a_start_of_integers_and_a_mask(spec: str, kind: torch.dtype, says: str,
                                                        call: Any) -> None:
    @sharded(f"B T K G H, B S K H, {spec} -> B T K G H")
    def see(q, k, seen):
        return attention(f"B T K G H, B S K H, B S K H, {spec} -> B T K G H", q, k, k, seen)
    with pytest.raises(SpecError) as error:
        call(see, torch.ones(1, 1, 1, 1, 1), torch.ones(1, 1, 1, 1),
             torch.ones((1,) * len(spec.split()), dtype=kind))
    first_line, _ = str(error.value).splitlines()[0].split("          ")
    assert first_line == f"attention: {says}"


def test_prepared_weights_of_several_dtypes_are_packed_by_dtype() -> None:
    @sharded("B D, * -> B D")
    def body(x, w: Three):
        p, q, r = (einsum("B D, D F -> B F", x, u) for u in (w.p, w.q, w.r))
        return x + cast(mean("B F -> B", p + q + r), "bfloat16") * x

    @sharded("B D, * -> B D")
    def f(x, w: Threes):
        return scan(body, x, w.layers)
    g = torch.Generator().manual_seed(0)
    p, q, r = (torch.randn(2, 6, 5, generator=g).to(kind) for kind in (bfloat16, float32, bfloat16))
    x, w, made = torch.randn(3, 6, generator=g).bfloat16(), Threes(layers=Three(p=p, q=q, r=r)), compile(f)
    prepared = made.prepare("w", w)
    assert prepared.parts == ("w.layers.p|w.layers.r", "w.layers.q")
    ours, plain = made(x, prepared), compile(f)(x, w)
    assert ours.dtype == bfloat16 and (ours - plain).abs().max() <= 2**-7 * plain.abs().max()


class Three(Params):
    p: Tensor = param("D F")
    q: Tensor = param("D F")
    r: Tensor = param("D F")


class Threes(Params):
    layers: Three = stacked("L", Three)


def test_a_function_called_at_other_dtypes_is_written_anew() -> None:
    """Where only the second of a pytree's leaves differs, or a tensor beside it, too."""
    @sharded("B D, * -> B F")
    def f(x, w: Layer):
        return einsum("B D, D F -> B F", rms_norm(x, w.norm), w.up)
    called, stepped, x = compile(f), step(f), torch.rand(2, 6)
    for kind in (float32, float64, bfloat16):
        w = Layer(norm=torch.rand(6), up=torch.rand(6, 5).to(kind), down=torch.rand(5, 6))
        assert called(x, w).dtype == stepped(x, w).dtype == torch.promote_types(float32, kind)
        first, w = torch.rand(2, 6).to(kind), Layer(norm=w.norm, up=w.up.float(), down=w.down)
        assert called(first, w).dtype == stepped(first, w).dtype == torch.promote_types(float32, kind)


@sharded("T D, () -> T D, T, T D")
def with_its_best(x, by):
    return x, argmax("T D -> T", x), cast(x, "bfloat16")


@sharded("T D, L -> T D, L T, L T D")
def all_their_best(x, bys):
    return scan(with_its_best, x, bys)


@every_executor
@pytest.mark.parametrize("rounds", [0, 2])
def test_what_a_scan_stacks_has_its_own_dtype_without_rounds_too(call, rounds: int) -> None:
    if rounds or call is not EXECUTORS["step"]:  # which runs the user's own loop, and has no value to tell by
        made = call(all_their_best, torch.randn(3, 4), torch.ones(rounds))
        assert [(y.dtype, y.shape) for y in made] == [
            (float32, (3, 4)), (int64, (rounds, 3)), (bfloat16, (rounds, 3, 4))]
