"""Updates in place: whatever a program writes into a cache, and reads of it before and after,
is what plain torch makes of copies."""
from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from shardlib import (
    EXPLICIT,
    Layout,
    Mesh,
    Params,
    SpecError,
    compile,
    einsum,
    param,
    scan,
    sharded,
    stacked,
)
from shardlib.compiler.fusion import Fusion
from shardlib.compiler.passes import DEFAULT
from shardlib.compiler.passes.fuse import fuse, require_fusion
from shardlib.functions import tanh
from shardlib.ops import embedding, update_cache

WRITE = "B S H, B T H, B -> B S H"


def written(cache: Tensor, rows: Tensor, start: Tensor) -> Tensor:
    out = cache.clone()
    for b, s in enumerate(start.tolist()):
        out[b, s:s + rows.shape[1]] = rows[b]
    return out


@sharded("B T H, B S H, B -> B T H, B S H")
def reads_what_was(x, cache, start):
    after = update_cache(WRITE, cache, x, start)
    return x + einsum("B S H, B T H -> B T H", cache, x), after


@sharded("B T H, B S H, B -> B T H, B S H")
def reads_what_is(x, cache, start):
    after = update_cache(WRITE, cache, x, start)
    return x + einsum("B S H, B T H -> B T H", after, x), after


@sharded("B T H, B S H, B -> B T H, B S H")
def writes_twice(x, cache, start):
    after = update_cache(WRITE, cache, x, start)
    return x * 0.5, update_cache(WRITE, after, x * 2.0, start * 0)


@sharded("B T H, B S H, B -> B T H, B S H")
def reads_between(x, cache, start):
    after = update_cache(WRITE, cache, x, start)
    return x + einsum("B S H, B T H -> B T H", after, x), update_cache(WRITE, after, x * 2.0, start * 0)


@sharded("B T H, B S H, B -> B T H, B S H, B S H")
def returns_both(x, cache, start):
    after = update_cache(WRITE, cache, x, start)
    return x * 0.5, after, update_cache(WRITE, after, x * 2.0, start * 0)


@sharded("B T H, B S H, B -> B T H, B S H, B S H")
def returns_what_was(x, cache, start):
    return x * 0.5, cache, update_cache(WRITE, cache, x, start)


def body_meant(f, x: Tensor, cache: Tensor, start: Tensor) -> tuple[Tensor, ...]:
    after = written(cache, x, start)
    last = written(after, x * 2, start * 0)
    return {reads_what_was: lambda: (x + cache.sum(1, keepdim=True) * x, after),
            reads_what_is: lambda: (x + after.sum(1, keepdim=True) * x, after),
            writes_twice: lambda: (x * 0.5, last),
            reads_between: lambda: (x + after.sum(1, keepdim=True) * x, last),
            returns_both: lambda: (x * 0.5, after, last),
            returns_what_was: lambda: (x * 0.5, cache, after)}[f]()


BODIES = (reads_what_was, reads_what_is, writes_twice, reads_between, returns_both, returns_what_was)


def layers_of(body, results: int):
    @sharded("B T H, L B S H, B -> B T H" + ", L B S H" * results)
    def layers(x, caches, start):
        return scan(body, x, caches, start)
    return layers


@pytest.mark.parametrize("donate", [(), ("cache", "caches")], ids=["kept", "donated"])
@pytest.mark.parametrize("body", BODIES, ids=lambda f: f.__name__)
def test_what_is_written_and_read(body, donate) -> None:
    """In a program by itself, and layer by layer.

    A caller that has not given its cache up finds it as it was.
    """
    g = torch.Generator().manual_seed(0)
    x, start = torch.randn(2, 2, 3, generator=g, dtype=torch.float64), torch.tensor([0, 3])
    caches = torch.randn(3, 2, 5, 3, generator=g, dtype=torch.float64)
    want = body_meant(body, x, caches[0], start)
    given = caches[0].clone()
    got = compile(body, Layout(), donate=[n for n in donate if n == "cache"])(x, given, start)
    assert (all(torch.allclose(a, b, rtol=1e-14, atol=0) for a, b in zip(got, want, strict=True))
            and (bool(donate) or torch.equal(given, caches[0])))
    carry, stacks = x, []
    for cache in caches:
        carry, *rest = body_meant(body, carry, cache, start)
        stacks.append(rest)
    given = caches.clone()
    got = compile(layers_of(body, len(want) - 1), Layout(),
                  donate=[n for n in donate if n == "caches"])(x, given, start)
    for a, b in zip(got, (carry, *map(torch.stack, zip(*stacks))), strict=True):
        assert torch.allclose(a, b, rtol=1e-14, atol=0)
    assert bool(donate) or torch.equal(given, caches)


