"""Gradients through all that a scan gives, and through a cond: those of torch.autograd, in each argument's
type, whatever the layout; typed, proven, and printed as any program."""
from __future__ import annotations

import pytest
import torch
from torch import Tensor

from shardlib import (
    Layout,
    Mesh,
    Params,
    cond,
    einsum,
    lower,
    param,
    prove,
    scan,
    sharded,
    simulate,
    stacked,
    step,
    value_and_grad,
)
from shardlib.compiler.parser import check, parse_program
from shardlib.functions import cast, greater, max, silu, sort, square, sum
from shardlib.language.cond import COND
from shardlib.ops import TABLE
from shardlib.program import Program

MESH, SIZES = Mesh(dp=2, tp=2), dict(L=3, B=3, D=5, F=3)
LAYOUTS = (Layout(B="dp", F="tp"), Layout(D="tp", F="dp"))


class Layer(Params):
    up: Tensor = param("D F")
    down: Tensor = param("F D")


class Net(Params):
    layers: Layer = stacked("L", Layer)


@sharded("B/1 D, B F, * -> B/1 D, B F, B F, ()")
def block(x, h, w: Layer):
    """Two carries, of which one is whole where the layout splits its dim; one is stacked, too."""
    h = h + silu(einsum("B D, D F -> B F", x, w.up))
    x = x + einsum("B F, F D -> B D", h, w.down)
    return x, h, h, sum("B D -> ()", square(x))


@sharded("B D, B F, * -> ()")
def of_all(x, h, w: Net):
    x, h, hidden, norms = scan(block, (x, h), w.layers)
    weighed = sum("L B F -> ()", hidden * hidden) + sum("L -> ()", norms * square(norms))
    return weighed + sum("B D -> ()", x * 2)


@sharded("B D, B F, * -> ()")
def of_the_stacked(x, h, w: Net):
    return sum("L B F -> ()", square(scan(block, (x, h), w.layers)[2]))


@sharded("* -> F")
def width(w: Layer):
    return max("D F -> F", w.up * w.up)


@sharded("B D, B F, * -> ()")
def of_a_map(x, h, w: Net):
    """No carry at all: each layer by itself."""
    return sum("L F -> ()", square(scan(width, (), w.layers)))


@sharded("B D, B F, * -> B F", layout=Layout(D="dp"))
def wide(x, h, w: Layer):
    return h * einsum("B D, D F -> B F", x, w.up)


@sharded("B D, B F, * -> B F", layout=Layout(F="dp", B="tp"))
def narrow(y, g, w: Layer):
    """Nothing of `down` is used in either branch, and y in one alone."""
    return square(g)


@sharded("B D, B F, *, () -> B F")
def either(x, h, w: Layer, least):
    h2 = cond(greater(sum("B F -> ()", h), than=0.0), wide, narrow, x, h, w)
    return cond(greater(sum("B F -> ()", h2) - least, than=0.0), narrow, wide, x, h2, w)


@sharded("B D, *, B F -> B D, B F")
def chosen(x, w: Layer, h):
    """A cond in the body of a scan: it chooses for each layer by itself."""
    h = cond(greater(sum("B F -> ()", einsum("B D, D F -> B F", x, w.up)), than=0.0), wide, narrow, x, h, w)
    return x + einsum("B F, F D -> B D", h, w.down), h


@sharded("B D, B F, * -> ()")
def deep(x, h, w: Net):
    x, made = scan(chosen, x, w.layers, h)
    return sum("B D -> ()", square(x)) + sum("L B F -> ()", made)


@sharded("B D, B F, * -> ()")
def nothing(x, h, w: Net):
    return sum("B D -> ()", x * x)


@sharded("B D, B F, * -> ()")
def of_a_scan_in_a_branch(x, h, w: Net):
    return cond(greater(sum("B D -> ()", x), than=-99.0), of_all, nothing, x, h, w)


