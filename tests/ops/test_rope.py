"""The table of positions, wherever a rank's rows begin, and what it turns, against complex numbers."""
from __future__ import annotations

import math

import pytest
import torch

from shardlib import Layout, Mesh, SpecError, compile, lower, sharded, simulate, value_and_grad
from shardlib.functions import sum
from shardlib.lowering.emit import Emitter
from shardlib.ops import rope, rope_table
from shardlib.ops.rope_scaling import amplitude, dynamic_frequencies, frequencies

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


# -- other pairs, and slower ones ----------------------------------------------------------------------------

@pytest.mark.parametrize("interleaved", (False, True))
@pytest.mark.parametrize("part", (None, 4))
def test_other_pairs_are_turned(interleaved: bool, part: int | None) -> None:
    """Against complex numbers; on pieces, with gradient. What is not turned stays, and gets its cotangent."""
    r = "R" if part else "H"

    @sharded("B, B T K H, B T K H -> ()")
    def total(start, x, weight):
        angles = rope_table(f"B -> B T {r}", start, theta=THETA, dtype="float64")
        turned = rope(f"B T K H, B T {r} -> B T K H", x, angles, interleaved=interleaved, part=part)
        return sum("B T K H -> ()", turned * weight)
    g = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(2, 3, 2, 6, dtype=torch.float64, generator=g) for _ in range(2))
    start, n = torch.tensor([0, 5]), part or 6
    value, of_x = simulate(value_and_grad(total, ("x",)), Layout(T="x"), start, x, weight, mesh=Mesh(x=2))
    turn = (start[:, None] + torch.arange(3))[..., None] * THETA ** -(torch.arange(n // 2) / (n // 2))
    turn = torch.polar(torch.ones_like(turn).double(), turn.double())[:, :, None]

    def pairs(y: torch.Tensor) -> torch.Tensor:
        y = y[..., :n].unflatten(-1, (-1, 2) if interleaved else (2, -1))
        return torch.complex(*y.unbind(-1 if interleaved else -2))
    real = (pairs(x) * turn * pairs(weight).conj()).real.sum() + (x[..., n:] * weight[..., n:]).sum()
    assert torch.allclose(value, real, rtol=1e-6)
    assert torch.allclose(pairs(of_x), pairs(weight) * turn.conj(), rtol=1e-6, atol=1e-6)
    assert torch.equal(of_x[..., n:], weight[..., n:])


@pytest.mark.parametrize("name, said, scaling", (
    ("linear", dict(factor=4.0), ("linear", 4.0)),
    ("yarn", dict(factor=2.0, original_max_position_embeddings=4096),
     ("yarn", 2.0, 4096, 32.0, 1.0, 0.1 * math.log(2) + 1)),
    ("dynamic", dict(factor=2.0), ("dynamic", 2.0, 128)),
    ("llama3", dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                    original_max_position_embeddings=64), (8.0, 1.0, 4.0, 64))))
def test_pairs_are_as_slow_as_those_of_transformers(name: str, said: dict, scaling: tuple) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    config = LlamaConfig(hidden_size=64, num_attention_heads=2, max_position_embeddings=128,
                         rope_parameters=dict(rope_theta=10000.0, rope_type=name, **said))
    theirs, attention = ROPE_INIT_FUNCTIONS[name](config, "cpu", seq_len=300)
    ours = (dynamic_frequencies(torch.tensor([295]), 5, 32, 10000.0, *scaling[1:])[0, 0] if name == "dynamic"
            else frequencies(32, 10000.0, scaling))
    assert torch.allclose(ours, theirs, rtol=1e-6, atol=0) and abs(amplitude(scaling) - attention) < 1e-12


def test_a_part_that_is_no_part() -> None:
    @sharded("T H, T R -> T H")
    def some(x, table):
        return rope("T H, T R -> T H", x, table, part=8)
    with pytest.raises(SpecError, match="rope: part is 8, and H is 6"):
        simulate(some, Layout(), torch.zeros(2, 6), torch.zeros(2, 8), mesh=Mesh(x=1))


def test_two_tables_of_one_program_are_two() -> None:
    @sharded("B -> B T H, B T H, B T U")
    def tables(start):
        return (rope_table("B -> B T H", start, theta=1e4), rope_table("B -> B T H", start, theta=1e6),
                rope_table("B -> B T U", start, theta=1e4))
    start = torch.tensor([0, 3])
    together = compile(tables, sizes=dict(T=4, H=6, U=8))(start)
    for made, dim, size, theta in zip(together, "HHU", (6, 6, 8), (1e4, 1e6, 1e4)):
        text = f"B -> B T {dim}"
        alone = sharded(text)(lambda start: rope_table(text, start, theta=theta))
        assert torch.equal(made, compile(alone, sizes={"T": 4, dim: size})(start))


def test_a_part_may_be_all_of_it() -> None:
    @sharded("T H, T H, T R -> T H, T H")
    def both(x, table, same):
        return rope("T H, T H -> T H", x, table), rope("T H, T R -> T H", x, same, part=6)
    x, angles = torch.randn(3, 6), torch.randn(3, 3)
    table = torch.cat((angles.cos(), angles.sin()), -1)
    assert torch.equal(*simulate(both, None, x, table, table, mesh=Mesh()))
