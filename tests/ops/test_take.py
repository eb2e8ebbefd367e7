"""take with dims of the index's own, and scatter_add, its transpose: those of torch, whatever is split."""
from __future__ import annotations

import pytest
import torch

from shardlib import Layout, Mesh, SpecError, lower, sharded, simulate, value_and_grad
from shardlib.functions import sum
from shardlib.ops import scatter_add, take

pytestmark = pytest.mark.usefixtures("one_thread")
LAYOUTS = (Layout(), Layout(B="x", D="y"), Layout(S="x", T="y"), Layout(T=("x", "y")), Layout(S=("y", "x")))
MESH = Mesh(x=2, y=2)


@sharded("B S D, B T, B T D -> ()")
def picked(x, index, by):
    """Squared, so that what comes back depends on what was taken."""
    y = take("B S D, B T -> B T D", x, index)
    return sum("B T D -> ()", by * y * y)


@sharded("B S D, B T, B T D -> ()")
def put(x, index, by):
    y = scatter_add("B T D, B T -> B S D", by, index)
    return sum("B S D -> ()", x * y * y)


def torch_picked(x: torch.Tensor, index: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    y = x.gather(1, index[..., None].expand(by.shape))
    return (by * y * y).sum()


def torch_put(x: torch.Tensor, index: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    y = torch.zeros_like(x).scatter_add(1, index[..., None].expand(by.shape), by)
    return (x * y * y).sum()


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("ours, theirs", ((picked, torch_picked), (put, torch_put)),
                         ids=("take", "scatter_add"))
@pytest.mark.parametrize("s, t", ((5, 7), (1, 3), (3, 0)))
def test_values_and_gradients_are_those_of_torch(ours, theirs, layout: Layout, s: int, t: int) -> None:
    """Of 5 places and 7 indices, some come twice."""
    g = torch.Generator().manual_seed(s)
    x, by = (torch.randn(3, n, 4, generator=g, dtype=torch.float64) for n in (s, t))
    index = torch.randint(s, (3, t), generator=g)
    asked = [x.clone().requires_grad_(), by.clone().requires_grad_()]
    want = theirs(asked[0], index, asked[1])
    got = simulate(value_and_grad(ours, wrt=("x", "by")), layout, x, index, by, mesh=MESH)
    for made, exact in zip(got, (want.detach(), *torch.autograd.grad(want, asked)), strict=True):
        torch.testing.assert_close(made, exact)


def test_nothing_is_sent_before_the_sum_that_is_owed() -> None:
    """Each rank puts its own tokens; of a split table it has those in its range."""
    f = sharded("T D, T -> E D")(lambda x, expert: scatter_add("T D, T -> E D", x, expert))
    assert str(lower(f, Layout(T="x", E="x"), mesh=Mesh(x=2))) == '''\
@sharded("T/x D, T/x -> E/x D", layout=EXPLICIT)
def f(x, expert):
    v1 = scatter_add("T/x D, T/x -> E D +x", x, expert)
    v = reduce_scatter("E D +x -> E/x D", v1)
    return v
'''


MEANT = ('take "{}": the specs are those of "B T D, B -> B D" or "B S D, B T -> B T D": the result lacks one '
         'dim of the first operand, and has those of the index; all keep their order')


@pytest.mark.parametrize("text", ("B S D, B T -> T B D", "B S D, B T -> B D", "B S D, B T -> B S D",
                                  "B S D, T B -> B T D", "B S D -> B S"))
def test_texts_that_are_none(text: str) -> None:
    def of(op, text: str) -> str:
        with pytest.raises(SpecError) as error:
            lower(sharded("B S D, B T -> B T D")(lambda x, index: op(text, x, index)), mesh=Mesh())
        return str(error.value).split("          ")[0]
    assert of(take, text) == MEANT.format(text)
    (x, *index), out = text.split(" -> ")[0].split(", "), text.split(" -> ")[1]
    turned = f"{', '.join((out, *index))} -> {x}"
    assert of(scatter_add, turned) == (
        f'scatter_add "{turned}": the specs are those of "B T D, B T -> B S D", the other way round than '
        'those of take "B S D, B T -> B T D"')


def test_an_index_out_of_range() -> None:
    f = sharded("T, T, E -> E")(lambda x, expert, bias: bias + scatter_add("T, T -> E", x, expert))
    with pytest.raises(SpecError) as error:
        simulate(f, Layout(E="x"), torch.ones(2), torch.tensor([0, 4]), torch.zeros(3), mesh=Mesh(x=2))
    assert str(error.value).startswith("scatter_add: expert holds 4, outside of 0 to 2 (E=3)")
