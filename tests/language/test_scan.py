"""Scans with one carry and with several: what they mean, their gradients, their text,
on every layout and op by op."""
from __future__ import annotations

import pytest
import torch
from torch import Tensor

from shardlib import (
    EXPLICIT,
    Layout,
    Mesh,
    SpecError,
    einsum,
    lower,
    scan,
    sharded,
    simulate,
    step,
    value_and_grad,
)
from shardlib.compiler.parser import parse_program
from shardlib.functions import sum, tanh

LAYOUTS = [(Mesh(), Layout()), (Mesh(x=2), Layout(B="x")), (Mesh(x=2), Layout(D="x")),
           (Mesh(x=3, y=2), Layout(F="y", B="x", D="x"))]


@sharded("B D, B F, D F, F D -> B D, B F, B")
def both(x, h, up, down):
    h = h + einsum("B D, D F -> B F", x, up)
    x = x + einsum("B F, F D -> B D", tanh(h), down)
    return x, h, sum("B D -> B", x)


@sharded("B D, B F, L D F, L F D -> B D, B F, L B")
def two_carries(x, h, up, down):
    return scan(both, (x, h), (up, down))


@sharded("B D, B F, L D F, L F D -> ()")
def loss(x, h, up, down):
    x, h, _ = scan(both, (x, h), (up, down))
    return sum("B D -> ()", x * x) + sum("B F -> ()", h)


def tensors(layers: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) / 2
            for shape in ((4, 3), (4, 5), (layers, 3, 5), (layers, 5, 3))]


