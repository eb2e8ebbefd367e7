"""sample against its definition: the distribution that it draws from, and what a draw depends on."""
from __future__ import annotations

import math

import pytest
import torch

from shardlib import Layout, Mesh, SpecError, sharded, simulate
from shardlib.ops import sample

pytestmark = pytest.mark.usefixtures("one_thread")
LOGITS = (0.3, 2.1, -1.0, 1.9, 0.0, -4.0, 1.2, 0.7)
DRAWS = 100_000


@sharded("B V, B -> B")
def drawn(logits, position, *, temperature, top_p, seed):
    return sample("B V, B -> B", logits, position, temperature=temperature, top_p=top_p, seed=seed)


def distribution(temperature: float, top_p: float) -> list[float]:
    """By definition: softmax(logits / temperature); of it the fewest likeliest that make up top_p;
    what they make up is 1."""
    weight = [math.exp(x / temperature) for x in LOGITS]
    p = [w / math.fsum(weight) for w in weight]
    order = sorted(range(len(p)), key=lambda i: -p[i])
    kept = next(order[:n] for n in range(1, len(p) + 1)
                if math.fsum(p[i] for i in order[:n]) >= top_p or n == len(p))
    return [p[i] / math.fsum(p[j] for j in kept) if i in kept else 0.0 for i in range(len(p))]


@pytest.mark.parametrize("temperature, top_p, kept",
                         ((1.0, 1.0, 8), (0.7, 0.9, 4), (1.6, 0.6, 3), (1.0, 0.2, 1)))
def test_frequencies_are_those_of_the_definition(temperature: float, top_p: float, kept: int) -> None:
    """Pearson's statistic of n draws has mean k - 1 and variance about 2 (k - 1): five deviations above is
    once in a million seeds. Rows and positions are all different, so that neither may be left out of a
    draw."""
    logits, position = torch.tensor([LOGITS]).expand(DRAWS, -1), torch.arange(DRAWS) % 317
    found = torch.bincount(simulate(drawn, Layout(), logits, position, mesh=Mesh(), temperature=temperature,
                                    top_p=top_p, seed=5), minlength=len(LOGITS))
    p = torch.tensor(distribution(temperature, top_p), dtype=torch.float64)
    assert int((p > 0).sum()) == kept and not found[p == 0].any()
    expected = DRAWS * p[p > 0]
    assert float(((found[p > 0] - expected) ** 2 / expected).sum()) <= kept - 1 + 5 * math.sqrt(2 * kept)


def test_a_draw_is_a_function_of_seed_position_and_row() -> None:
    """Of each; equal on every mesh, and whatever else is in the batch."""
    logits, position = torch.zeros(64, 1000), torch.zeros(64, dtype=torch.int64)
    def draws(layout: Layout = Layout(), seed: int = 3, shift: int = 0, rows: int = 64) -> list[int]:
        return simulate(drawn, layout, logits[:rows], position[:rows] + shift, mesh=Mesh(x=3),
                        temperature=0.8, top_p=0.9, seed=seed).tolist()
    alone = draws()
    assert alone == draws(Layout(B="x")) == draws(Layout(V="x")) and alone[:7] == draws(rows=7)
    later = draws(shift=1)
    for other in (draws(seed=4), later, later[1:], [-1, *later], alone[1:]):
        assert sum(a == b for a, b in zip(alone, other)) <= 4  # one in a thousand would be equal by chance


def test_the_likeliest_alone() -> None:
    """A low temperature is greedy, without infinities; of equals the first is the likeliest;
    top_p keeps at least one."""
    logits = torch.tensor(
        [[0.0, 3.0, 3.0, -1.0], [1e30, -1e30, 2e30, 0.0], [-torch.inf, -torch.inf, 0.5, -torch.inf]])
    for temperature, top_p in ((1e-300, 1.0), (1.0, 1e-300), (1e-6, 0.5)):
        made = simulate(drawn, Layout(), logits, torch.arange(3), mesh=Mesh(), temperature=temperature,
                        top_p=top_p, seed=0).tolist()
        assert made[1:] == [2, 2] and (made[0] == 1 if top_p < 1 else made[0] in (1, 2))


@pytest.mark.parametrize("temperature, top_p", [(0.0, 1.0), (-1.0, 1.0), (math.nan, 1.0), (1.0, 0.0),
                                                (1.0, 1.5), (1.0, math.nan)])
def test_what_nothing_can_be_drawn_by_is_refused(temperature: float, top_p: float) -> None:
    with pytest.raises(SpecError) as refused:
        simulate(drawn, Layout(), torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64), mesh=Mesh(),
                 temperature=temperature, top_p=top_p, seed=0)
    assert str(refused.value).partition("   ")[0] == (
        f"sample: temperature is {temperature}, top_p {top_p}; temperature is above 0, top_p above 0 and at "
        "most 1")