def by_torch(name: str, x: Tensor, h: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The same, in plain torch."""
    def either_of(first: bool, x: Tensor, h: Tensor, up: Tensor) -> Tensor:
        return h * (x @ up) if first else h ** 2
    if name == "of_a_map":
        return ((up * up).max(1).values ** 2).sum()
    total, hidden, norms = x.new_zeros(()), [], []
    for u, d in zip(up, down):
        if name == "deep":
            made = either_of(bool((x @ u).sum() > 0), x, h, u)
            x = x + made @ d
            hidden.append(made)
        else:
            h = h + torch.nn.functional.silu(x @ u)
            x = x + h @ d
            hidden.append(h)
            norms.append((x ** 2).sum())
    if name == "of_the_stacked":
        return (torch.stack(hidden) ** 2).sum()
    if name == "deep":
        return (x ** 2).sum() + torch.stack(hidden).sum()
    total = (torch.stack(hidden) ** 2).sum() + (torch.stack(norms) ** 3).sum()
    return total + (2 * x).sum()


def tensors() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(s, generator=generator, dtype=torch.float64) / 2
            for s in ((3, 5), (3, 3), (3, 5, 3), (3, 3, 5))]


def explicit(f, layout: Layout) -> Program:
    return lower(value_and_grad(f, ["x", "h", "w"]), layout, mesh=MESH)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("f", [of_all, of_the_stacked, of_a_map, deep, of_a_scan_in_a_branch],
                         ids=lambda f: f.__name__)
def test_gradients_are_those_of_autograd(f, layout: Layout) -> None:
    x, h, up, down = tensors()
    weights = Net(layers=Layer(up=up, down=down))
    value, dx, dh, dw = simulate(value_and_grad(f, ["x", "h", "w"]), layout, x, h, weights, mesh=MESH)
    free = [t.clone().requires_grad_() for t in (x, h, up, down)]
    want = by_torch("of_all" if f is of_a_scan_in_a_branch else f.__name__, *free)
    grads = torch.autograd.grad(want, free, allow_unused=True)
    torch.testing.assert_close(value, want.detach())
    for mine, t, theirs in zip((dx, dh, dw.layers.up, dw.layers.down), free, grads):
        torch.testing.assert_close(mine, torch.zeros_like(t) if theirs is None else theirs)
    program = explicit(f, layout)
    assert parse_program(str(program), TABLE) == program == check(program, MESH)
    assert prove(program, MESH, SIZES)
    assert [str(s) for _, s in program.result_leaves()[1:]] == [str(s) for _, s in program.arg_leaves()]


@sharded("B D, B F, *, () -> ()")
def of_two_conds(x, h, w: Layer, least):
    return sum("B F -> ()", either(x, h, w, least))


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("least", [-99.0, 99.0])
def test_each_branch_gives_its_own_gradients_under_layouts_of_its_own(sign: float, least: float) -> None:
    """What one branch does not use has a gradient of zeros there; what neither uses is not passed in."""
    x, h, up, down = tensors()
    x, h, up, down = x.abs(), h.abs() * sign, up[0].abs(), down[0]
    value, dx, dh, dw = simulate(value_and_grad(of_two_conds, ["x", "h", "w"]), LAYOUTS[0], x, h,
                                 Layer(up=up, down=down), torch.tensor(least, dtype=torch.float64), mesh=MESH)
    free = [t.clone().requires_grad_() for t in (x, h, up)]
    first = free[1] * (free[0] @ free[2]) if sign > 0 else free[1] ** 2
    want = (first ** 2 if least < 0 else first * (free[0] @ free[2])).sum()
    torch.testing.assert_close(value, want.detach())
    for mine, t, theirs in zip((dx, dh, dw.up), free, torch.autograd.grad(want, free, allow_unused=True)):
        torch.testing.assert_close(mine, torch.zeros_like(t) if theirs is None else theirs)
    assert not dw.down.any()


@sharded("B D, D F -> B F")
def projected(x, w):
    return einsum("B D, D F -> B F", x, w)


@sharded("B D, D F -> B F")
def projected_twice(x, w):
    return 2 * einsum("B D, D F -> B F", x, w)


@sharded("B D, D F -> ()")
def of_either(x, w):
    chosen = cond(greater(sum("B D -> ()", x), than=0.0), projected, projected_twice, x, w)
    return sum("B F -> ()", square(chosen))


def test_what_both_branches_owe_is_settled_once_after_them() -> None:
    """The gradient of w owes over dp in both: they return it so, and take the weight no more."""
    program = lower(value_and_grad(of_either, "w"), Layout(B="dp", D="dp"), mesh=MESH)
    _, backward = (s for s in program.steps if s.op is COND)
    assert [str(s) for s in backward.outs] == ["D F +dp"]
    assert [[s.op.name for s in body.steps] for body in backward.bodies] == [["einsum"], ["scale", "einsum"]]
    assert program.steps[-1].op.name == "reduce_scatter"


@sharded("B D, B D -> B D")
def by_its_place(x, places):
    return x * cast(places, "float64")


@sharded("B D, B D -> B D")
def as_it_is(x, places):
    return x


@sharded("B D -> ()")
def of_sorted(x):
    values, places = sort(x, along="D")
    chosen = cond(greater(sum("B D -> ()", x), than=0.0), by_its_place, as_it_is, values, places)
    return sum("B D -> ()", square(chosen))


@pytest.mark.parametrize("sign", [1, -1])
def test_integers_have_no_gradient_in_either_branch(sign: int) -> None:
    x = tensors()[0].abs() * sign
    value, dx = simulate(value_and_grad(of_sorted, "x"), LAYOUTS[0], x, mesh=MESH)
    free = x.clone().requires_grad_()
    values, places = free.sort(stable=True)
    want = ((values * places if sign > 0 else values) ** 2).sum()
    torch.testing.assert_close(value, want.detach())
    torch.testing.assert_close(dx, *torch.autograd.grad(want, free))


@sharded("* -> F, ()")
def width_and_size(w: Layer):
    return width(w), sum("D F -> ()", w.up)


@sharded("* -> L F, L")
def each(w: Net):
    return scan(width_and_size, (), w.layers)


def test_a_scan_without_a_carry_op_by_op_and_over_no_layers() -> None:
    up, down = tensors()[2:]
    largest, sums = step(each, mesh=Mesh())(Net(layers=Layer(up=up, down=down)))
    assert torch.equal(largest, (up * up).max(1).values) and torch.allclose(sums, up.sum((1, 2)))
    none = each(Net(layers=Layer(up=up[:0], down=down[:0])))
    assert [(tuple(t.shape), t.dtype) for t in none] == [((0, 3), torch.float64), ((0,), torch.float64)]
