"""Packing changes how weights are held, and nothing else."""
from __future__ import annotations

import pytest
import torch
from torch import Tensor

from shardlib import Layout, Params, SpecError, compile, einsum, init, param, scan, sharded, stacked
from shardlib.compiler.passes.pack import Packing, pack
from shardlib.language.einsum import EINSUM
from shardlib.models.causal import Cache
from shardlib.models.decoding import weights_of
from shardlib.models.llama import LlamaConfig, next_logits
from shardlib.ops import rope
from shardlib.program import Step
from shardlib.spec import parse


def config_of(kv: int, g: int, h: int, f: int, tied: bool) -> LlamaConfig:
    return LlamaConfig(vocab_size=37, d_model=12, num_layers=3, num_kv_heads=kv, queries_per_kv=g, head_dim=h,
                       d_ff=f, norm_eps=1e-5, rope_theta=1e4, rope_scaling=None, tied=tied, max_context=64)


@pytest.mark.parametrize("t", [1, 5])
@pytest.mark.parametrize(
    "config", [config_of(3, 2, 4, 11, True), config_of(1, 1, 2, 1, False), config_of(2, 3, 6, 8, True)])
def test_packed_weights_give_the_same_logits_and_cache(config, t):
    w = init(weights_of(config), config.sizes, dtype=torch.float64)
    cache = init(Cache, dict(config.sizes, B=2, S=9), dtype=torch.float64, path="cache")
    step = compile(next_logits, Layout(), sizes=config.sizes, config=config)
    ids, start, last = torch.randint(0, 37, (2, t)), torch.tensor([0, 2]), torch.tensor([t - 1, 0])
    plain, plain_cache = step(ids, w, cache, start, last)
    packed, packed_cache = step(ids, step.prepare("w", w), cache, start, last)
    assert not cache.layers.k.any() and not cache.layers.v.any()
    for a, b in ((plain, packed), (plain_cache.layers.k, packed_cache.layers.k),
                 (plain_cache.layers.v, packed_cache.layers.v)):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-13)     # fp64: some thousand roundings of 1e-16


@pytest.mark.parametrize("dtype, strides", [(torch.bfloat16, (1, 12)), (torch.float16, (1, 12)),
                                            (torch.float32, (11, 1)), (torch.float64, (11, 1))])
def test_packed_weights_lie_as_their_dtype_is_read_fastest(dtype, strides):
    """Of one weight alone, 12 by 11, of three layers, and of two such side by side;
    the values are those of the weights."""
    gate, up = (torch.randn(3, 12, 11, generator=torch.Generator().manual_seed(seed)).to(dtype)
                for seed in (0, 1))
    step = Step(EINSUM, (parse("B D"), parse("D F")), (parse("B F"),), ("x", "w"), ("y",))
    for names in (("w.gate",), ("w.gate", "w.up")):
        group = Packing("scan", (step,) * len(names), names, names)
        layers = pack(group, {"w.gate": gate, "w.up": up})
        assert len(layers) == 3 and torch.equal(torch.stack(layers), torch.cat([gate, up][:len(names)], -1))
        assert {w.stride() for w in layers} == {strides if strides[0] == 1 else (strides[0] * len(names), 1)}


def test_one_matmul_each_for_qkv_and_for_gate_and_up_and_one_rope():
    config = config_of(3, 2, 4, 11, True)
    w = init(weights_of(config), config.sizes)
    cache = init(Cache, dict(config.sizes, B=1, S=9), path="cache")
    step = compile(next_logits, Layout(), sizes=config.sizes, config=config)
    zero = torch.zeros(1, dtype=torch.int64)
    step(zero[None], step.prepare("w", w), cache, zero, zero)
    (source,) = step.sources.values()
    assert source.count("torch.matmul") == 4 and source.count(".roll(") == 1


def test_a_donated_cache_is_updated_in_place_and_another_is_left_alone():
    config = config_of(3, 2, 4, 11, True)
    w = init(weights_of(config), config.sizes)
    zero = torch.zeros(1, dtype=torch.int64)
    for donate in ((), ("cache",)):
        cache = init(Cache, dict(config.sizes, B=1, S=9), path="cache")
        _, after = compile(next_logits, Layout(), sizes=config.sizes, donate=donate,
                           config=config)(zero[None], w, cache, zero, zero)
        assert ((after.layers.k is cache.layers.k) == bool(donate)
                and bool(cache.layers.k.any()) == bool(donate))


