"""Experts that take so many rows: what is dropped, under every layout, and that it is as if never chosen."""
from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from shardlib import Layout, Mesh, SpecError, sharded, simulate, value_and_grad
from shardlib.functions import silu, sum
from shardlib.ops import combine, dispatch, grouped_einsum, within_capacity

pytestmark = pytest.mark.usefixtures("one_thread")


@sharded("N D, N J, N J, E D F, E F D -> N D, N J, E")
def limited(x, chosen, weights, up, down, *, capacity):
    chosen, dropped = within_capacity("N J -> N J, E", chosen, capacity=capacity)
    rows, at = dispatch("N D, N J -> (E N)~J D, (E N)~J", x, chosen, ignore_index=-1)
    h = silu(grouped_einsum("(E N)~J D, (E N)~J, E D F -> (E N)~J F", rows, at, up))
    y = grouped_einsum("(E N)~J F, (E N)~J, E F D -> (E N)~J D", h, at, down)
    return combine("(E N)~J D, (E N)~J, N J -> N D", y, at, weights), chosen, dropped


@sharded("N D, N J, N J, E D F, E F D, N D -> ()")
def loss(x, chosen, weights, up, down, g, *, capacity):
    return sum("N D -> ()", g * limited(x, chosen, weights, up, down, capacity=capacity)[0])


def first_come(chosen: Tensor, capacity: int, experts: int) -> tuple[Tensor, Tensor]:
    """By a walk through first choices, then second ones."""
    kept, taken, lost = chosen.clone(), [0] * experts, [0] * experts
    for j in range(chosen.shape[1]):
        for n in range(len(chosen)):
            e = int(chosen[n, j])
            if e >= 0 and taken[e] == capacity:
                kept[n, j] = -1
                lost[e] += 1
            elif e >= 0:
                taken[e] += 1
    return kept, torch.tensor(lost)


@pytest.mark.parametrize("mesh, layout, n, e, j, capacity", (
    ("ep=1", "", 6, 3, 2, 2), ("ep=3", "E=ep", 5, 4, 3, 1), ("ep=3", "N=ep,E=ep", 7, 5, 2, 2),
    ("dp=2,ep=2", "N=dp,E=dp/ep", 7, 3, 2, 0), ("dp=2,ep=2", "N=ep,F=dp", 1, 2, 1, 3)))
def test_what_is_dropped_is_as_if_it_had_not_been_chosen(mesh: str, layout: str, n: int, e: int, j: int,
                                                         capacity: int) -> None:
    """Values and gradients, those of what is dropped zero; the same rows under every layout, all counted."""
    g = torch.Generator().manual_seed(n)
    x, weights, up, down, ct = (torch.randn(*shape, generator=g, dtype=torch.float64)
                                for shape in ((n, 3), (n, j), (e, 3, 2), (e, 2, 3), (n, 3)))
    chosen = torch.rand(n, e, generator=g).argsort(-1)[:, :j]
    chosen[torch.rand(n, j, generator=g) < 0.2] = -1
    kept, lost = first_come(chosen, capacity, e)
    given = [t.requires_grad_() for t in (x, weights, up, down)]
    y = torch.einsum("nef,efd->ned", torch.nn.functional.silu(torch.einsum("nd,edf->nef", x, up)), down)
    there = (kept[..., None] == torch.arange(e)).to(y.dtype)
    wanted = torch.einsum("nj,nje,ned->nd", weights, there, y)
    truth = torch.autograd.grad((wanted * ct).sum(), given)
    call: Any = dict(mesh=Mesh.parse(mesh), capacity=capacity)
    operands = [t.detach() for t in (x, chosen, weights, up, down)]
    made, same, dropped = simulate(limited, Layout.parse(layout), *operands, **call)
    assert torch.equal(same, kept) and torch.equal(dropped, lost)
    torch.testing.assert_close(made, wanted.detach(), rtol=1e-12, atol=1e-12)
    if "N=ep" in layout:
        found = simulate(value_and_grad(loss, wrt=("x", "weights", "up", "down")), Layout.parse(layout),
                         *operands, ct, **call)
        for a, b in zip(found[1:], truth, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        assert (found[2][kept < 0] == 0).all()


@sharded("N D, N J, E -> N D")
def padded(x, chosen, like):
    rows, at = dispatch("N D, N J -> (E N)~J D, (E N)~J", x, chosen, ignore_index=-3)
    return combine("(E N)~J D, (E N)~J -> N D", rows, at)


def refusal(f: Any, chosen: list[list[int]], **more: Any) -> str:
    x = torch.ones(len(chosen), 2)
    weights = (x[:, :1].expand(-1, len(chosen[0])), torch.ones(3, 2, 1), torch.ones(3, 1, 2))
    with pytest.raises(SpecError) as caught:
        simulate(f, Layout(E="ep"), x, torch.tensor(chosen),
                 *(weights if f is limited else (torch.zeros(3),)), mesh=Mesh(ep=2), **more)
    return str(caught.value).splitlines()[0].split("  ")[0]


def test_padding_is_no_expert() -> None:
    x = torch.arange(6.0).view(3, 2)
    made = simulate(padded, Layout(E="ep"), x, torch.tensor([[0, 1], [-3, -3], [-3, 2]]), torch.zeros(3),
                    mesh=Mesh(ep=2))
    assert torch.equal(made, x * torch.tensor([[2.0], [0.0], [1.0]]))
    assert refusal(padded, [[0, -1]]).startswith("dispatch: chosen holds -1, outside of 0 to 2 (E=3)")
    assert refusal(padded, [[1, 1]]) == ("dispatch: chosen holds -4, outside of 0 to 2 (E=3); an expert that "
                                         "a token has twice counts as -4")


TWICE = "; -1 is none, and an expert that a token has twice counts as -2"


@pytest.mark.parametrize("chosen, says", (
    ([[0, 3]], "holds 3, outside of 0 to 2 (E=3)"),
    ([[0, -2]], "holds -2, outside of 0 to 2 (E=3)" + TWICE),
    ([[1, 1]], "holds -2, outside of 0 to 2 (E=3)" + TWICE)))
def test_an_expert_that_is_none_is_refused_before_it_is_dropped(chosen: list[list[int]], says: str) -> None:
    assert refusal(limited, chosen, capacity=0) == "within_capacity: chosen " + says


@pytest.mark.parametrize("text", ("N J -> N J", "N J -> N J, E D", "N J -> J N, E", "N J -> N J, J",
                                  "N J, E -> N J, E"))
def test_a_text_that_is_no_call_says(text: str) -> None:
    with pytest.raises(SpecError) as caught:
        within_capacity(text, None, capacity=1)
    assert str(caught.value) == f'within_capacity "{text}": the specs are those of "B T J -> B T J, E"'


@pytest.mark.parametrize("capacity", (-1, True, 1.5))
def test_a_capacity_is_a_number_of_rows(capacity: Any) -> None:
    assert refusal(limited, [[0, 1]], capacity=capacity) == f"within_capacity: capacity is {capacity!r}"
