"""How kernels of few rows are launched: tiles and splits that fit,
and the library's where there is no kernel."""
from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shardlib.distributed.graph_capture import chained
from shardlib.ops import few_rows
from shardlib.ops.few_rows import (
    COUNTS,
    FEW,
    SHARED,
    STREAMS,
    attend_cached,
    attend_lengths,
    attends_cached,
    attends_lengths,
    counts_of,
    rows_matmul,
    splits_of,
    starts_early,
    tile_of,
)
from shardlib.triton_kernels import matmul_rows
from shardlib.triton_kernels.limits import MOST_QUERIES, MOST_SPLITS, Tile


@given(st.integers(1, FEW), st.integers(1, 32768), st.integers(1, 65536), st.booleans())
def test_tiles_fit(rows: int, lines: int, columns: int, gated: bool) -> None:
    """A gate beside its value in one tile; in shared memory what is under way; a count for each tile that is
    split, of lines that all splits have."""
    tile = tile_of(rows, lines, columns, gated)
    assert tile.columns > gated and all(n & (n - 1) == 0 for n in (tile.columns, tile.lines, tile.warps))
    if rows > 1:
        assert tile.stages * tile.lines * (tile.columns + max(8, rows)) * 2 <= SHARED
        assert tile.splits == 1 or -(-columns // tile.columns) <= COUNTS and lines >= tile.splits * tile.lines
    elif tile.blocks:
        assert lines <= tile.lines < 2 * lines and tile.columns * tile.lines <= 64 * 32 * tile.warps
        assert tile.blocks * (tile.stages - 1) * tile.columns * tile.lines * 2 <= SHARED
        assert tile.blocks * tile.warps <= 64
    else:
        assert tile.splits == 1 and tile.columns * tile.lines <= 32 * 32 * tile.warps


@given(st.integers(0, 4096), st.integers(0, 1 << 20))
def test_splits_are_powers_of_two_of_256_keys_at_least(heads: int, keys: int) -> None:
    splits = splits_of(heads, keys)
    assert splits & (splits - 1) == 0 and 1 <= splits <= MOST_SPLITS
    assert splits == 1 or heads * splits <= 128 and keys >= 256 * splits


def test_a_rank_without_rows_attends_to_nothing() -> None:
    """Its calls stay, and its counts are there."""
    q, k, v, angles, keys, values, start = (x[:0] for x in step_of())
    counts = torch.zeros(COUNTS, dtype=torch.int32)
    assert attend_cached(q, k, v, angles, keys, values, start, counts).shape == (0, 1, 3, 4, 128)
    assert attend_lengths(q, keys, values, start, counts).shape == (0, 1, 3, 4, 128)


@pytest.mark.parametrize("rows, dtype, by_columns, kernel", [
    (1, torch.bfloat16, True, "matmul_rows"), (32, torch.float16, True, "matmul_rows"),
    (33, torch.bfloat16, True, None), (0, torch.bfloat16, True, None), (1, torch.float32, True, None),
    (1, torch.bfloat16, False, None)])
def test_few_rows_of_16_bits_by_columns_have_kernels(rows: int, dtype: torch.dtype, by_columns: bool,
                                                     kernel: str | None,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """And what has none gives the same by the library."""
    seen: list[str] = []

    def record(name: str) -> Any:
        def launch(x: Tensor, w: Tensor, tile: Tile, counts: Tensor, early: bool) -> Tensor:
            seen.append(name)
            return x @ w if name == "matmul_rows" else matmul_rows.gated_matmul_rows_reference(x, w)
        return launch
    for name in ("matmul_rows", "gated_matmul_rows"):
        monkeypatch.setattr(matmul_rows, name, record(name))
    x, w, counts = (torch.randn(rows, 8).to(dtype), torch.randn(6, 8).to(dtype).mT,
                    torch.zeros(1, dtype=torch.int32))
    w = w if by_columns else w.contiguous()
    assert torch.equal(rows_matmul(x, w, counts), x @ w)
    assert torch.equal(rows_matmul(x, w, counts, gated=True),
                       torch.nn.functional.silu((x @ w)[:, :3]) * (x @ w)[:, 3:])
    assert seen == ([] if kernel is None else [kernel, f"gated_{kernel}"])


def test_without_counts_no_tile_is_split(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(matmul_rows, "matmul_rows",
                        lambda x, w, tile, counts, early: seen.append(tile.splits))
    x, w = torch.zeros(8, 2048, dtype=torch.bfloat16), torch.zeros(2048, 16, dtype=torch.bfloat16)
    for counts in (torch.zeros(1, dtype=torch.int32), None):
        rows_matmul(x, w.mT.contiguous().mT, counts)
    assert seen == [4, 1]


def test_few_rows_start_early_in_a_chain_on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, old = torch.device("cuda", 6), torch.device("cuda", 7)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9 if device == gpu else 8, 0))
    assert not starts_early(gpu, 1)
    with chained():
        assert [starts_early(gpu, rows) for rows in (1, FEW, FEW + 1)] == [True, True, False]
        assert not starts_early(old, 1) and not starts_early(torch.device("cpu"), 1)
    assert not starts_early(gpu, 1)


@pytest.mark.parametrize("kernel", ("decode_attention", "cached_attention"))
def test_attention_is_split_by_its_caches(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not without counts."""
    seen: list[int] = []
    at = 5 if kernel == "decode_attention" else 8
    monkeypatch.setattr(f"shardlib.triton_kernels.{kernel}.{kernel}",
                        lambda *given, **how: seen.append(given[at]))

    def attend(rows: int, keys: int, counts: Tensor | None) -> None:
        q, k, angles, cache, lengths = (torch.empty(rows, *shape, device="meta") for shape in (
            (1, 2, 4, 128), (1, 2, 128), (1, 128), (keys, 2, 128), ()))
        if kernel == "decode_attention":
            attend_lengths(q, cache, cache, lengths, counts)
        else:
            attend_cached(q, k, k, angles, cache, cache, lengths, counts)
    for counts in (torch.empty(0, device="meta"), None):
        for rows, keys in ((1, 256), (1, 4096), (8, 4096), (1, 32768), (128, 256)):
            attend(rows, keys, counts)
    assert seen == [1, 16, 8, 64, 1] + [1] * 5


def attention_of(t: int = 1, g: int = 4, h: int = 128, dtype: torch.dtype = torch.bfloat16,
                 v: Any = None) -> tuple[Tensor, Tensor, Tensor]:
    q, k = torch.zeros(2, t, 3, g, h, dtype=dtype), torch.zeros(2, 9, 3, h, dtype=dtype)
    return q, k, torch.zeros_like(k) if v is None else v(k)


@pytest.mark.parametrize("taken, operands", [
    (True, attention_of()), (True, attention_of(t=MOST_QUERIES, g=1)), (True, attention_of(h=256)),
    (True, attention_of(dtype=torch.float32)), (True, attention_of(h=5, dtype=torch.float16)),
    (False, attention_of(t=MOST_QUERIES // 4 + 1)), (False, attention_of(h=257)), (False, attention_of(h=0)),
    (False, attention_of(h=129, dtype=torch.float32)), (False, attention_of(h=8, dtype=torch.float64)),
    (False, attention_of(v=lambda k: k[..., :64])), (False, attention_of(v=lambda k: k.float())),
    (False, attention_of(v=lambda k: k.transpose(1, 2).contiguous().transpose(1, 2))),
    (False, attention_of(v=lambda k: k.clone().requires_grad_()))])
def test_what_is_attended_by_lengths(taken: bool, operands: tuple[Tensor, Tensor, Tensor],
                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU that has room: nothing on the CPU."""
    assert not attends_lengths(*operands)
    monkeypatch.setattr(few_rows, "has_room", lambda device: True)
    assert attends_lengths(*operands) == taken
    if operands[2].requires_grad:
        with torch.no_grad():
            assert attends_lengths(*operands)


def step_of(t: int = 1, g: int = 4, h: int = 128, dtype: torch.dtype = torch.bfloat16,
            **changed: Any) -> list[Tensor]:
    """What a step of decoding is of, q, k and v parts of one projection; by name, what is changed of it."""
    q, k, v = torch.zeros(2, t, 3 * (g + 2) * h, dtype=dtype).split([3 * g * h, 3 * h, 3 * h], -1)
    of = dict(q=q.unflatten(-1, (3, g, h)), k=k.unflatten(-1, (3, h)), v=v.unflatten(-1, (3, h)),
              angles=torch.zeros(2, t, h), keys=torch.zeros(2, 9, 3, h, dtype=dtype),
              values=torch.zeros(2, 9, 3, h, dtype=dtype), start=torch.zeros(2, dtype=torch.int64))
    return [changed.get(name, lambda x: x)(x) for name, x in of.items()]


def turned_over(x: Tensor) -> Tensor:
    """The same numbers, of other strides."""
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


@pytest.mark.parametrize("taken, operands", [
    (True, step_of()), (True, step_of(t=MOST_QUERIES, g=1)), (True, step_of(h=256)),
    (True, step_of(t=3, dtype=torch.float32)), (True, step_of(h=6, dtype=torch.float16)),
    (True, step_of(start=Tensor.int)),
    (True, step_of(keys=lambda x: torch.zeros(2, 12, 3, 128, dtype=x.dtype)[:, :9],
                   values=lambda x: torch.zeros(2, 12, 3, 128, dtype=x.dtype)[:, 3:])),
    (False, step_of(t=MOST_QUERIES // 4 + 1)), (False, step_of(h=258)), (False, step_of(t=2, h=130)),
    (False, step_of(h=5)), (False, step_of(h=130, dtype=torch.float32)),
    (False, step_of(h=8, dtype=torch.float64)), *(
        (False, step_of(**{name: turned_over})) for name in ("q", "k", "v", "keys", "values")), *(
        (False, step_of(**{name: Tensor.half})) for name in ("q", "k", "v", "angles", "keys", "values")), *(
        (False, step_of(**{name: lambda x: x.narrow(0, 0, 1)})) for name in ("k", "v", "angles", "values",
                                                                             "start")),
    (False, step_of(keys=lambda x: x[:1], values=lambda x: x[:1])),
    (False, step_of(values=lambda x: x[:, :8])), (False, step_of(t=2, angles=turned_over)),
    (False, step_of(start=lambda x: x[:1].expand(2))), *(
        (False, step_of(**{name: lambda x: x.clone().requires_grad_()})) for name in ("q", "keys"))])
def test_which_steps_of_decoding_are_taken(taken: bool, operands: list[Tensor],
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU that has room: nothing on the CPU."""
    assert not attends_cached(*operands)
    monkeypatch.setattr(few_rows, "has_room", lambda device: True)
    assert attends_cached(*operands) == taken
    if any(x.requires_grad for x in operands):
        with torch.no_grad():
            assert attends_cached(*operands)


@pytest.mark.parametrize("bytes_of_a_block, enough", [(SHARED, True), (SHARED - 1, False), (None, False)])
def test_a_gpu_has_room_that_has_an_h100s(bytes_of_a_block: int | None, enough: bool,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    of = SimpleNamespace(**{} if bytes_of_a_block is None
                         else {"shared_memory_per_block_optin": bytes_of_a_block})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: of)
    few_rows.has_room.cache_clear()
    assert few_rows.has_room(torch.device("cuda", 0)) == enough
    few_rows.has_room.cache_clear()


def test_queries_may_lie_anywhere() -> None:
    """The kernel wants them one after another."""
    r = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 3, 2, 1, 8, generator=r), torch.randn(2, 9, 2, 8, generator=r)
    strided, lengths = q.transpose(1, 2).contiguous().transpose(1, 2), torch.tensor([2, 7])
    assert torch.equal(attend_lengths(strided, k, k, lengths, None), attend_lengths(q, k, k, lengths, None))


class Streams:
    """What `counts_of` asks of CUDA: the current stream, by number, and whether it captures."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.capturing, self.log = 0, False, []
        zeros = torch.zeros
        monkeypatch.setattr(few_rows, "_COUNTS", {})
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(
            cuda_stream=self.now, synchronize=lambda: self.log.append(f"wait for {self.now}")))
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(torch, "zeros", lambda shape, dtype, device: (
            self.log.append(f"zeros {shape} on {device}"), zeros(shape, dtype=dtype))[1])


def test_a_stream_has_its_own_counts_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of all streams are made at once, and are zeros when another one comes."""
    cuda, device, made = Streams(monkeypatch), torch.device("cuda", 1), {}
    for cuda.now in (7, 3, 7, *range(100, 100 + STREAMS), 3):
        counts = counts_of(device)
        assert counts is None or counts.dtype == torch.int32 and counts.shape == (COUNTS,)
        at = None if counts is None else counts.data_ptr()
        assert made.setdefault(cuda.now, at) == at
        cuda.capturing = True                           # later ones are rows of what there is
    assert [*made.values()].count(None) == 2 and len({*made.values()}) == STREAMS + 1
    assert made[100 + STREAMS - 1] is made[100 + STREAMS - 2] is None
    assert cuda.log == [f"zeros {(STREAMS, COUNTS)} on cuda:1", "wait for 7"]


def test_a_capture_makes_no_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would lie in the graph's memory, and be zeros in its replays alone. Each device has its own."""
    cuda, one, other = Streams(monkeypatch), torch.device("cuda", 0), torch.device("cuda", 1)
    cuda.capturing = True
    assert counts_of(one) is None and cuda.log == []
    cuda.capturing = False
    assert counts_of(one) is not None
    cuda.capturing = True
    assert counts_of(one) is not None and counts_of(other) is None