@sharded("B T H, L B S H, B -> B T H, L B S H, L B S H")
def keeps_the_stack(x, caches, start):
    x, after = scan(reads_what_is, x, caches, start)
    return x, caches * 2.0, after


@pytest.mark.parametrize("donate", [(), ("caches",)], ids=["kept", "donated"])
def test_a_stack_that_is_used_elsewhere_stays(donate) -> None:
    g = torch.Generator().manual_seed(0)
    x, caches, start = (torch.randn(2, 2, 3, generator=g), torch.randn(3, 2, 5, 3, generator=g),
                        torch.tensor([0, 3]))
    given = caches.clone()
    _, before, after = compile(keeps_the_stack, Layout(), donate=donate)(x, given, start)
    assert (torch.equal(before, caches * 2) and torch.equal(given, caches)
            and torch.equal(after[0], written(caches[0], x, start)))


@sharded("B T H, B S H, B -> B T H, B S H")
def by_its_own_start(x, cache, start):
    return x * 0.5, update_cache(WRITE, cache, x, start)


@sharded("B T H, L B S H, L B -> B T H, L B S H")
def starts_of_layers(x, caches, starts):
    return scan(by_its_own_start, x, (caches, starts))


def test_one_argument_may_be_donated_by_its_name_alone() -> None:
    given = torch.zeros(2, 5, 3)
    _, after = compile(by_its_own_start, Layout(), donate="cache")(torch.ones(2, 2, 3), given,
                                                                  torch.tensor([0, 3]))
    assert after.data_ptr() == given.data_ptr() and given.sum() == 12


def test_what_differs_by_layer_is_not_worked_out_before_the_loop() -> None:
    x, caches, starts = torch.ones(2, 2, 3), torch.zeros(3, 2, 5, 3), torch.tensor([[0, 3], [1, 2], [3, 0]])
    _, after = compile(starts_of_layers, Layout())(x, caches, starts)
    for i, (cache, start) in enumerate(zip(caches, starts)):
        assert torch.equal(after[i], written(cache, x * 0.5 ** i, start))


@sharded("B T H, B S H, B -> B S H", layout=EXPLICIT)
def written_turned(x, cache, start):
    """Writes what is squashed: two steps, so that there is something to fuse."""
    return update_cache(WRITE, cache, tanh(x), start)


@sharded("B T H, B S H, B S H, B -> B S H, B S H")
def two_caches(x, one, two, start):
    return update_cache(WRITE, one, tanh(x), start), update_cache(WRITE, two, tanh(x * 2.0), start)


@sharded("B T H, B S H, B -> B S H, B T H")
def keeps_what_was(x, cache, start):
    after = update_cache(WRITE, cache, tanh(x), start)
    return after, x + einsum("B S H, B T H -> B T H", cache, x)


def writes(x: Tensor, cache: Tensor, start: Tensor) -> Tensor:
    """A kernel: its cache is given up."""
    for b, s in enumerate(start.tolist()):
        cache[b, s:s + x.shape[1]] = x[b].tanh()
    return cache


def fresh(x: Tensor, cache: Tensor, start: Tensor) -> Tensor:
    """A kernel that gives another tensor than the one it was given up."""
    return writes(x, cache.clone(), start)


KERNELS = pytest.mark.parametrize("kernel", [None, lambda site: writes, lambda site: fresh],
                                  ids=["body", "kernel", "fresh"])


@KERNELS
@pytest.mark.parametrize("donate", [(), ("one", "two", "cache")])
def test_fused_updates_write_where_they_may(kernel: Any, donate: tuple[str, ...]) -> None:
    passes = (*DEFAULT, *fuse((Fusion(written_turned, kernel=kernel),)))
    x, start = torch.randn(2, 1, 3), torch.tensor([0, 3])
    one, two = torch.randn(2, 4, 3), torch.randn(2, 4, 3)
    was = one.clone(), two.clone()
    step = compile(two_caches, donate=[d for d in donate if d != "cache"], passes=passes)
    given = step(x, one, two, start)
    assert require_fusion("written_turned", 2).run(step.program, Mesh()) is step.program
    for after, before, cache, scale in zip(given, was, (one, two), (1, 2)):
        assert torch.equal(after, written(before, (x * scale).tanh(), start))
        assert (after.data_ptr() == cache.data_ptr()) == bool(donate)
        assert donate or torch.equal(cache, before)
    cache = was[0].clone()
    after, read = compile(keeps_what_was, donate=[d for d in donate if d == "cache"],
                          passes=passes)(x, cache, start)
    assert torch.equal(after, written(was[0], x.tanh(), start))
    assert torch.allclose(read, x + was[0].sum(1, keepdim=True) * x)