def by_hand(x: Tensor, h: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    sums = [torch.zeros(0, 4, dtype=x.dtype)]
    for i in range(len(up)):
        h = h + x @ up[i]
        x = x + torch.tanh(h) @ down[i]
        sums.append(x.sum(1)[None])
    return x, h, torch.cat(sums)


@pytest.mark.parametrize("layers", [0, 1, 3])
@pytest.mark.parametrize("mesh, layout", LAYOUTS, ids=str)
def test_several_carries(mesh: Mesh, layout: Layout, layers: int) -> None:
    for made, want in zip(simulate(two_carries, layout, *tensors(layers), mesh=mesh),
                          by_hand(*tensors(layers)), strict=True):
        torch.testing.assert_close(made, want)


@pytest.mark.parametrize("mesh, layout", LAYOUTS, ids=str)
def test_gradients_through_several_carries(mesh: Mesh, layout: Layout) -> None:
    given = [t.requires_grad_() for t in tensors()]
    x, h, _ = by_hand(*given)
    want = (x * x).sum() + h.sum()
    value, *grads = simulate(value_and_grad(loss, wrt=["x", "h", "up", "down"]), layout,
                             *(t.detach() for t in given), mesh=mesh)
    torch.testing.assert_close(value, want.detach())
    for made, wanted in zip(grads, torch.autograd.grad(want, given), strict=True):
        torch.testing.assert_close(made, wanted)


@pytest.mark.parametrize("mesh, layout", LAYOUTS, ids=str)
def test_the_text_of_several_carries(mesh: Mesh, layout: Layout) -> None:
    for f in (two_carries, value_and_grad(loss, wrt=["x", "h", "up", "down"])):
        program = lower(f, layout, mesh=mesh)
        assert parse_program(str(program)) == program
    assert "    v1, v2, v3 = scan(both, (x, h), (up, down,))\n" in str(lower(two_carries, layout, mesh=mesh))


def test_op_by_op_several_carries() -> None:
    for made, want in zip(step(two_carries)(*tensors()), by_hand(*tensors()), strict=True):
        torch.testing.assert_close(made, want)


@sharded("B D, (), D -> B D, ()")
def counting(x, n, w):
    return x * w, n + 1


@sharded("B D, (), L D -> ()")
def counted(x, n, w):
    x, n = scan(counting, (x, n), w)
    return sum("B D -> ()", x)


def test_a_carry_of_integers_has_no_gradient() -> None:
    x, w = torch.full((2, 3), 2.), torch.full((4, 3), 3.)
    value, by_w = simulate(value_and_grad(counted, wrt="w"), Layout(B="x"), x, torch.tensor(0), w,
                           mesh=Mesh(x=2))
    assert value == 6 * 2 * 3 ** 4
    torch.testing.assert_close(by_w, torch.full((4, 3), 2. * 2 * 27))


@sharded("D, D -> D")
def named_g(g, g2):
    return g * g2


@sharded("D, L D -> ()")
def of_g(g, w):
    return sum("D -> ()", scan(named_g, g, w))


def test_the_cotangent_takes_no_name_of_the_body() -> None:
    value, by_g, by_w = value_and_grad(of_g, wrt=["g", "w"])(torch.tensor([2., 3.]),
                                                             torch.tensor([[5., 7.], [11., 13.]]))
    assert (value.item(), by_g.tolist(), by_w.tolist()) == (2 * 55 + 3 * 91, [55., 91.],
                                                            [[22., 39.], [10., 21.]])


@pytest.mark.parametrize("carries, said", [
    (lambda x, h: (), "scan: both takes 4 arguments; it gets 0 carries, 2 stacked and 0 constants"),
    (lambda x, h: (x, 3),
     "scan: the carry is an int; it is a tensor of the traced function, or a tuple of them"),
    (lambda x, h: x, "scan: both takes 4 arguments; it gets the carry, 2 stacked and 0 constants"),
    (lambda x, h: (x, h, h), "scan: both takes 4 arguments; it gets 3 carries, 2 stacked and 0 constants")])
def test_carries_that_are_refused(carries, said: str) -> None:
    @sharded("B D, B F, L D F, L F D -> B D")
    def f(x, h, up, down):
        return scan(both, carries(x, h), (up, down))[0]
    with pytest.raises(SpecError) as refused:
        lower(f, Layout(), mesh=Mesh())
    assert str(refused.value).split("   ")[0] == said


def test_a_body_that_returns_fewer_than_its_carries() -> None:
    @sharded("D, D, D -> D")
    def one(x, h, w):
        return x * w

    @sharded("D, D, L D -> D")
    def f(x, h, w):
        return scan(one, (x, h), w)
    with pytest.raises(SpecError) as refused:
        lower(f, Layout(), mesh=Mesh())
    assert str(refused.value).split("      ")[0] == (
        "scan: one returns 1; the first 2 are the carries, tensors")


@sharded("D, D, D -> D")
def weighted(x, w, y):
    return x * w + y


@sharded("D, L D -> D")
def of_a_constant_that_is_read_before(x, w):
    y = x * 2.0
    z = y + 1.0
    return scan(weighted, z, w, y) * z


def test_what_a_body_reads_is_still_there() -> None:
    """Its variable in generated code goes to no other value before the loop is over."""
    x, w = tensors()[0][0], tensors()[2][:, :, 0]
    y = 2 * x
    z = made = y + 1
    for row in w:
        made = made * row + y
    f = of_a_constant_that_is_read_before
    for run in (f, lambda *args: simulate(f, Layout(D="x"), *args, mesh=Mesh(x=2))):
        torch.testing.assert_close(run(x, w), made * z)


@sharded("D, D -> D, D, D")
def twice_kept(x, w):
    y = x * w
    return x + y, y, y


@sharded("D, L D -> D, L D, L D")
def kept_twice(x, w):
    return scan(twice_kept, x, w)


@pytest.mark.parametrize("layers", [0, 2])
def test_what_a_body_returns_twice_is_stacked_twice(layers: int) -> None:
    x, w = torch.tensor([2., 3.]), torch.tensor([[5., 7.], [11., 13.]])[:layers]
    wanted = torch.stack([x * w[0], (x + x * w[0]) * w[1]]) if layers else torch.zeros(0, 2)
    for run in (kept_twice, lambda *args: simulate(kept_twice, Layout(D="x"), *args, mesh=Mesh(x=2))):
        _, *both = run(x, w)
        assert all(torch.equal(made, wanted) for made in both)


def test_stacks_of_two_dims_are_refused() -> None:
    """The last slices of the longer one would be left out."""
    @sharded("D, D, D -> D")
    def moved(x, w, v):
        return x * w + v

    @sharded("D, L D, M D -> D")
    def f(x, w, v):
        return scan(moved, x, (w, v))
    x, w, v = torch.ones(2), torch.ones(3, 2), torch.ones(4, 2)
    for run in (lambda: lower(f, Layout(), mesh=Mesh()), lambda: step(f)(x, w, v)):
        with pytest.raises(SpecError) as refused:
            run()
        assert str(refused.value).split("      ")[0] == (
            "scan: the stacked tensors begin with L, M; they share one first dim")


@sharded("B, B D/x -> B, B +x", layout=EXPLICIT)
def totalled(before, rows):
    return before, sum("B D/x -> B +x", rows)


def test_what_stacked_results_owe_is_known_op_by_op() -> None:
    seen = []

    @sharded("B, L B D -> B, L B")
    def f(before, rows):
        after, sums = scan(totalled, before, rows)
        seen.append(str(sums.spec))
        return after, sums
    before, rows = torch.zeros(2), torch.arange(12.0).view(3, 2, 2)
    after, sums = step(f, Layout(D="x"), mesh=Mesh(x=1))(before, rows)
    assert seen == ["L B +x"] and torch.equal(after, before) and torch.equal(sums, rows.sum(-1))


def test_every_carry_keeps_its_dtype() -> None:
    @sharded("B, B, L B -> B, B")
    def f(x, h, ys):
        return scan(sharded("B, B, B -> B, B")(lambda x, h, y: (x, h + y)), (x, h), ys)
    wide, narrow = torch.ones(2), torch.ones(2, dtype=torch.bfloat16)
    for x, h, ys in ((wide, narrow, torch.ones(3, 2)), (narrow, narrow, torch.ones(3, 2))):
        with pytest.raises(SpecError, match="the carry is bfloat16, .* returns it as float32"):
            simulate(f, Layout(), x, h, ys, mesh=Mesh())


def test_text_that_scans_over_two_dims_is_none() -> None:
    text = str(lower(two_carries, Layout(), mesh=Mesh()))
    assert parse_program(text)
    with pytest.raises(SpecError, match="this is no program"):
        parse_program(text.replace("L D F, L F D ->", "L D F, M F D ->"))


@sharded("B D, D F -> B D", layout=Layout(F="y"))
def of_its_own(x, w):
    return x + einsum("B F, D F -> B D", einsum("B D, D F -> B F", x, w), w)


@sharded("B D, L D F -> B D")
def through(x, w):
    return scan(of_its_own, x, w)


def test_a_body_has_a_layout_of_its_own() -> None:
    """On every executor: compile ignored it, and step did not. After it the caller's is in force again."""
    mesh = Mesh(x=2, y=2)
    program = lower(through, Layout(B="x", F="x"), mesh=mesh)
    assert '@sharded("B D, D F/x -> B D", layout=EXPLICIT)' in str(program)  # the stack as it is
    assert 'einsum("B F/y, D F/y -> B D +y"' in str(program)
    assert [str(s) for _, s in program.result_leaves()] == ["B/x D"]
    x, w = torch.randn(3, 4, dtype=torch.float64), torch.randn(2, 4, 5, dtype=torch.float64) / 4
    want = x + x @ w[0] @ w[0].T
    want = want + want @ w[1] @ w[1].T
    torch.testing.assert_close(simulate(through, Layout(B="x", F="x"), x, w, mesh=mesh), want)
    torch.testing.assert_close(step(through, Layout(B="x"), mesh=Mesh(x=1, y=1))(x, w), want)


def test_a_function_of_any_number_of_tensors() -> None:
    largest = sharded("B, B, B -> B")(lambda x, *others: x + others[0] * others[1])
    assert [name for name, _ in lower(largest, Layout(), mesh=Mesh()).args] == ["x", "others1", "others2"]
    assert largest(torch.ones(2), torch.ones(2), torch.ones(2)).tolist() == [2.0, 2.0]


def test_what_follows_a_body_of_its_own_layout_has_the_callers() -> None:
    after = sharded("B D, L D F -> L B F")(
        lambda x, w: einsum("B D, L D F -> L B F", scan(of_its_own, x, w), w))
    text = str(lower(after, Layout(B="x", F="y"), mesh=Mesh(x=2, y=2)))
    assert 'einsum("B/x D, L D F/y -> L B/x F/y"' in text
