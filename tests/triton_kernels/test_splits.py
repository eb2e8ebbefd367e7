"""Work that blocks of one GPU share, under every order of turns that a seed brings, in memory as weak as a
GPU's; and what goes wrong with one thing left out."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from accuracy import near
from torch import Tensor

from shardlib.triton_kernels import attending, cached_attention, decode_attention, matmul_rows
from shardlib.triton_kernels.simulator import Simulation

SEEDS = range(6)
pytestmark = pytest.mark.usefixtures("one_thread")


def trial(seed: int) -> bool:
    """Whether three calls one after another, of attention and of a matmul, are as near to float64 as torch,
    and leave no count."""
    torch.manual_seed(seed)
    q, k, v = torch.randn(2, 1, 1, 2, 8), torch.randn(2, 40, 1, 8), torch.randn(2, 40, 1, 8)
    x, w, lengths = torch.randn(2, 48).half(), torch.randn(20, 48).half().mT, torch.tensor([37, 5])
    counts = torch.zeros(4, dtype=torch.int32)

    def calls() -> list[Tensor]:
        attend = [decode_attention.decode_attention(q * i, k, v, lengths, counts, splits=3, block=16)
                  for i in (1, 2)]
        return [*attend, matmul_rows.matmul_rows(x, w, matmul_rows.Tile(16, 16, 4, 1, splits=3), counts)]

    def meant(kind: Callable[[Tensor], Tensor]) -> list[Tensor]:
        attend = [decode_attention.decode_attention_reference(*map(kind, (q * i, k, v)), lengths)
                  for i in (1, 2)]
        return [*attend, matmul_rows.matmul_rows_reference(kind(x), kind(w))]
    (got,) = Simulation(seed).run([calls])
    return bool((counts == 0).all()) and all(map(near, got, meant(lambda x: x), meant(Tensor.double)))


def trial_of_the_cache(seed: int) -> bool:
    """Whether three steps of decoding one after another, of one token and of two, are as near to float64 as
    torch. What is not in the cache yet is NaN there: who reads it too early shows."""
    torch.manual_seed(seed)
    start, angles, counts = torch.tensor([35, 3]), torch.zeros(2, 2, 8), torch.zeros(2, dtype=torch.int32)
    angles[..., :4] = 1
    keys, values = (torch.randn(2, 40, 1, 8).masked_fill_(
        (torch.arange(40) >= start[:, None])[..., None, None], float("nan")) for _ in range(2))
    steps = [(torch.randn(2, n, 1, 2, 8), torch.randn(2, n, 1, 8), torch.randn(2, n, 1, 8),
              angles[:, :n].contiguous()) for n in (1, 2, 1)]

    def calls() -> list[Tensor]:
        cache = keys.clone(), values.clone()
        return [cached_attention.cached_attention(*step, *cache, start + i, counts, splits=3, block=16)
                for i, step in zip((0, 1, 3), steps)]

    def meant(kind: Callable[[Tensor], Tensor]) -> list[Tensor]:
        cache, out = (kind(keys), kind(values)), []
        for i, step in zip((0, 1, 3), steps):
            one, *cache = cached_attention.cached_attention_reference(*map(kind, step), *cache, start + i)
            out.append(one)
        return out
    (got,) = Simulation(seed).run([calls])
    return bool((counts == 0).all()) and all(map(near, got, meant(lambda x: x), meant(Tensor.double)))


def patched(patch: pytest.MonkeyPatch, last: Any) -> None:
    for module in (attending, matmul_rows):
        patch.setattr(module, "last_to_leave", last)


@triton.jit
def _counts_without_a_barrier(count_ptr, splits):
    last = tl.atomic_add(count_ptr, 1, sem="acq_rel", scope="gpu") == splits - 1
    tl.debug_barrier()
    if last:
        tl.store(count_ptr, 0)
    return last


@triton.jit
def _counts_without_release(count_ptr, splits):
    tl.debug_barrier()
    last = tl.atomic_add(count_ptr, 1, sem="relaxed", scope="gpu") == splits - 1
    tl.debug_barrier()
    if last:
        tl.store(count_ptr, 0)
    return last


@triton.jit
def _leaves_the_count(count_ptr, splits):
    tl.debug_barrier()
    last = tl.atomic_add(count_ptr, 1, sem="acq_rel", scope="gpu") == splits - 1
    tl.debug_barrier()
    return last


@triton.jit
def _first_to_leave(count_ptr, splits):
    tl.debug_barrier()
    count = tl.atomic_add(count_ptr, 1, sem="acq_rel", scope="gpu")
    tl.debug_barrier()
    if count == splits - 1:
        tl.store(count_ptr, 0)
    return count == 0


trials = pytest.mark.parametrize("trial", (trial, trial_of_the_cache))


@trials
def test_no_seed_goes_wrong(trial: Callable[[int], bool]) -> None:
    assert all(trial(seed) for seed in SEEDS)


@trials
@pytest.mark.parametrize("last", (_counts_without_a_barrier, _counts_without_release, _leaves_the_count,
                                  _first_to_leave), ids=lambda last: last.__name__)
def test_negative_control(last: Callable[..., Any], trial: Callable[[int], bool],
                          monkeypatch: pytest.MonkeyPatch) -> None:
    patched(monkeypatch, last)
    assert not all(trial(seed) for seed in SEEDS), "passes: the simulator does not see what is missing"
