"""What benchmarks of kernels measure beside each other gives the same."""
from __future__ import annotations

from types import ModuleType

import numpy
import pytest
import torch
import triton
from accuracy import near
from here import HELPERS
from rounded import rounded

OLD = (tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
       and tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4))


@pytest.fixture
def cached_attention(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(HELPERS.parents[1] / "benchmarks"))
    import cached_attention
    return cached_attention


@pytest.mark.skipif(OLD, reason="the interpreter of Triton 3.6 runs no loops with numpy 2.4")
@pytest.mark.usefixtures("one_thread")
def test_a_step_in_one_kernel_and_apart(cached_attention: ModuleType) -> None:
    """The same cache, and attention as near to that in float64."""
    torch.manual_seed(0)
    x = cached_attention.step(2, 40, 2, 4, "cpu", layers=2)
    wide = x._replace(q=x.q.double(), k=x.k.double(), v=x.v.double(), bias=x.bias.double())
    exact, others = cached_attention.by_torch(wide, *(c.double() for c in x.caches[0])), []
    for way in (cached_attention.by_torch, cached_attention.by_lengths, cached_attention.in_one):
        cache = [c.clone() for c in x.caches[0]]
        with rounded():
            others.append((way(x, *cache), *cache))
    (torchs, *first), *others = others
    for got, *cache in others:
        assert near(got, torchs, exact) and all(map(torch.equal, cache, first))


def test_the_sweep_has_what_is_launched(cached_attention: ModuleType) -> None:
    """No split without keys; some of each tuning, for every shape."""
    for rows, keys in cached_attention.CASES:
        for heads, _ in cached_attention.MODELS.values():
            seen = list(cached_attention.configurations(rows, keys, heads))
            assert {how[1:] for how in seen} == set(cached_attention.TUNED)
            assert all(splits == 1 or splits * block <= 2 * keys for splits, block, *_ in seen)