def test_a_donated_cache_that_is_prepared_is_returned_as_it_came():
    config = config_of(3, 2, 4, 11, True)
    w = init(weights_of(config), config.sizes)
    zero = torch.zeros(1, dtype=torch.int64)
    cache = init(Cache, dict(config.sizes, B=1, S=9), path="cache")
    donating = compile(next_logits, Layout(), sizes=config.sizes, donate=("cache",), config=config)
    keeping = compile(next_logits, Layout(), sizes=config.sizes, config=config)
    prepared = keeping.prepare("cache", cache)
    logits, after = keeping(zero[None], w, prepared, zero, zero)
    assert not cache.layers.k.any() and type(after) is Cache
    ready = donating.prepare("cache", cache)
    again, same = donating(zero[None], w, ready, zero, zero)
    assert same is ready and torch.equal(again, logits)
    assert torch.equal(cache.layers.k, after.layers.k) and torch.equal(cache.layers.v, after.layers.v)


def test_prepared_arguments_of_equal_shapes_share_a_program():
    config = config_of(3, 2, 4, 11, True)
    zero = torch.zeros(1, dtype=torch.int64)
    step = compile(next_logits, Layout(), sizes=config.sizes, donate=("cache",), config=config)
    for slots, dtype in ((9, torch.float32), (9, torch.float32), (11, torch.float32), (9, torch.float64)):
        cache = init(Cache, dict(config.sizes, B=1, S=slots), path="cache", dtype=dtype)
        step(zero[None], step.prepare("w", init(weights_of(config), config.sizes, dtype=dtype)),
             step.prepare("cache", cache), zero, zero)
    assert len(step.sources) == 3


class Two(Params):
    up: Tensor = param("D F")
    gate: Tensor = param("D F")


class Stack(Params):
    layers: Two = stacked("L", Two)


@sharded("T D, * -> T D")
def up_first(x, w: Two):
    a, b = einsum("T D, D F -> T F", x, w.up), einsum("T D, D F -> T F", x, w.gate)
    return x + einsum("T F, D F -> T D", a - 2.0 * b, w.up)


@sharded("T D, * -> T D")
def gate_first(x, w: Two):
    b, a = einsum("T D, D F -> T F", x, w.gate), einsum("T D, D F -> T F", x, w.up)
    return x + einsum("T F, D F -> T D", a - 2.0 * b, w.gate)


@sharded("T D, * -> T D")
def ups(x, w: Stack):
    return scan(up_first, x, w.layers)


@sharded("T D, * -> T D")
def gates(x, w: Stack):
    return scan(gate_first, x, w.layers)


def test_the_order_of_a_dict_of_weights_does_not_matter():
    sizes = dict(D=3, F=3, L=2, T=2)
    w, x = init(Stack, sizes), torch.randn(2, 3)
    for f in (ups, gates):
        step = compile(f)
        leaves = {"w.layers.up": w.layers.up, "w.layers.gate": w.layers.gate}
        want = step(x, w)
        for given in (leaves, dict(reversed(leaves.items()))):
            assert torch.allclose(step(x, step.prepare("w", dict(given), w)), want)
    with pytest.raises(SpecError) as error:
        step.prepare("w", {"w.layers.up": w.layers.up}, w)
    assert str(error.value) == "prepare: w has the leaves w.layers.up, w.layers.gate; given are w.layers.up"
    with pytest.raises(SpecError) as error:
        step.prepare("w", {**leaves, "w.bias": x}, w)
    assert str(error.value) == (
        "prepare: w has the leaves w.layers.up, w.layers.gate; given are w.layers.up, w.layers.gate, w.bias")


def test_what_was_prepared_for_another_program_runs_right_or_is_refused():
    w, x = init(Stack, dict(D=3, F=3, L=2, T=2)), torch.randn(2, 3)
    one, other = compile(ups), compile(gates)
    ready = one.prepare("w", w)
    assert torch.allclose(one(x, ready), one(x, w))
    if ready.parts == other.prepare("w", w).parts:
        assert torch.allclose(other(x, ready), other(x, w))
    else:
        with pytest.raises(SpecError) as error:
            other(x, ready)
        assert "w was prepared for a program that packs it otherwise" in str(error.value)


class Turned(Params):
    q: Tensor = param("D K H")
    angles: Tensor = param("D H")
    k: Tensor = param("D K H")


class TurnedStack(Params):
    layers: Turned = stacked("L", Turned)