@KERNELS
def test_a_slot_that_is_not_there_is_refused_where_a_kernel_writes(kernel: Any) -> None:
    run = compile(two_caches, passes=(*DEFAULT, *fuse((Fusion(written_turned, kernel=kernel),))))
    cache = torch.zeros(1, 4, 3)
    with pytest.raises(SpecError, match=r"^update_cache: start holds 4, outside of 0 to 3 \(S=4, T=1\)"):
        run(torch.zeros(1, 1, 3), cache, cache.clone(), torch.tensor([4]))


class Layer(Params):
    cache: Tensor = param("B S H")


class Net(Params):
    layers: Layer = stacked("L", Layer)


@sharded("B T H, *, B -> B T H, *")
def one_layer(x, w: Layer, start):
    after = update_cache(WRITE, w.cache, tanh(x), start)
    return x + einsum("B S H, B T H -> B T H", after, x), Layer(cache=after)


@sharded("B T H, *, B -> B T H, *")
def layers(x, w: Net, start):
    x, made = scan(one_layer, x, w.layers, start)
    return x, Net(layers=made)


@pytest.mark.parametrize("start", [3, 4])
@KERNELS
def test_layers_are_updated_in_place_by_fused_steps(kernel: Any, start: int) -> None:
    """And what is looked at is looked at once, before them."""
    run = compile(layers, donate=("w",), passes=(*DEFAULT, *fuse((Fusion(written_turned, kernel=kernel),))))
    x, cache = torch.randn(1, 1, 3), torch.randn(2, 1, 4, 3)
    w, at = Net(layers=Layer(cache=cache.clone())), torch.tensor([start])
    if start == 4:
        with pytest.raises(SpecError, match="^update_cache: start holds 4"):
            run(x, w, at)
        return
    (got, made), (want, plain) = run(x, w, at), compile(layers)(x, Net(layers=Layer(cache=cache)), at)
    assert torch.equal(got, want) and torch.equal(made.layers.cache, plain.layers.cache)
    assert made.layers.cache.data_ptr() == w.layers.cache.data_ptr()
    (code,) = run.sources.values()
    assert kernel is None or code.count("look(") == 1 and code.index("look(") < code.index("for ")


@pytest.mark.parametrize("change, said", [
    (lambda x: x[:1], "(1, 4, 3) float32"), (Tensor.double, "(2, 4, 3) float64")])
def test_what_updates_a_buffer_is_like_it(change: Any, said: str) -> None:
    """Nothing is broadcast into it, or cast."""
    def kernel(x: Tensor, cache: Tensor, start: Tensor) -> Tensor:
        return change(writes(x, cache, start))
    run = compile(two_caches, passes=(*DEFAULT, *fuse((Fusion(written_turned, kernel=lambda site: kernel),))))
    cache = torch.zeros(2, 4, 3)
    with pytest.raises(SpecError) as refused:
        run(torch.zeros(2, 1, 3), cache, cache.clone(), torch.tensor([0, 0]))
    assert str(refused.value).partition("  ")[0] == (
        f"written_turned: its kernel gives {said} for a buffer of (2, 4, 3) float32")


@sharded("B, V D -> B D", layout=EXPLICIT)
def looked_up(ids, table):
    return tanh(embedding("B, V D -> B D", ids, table))


@sharded("B T H, B S H, B -> B S H", layout=EXPLICIT)
def written_later(x, cache, start):
    """Its index is made inside of it."""
    return update_cache(WRITE, cache, tanh(x), start + 1)


@sharded("B, V D -> B D")
def looks_up(ids, table):
    return tanh(embedding("B, V D -> B D", ids, table))


@sharded("B T H, B S H, B -> B S H")
def writes_later(x, cache, start):
    return update_cache(WRITE, cache, tanh(x), start + 1)


@pytest.mark.parametrize("f, meant, operands, said, error", [
    (looks_up, looked_up, (torch.tensor([7]), torch.zeros(5, 2)), "nothing says what embedding looks at",
     "embedding: ids holds 7"),
    (writes_later, written_later, (torch.zeros(1, 1, 3), torch.zeros(1, 4, 3), torch.tensor([3])),
     "an index of update_cache is made inside of it", "update_cache: start holds 4")])
def test_no_kernel_takes_indices_that_nobody_looks_at(f: Any, meant: Any, operands: Any, said: str,
                                                      error: str) -> None:
    def kernel(site: Any) -> Any:
        raise AssertionError("asked")
    run = compile(f, passes=(*DEFAULT, *fuse((Fusion(meant, kernel=kernel),))))
    with pytest.raises(SpecError, match=f"^{error}"):
        run(*operands)
    assert [a.rpartition(": ")[2] for a in run.kernels.answers] == [said]
