"""The table of positions, wherever a rank's rows begin, and what it turns, against complex numbers."""
from __future__ import annotations

import pytest
import torch

from shardlib import Layout, Mesh, SpecError, compile, lower, sharded, simulate
from shardlib.lowering.emit import Emitter
from shardlib.ops import rope, rope_table

pytestmark = pytest.mark.usefixtures("one_thread")
THETA = 10.0


@sharded("B, B T K H -> B T K H")
def turned(start, x):
    return rope("B T K H, B T H -> B T K H", x, rope_table("B -> B T H", start, theta=THETA, dtype="float64"))


@pytest.mark.parametrize("t", (1, 2, 3, 7))
@pytest.mark.parametrize("layout",
                         (Layout(), Layout(T="x"), Layout(T=("y", "x")), Layout(B="x"), Layout(K="x", T="y")))
def test_pairs_are_turned_by_their_position(layout: Layout, t: int) -> None:
    """T of as many rows as ranks is one row each, which has a place of its own."""
    start, x = (torch.tensor([0, 5]),
                torch.randn(2, t, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    at = (start[:, None] + torch.arange(t))[..., None] * THETA ** -(torch.arange(2) / 2)
    want = torch.complex(x[..., :2], x[..., 2:]) * torch.polar(torch.ones_like(at).double(),
                                                               at.double())[:, :, None]
    got = simulate(turned, layout, start, x, mesh=Mesh(x=3, y=2))
    # angles are float32: 2 ** -24 of 12
    assert torch.allclose(torch.complex(got[..., :2], got[..., 2:]), want, rtol=1e-6, atol=1e-6)


@sharded("B -> B T H")
def table(start, *, dtype):
    return rope_table("B -> B T H", start, theta=THETA, dtype=dtype)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_a_table_is_that_of_float32_rounded_once(dtype: torch.dtype) -> None:
    """Far from the beginning, too: neither dtype has the number 4099."""
    of = {kind: compile(table, sizes=dict(T=3, H=4), dtype=str(kind)[6:])(torch.tensor([0, 4099]))
          for kind in (torch.float32, dtype)}
    assert of[dtype].dtype == dtype and torch.equal(of[dtype], of[torch.float32].to(dtype))


def test_an_odd_dim_has_no_pairs() -> None:
    program = lower(turned, mesh=Mesh(x=1))
    with pytest.raises(SpecError) as refused:
        Emitter(Mesh(x=1), 0, dict(B=2, T=1, K=1, H=5)).program(program)
    assert str(refused.value).split("          ")[0] == (
        "rope_table: H is 5; its halves are turned in pairs, so it is even")
