"""uniform, normal and dropout: the bits of the published mixer, the same under every layout; backward."""
from __future__ import annotations

import math

import pytest
import torch

from shardlib import Layout, Mesh, SpecError, lower, scan, sharded, simulate, value_and_grad
from shardlib.functions import dropout, normal, sum, uniform
from shardlib.language.draws import cosine, hashed, logarithm

pytestmark = pytest.mark.usefixtures("one_thread")
LAYOUTS = (Layout(B="x"), Layout(D=("x", "y")), Layout(D="y", B="x"), Layout(B=("y", "x")))
MESH, ALL = Mesh(x=2, y=3), (1 << 64) - 1


def mixed(z: int) -> int:
    """The finalizer of SplitMix64, of Python's integers."""
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & ALL
    z = (z ^ z >> 27) * 0x94D049BB133111EB & ALL
    return z ^ z >> 31


def test_bits_are_those_of_the_published_mixer() -> None:
    golden, index = 0x9E3779B97F4A7C15, torch.tensor([0, 1, (1 << 40) + 7])
    made = hashed(index, torch.tensor(5), torch.tensor(2), seed=-9).tolist()
    stream = -9 & ALL
    for part in (5, 2):
        stream = mixed(mixed(stream * golden & ALL) + part & ALL)
    assert [n & ALL for n in made] == [mixed((i + 1) * golden + stream & ALL) for i in index.tolist()]
    first = hashed(torch.arange(3), torch.tensor(0), torch.tensor(0), seed=0)
    assert len({*first.tolist(), *hashed(torch.arange(3), torch.tensor(1), torch.tensor(0), 0).tolist(),
                *hashed(torch.arange(3), torch.tensor(0), torch.tensor(1), 0).tolist(),
                *hashed(torch.arange(3), torch.tensor(0), torch.tensor(0), 1).tolist()}) == 12


def test_the_logarithm_and_the_cosine_are_right_to_a_few_bits() -> None:
    x = torch.cat((torch.logspace(-52, 0, 2001, base=2.0, dtype=torch.float64),
                   torch.tensor([2.0 ** -54, 1 - 2.0 ** -53, math.sqrt(0.5)])))
    assert float(((logarithm(x) - x.log()).abs() / x.log().abs().clamp(min=1)).max()) < 4e-16
    turns = torch.arange(0, 1, 1 / 997, dtype=torch.float64)
    assert float((cosine(turns) - (2 * math.pi * turns).cos()).abs().max()) < 1e-15


def test_they_are_uniform_and_normal() -> None:
    f = sharded("N, () -> N, N")(lambda x, step: (uniform("N", step, seed=3), normal("N", step, seed=3)))
    u, n = simulate(f, None, torch.zeros(20_000), torch.tensor(1), mesh=Mesh())
    assert float(u.min()) >= 0 and float(u.max()) < 1
    # far beyond what chance makes of 20,000: Kolmogorov's distance above 0.0138 has a probability of 0.001
    even = torch.arange(20_000) / 20_000
    assert float((u.sort().values - even).abs().max()) < 0.0138
    assert float((torch.special.ndtr(n.sort().values) - even).abs().max()) < 0.0138


@sharded("B D, L, () -> ()")
def deep(x, layers, step):
    """Dropout, and noise, in each round of a scan."""
    body = sharded("B D, (), () -> B D")(
        lambda x, layer, step: dropout(x * (1.5 + uniform("B D", step, layer, seed=5, dtype="float64")), step,
                                       layer, rate=0.3, seed=4) + normal("B D", step, layer, seed=6))
    y = scan(body, x, layers, step)
    return sum("B D -> ()", y * y)


@sharded("B D, () -> B D, B D, B D")
def drawn(x, step):
    return (dropout(x, step, 3, rate=0.5, seed=1), uniform("B D", step, seed=2, dtype="bfloat16"),
            normal("B D", step, seed=2))


def test_the_same_bits_under_every_layout() -> None:
    x, step = torch.ones(5, 7), torch.tensor(11)
    want = simulate(drawn, None, x, step, mesh=Mesh())
    assert 5 < int((want[0] == 0).sum()) < 30 and set(want[0].unique().tolist()) == {0.0, 2.0}
    for layout in LAYOUTS:
        assert all(map(torch.equal, simulate(drawn, layout, x, step, mesh=MESH), want))


def test_backward_drops_the_same() -> None:
    """And draws for each layer anew, though the body is there once."""
    x, grad = torch.full((5, 7), 0.25, dtype=torch.float64), value_and_grad(deep, wrt="x")
    args = x, torch.arange(3), torch.tensor(2)
    value, made = simulate(grad, None, *args, mesh=Mesh())
    for layout in LAYOUTS:
        for got, want in zip(simulate(grad, layout, *args, mesh=MESH), (value, made)):
            torch.testing.assert_close(got, want)
    up = torch.zeros_like(x)
    up[2, 3] = 1e-5
    change = [float(simulate(deep, None, x + sign * up, *args[1:], mesh=Mesh())) for sign in (1, -1)]
    assert math.isclose((change[0] - change[1]) / 2e-5, float(made[2, 3]), rel_tol=1e-6, abs_tol=1e-8)


def test_what_they_refuse() -> None:
    def said(f) -> str:
        with pytest.raises(SpecError) as error:
            lower(sharded("B D, () -> B D")(f), mesh=Mesh())
        return str(error.value).split("          ")[0]
    for rate in (-0.1, 1.5, True, None, math.nan):
        assert said(lambda x, n: dropout(x, n, rate=rate, seed=0)) == (
            f"dropout: rate is {rate!r}; it is a number from 0 to 1")
    for f, name in ((lambda x, n: dropout(x, n, rate=0.5, seed=1 << 64), "dropout"),
                    (lambda x, n: normal("B D", n, seed=1 << 64), "normal")):
        assert said(f) == f"{name}: seed is {1 << 64}; it is a whole number of at most 64 bits"
    assert said(lambda x, n: uniform("B D", n, seed=0, dtype="int64")).startswith(
        "uniform: dtype is 'int64'; it is one of float")
    assert said(lambda x, n: uniform("B D", x, seed=0)).startswith('uniform "(), () -> B D": x has dims B D')
    assert said(lambda x, n: normal("B D +x", n, seed=0)) == (
        'normal "B D +x": the text is dims of what is made; it owes nothing')


@pytest.mark.parametrize("draw", (uniform, normal))
def test_steps_layers_and_seeds_draw_anew(draw) -> None:
    @sharded("-> D, D, D, D, D")
    def five():
        return tuple(draw("D", *at, seed=seed) for *at, seed in ((3, 0, 1), (3, 1, 1), (4, 0, 1), (3, 0, 2),
                                                                (3, 0, 1)))
    first, *others, again = simulate(five, None, mesh=Mesh(), sizes=dict(D=8))
    assert torch.equal(first, again) and not any(torch.equal(first, other) for other in others)
    assert not torch.equal(others[0], others[1])