@sharded("B T D, * -> B T D")
def turned(x, w: Turned):
    """The table of the turn is itself made by a weight that is packed with those of q and k."""
    q, k = einsum("B T D, D K H -> B T K H", x, w.q), einsum("B T D, D K H -> B T K H", x, w.k)
    table = einsum("B T D, D H -> B T H", x, w.angles)
    q, k = rope("B T K H, B T H -> B T K H", q, table), rope("B T K H, B T H -> B T K H", k, table)
    return einsum("B T K H, B T K H, B T D -> B T D", q, k, x)


@sharded("B T D, *, B T H -> B T D, B T K H, B T K H")
def kept_as_well(x, w: Turned, table):
    """What a turn follows is a result too, before it is turned: of one of the two that would be joined."""
    q, k = einsum("B T D, D K H -> B T K H", x, w.q), einsum("B T D, D K H -> B T K H", x, w.k)
    q2, k2 = rope("B T K H, B T H -> B T K H", q, table), rope("B T K H, B T H -> B T K H", k, table)
    return einsum("B T K H, B T K H, B T D -> B T D", q2, k2, x), q, k2


@sharded("B T D, *, B T H, B T H -> B T D")
def turned_apart(x, w: Turned, one, other):
    """q and k go through the same op, each with a table of its own."""
    q, k = einsum("B T D, D K H -> B T K H", x, w.q), einsum("B T D, D K H -> B T K H", x, w.k)
    q, k = rope("B T K H, B T H -> B T K H", q, one), rope("B T K H, B T H -> B T K H", k, other)
    return einsum("B T K H, B T K H, B T D -> B T D", q, k, x)


@sharded("B T D, *, B T H -> B T D")
def turned_alike(x, w: Turned, table):
    """q and k are all that the packed matmul makes, and one turn takes both."""
    q, k = einsum("B T D, D K H -> B T K H", x, w.q), einsum("B T D, D K H -> B T K H", x, w.k)
    q, k = rope("B T K H, B T H -> B T K H", q, table), rope("B T K H, B T H -> B T K H", k, table)
    return einsum("B T K H, B T K H, B T D -> B T D", q, k, x)


@sharded("B T D, *, B T H -> B T D")
def all_turned_alike(x, w: TurnedStack, table):
    return scan(turned_alike, x, w.layers, table)


@sharded("B T D, *, B T H, B T H -> B T D")
def all_turned_apart(x, w: TurnedStack, one, other):
    return scan(turned_apart, x, w.layers, one, other)


@sharded("B T D, * -> B T D")
def all_turned(x, w: TurnedStack):
    return scan(turned, x, w.layers)


@sharded("B T D, *, B T H -> B T D, L B T K H, L B T K H")
def all_kept(x, w: TurnedStack, table):
    return scan(kept_as_well, x, w.layers, table)


@sharded("T D, * -> T D")
def crosswise(x, w: Two):
    """The second weight is contracted over its last dim; both are square."""
    return x + einsum("T F, D F -> T D", einsum("T D, D F -> T F", x, w.up), w.gate)


@sharded("T D, * -> T D")
def across(x, w: Stack):
    return scan(crosswise, x, w.layers)


@sharded("B T D, * -> B T D")
def there_and_back(x, w: Turned):
    return einsum("B T K H, D K H -> B T D", einsum("B T D, D K H -> B T K H", x, w.q), w.q)


@sharded("B T D, * -> B T D")
def twice(x, w: TurnedStack):
    """By the one its weights would be packed, by the other they are wanted as they are."""
    return scan(there_and_back, scan(turned, x, w.layers), w.layers)


TABLE = torch.randn(2, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("f, cls, more", [(all_turned, TurnedStack, ()), (all_kept, TurnedStack, (TABLE,)),
                                          (all_turned_alike, TurnedStack, (TABLE,)),
                                          (all_turned_apart, TurnedStack, (TABLE, TABLE * 2)),
                                          (across, Stack, ()), (twice, TurnedStack, ())])
def test_what_packing_must_keep_its_hands_off(f, cls, more):
    sizes = dict(L=2, D=4, K=3, H=2, F=4)
    w = init(cls, sizes, dtype=torch.float64)
    x = torch.randn(*((2, 3, 4) if cls is TurnedStack else (3, 4)), dtype=torch.float64,
                    generator=torch.Generator().manual_seed(0))
    run = compile(f, sizes=sizes)
    want, got = run(x, w, *more), run(x, run.prepare("w", w), *more)
    for a, b in zip(*((y if isinstance(y, tuple) else (y,)) for y in (got, want)), strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-13)
