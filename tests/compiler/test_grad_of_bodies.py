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
    SpecError,
    cond,
    einsum,
    lower,
    param,
    prove,
    rearrange,
    scan,
    sharded,
    simulate,
    stacked,
    step,
    tree_map,
    value_and_grad,
)
from shardlib.compiler.parser import check, parse_program
from shardlib.functions import (
    arange,
    cast,
    dropout,
    full,
    greater,
    max,
    silu,
    sort,
    square,
    stop_gradient,
    sum,
    zeros,
)
from shardlib.language.cond import COND
from shardlib.language.scan import SCAN
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


@sharded("B F -> B F, B F")
def both_itself(x):
    return x, stop_gradient(x)


@sharded("B F -> B F, B F")
def and_its_square(x):
    return x, x * x


@sharded("B F -> ()")
def of_two_results(x):
    first, second = cond(greater(sum("B F -> ()", x), than=0.0), both_itself, and_its_square, x)
    return sum("B F -> ()", first + second * second)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_cotangent_that_one_branch_alone_takes(sign: int) -> None:
    x = tensors()[1].abs() * sign
    dx = simulate(value_and_grad(of_two_results, "x"), LAYOUTS[0], x, mesh=MESH)[1]
    torch.testing.assert_close(dx, torch.ones_like(x) if sign > 0 else 1 + 4 * x ** 3)


# -- what backward runs again --------------------------------------------------------------------------------

@sharded("B D, *, (), () -> B D")
def dropped(x, w: Layer, depth, step):
    h = dropout(silu(einsum("B D, D F -> B F", x, w.up)), step, depth, rate=0.5, seed=1)
    return x + einsum("B F, F D -> B D", h, w.down)


@sharded("B D, *, () -> (), B D")
def of_dropped(x, w: Net, step):
    y = scan(dropped, x, (w.layers, arange("L", dtype="int64")), step)
    return sum("B D -> ()", square(y)), y


def kept(program: Program) -> list[str]:
    """What the forward scan stacks for backward, by type."""
    forward = next(s for s in program.steps if s.op is SCAN)
    return [str(s) for s in forward.outs[1:]]


def test_a_layer_that_runs_again_keeps_its_carry_alone_and_draws_the_same_mask() -> None:
    x, _, up, down = tensors()
    args = x, Net(layers=Layer(up=up, down=down)), torch.tensor(7)
    once, again = (value_and_grad(of_dropped, ["x", "w"], has_aux=True, remat=names)
                   for names in ((), "dropped"))
    for layout in LAYOUTS:
        want, got = (simulate(f, layout, *args, mesh=MESH) for f in (once, again))
        assert len(want) == 4
        for a, b in zip(want, got):
            tree_map(torch.testing.assert_close, b, a)
    programs = [lower(f, LAYOUTS[0], mesh=MESH) for f in (once, again)]
    assert [kept(p) for p in programs] == [["L B/dp F/tp", "L B/dp F/tp", "L B/dp D"], ["L B/dp D"]]
    assert parse_program(str(programs[1]), TABLE) == programs[1] == check(programs[1], MESH)
    assert prove(programs[1], MESH, SIZES)


def test_only_bodies_of_scans_run_again() -> None:
    with pytest.raises(SpecError) as error:
        lower(value_and_grad(of_all, "w", remat=["block", "blocks"]), mesh=MESH)
    assert str(error.value).split("          ")[0] == (
        "value_and_grad: remat names blocks, which is no body of a scan of of_all; these are block")


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_gradients_of_layers_that_run_again(layout: Layout) -> None:
    """Several carries, of which one is pinned, what is stacked, and a cond within."""
    x, h, up, down = tensors()
    for f, name in ((of_all, "block"), (deep, "chosen"), (of_a_map, "width")):
        args = x, h, Net(layers=Layer(up=up, down=down))
        want, got = (simulate(value_and_grad(f, ["x", "h", "w"], remat=names), layout, *args, mesh=MESH)
                     for names in ((), name))
        for a, b in zip((want[1], want[2], want[3].layers.up), (got[1], got[2], got[3].layers.up)):
            torch.testing.assert_close(b, a)


@sharded("B, B -> B, B")
def summed(total, h):
    return total + silu(h), total


@sharded("B D, * -> B D")
def of_all_kinds(x, w: Layer):
    h = einsum("B D, D F -> B F", x, w.up) * full("F", 0.5)
    total, _ = scan(summed, zeros("B", dtype="float64"), rearrange("B F -> F B", h))
    return x + einsum("B F, F D -> B D", h * total, w.down)


@sharded("B D, * -> ()")
def of_layers(x, w: Net):
    return sum("B D -> ()", square(scan(of_all_kinds, x, w.layers)))


def test_what_runs_again_is_gathered_and_made_once_and_forward_keeps_nothing_of_it() -> None:
    (x, _, up, down), fsdp = tensors(), Layout(B="dp", D="dp")
    program = lower(value_and_grad(of_layers, remat="of_all_kinds"), fsdp, mesh=MESH)
    forward, backward = (s for s in program.steps if s.op is SCAN)
    (inner,) = [s for s in forward.body.steps if s.op is SCAN]
    assert [len(inner.outs), kept(program)] == [2, ["L B/dp D"]]
    names = [s.op.name for s in backward.body.steps]
    assert [names.count(n) for n in ("full", "all_gather", "scan")] == [1, 2, 2]
    args = x, Net(layers=Layer(up=up, down=down))
    want, got = (simulate(value_and_grad(of_layers, remat=names), fsdp, *args, mesh=MESH)[1]
                 for names in ((), "of_all_kinds"))
    tree_map(torch.testing.assert_close, got, want)
