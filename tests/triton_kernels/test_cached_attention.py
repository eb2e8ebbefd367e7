"""A step of decoding in one kernel, in the interpreter: at most twice as far from float64 as torch, the cache
to the bit, and nothing beyond the memory that is meant."""
from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy
import pytest
import torch
import triton
import triton.language as tl
from accuracy import near
from hypothesis import given, settings
from hypothesis import strategies as st
from rounded import rounded
from torch import Tensor

from shardlib.ops.rope import rotate, turns
from shardlib.triton_kernels import attending
from shardlib.triton_kernels import cached_attention as module
from shardlib.triton_kernels.cached_attention import cached_attention, cached_attention_reference
from shardlib.triton_kernels.rope_into_cache import rope_into_cache, rope_into_cache_reference

OLD = (tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
       and tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4))
pytestmark = [pytest.mark.usefixtures("one_thread", "as_a_gpu_rounds"),
              pytest.mark.skipif(OLD, reason="the interpreter of Triton 3.6 runs no loops with numpy 2.4")]
some = settings(max_examples=settings.default.max_examples // 4)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
GUARD = 7.0
"""What surrounds the cache."""


@pytest.fixture(scope="module")
def as_a_gpu_rounds() -> Iterator[None]:
    with rounded():
        yield


class Sizes(NamedTuple):
    rows: int
    new: int
    heads: int
    group: int
    h: int
    slots: int


class Case(NamedTuple):
    """memory: of keys and values, with what surrounds them."""
    q: Tensor
    k: Tensor
    v: Tensor
    angles: Tensor
    keys: Tensor
    values: Tensor
    start: Tensor
    memory: tuple[Tensor, Tensor]

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return self[:7]

    def exact(self) -> tuple[Tensor, ...]:
        return cached_attention_reference(*(x.double() for x in self.inputs[:6]), self.start)

    def run(self, splits: int = 1) -> Tensor:
        counts = torch.zeros(self.keys.shape[0] * self.keys.shape[2], dtype=torch.int32)
        out = cached_attention(*self.inputs, counts if splits > 1 else None, splits, block=16)
        assert out.shape == self.q.shape and out.is_contiguous() and out.dtype == self.q.dtype
        assert (counts == 0).all()
        return out


def within(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(memory, a cache in it, whose rows are the front of longer ones)."""
    memory = torch.full((shape[0] + 2, shape[1] + 3, *shape[2:]), GUARD, dtype=dtype)
    return memory, memory[1:-1, 1:-2]


def case(sizes: Sizes, dtype: torch.dtype, start: Tensor, packed: bool = True) -> Case:
    """q, k and v: views of one projection, or each by itself. Slots from start on are NaN."""
    rows, new, heads, group, h, slots = sizes
    both = torch.randn(rows, new, heads * (group + 2) * h).to(dtype)
    q, k, v = both.split([heads * group * h, heads * h, heads * h], -1)
    q, k, v = q.unflatten(-1, (heads, group, h)), k.unflatten(-1, (heads, h)), v.unflatten(-1, (heads, h))
    radians = (start.clamp(0, slots)[:, None] + torch.arange(new))[..., None] * torch.rand(h // 2)
    memory, caches = zip(*(within((rows, slots, heads, h), dtype) for _ in range(2)))
    for cache in caches:
        cache.copy_(torch.randn(cache.shape)).masked_fill_(
            (torch.arange(slots) >= start[:, None])[..., None, None], float("nan"))
    given = (q, k, v) if packed else (q.contiguous(), k.contiguous(), v.contiguous())
    return Case(*given, torch.cat((radians.cos(), radians.sin()), -1), *caches, start, memory)


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(bits(a), bits(b))


def starts(rows: int, new: int, slots: int) -> st.SearchStrategy[Tensor]:
    """Of empty rows, of full ones, and of any."""
    each = st.one_of(st.sampled_from((0, slots - new)), st.integers(0, slots - new))
    return st.lists(each, min_size=rows, max_size=rows).map(torch.tensor)


sizes = st.builds(Sizes, st.integers(1, 3), st.integers(1, 3), st.integers(1, 2),
                  st.sampled_from((1, 2, 4, 8)), st.sampled_from((8, 16, 24, 64, 80, 128)),
                  st.integers(3, 90))


@some
@given(st.data(), sizes, st.sampled_from(DTYPES), st.integers(0, 2**31), st.integers(1, 8), st.booleans())
def test_any_case(data: st.DataObject, sizes: Sizes, dtype: torch.dtype, seed: int, splits: int,
                  packed: bool) -> None:
    """Of any sizes, split or not: near to float64; in the cache the bits of `rope` and of v, and all others
    as they were, as is what was given."""
    torch.manual_seed(seed)
    made = case(sizes, dtype, data.draw(starts(sizes.rows, sizes.new, sizes.slots)), packed)
    before = [x.clone() for x in (*made.inputs, *made.memory)]
    want, exact = cached_attention_reference(*made.inputs), made.exact()
    got = made.run(splits)
    assert near(got, want[0], exact[0])
    for memory, old, cache in zip(made.memory, before[7:], want[1:]):
        for b, first in enumerate(made.start.tolist()):
            old[1 + b, 1 + first:1 + first + sizes.new] = cache[b, first:first + sizes.new]
        assert same(memory, old)
    assert all(map(same, (*made.inputs[:4], made.start), (*before[:4], before[6])))


@some
@given(st.data(), sizes, st.sampled_from(DTYPES), st.integers(0, 2**31), st.booleans())
def test_what_comes_before_attention_at_the_beginning(data: st.DataObject, sizes: Sizes, dtype: torch.dtype,
                                                      seed: int, packed: bool) -> None:
    """q, k and the cache have the bits of `rope` and of v; all else is as it was."""
    torch.manual_seed(seed)
    made = case(sizes, dtype, data.draw(starts(sizes.rows, sizes.new, sizes.slots)), packed)
    before = [x.clone() for x in (*made.inputs, *made.memory)]
    want = rope_into_cache_reference(*made.inputs)
    got = rope_into_cache(*made.inputs)
    for memory, old, cache in zip(made.memory, before[7:], want[2:]):
        for b, first in enumerate(made.start.tolist()):
            old[1 + b, 1 + first:1 + first + sizes.new] = cache[b, first:first + sizes.new]
        assert same(memory, old)
    assert same(got[0], want[0]) and same(got[1], want[1]) and all(x.is_contiguous() for x in got)
    assert all(map(same, (*made.inputs[:4], made.start), (*before[:4], before[6])))


@pytest.mark.parametrize("heads", (3, 5, 28))
def test_heads_whose_warps_would_be_no_power_of_two(heads: int) -> None:
    made = case(Sizes(1, 1, heads, 8, 128, 2), torch.float32, torch.tensor([1]))
    want = rope_into_cache_reference(*made.inputs)
    assert same(rope_into_cache(*made.inputs)[0], want[0])


def test_starts_that_are_wrong_stay_within_the_cache() -> None:
    """Where several tokens would have one slot, the last of them has it."""
    made = case(Sizes(3, 4, 1, 1, 8, 10), torch.float32, torch.tensor([-2, 8, 99]))
    rope_into_cache(*made.inputs)
    for memory, cache, rows in zip(made.memory, (made.keys, made.values), (None, made.v)):
        inside = torch.zeros(memory.shape, dtype=torch.bool)
        inside[1:-1, 1:-2] = True
        assert (memory[~inside] == GUARD).all()
        if rows is not None:
            assert torch.equal(cache[0, :2], rows[0, 2:]) and torch.equal(cache[1, 8:], rows[1, [0, 3]])
            assert torch.equal(cache[2, 9], rows[2, 3])


SIZES = Sizes(2, 2, 2, 4, 16, 40)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_reference_is_rope_then_a_cache_then_attention(dtype: torch.dtype) -> None:
    """Of the operators, in the order in which a model has them."""
    made = case(SIZES, dtype, torch.tensor([0, 21]))
    turn = turns(made.angles)
    keys, values = made.keys.clone(), made.values.clone()
    for b, first in enumerate(made.start.tolist()):
        for t in range(SIZES.new):
            keys[b, first + t] = rotate(made.k[b, t], (turn[0][b, t], turn[1][b, t]), 8).to(dtype)
            values[b, first + t] = made.v[b, t]
    out, new_keys, new_values = cached_attention_reference(*made.inputs)
    assert torch.equal(keys.nan_to_num(), new_keys.nan_to_num())
    assert torch.equal(values.nan_to_num(), new_values.nan_to_num())
    q = rotate(made.q, tuple(x[:, :, None, None] for x in turn), 8).to(dtype)
    for b, first in enumerate(made.start.tolist()):
        for t in range(SIZES.new):
            seen = slice(0, first + t + 1)
            score = torch.einsum("kgh,skh->kgs", q[b, t].double(), keys[b, seen].double()) / 4
            want = torch.einsum("kgs,skh->kgh", score.softmax(-1), values[b, seen].double())
            torch.testing.assert_close(out[b, t].double(), want, rtol=0,
                                       atol=0.03 if dtype != torch.float32 else 1e-5)


@pytest.mark.parametrize("new", (1, 2))
def test_an_empty_cache(new: int) -> None:
    """The first token sees itself alone: v comes out."""
    made = case(SIZES._replace(new=new), torch.bfloat16, torch.tensor([0, 0]))
    got = made.run(splits=3)
    assert same(got[:, 0], made.v[:, 0, :, None].expand(got[:, 0].shape))


@pytest.mark.parametrize("new, splits", ((1, 1), (1, 2), (3, 2)))
@pytest.mark.parametrize("start", (-2**63, -2**33, -3, -1, 38, 39, 40, 2**31, 2**63 - 1))
def test_a_slot_that_is_not_there_is_the_nearest_one(start: int, new: int, splits: int) -> None:
    """Nothing beyond the cache is written, and no more of it; the other row is as it would be."""
    made = case(SIZES._replace(new=new), torch.float32, torch.tensor([start, 21]))
    slots = [min(max(start + t, 0), 39) for t in range(new)]
    before, alone = [m.clone() for m in made.memory], [x[1:] for x in made.inputs]
    want = cached_attention_reference(*alone)
    got = made.run(splits)
    assert near(got[1:], want[0], cached_attention_reference(*(x.double() for x in alone[:6]), alone[6])[0])
    assert torch.equal(made.keys[1, :21 + new], want[1][0, :21 + new])
    assert torch.equal(made.values[1, :21 + new], want[2][0, :21 + new])
    turn = tuple(x[0, :, None] for x in turns(made.angles))
    for memory, old, new_rows in zip(made.memory, before, (rotate(made.k[0], turn, 8), made.v[0])):
        old[2, 1:-2] = memory[2, 1:-2]
        for slot, row in zip(slots, new_rows):          # of several for one slot, the last
            old[1, 1 + slot] = row
        assert same(memory, old)


def test_strides_of_one_row_and_of_one_token_say_nothing() -> None:
    made = case(SIZES._replace(rows=1, new=1), torch.float16, torch.tensor([30]))
    want = cached_attention_reference(*made.inputs)[0]
    odd = [x.as_strided(x.shape, (7, 5, *x.stride()[2:])) for x in made.inputs[:3]]
    assert same(made._replace(q=odd[0], k=odd[1], v=odd[2]).run(), made.run())
    assert near(made.run(), want, made.exact()[0])


def test_the_most_queries() -> None:
    made = case(Sizes(1, 16, 1, 4, 16, 50), torch.float32, torch.tensor([17]))
    want = cached_attention_reference(*made.inputs)[0]
    assert near(made.run(2), want, made.exact()[0])


@pytest.mark.parametrize("changed", [
    dict(start=torch.tensor([1, 22])), dict(start=torch.tensor([0, 20])),
    dict(angles=torch.cat((torch.ones(2, 2, 8), torch.zeros(2, 2, 8)), -1)),
    dict(angles="back"), dict(k="first token's"), dict(v="first token's"), dict(keys="values"),
], ids=lambda changed: "-".join(map(str, changed)))
def test_negative_control(changed: dict[str, object]) -> None:
    """What comes out is not near to a reference of anything else."""
    made = case(SIZES, torch.float32, torch.tensor([1, 21]))
    other = made._replace(keys=made.keys.clone().nan_to_num(), values=made.values.clone().nan_to_num())
    for name, value in changed.items():
        if value == "back":
            value = torch.cat((made.angles[..., :8], -made.angles[..., 8:]), -1)
        elif value == "first token's":
            value = getattr(made, name)[:, :1].expand(getattr(made, name).shape)
        elif value == "values":
            value = other.values
        other = other._replace(**{name: value})
    ours, others = ((cached_attention_reference(*x.inputs)[0], x.exact()[0]) for x in (made, other))
    got = made.run(2)
    assert near(got, *ours) and not near(got, *others)


@triton.jit
def _with_the_next_slot(most, weights, values, q, k_ptr, v_ptr, seen, first, stop, stride_s, H: tl.constexpr,
                        HEAD: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    return attending.take_in_range(most, weights, values, q, k_ptr, v_ptr, seen + 1, first, stop + 1,
                                   stride_s, H, HEAD, BLOCK, STAGES)


@pytest.mark.parametrize("new", (1, 2))
def test_a_kernel_that_reads_what_it_writes_is_seen(new: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made = case(SIZES._replace(new=new), torch.float32, torch.tensor([0, 21]))
    ours = cached_attention_reference(*made.inputs)[0], made.exact()[0]
    assert near(made.run(), *ours)
    monkeypatch.setattr(module, "take_in_range", _with_the_next_slot)
    assert not near(made.run(), *ours)


@pytest.mark.parametrize("changed", [
    dict(q=torch.zeros(2, 2, 2, 4, 16).half()), dict(angles=torch.zeros(2, 2, 16).half()),
    dict(k=torch.zeros(2, 2, 16, 2).mT), dict(v=torch.zeros(2, 1, 2, 16)),
    dict(keys=torch.zeros(2, 40, 2, 16)), dict(start=torch.zeros(4, dtype=torch.int64)[::2]),
    dict(start=torch.zeros(3, dtype=torch.int64))], ids=lambda changed: "-".join(changed))
def test_what_is_refused(changed: dict[str, Tensor]) -> None:
    with pytest.raises(AssertionError):
        case(SIZES, torch.float32, torch.tensor([0, 0]))._replace(**changed).run()


def test_more_splits_than_counts_and_an_odd_head_are_refused() -> None:
    made = case(SIZES, torch.float32, torch.tensor([0, 0]))
    for counts in (None, torch.zeros(3, dtype=torch.int32)):
        with pytest.raises(AssertionError):
            cached_attention(*made.inputs, counts, 2)
    with pytest.raises(AssertionError):
        case(SIZES._replace(h=7), torch.float32, torch.tensor([0, 0])).run()


@pytest.mark.parametrize("empty", (dict(rows=0), dict(new=0), dict(slots=0)))
def test_nothing(empty: dict[str, int]) -> None:
    sizes = SIZES._replace(**empty)
    made = case(sizes, torch.float32, torch.zeros(sizes.rows, dtype=torch.int64))
    assert (made.run() == 0).all()
